"""Segment plans of a serving engine's step: made once per step, read by every layer.

An engine knows on the host which slot each token of a step uses, and pads the tokens of a CUDA
graph to a captured size that it chooses later. `StepPlans` therefore keeps a token -> slot map of
a fixed capacity whose tail says "no adapter", and plans built from the whole map: the first T
entries of their tables are right for every T that is at least the number of real tokens, so one
set of addresses serves every captured size, and padded rows are never touched.

The memory is allocated once. A refill copies the map and launches the plan kernel; nothing is read
back from the device.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dop.ops.plan import Layout, SegmentPlan

NO_ADAPTER = -1

SMALL_TOKENS = 512
"""Tokens of the small plan: what engines capture as CUDA graphs by default."""


@dataclass(slots=True)
class _Level:
    """A plan of one capacity and its state."""

    capacity: int
    slots: torch.Tensor
    plan: Any = None
    fresh: bool = False
    captured: bool = False


class StepPlans:
    """The plans of one engine's model: a small one for decode, one for the largest step.

    Args:
        capacity: most tokens of a step.
        slots: number of adapter slots in the weight stacks.
        rank: rank of the stacks; ranks of slots start there.
        device: where the stacks are.
        small: capacity of the small plan.
        hint_small: say the number of adapters also for launches that fit the small plan. Where
            one CUDA graph per size serves every mix, the mix it is captured with says nothing.
        few: most adapters of a step that the graph for steps of few adapters serves, by the
            graph's tokens; 0 where one graph serves all steps. Which of a size's two graphs is
            captured, the step's adapters tell.
    """

    def __init__(
        self,
        capacity: int,
        slots: int,
        rank: int,
        device: torch.device | str,
        small: int = SMALL_TOKENS,
        hint_small: bool = False,
        few: Callable[[int], int] | None = None,
    ) -> None:
        self.slots = slots
        self.rank = rank
        self.device = torch.device(device)
        self.tokens = 0
        self.adapters = 0
        self._unhinted = 0 if hint_small else small
        self._few = few
        self.rank_list = [rank] * slots
        self._ranks_changed = False
        self._views: dict[int, SegmentPlan] = {}
        self._pinned = self.device.type == "cuda"
        self._ranks = torch.full((slots,), rank, dtype=torch.int32, device=self.device)
        self._scale: torch.Tensor | float = 1.0
        self._host = torch.full((capacity,), NO_ADAPTER, dtype=torch.int32)
        sizes = [small, capacity] if 0 < small < capacity else [capacity]
        self._levels = [_Level(size, self._empty_map(size)) for size in sizes]

    def _empty_map(self, size: int) -> torch.Tensor:
        return torch.full((size,), NO_ADAPTER, dtype=torch.int32, device=self.device)

    @property
    def capacity(self) -> int:
        """Most tokens of a step."""
        return self._levels[-1].capacity

    def set_rank(self, slot: int, rank: int, *, again: bool = False) -> None:
        """Note the true rank of the adapter in a slot; it counts from the next `update`.

        `again`: write the ranks even if none has changed. An engine that slept may have lost
        the table's memory; adapters are loaded afterwards.
        """
        known = min(max(rank, 1), self.rank)
        if again or self.rank_list[slot] != known:
            self.rank_list[slot] = known
            self._ranks_changed = True

    def use_scales(self, scales: torch.Tensor) -> None:
        """Scale of every slot, float32 [slots] at a fixed address, read at every refill."""
        self._scale = scales

    def update(self, slots: torch.Tensor, adapters: int | None = None) -> None:
        """Take in a step: `slots` is int32 [tokens] on the host, -1 for no adapter.

        `adapters` is the number of distinct adapters, if the caller knows it. More tokens than
        the capacity enlarge it.
        """
        tokens = slots.numel()
        self._grow(tokens)
        self.tokens = tokens
        self.adapters = _distinct(slots) if adapters is None else adapters
        self._host[:tokens] = slots
        self._host[tokens:] = NO_ADAPTER
        if self._ranks_changed:
            self._copy(self._ranks, torch.tensor(self.rank_list, dtype=torch.int32))
            self._ranks_changed = False
        self._views.clear()
        filled = False
        for level in self._levels:
            level.fresh = False
            if level.capacity >= tokens and (level.captured or not filled):
                self._refill(level)
                filled = True

    def plan(self, tokens: int) -> SegmentPlan:
        """The plan for a launch over `tokens` rows (padded rows included).

        Raises:
            ValueError: fewer rows than the step has tokens.
        """
        view = self._views.get(tokens)
        if view is None or capturing(self.device):
            view = self._views[tokens] = self._view(tokens)
        return view

    def _view(self, tokens: int) -> SegmentPlan:
        if tokens < self.tokens:
            raise ValueError(f"{tokens} rows for a step of {self.tokens} tokens")
        self._grow(tokens)
        level = next(each for each in self._levels if each.capacity >= tokens)
        if not level.fresh:
            self._refill(level)
        level.captured = level.captured or capturing(self.device)
        return narrow(level.plan, tokens, self._hint(tokens))

    def _grow(self, tokens: int) -> None:
        """Add a level if no other holds so many tokens; what graphs have captured stays."""
        if tokens > self.capacity:
            size = 1 << (tokens - 1).bit_length()
            grown = torch.full((size,), NO_ADAPTER, dtype=torch.int32)
            grown[: self._host.numel()] = self._host
            self._host = grown
            self._levels.append(_Level(size, self._empty_map(size)))

    def _hint(self, tokens: int) -> int | None:
        """Number of adapters for choosing a kernel, rounded so that few choices are made."""
        if self.adapters == 0:
            return None
        if tokens > self._unhinted:
            return min(tokens, 1 << (self.adapters - 1).bit_length())
        few = self._few(tokens) if self._few is not None else 0
        if not few:
            return None
        return few if self.adapters <= few else min(tokens, self.slots)

    def _refill(self, level: _Level) -> None:
        from dop.ops import segment_plan

        if capturing(self.device):
            # A copy from the host would be repeated by every replay, from memory that is gone.
            filled = next(each for each in self._levels if each.fresh)
            shared = min(filled.capacity, level.capacity)
            level.slots.fill_(NO_ADAPTER)
            level.slots[:shared].copy_(filled.slots[:shared])
        else:
            self._copy(level.slots, self._host[: level.capacity])
        level.plan = segment_plan(
            level.slots,
            slots=self.slots,
            ranks=self._ranks,
            scale=self._scale,
            out=level.plan,
        )
        level.fresh = True

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Host to device without waiting; pinned memory is fresh each time, as torch keeps it
        until the copy has run."""
        target.copy_(source.pin_memory() if self._pinned else source, non_blocking=True)


def narrow(plan: SegmentPlan, tokens: int, adapters: int | None = None) -> SegmentPlan:
    """A plan's tables as those of its first `tokens` tokens; later ones must have no adapter.

    Every table begins with what a plan of fewer tokens holds: tokens in order, rows that have an
    adapter first, tiles in use first. `adapters` is a hint for choosing a kernel.
    """
    view = _narrow_class()(plan.buffer, tokens, plan.slots, adapters, plan.has_ranks, plan.in_graph)
    view.settled = plan.settled
    view.whole = plan.tokens
    view.version = plan.version
    narrowed: SegmentPlan = view
    return narrowed


@lru_cache(maxsize=1)
def _narrow_class() -> Any:
    from dop.ops.plan import SegmentPlan

    class NarrowPlan(SegmentPlan):
        """A plan of fewer tokens in the buffer of one for `whole` tokens."""

        whole: int

        @property
        def layout(self) -> Layout:
            return _narrow_layout(self.whole, self.tokens, self.slots)

    return NarrowPlan


@lru_cache(maxsize=4096)
def _narrow_layout(whole: int, tokens: int, slots: int) -> Layout:
    from dop.ops.plan import Layout, layout

    long, short = layout(whole, slots), layout(tokens, slots)
    places = {name: (long.places[name][0], n) for name, (_, n) in short.places.items()}
    return Layout(tokens, slots, places, long.size)


def _distinct(slots: torch.Tensor) -> int:
    found = torch.unique(slots)
    return int((found >= 0).sum())


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def slots_of(ids: Sequence[int], slot_of: Mapping[int, int]) -> torch.Tensor:
    """int32 slot of every token from its adapter id (0: none).

    torch sees the result only: some of its operators start threads, which costs milliseconds where
    the cores are busy. The first array turns numpy's numbers into Python's at once.

    Raises:
        KeyError: an id has no slot.
    """
    known = {0: NO_ADAPTER, **slot_of}
    slots = array("i", map(known.__getitem__, array("q", ids)))
    return (
        torch.frombuffer(slots, dtype=torch.int32) if slots else torch.empty(0, dtype=torch.int32)
    )
