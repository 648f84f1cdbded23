"""Inputs of the CUDA runner on the GPU: weights, activations, references; cached per workload."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from dop.measure import tensor_cache
from dop.measure.accuracy import Errors
from dop.measure.base_layer import Matmuls
from dop.measure.inputs import copies, window_slots
from dop.measure.plan import Plan, SlotFacts, Table, make_plan, most_adapters
from dop.scenario import NO_ADAPTER, Scenario
from dop.workload import Workload

GUARD = 1024
"""Elements before and behind y that no kernel may touch."""
WINDOW_LIMIT = 32
"""Calls of one graph at most; the cache is flushed before each replay, so they need not fill it,
nor need that many copies of x and y."""
BUDGET_BYTES = 40 << 30
TABLE_STEP = 16
"""Tables start at multiples of 64 bytes."""
FACTS = ("_rank", "_scale")
"""How the names of tables end that a caller may leave out."""
BITS = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}
DEVICE = "cuda"


def element_type(workload: Workload) -> torch.dtype:
    """torch type of the elements."""
    kind = getattr(torch, workload.dtype)
    assert isinstance(kind, torch.dtype)
    return kind


@dataclass
class WindowTables:
    """A plan per window, on the GPU: tables by name, [windows, padded length]; those of ranks and
    scales only if the batch has any."""

    plan: Plan
    tables: dict[str, torch.Tensor]

    def pointers(self) -> dict[str, int]:
        """Address of each table of the first window; 0 for one that is not given."""
        given = {name: table.data_ptr() for name, table in self.tables.items()}
        return dict.fromkeys(self.plan.tables, 0) | given

    def steps(self) -> dict[str, int]:
        """Bytes from a table of one window to that of the next, for those that are given."""
        return {name: table.stride(0) * 4 for name, table in self.tables.items()}


@dataclass
class Batch:
    """One scenario's tensors.

    Attributes:
        rows: slot of each row, per window.
        x: [tokens, in].
        guarded: y with its guards, [GUARD + tokens * out + GUARD].
        others: x and guarded y of a cold batch's other copies; only the first one is checked.
        before: y and guards before a call.
        want: y after it, [tokens, out], computed in float64, stored as float32.
        used: rows with an adapter, or None if all are.
        facts: ranks and scales of the slots; None for full ranks and scale 1.
        matmuls: of the base layer, once the batch was timed beside them.
    """

    scenario: Scenario
    rows: list[NDArray[np.int32]]
    x: torch.Tensor
    guarded: torch.Tensor
    before: torch.Tensor
    want: torch.Tensor
    bits: torch.dtype
    used: torch.Tensor | None
    update_rms: float
    scale: float
    facts: SlotFacts | None
    others: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    plans: dict[int, WindowTables] = field(default_factory=dict)
    matmuls: Matmuls | None = None

    @property
    def y(self) -> torch.Tensor:
        """y without its guards, [tokens, out]."""
        return self.guarded[GUARD:-GUARD].view(self.want.shape)

    @property
    def copies(self) -> int:
        """Copies of x and y."""
        return 1 + len(self.others)

    def pointers(self, copy: int) -> dict[str, int]:
        """Addresses of x and y of a copy, by the names of kernels' parameters."""
        x, guarded = [(self.x, self.guarded), *self.others][copy]
        y = guarded.data_ptr() + GUARD * guarded.element_size()
        return {"x": x.data_ptr(), "y_in": y, "y": y}

    def plans_for(self, tile_rows: int) -> WindowTables:
        """Plans of all windows for a tile height.

        The tiles launched are bounded by the token count and `most_adapters`, not by how the rows
        are spread.
        """
        if tile_rows not in self.plans:
            most = most_adapters(self.scenario)
            plans = [
                make_plan(rows, tile_rows, max_adapters=most, facts=self.facts)
                for rows in self.rows
            ]
            names = [n for n in plans[0].tables if self.facts or not n.endswith(FACTS)]
            tables = {name: _upload([p.tables[name] for p in plans]) for name in names}
            self.plans[tile_rows] = WindowTables(plans[0], tables)
        return self.plans[tile_rows]

    def reset(self) -> None:
        """Puts y and its guards back to what they were before any call."""
        self.guarded.copy_(self.before)

    def errors(self) -> Errors:
        """What a call made of y, against the reference."""
        changed = self.guarded.view(self.bits) != self.before.view(self.bits)
        guards = changed[:GUARD].any() | changed[-GUARD:].any()
        error = self.y.float() - self.want
        bare = guards.new_zeros(())
        if self.used is not None:
            bare = changed[GUARD:-GUARD].view(self.want.shape)[~self.used].any()
            error = error[self.used]
        if error.numel() == 0:
            return Errors(0.0, 1.0, 0.0, 1.0, bool(bare), bool(guards))
        figures = [error.abs().max(), error.square().mean().sqrt(), bare.float(), guards.float()]
        largest, rms, bare_f, guards_f = torch.stack(figures).tolist()
        return Errors(largest, self.scale, rms, self.update_rms, bare_f > 0, guards_f > 0)


def _upload(tables: Sequence[Table]) -> torch.Tensor:
    length = -(-max(len(t) for t in tables) // TABLE_STEP) * TABLE_STEP
    padded = np.zeros((len(tables), max(length, TABLE_STEP)), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table.view(np.int32)
    return torch.from_numpy(padded).to(DEVICE)


@dataclass
class Weights(tensor_cache.Weights[torch.Tensor, Batch]):
    """Stacks of one workload, and the batches made for it."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = [*self.a, *self.b]
        for batch in self.batches.values():
            tensors += [batch.x, batch.guarded, batch.before, batch.want]
            tensors += [tensor for copy in batch.others for tensor in copy]
        return sum(t.numel() * t.element_size() for t in tensors)

    def pointers(self) -> dict[str, int]:
        """Address of each stack: a0, b0, a1, ..."""
        named = [(f"a{s}", t) for s, t in enumerate(self.a)]
        named += [(f"b{s}", t) for s, t in enumerate(self.b)]
        return {name: tensor.data_ptr() for name, tensor in named}


class TensorCache(tensor_cache.TensorCache[Weights, Batch]):
    """Weights of the last workloads, within a memory budget."""

    def __init__(self, cache_bytes: int, budget_bytes: int = BUDGET_BYTES) -> None:
        super().__init__(cache_bytes, WINDOW_LIMIT, budget_bytes)

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
        batch = _make_batch(workload, weights, scenario, count, facts)
        wanted = copies(workload, scenario, self._cache_bytes, WINDOW_LIMIT)
        # The allocator aligns each of them to 512 bytes.
        batch.others = [(batch.x.clone(), batch.before.clone()) for _ in range(1, wanted)]
        return batch


def _normal(shape: tuple[int, ...], kind: torch.dtype, scale: float) -> torch.Tensor:
    return torch.empty(shape, dtype=kind, device=DEVICE).normal_(0.0, scale)


def _make_weights(workload: Workload, slots: int) -> Weights:
    kind = element_type(workload)
    a_shape = (slots, workload.rank, workload.in_features)
    a_scale, b_scale = workload.in_features**-0.5, workload.rank**-0.5
    a = [_normal(a_shape, kind, a_scale) for _ in range(workload.slices)]
    b = [_normal((slots, n, workload.rank), kind, b_scale) for n in workload.out_features]
    return Weights(a, b, slots)


def reference(
    x: torch.Tensor,
    weights: Weights,
    y: torch.Tensor,
    token_slot: NDArray[np.int32],
    facts: SlotFacts | None = None,
) -> torch.Tensor:
    """What y must hold after the call, in float64; x [tokens, in], y [tokens, out]."""
    want = y.double()
    for slot in np.unique(token_slot[token_slot != NO_ADAPTER]).tolist():
        rows = torch.from_numpy(np.flatnonzero(token_slot == slot)).to(x.device)
        inputs = x[rows].double() * (float(facts.scales[slot]) if facts else 1.0)
        rank = int(facts.ranks[slot]) if facts else None
        pairs = zip(weights.a, weights.b, strict=True)
        updates = [
            inputs @ a[slot, :rank].double().T @ b[slot, :, :rank].double().T for a, b in pairs
        ]
        want[rows] += torch.cat(updates, dim=1)
    return want


def _make_batch(
    workload: Workload,
    weights: Weights,
    scenario: Scenario,
    count: int,
    facts: SlotFacts | None,
) -> Batch:
    kind, tokens = element_type(workload), scenario.tokens
    rows = window_slots(scenario, weights.slots, count)
    x = _normal((tokens, workload.in_features), kind, 1.0)
    before = _normal((tokens * workload.total_out + 2 * GUARD,), kind, 1.0)
    y = before[GUARD:-GUARD].view(tokens, workload.total_out)
    want = reference(x, weights, y, rows[0], facts)
    used = torch.from_numpy(rows[0] != NO_ADAPTER).to(x.device)
    update_rms = float((want - y.double())[used].square().mean().sqrt())
    scale = float(want[used].abs().max()) if bool(used.any()) else 1.0
    return Batch(
        scenario,
        rows,
        x,
        torch.empty_like(before),
        before,
        want.float(),
        BITS[workload.dtype],
        None if bool(used.all()) else used,
        0.0 if math.isnan(update_rms) else update_rms,
        scale,
        facts,
    )
