"""Kernels for every shape, rank and GPU from sm_80 on, shipped as binaries: plans and SGMV."""
