"""PEFT's adapter names as slots of stacks and a segment plan: once per step, for all layers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dop.integrations.stacks import stack_rank

BASE = "__base__"
"""PEFT's name for a row without an adapter."""


@dataclass(frozen=True)
class Batch:
    """What the rows of one batch ask for; made once per list of names, shared by all layers.

    Attributes:
        names: adapter of each row, as PEFT passes it.
        slots: distinct adapter -> its slot in every layer's stacks.
        row_slots: slot of each row, -1 for none.
        scales: scale of each slot.
        ranks: rank of each slot.
        capacity, rank: shape of the stacks that the slots belong to.
    """

    names: list[str]
    slots: dict[str, int]
    row_slots: list[int]
    scales: list[float]
    ranks: list[int]
    capacity: int
    rank: int
    plans: dict[tuple[torch.device, int], Any] = field(default_factory=dict)

    def plan(self, device: torch.device, tokens_per_row: int) -> Any:
        """The segment plan of the batch, made at the first layer that asks."""
        key = (device, tokens_per_row)
        found = self.plans.get(key)
        if found is None:
            if len(self.plans) >= 8:  # a prompt's length and 1, on a few devices
                self.plans.clear()
            found = self.plans[key] = self._make(device, tokens_per_row)
        return found

    def _make(self, device: torch.device, tokens_per_row: int) -> Any:
        from dop import ops

        rows = torch.tensor(self.row_slots, dtype=torch.int32, device=device)
        if tokens_per_row != 1:
            rows = rows.repeat_interleave(tokens_per_row)
        return ops.segment_plan(
            rows,
            slots=self.capacity,
            ranks=torch.tensor(self.ranks, dtype=torch.int32, device=device),
            scale=torch.tensor(self.scales, dtype=torch.float32, device=device),
            adapters=len(self.slots),
        )


class Slots:
    """Names to slots, for all layers of a model: least recently used goes first."""

    def __init__(self, layers: Sequence[nn.Module], max_slots: int) -> None:
        self._layers: weakref.WeakSet[Any] = weakref.WeakSet(layers)
        self._max_slots = max_slots
        self._slot: dict[str, int] = {}  # in order of use, oldest first
        self._capacity = 0
        self._rank = 0
        self._last: Batch | None = None
        self.told: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Slots:
        return self  # a copied model is accelerated anew; its layers may share this one

    def forget(self) -> None:
        """Drop what is known about the last batch: an adapter came, went or changed."""
        self._last = None

    def batch(self, names: list[str]) -> Batch:
        """The batch of these names; the same object as long as the names stay the same."""
        last = self._last
        if last is None or last.names != names:
            last = self._last = self._make(names)
        return last

    def _make(self, names: list[str]) -> Batch:
        distinct = [n for n in dict.fromkeys(names) if n != BASE]
        ranks = {n: self._rank_of(n) for n in distinct}
        known = len(self._slot.keys() | ranks.keys())
        self._grow(len(distinct), known, max(ranks.values(), default=1))
        for name in distinct:
            self._touch(name, set(distinct))
        slots = {n: self._slot[n] for n in distinct}
        slot_ranks, scales = [1] * self._capacity, [1.0] * self._capacity
        for name, slot in slots.items():
            slot_ranks[slot], scales[slot] = max(1, ranks[name]), self._scale_of(name)
        row_slots = [slots.get(n, -1) for n in names]
        return Batch(list(names), slots, row_slots, scales, slot_ranks, self._capacity, self._rank)

    def _grow(self, adapters: int, known: int, rank: int) -> None:
        """Room for a batch's adapters, and for all that are known up to `max_slots`."""
        wanted = max(adapters, min(known, self._max_slots))
        capacity = max(self._capacity, 1 << max(0, wanted - 1).bit_length())
        rank = max(self._rank, stack_rank(rank))
        if (capacity, rank) != (self._capacity, self._rank):
            self._capacity, self._rank = capacity, rank

    def _touch(self, name: str, needed: set[str]) -> None:
        slot = self._slot.pop(name, None)
        if slot is None:
            used = set(self._slot.values())
            free = next((s for s in range(self._capacity) if s not in used), None)
            if free is None:
                oldest = next(n for n in self._slot if n not in needed)
                free = self._slot.pop(oldest)
            slot = free
        self._slot[name] = slot

    def _rank_of(self, name: str) -> int:
        return max((layer.r.get(name, 0) for layer in self._layers), default=0)

    def _scale_of(self, name: str) -> float:
        for layer in self._layers:
            scale = float(layer.scaling.get(name, 0.0))
            if scale:
                return scale
        return 1.0
