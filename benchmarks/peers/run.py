"""How a run goes: case by case, contender by contender, until the cases or the time are up."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence

import torch

from benchmarks.peers.cases import Case
from benchmarks.peers.contenders import Contender, Prepared
from benchmarks.peers.data import Data, Pools
from benchmarks.peers.host import host_cost
from benchmarks.peers.results import Row, row_of, timed
from benchmarks.peers.timing import MAX_ERROR, Clock, CpuClock, CudaClock, Round, check

CPU_SETS = 3
NO_HOST_COST = ("torch", "bmm")
"""Many calls of torch per call: what they cost the host is no question."""


class Bench:
    """One run: its clock, its buffers, and how a case is measured."""

    def __init__(self, cases: Sequence[Case], device: str, reps: int) -> None:
        self.clock: Clock = CudaClock() if device == "cuda" else CpuClock()
        self.floors = self.clock.floors()
        dtype = getattr(torch, cases[0].workload.dtype)
        self.limit = MAX_ERROR[dtype]
        self.pools = Pools(cases, device, dtype, CPU_SETS if device == "cpu" else 0)
        self.reps = reps

    def measure(self, case: Case, contenders: Sequence[Contender]) -> list[Row]:
        """One row per contender that takes part; a failure is a row with its error."""
        data = Data.carve(case, self.pools)
        rounds: dict[str, tuple[Round, Prepared]] = {}
        rows: dict[str, Row] = {}
        try:
            for contender in contenders:
                if contender.suits(case):
                    name = contender.name
                    rows[name] = row_of(case, name, sets=data.sets)
                    rows[name] |= self._enter(contender, case, data, rounds)
            floor_us = case.floor_bytes / self.floors["copy_gbps"] / 1e3
            times = self.clock.time({name: entry[0] for name, entry in rounds.items()}, self.reps)
            for name, found in times.items():
                rows[name] |= timed(found, floor_us)
        finally:
            self.clock.wait()
            for _, prepared in rounds.values():
                prepared.close()
        return list(rows.values())

    def _enter(
        self,
        contender: Contender,
        case: Case,
        data: Data,
        rounds: dict[str, tuple[Round, Prepared]],
    ) -> Row:
        """Prepares and checks a contender; it is timed only if its result is right."""
        try:
            prepared = contender.prepare(case, data)
            calls = data.sets if data.device.type == "cpu" else case.calls
            each = self.clock.round(prepared, data.sets, calls)
            error = check(self.clock, each, prepared, data)
        except Exception as failure:
            self.clock.wait()  # a lost CUDA context ends the run here
            return {"error": f"{type(failure).__name__}: {str(failure)[:300]}"}
        facts = {"calls": each.calls, "err": error, "note": prepared.note}
        if not error <= self.limit:  # NaN is wrong too
            prepared.close()
            return facts | {"error": f"wrong result: relative error {error:.3g}"}
        rounds[contender.name] = each, prepared
        return facts


def run(
    bench: Bench, cases: Sequence[Case], contenders: Sequence[Contender], deadline: float
) -> Iterator[Row]:
    """Rows as they are measured; no case starts after the deadline (time.monotonic)."""
    gc.collect()
    gc.disable()  # a collection in the middle of a round would be timed
    try:
        for number, case in enumerate(cases):
            if time.monotonic() > deadline:
                print(f"time is up: {len(cases) - number} cases are left out", flush=True)
                return
            yield from bench.measure(case, contenders)
            if number % 16 == 15:
                gc.collect()
                print(f"  {number + 1} of {len(cases)} cases", flush=True)
    finally:
        gc.enable()


def measure_host(
    cases: Sequence[Case], contenders: Sequence[Contender], device: str
) -> list[dict[str, object]]:
    """Host cost of one eager call per contender, on the smallest batch of each group of slices."""
    smallest: dict[str, Case] = {}
    for case in cases:
        kept = smallest.setdefault(case.layer, case)
        if (case.tokens, case.workload.rank) < (kept.tokens, kept.workload.rank):
            smallest[case.layer] = case
    dtype = getattr(torch, cases[0].workload.dtype)
    pools = Pools(smallest.values(), device, dtype, 1)
    found = []
    for case in smallest.values():
        data = Data.carve(case, pools)
        for contender in contenders:
            if contender.name not in NO_HOST_COST and contender.suits(case):
                cost = host_cost(contender, case, data)
                print(cost.line(), flush=True)
                found.append(cost.document())
    return found
