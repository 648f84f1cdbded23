"""Kernels for every shape, rank and GPU from sm_80 on, shipped as binaries: plans and SGMV."""

from dop.ops.generic.kernels import expand_kernel, kernel, shrink_kernel

__all__ = ["expand_kernel", "kernel", "shrink_kernel"]
