"""vLLM's look at a step's adapters, without copying its list of them for every one.

Before each step vLLM makes sure that every adapter of the step is loaded and in a slot, and marks
it as used. For each it copies the list of all loaded adapters, entry by entry in Python: with 64
adapters in a step that is 2.5 ms of the host, more than all of a small model's step takes on the
GPU (docs/performance.md 44). Adapters that are where they should be only need the mark.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

_CACHES = ("_registered_adapters", "_active_adapters")
"""A manager's adapters in the host's memory, and in slots; both in the order of their last use."""
_WORKER = ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager")

Apply = Callable[[Any, "set[Any]"], None]


def install() -> bool:
    """Patch vLLM's worker once; whether it has what is patched."""
    try:
        kind = getattr(importlib.import_module(_WORKER[0]), _WORKER[1])
        stock = kind._apply_adapters
    except (ImportError, AttributeError):
        return False
    if not hasattr(stock, "stock"):
        kind._apply_adapters = _applied(stock)
    return True


def _applied(stock: Apply) -> Apply:
    """`_apply_adapters`: vLLM's own only if an adapter has to be loaded or moved into a slot."""

    def _apply_adapters(worker: Any, requests: set[Any]) -> None:
        if not mark_used(worker._adapter_manager, requests):
            stock(worker, requests)

    _apply_adapters.stock = stock  # type: ignore[attr-defined]
    return _apply_adapters


def mark_used(manager: Any, requests: Iterable[Any]) -> bool:
    """Mark the requests' adapters as the ones used last, if each is loaded and in a slot; else
    change nothing.

    Args:
        manager: an LRUCacheLoRAModelManager.
        requests: vLLM's LoRARequest, or None for no adapter.

    Returns:
        Whether they were. False as well where vLLM keeps its adapters in another way.
    """
    caches: list[Any] = [getattr(manager, name, None) for name in _CACHES]
    if not all(hasattr(cache, "touch") for cache in caches):
        return False
    known: list[int] = []
    for request in requests:
        if request is None:
            continue
        adapter = request.lora_int_id
        if getattr(request, "load_inplace", True) or any(adapter not in each for each in caches):
            return False
        known.append(adapter)
    for adapter in known:
        for cache in caches:
            cache.touch(adapter)
    return True
