"""The one place that asks for a GPU: without one, every test in this folder is skipped."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@functools.cache
def why_not() -> str:
    """Why tests cannot run on a GPU here, or ""."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return ""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timed: judges times, so it wants the GPU for itself")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if HERE not in item.path.parents:
            continue
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif "PYTEST_XDIST_WORKER" in os.environ and item.get_closest_marker("timed"):
            item.add_marker(pytest.mark.skip(reason="judges times: run it alone, -m timed"))


@pytest.fixture(scope="session")
def gpu_target():
    """Target of the current GPU."""
    import torch

    from dop.target import Target

    p = torch.cuda.get_device_properties(0)
    suffix = "a" if p.major >= 9 else ""
    return Target(
        "cuda",
        f"sm_{p.major}{p.minor}{suffix}",
        p.name,
        p.multi_processor_count,
        1024,
        p.shared_memory_per_block_optin,
        65536,
        p.L2_cache_size,
        16,
    )
