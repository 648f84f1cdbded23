"""Tensors of the last workloads, wherever they live: made once, dropped when memory runs out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from dop.measure.inputs import mixed_facts, stack_slots, windows
from dop.measure.plan import SlotFacts
from dop.scenario import Scenario
from dop.workload import Workload

TensorT = TypeVar("TensorT")
BatchT = TypeVar("BatchT")
WeightsT = TypeVar("WeightsT", bound="Weights")  # type: ignore[type-arg]


@dataclass
class Weights(ABC, Generic[TensorT, BatchT]):
    """Stacks of one workload, one per slice, and the batches made for it.

    Attributes:
        a: [slots, rank, in] each.
        b: [slots, out of the slice, rank] each.
        slots: adapters in a stack.
        batches: by scenario, number of windows, and whether they are timed.
    """

    a: list[TensorT]
    b: list[TensorT]
    slots: int
    batches: dict[tuple[Scenario, int, bool], BatchT] = field(default_factory=dict)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held, the batches' included."""


class TensorCache(ABC, Generic[WeightsT, BatchT]):
    """Weights of the last workloads, within a memory budget.

    Args:
        cache_bytes: last-level cache of the device, which the weights of a timing must exceed.
        window_limit: windows of a batch at most.
        budget_bytes: memory that the workloads may hold together; the last one may exceed it.
    """

    def __init__(self, cache_bytes: int, window_limit: int, budget_bytes: int) -> None:
        self._cache_bytes, self._window_limit = cache_bytes, window_limit
        self._budget = budget_bytes
        self._held: OrderedDict[str, WeightsT] = OrderedDict()

    @abstractmethod
    def make_weights(self, workload: Workload, slots: int) -> WeightsT:
        """New stacks."""

    @abstractmethod
    def make_batch(
        self,
        workload: Workload,
        weights: WeightsT,
        scenario: Scenario,
        count: int,
        facts: SlotFacts | None,
    ) -> BatchT:
        """Tensors of a scenario with `count` windows."""

    def weights(self, workload: Workload, scenarios: Sequence[Scenario], least: int) -> WeightsT:
        """Stacks with slots for every scenario and at least `least` of them."""
        needed = stack_slots(workload, scenarios, self._cache_bytes, self._window_limit)
        slots = max(least, needed)
        held = self._held.get(workload.key)
        if held is None or held.slots < slots:
            held = None  # the smaller stacks go before the larger ones are made
            self._held.pop(workload.key, None)
            held = self._held[workload.key] = self.make_weights(workload, slots)
        self._held.move_to_end(workload.key)
        while len(self._held) > 1 and sum(w.nbytes for w in self._held.values()) > self._budget:
            self._held.popitem(last=False)
        return held

    def batch(self, workload: Workload, scenario: Scenario, *, timed: bool) -> BatchT:
        """Tensors of a scenario; one window, with mixed ranks and scales, if it is only checked."""
        weights = self._held[workload.key]
        facts = None if timed else mixed_facts(workload, weights.slots)
        count = 1
        if timed:
            count = windows(workload, scenario, self._cache_bytes, self._window_limit)
        key = (scenario, count, timed)
        if key not in weights.batches:
            weights.batches[key] = self.make_batch(workload, weights, scenario, count, facts)
        found: BatchT = weights.batches[key]
        return found
