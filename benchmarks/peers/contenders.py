"""What is compared: the operator, torch's own ways, and the engines' kernels (see engines.py).

A contender is prepared once per case, outside of the timed region: sorting tokens by adapter,
building tables and views is its own affair there, for the operator as for the peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.cases import Case
from benchmarks.peers.data import Data
from benchmarks.peers.dop_ops import adapters_hint

Call = Callable[[int], object]
"""Adds the update of set i into y[i]."""

MOST_LAUNCHES = 1200
MOST_NOTE = 300
MOST_GATHERED_BYTES = 1 << 30
"""torch's gathered product copies each row's weights; beyond this it has no place on a GPU."""


@dataclass
class Prepared:
    """A contender on one case.

    Attributes:
        call: adds the update into y of a set.
        layout: which weights it used: "sliced" or "joined" (see Data).
        launches: kernels per call, if there are so many that a graph should have fewer calls.
        note: facts worth keeping in the results.
        close: frees what outlives the case.
    """

    call: Call
    layout: str = "sliced"
    launches: int = 1
    note: dict[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None

    @property
    def most_calls(self) -> int:
        """Calls of one graph at most."""
        return max(1, MOST_LAUNCHES // self.launches)


@dataclass(frozen=True)
class Contender:
    """One way to do SGMV.

    Attributes:
        name: column of the table.
        prepare: makes it ready for a case.
        suits: whether it takes part in a case.
        compiles: it is compiled when first called, case by case.
    """

    name: str
    prepare: Callable[[Case, Data], Prepared]
    suits: Callable[[Case], bool] = lambda _: True
    compiles: bool = False


def prepare_dop(case: Case, data: Data) -> Prepared:
    """`dop.ops`: one plan per batch, one call per group of slices."""
    from dop import ops

    tight = not case.least_slots
    hint = adapters_hint(case.kind, tight, case.tokens, case.slots, case.active)
    plan = ops.segment_plan(data.slots.int().to(data.device), slots=case.slots, adapters=hint)
    x, y, weights = data.x, data.y, data.sliced

    def call(i: int) -> None:
        a, b = weights[i]
        ops.add_lora(y[i], x[i], a, b, plan)

    choice = ops.explain_choice(
        case.workload, tokens=case.tokens, adapters=hint, slots=case.slots, device=data.device
    )
    kernel = " ".join(str(choice).split())[:MOST_NOTE]
    return Prepared(call, note={"adapters_hint": hint, "kernel": kernel})


def prepare_loop(case: Case, data: Data) -> Prepared:
    """torch, adapter by adapter: gather rows, two products per slice, add the rows back."""
    groups, w = data.groups, case.workload
    columns = [slice(at, at + n) for at, n in zip(w.offsets, w.out_features, strict=True)]

    def call(i: int) -> None:
        a, b = data.joined[i]
        for slot, rows in groups:
            v = data.x[i][rows] @ a[slot].T
            for s, part in enumerate(columns):
                mine = v[:, s * w.rank : (s + 1) * w.rank]
                data.y[i][:, part].index_add_(0, rows, mine @ b[slot, part].T)

    return Prepared(call, "joined", launches=len(groups) * (2 + 2 * w.slices))


def prepare_bmm(case: Case, data: Data) -> Prepared:
    """torch, each row with its own gathered weights: two batched products per slice."""
    w, slots = case.workload, data.slots.to(data.device)
    columns = [slice(at, at + n) for at, n in zip(w.offsets, w.out_features, strict=True)]

    def call(i: int) -> None:
        rows = data.x[i].unsqueeze(1)
        a, b = data.sliced[i]
        for s, part in enumerate(columns):
            v = rows @ a[s][slots].transpose(1, 2)
            data.y[i][:, part] += (v @ b[s][slots].transpose(1, 2)).squeeze(1)

    return Prepared(call, launches=5 * w.slices)


def prepare_dense(case: Case, data: Data) -> Prepared:
    """One adapter as plain dense products (cuBLAS on a GPU): the slices' shrinks in one."""
    w, slot = case.workload, case.token_slots[0]
    columns = [slice(at, at + n) for at, n in zip(w.offsets, w.out_features, strict=True)]

    def call(i: int) -> None:
        a, b = data.joined[i]
        v = data.x[i] @ a[slot].T
        for s, part in enumerate(columns):
            mine = v[:, s * w.rank : (s + 1) * w.rank]
            data.y[i][:, part].addmm_(mine, b[slot, part].T)

    return Prepared(call, "joined", launches=1 + w.slices)


def _gathers(case: Case) -> bool:
    return case.workload.min_bytes(0, 1) * case.tokens <= MOST_GATHERED_BYTES


def own(device: str) -> list[Contender]:
    """The operator and torch's ways: loop over adapters, gathered product, dense products."""
    dense = "cublas" if device == "cuda" else "dense"
    return [
        Contender("dop", prepare_dop),
        Contender("torch", prepare_loop),
        Contender("bmm", prepare_bmm, _gathers),
        Contender(dense, prepare_dense, lambda case: case.active == 1),
    ]
