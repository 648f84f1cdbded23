"""vLLM plugin (entry point of the group `vllm.general_plugins`): LoRA linears through dop.ops.

vLLM calls `register` in each of its processes, perhaps more than once. All it does is to name
another wrapper class; everything that imports vLLM's layers happens when the LoRA manager asks for
that class, in the worker. See docs/vllm.md.
"""

from __future__ import annotations

import logging
import os
from typing import Any

WRAPPER = "dop.integrations.vllm_wrapper.DopPunicaWrapper"
"""Qualified name of the wrapper that vLLM's selector resolves."""

LOG = logging.getLogger("vllm.dop")
"""Below vLLM's logger, so that its configuration decides what is shown."""

MIN_CAPABILITY = 80
"""Oldest GPU, as major * 10 + minor, that dop has kernels for."""


def allowed(variable: str) -> bool:
    """Whether an environment variable does not say no: it is not 0 (or no, off, false)."""
    return os.environ.get(variable, "1").strip().lower() not in ("0", "no", "off", "false")


def enabled() -> bool:
    """Whether the plugin may do anything (DOP_VLLM)."""
    return allowed("DOP_VLLM")


def register() -> None:
    """Make vLLM use dop for LoRA linears; does nothing if DOP_VLLM=0 or if done before."""
    if not enabled():
        LOG.info("dop: off (DOP_VLLM=0); LoRA runs on vLLM's own kernels.")
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        LOG.info("dop: not a CUDA platform; LoRA runs on vLLM's own kernels.")
        return
    platform = type(current_platform)
    stock = platform.get_punica_wrapper
    if getattr(stock, "is_dop", False):
        return
    platform.get_punica_wrapper = classmethod(_chooser(stock))


def _chooser(stock: Any) -> Any:
    """The replacement of a platform's `get_punica_wrapper`."""

    def get_punica_wrapper(cls: Any) -> str:
        reason = unusable(cls)
        if reason:
            LOG.warning("dop: %s; LoRA runs on vLLM's own kernels.", reason)
            return str(stock())
        return WRAPPER

    get_punica_wrapper.is_dop = True  # type: ignore[attr-defined]
    return get_punica_wrapper


def unusable(platform: Any) -> str | None:
    """Why dop cannot serve LoRA in this process at all, in words, or None."""
    if not enabled():
        return "off (DOP_VLLM=0)"
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        return "VLLM_BATCH_INVARIANT is set, and dop picks its kernel by the batch"
    if not platform.has_device_capability(MIN_CAPABILITY):
        return f"the GPU is older than compute capability {MIN_CAPABILITY / 10}"
    try:
        import dop.ops  # noqa: F401
    except ImportError as error:
        return f"dop.ops cannot be imported ({error})"
    return None
