"""Inputs of the CPU runner: weights, activations, references; cached per workload."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dop.measure import tensor_cache
from dop.measure.accuracy import Errors, Floats, compare, reference
from dop.measure.inputs import window_slots
from dop.measure.plan import Plan, SlotFacts, Table, make_plan
from dop.scenario import Scenario
from dop.target import Target
from dop.workload import Workload

ALIGNMENT = 64
GUARD = 1024
"""Elements before and behind y that no kernel may touch; a multiple of the alignment."""
WINDOW_LIMIT = 512
CACHE_LIMIT_BYTES = 64 << 20
"""Assumed cache at most: on servers with larger ones rotating weights would not fit in memory."""
BUDGET_BYTES = 1 << 30
_NUMPY = {"float32": np.float32, "float16": np.float16}


def aligned(shape: tuple[int, ...], dtype: type) -> NDArray:  # type: ignore[type-arg]
    """Uninitialised array whose data is 64-byte aligned, as the kernels assume."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _normal(shape: tuple[int, ...], dtype: type, scale: float, seed: int) -> Floats:
    """Normal values; one block of 2^18 is laid down again and again, rotated by random amounts:
    20x faster than fresh values, and every slot still has its own weights."""
    rng = np.random.default_rng(seed)
    out = aligned(shape, dtype)
    flat = out.reshape(-1)
    block: Floats = (rng.standard_normal(1 << 18, np.float32) * scale).astype(dtype)
    for start in range(0, flat.size, block.size):
        part = flat[start : start + block.size]
        part[:] = np.roll(block, int(rng.integers(block.size)))[: part.size]
    return out


@dataclass
class Batch:
    """One scenario's tensors.

    Attributes:
        rows: slot of each row, per window.
        x: [tokens, in].
        guarded: y with its guards, [GUARD + tokens * out + GUARD].
        before: y and guards before a call.
        want: y after it [tokens, out], computed in float64, stored as float32.
        facts: ranks and scales of the slots; None for full ranks and scale 1.
    """

    scenario: Scenario
    slots: int
    rows: list[NDArray[np.int32]]
    x: Floats
    guarded: Floats
    before: Floats
    want: Floats
    facts: SlotFacts | None = None
    plans: dict[int, list[Plan]] = field(default_factory=dict)

    @property
    def y(self) -> Floats:
        """[tokens, out], a view between the guards."""
        return self.guarded[GUARD:-GUARD].reshape(self.want.shape)

    def plans_for(self, tile_rows: int) -> list[Plan]:
        """Plan of each window for a tile height."""
        if tile_rows not in self.plans:
            plans = [make_plan(rows, tile_rows, facts=self.facts) for rows in self.rows]
            for plan in plans:
                for name, table in plan.tables.items():
                    plan.tables[name] = _copy_aligned(table)
            self.plans[tile_rows] = plans
        return self.plans[tile_rows]

    def reset(self) -> None:
        """Puts y and its guards back to what they were before any call."""
        self.guarded[...] = self.before

    def errors(self) -> Errors:
        """What a call made of y, against the reference."""
        guards = (slice(None, GUARD), slice(-GUARD, None))
        touched = any(not np.array_equal(self.guarded[g], self.before[g]) for g in guards)
        before = self.before[GUARD:-GUARD].reshape(self.want.shape)
        return compare(self.y, self.want, before, self.rows[0], touched)


def _copy_aligned(table: Table) -> Table:
    out: Table = aligned(table.shape, table.dtype.type)
    out[...] = table
    return out


@dataclass
class Weights(tensor_cache.Weights[Floats, Batch]):
    """Stacks of one workload, and the batches made for it."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        arrays = [*self.a, *self.b]
        for batch in self.batches.values():
            arrays += [batch.x, batch.guarded, batch.before, batch.want]
        return sum(int(array.nbytes) for array in arrays)


class TensorCache(tensor_cache.TensorCache[Weights, Batch]):
    """Weights of the last workloads, within a memory budget."""

    def __init__(self, target: Target, budget_bytes: int = BUDGET_BYTES) -> None:
        super().__init__(min(target.l2_bytes, CACHE_LIMIT_BYTES), WINDOW_LIMIT, budget_bytes)

    def make_weights(self, workload: Workload, slots: int) -> Weights:
        """Stacks of normal values."""
        return _make_weights(workload, slots)

    def make_batch(
        self,
        workload: Workload,
        weights: Weights,
        scenario: Scenario,
        count: int,
        facts: SlotFacts | None,
    ) -> Batch:
        """Normal values, and what a call must make of them."""
        return _make_batch(workload, weights, scenario, count, facts)


def element_type(workload: Workload) -> type:
    """numpy type of the elements; bfloat16 has none and is refused by the CPU runner."""
    return _NUMPY[workload.dtype]


def _make_weights(workload: Workload, slots: int) -> Weights:
    kind = element_type(workload)
    a_shape = (slots, workload.rank, workload.in_features)
    b_shapes = [(slots, width, workload.rank) for width in workload.out_features]
    a = _stacks([a_shape] * workload.slices, kind, workload.in_features**-0.5, 1)
    return Weights(a, _stacks(b_shapes, kind, workload.rank**-0.5, 2), slots)


def _stacks(shapes: Sequence[tuple[int, ...]], kind: type, scale: float, seed: int) -> list[Floats]:
    """Stacks of all slices in one allocation: generated code reaches them from the first one by
    32-bit offsets, and separate allocations may lie terabytes apart."""
    sizes = [-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for shape in shapes]
    arena = _normal((sum(sizes),), kind, scale, seed)
    starts = [sum(sizes[:s]) for s in range(len(sizes))]
    return [
        arena[start : start + math.prod(shape)].reshape(shape)
        for start, shape in zip(starts, shapes, strict=True)
    ]


def _make_batch(
    workload: Workload,
    weights: Weights,
    scenario: Scenario,
    count: int,
    facts: SlotFacts | None,
) -> Batch:
    kind = element_type(workload)
    tokens = scenario.tokens
    rows = window_slots(scenario, weights.slots, count)
    x = _normal((tokens, workload.in_features), kind, 1.0, 21)
    before = _normal((tokens * workload.total_out + 2 * GUARD,), kind, 1.0, 22)
    guarded = aligned(before.shape, kind)
    y = before[GUARD:-GUARD].reshape(tokens, workload.total_out)
    want = reference(x, weights.a, weights.b, y, rows[0], facts).astype(np.float32)
    return Batch(scenario, weights.slots, rows, x, guarded, before, want, facts)


def pointers(arrays: Sequence[NDArray]) -> ctypes.Array[ctypes.c_void_p]:  # type: ignore[type-arg]
    """C array of the arrays' data pointers."""
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
