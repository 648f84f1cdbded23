"""vLLM's CUDA graphs, by whether a step has few adapters or many.

A graph keeps the kernels that it was captured with, and vLLM captures one of a size for any
adapters. The kernel that is best for 64 adapters of a row each takes up to twice as long as the
best for eight adapters or one, and the other way round; one kernel for all of them loses 20 to
35 % to the best of each (docs/performance.md 39). So sizes of more than `ONE_GRAPH_TOKENS` rows
are captured twice: as vLLM does, and for steps that have at most `few_adapters`. vLLM counts a
step's adapters before it chooses a graph; all that is new is the choice. Any graph computes any
step correctly, as ever.

(`specialize_active_lora` does the same with a graph for every power of two, at every size.)

Both of vLLM's runners are patched: `CudagraphDispatcher` and `CudaGraphManager`. Where a version
has neither, graphs stay as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from dop.integrations.vllm import allowed

ONE_GRAPH_TOKENS = 32
"""Most rows of a graph that serves any adapters: there one kernel is 1 to 2 us a layer behind the
best for each."""
TWO_GRAPH_TOKENS = 128
"""Most rows of a graph with a second one beside it."""
SHARED_ROWS = 4
"""Rows of an adapter, on average, from which on a step is one of few adapters."""

_V1 = ("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher")
_V2 = ("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager")
_FEW = "_dop_few"

_SLOTS: set[int] = set()


def few_adapters(tokens: int, slots: int) -> int:
    """Most adapters of a step that a size's second graph serves; 0 if it has none.

    Args:
        tokens: rows of the graph.
        slots: adapters that may be active (`max_loras`).
    """
    few = tokens // SHARED_ROWS
    return few if ONE_GRAPH_TOKENS < tokens <= TWO_GRAPH_TOKENS and few < slots else 0


def captured_few(tokens: int, slots: int) -> int:
    """`few_adapters`, if an engine of this process captures such graphs for so many slots."""
    return few_adapters(tokens, slots) if slots in _SLOTS else 0


def install() -> list[str]:
    """Patch what chooses graphs, once, unless DOP_VLLM_SPLIT=0; returns the names of the classes
    that are patched."""
    if not allowed("DOP_VLLM_SPLIT"):
        return []
    patches = ((_V1, _patch_dispatcher), (_V2, _patch_manager))
    found = []
    for (module, name), patch in patches:
        try:
            kind = getattr(importlib.import_module(module), name)
            if not hasattr(kind, _FEW):
                patch(kind)
                setattr(kind, _FEW, {})
        except (ImportError, AttributeError):
            continue
        found.append(name)
    return found


def _seconds_of(manager: Any, known: Iterable[Any]) -> dict[Any, Any]:
    """The second graph's descriptor for each that has one.

    Args:
        manager: has vLLM's configuration.
        known: descriptors of graphs, frozen dataclasses with `num_tokens` and `num_active_loras`.
    """
    lora = manager.vllm_config.lora_config
    if lora is None or lora.specialize_active_lora:
        return {}
    slots = lora.max_loras
    found = {
        each: replace(each, num_active_loras=few)
        for each in known
        if each.num_active_loras == slots + 1  # what vLLM calls "any"
        and (few := few_adapters(each.num_tokens, slots))
    }
    if found:
        _SLOTS.add(slots)
    return found


def _chosen(manager: Any, descriptor: Any, adapters: int) -> Any:
    """The second graph's descriptor, if a step of so many adapters has one; else the given one."""
    few = getattr(manager, _FEW).get(descriptor)
    return few if few is not None and 0 < adapters <= few.num_active_loras else descriptor


def _patch_dispatcher(kind: Any) -> None:
    """The first runner's: keys by mode."""
    initialize, dispatch = kind.initialize_cudagraph_keys, kind.dispatch

    def initialize_cudagraph_keys(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        found: dict[Any, Any] = {}
        for keys in self.cudagraph_keys.values():
            mine = _seconds_of(self, keys)
            keys.update(mine.values())
            found |= mine
        setattr(self, _FEW, found)

    def dispatch_few(
        self: Any,
        num_tokens: int,
        uniform_decode: bool = False,
        has_lora: bool = False,
        num_active_loras: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        mode, descriptor = dispatch(
            self, num_tokens, uniform_decode, has_lora, num_active_loras, *args, **kwargs
        )
        return mode, _chosen(self, descriptor, num_active_loras)

    kind.initialize_cudagraph_keys = initialize_cudagraph_keys
    kind.dispatch = dispatch_few


def _patch_manager(kind: Any) -> None:
    """The second runner's: lists of what to capture, by mode."""
    initialize, dispatch = kind._init_candidates, kind.dispatch

    def _init_candidates(self: Any) -> None:
        initialize(self)
        found: dict[Any, Any] = {}
        for descriptors in self._capture_descs.values():
            mine = _seconds_of(self, descriptors)
            descriptors.extend(mine.values())
            descriptors.sort(key=lambda each: -each.num_tokens)
            found |= mine
        setattr(self, _FEW, found)

    def dispatch_few(
        self: Any,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        descriptor = dispatch(
            self, num_reqs, num_tokens, uniform_token_count, num_active_loras, *args, **kwargs
        )
        return _chosen(self, descriptor, num_active_loras)

    kind._init_candidates = _init_candidates
    kind.dispatch = dispatch_few
