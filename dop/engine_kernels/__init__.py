"""Tuning the Triton kernels that vLLM and SGLang ship: their block sizes, not Dop's kernels."""
