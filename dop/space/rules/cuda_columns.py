"""CUDA, plain cores, expand half: threads own columns of y.

Block: one tile and a group of columns. A thread walks `steps` groups of `vector` neighbouring
columns; for each it reads the columns' rows of B into registers (16-byte loads), multiplies with v
and updates y. The sum over the split-K partials of v is done once per block, in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.launches import A_FIRST, dependent_launch
from dop.space.rules.numbers import ceil_div, powers_of_two, vector_width
from dop.space.sketch import Annotation

MAX_WRITTEN_OUT = 8192
"""Products of a thread that are unrolled: nvcc takes minutes over more."""

MAX_LOADS = 64
"""Loads of B in a step of a thread. In 4,470 records, in which each had an address of its own,
candidates with 64 were at best 1.38 times as slow as the winner, with 128 1.49, with 256 5.4 times:
ptxas kept the addresses over all steps and spilled up to 5.8 KB a thread. One such kernel faulted.
Loads of one group of 8 elements share an address now; with 256 loads, ptxas still spills 2.2 KB."""

BLOCK, THREAD, STEP = 1, 2, 3
"""Loop positions in accumulate: t, column block, thread, step, row, vector."""


def _products(rank: int, a: Annotation) -> int:
    rows = a.get("tokens.tile_rows", 1)
    return rows * rank * a["expand.vector"] * a.get("expand.steps", 1)


@dataclass(frozen=True)
class Columns:
    """accumulate: split the columns over blocks, threads, steps and a vector."""

    name: str = "columns"
    stage: str = "accumulate"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "matrix" in state.notes:
            return []
        new = state.fork(self.name)
        steps = new.param("expand.steps", "tile", (1, 2, 4, 8), 2)
        threads = new.param("expand.threads", "warps", (64, 128, 256, 512), 128)
        vector = new.param("expand.vector", "vector", (1, 2, 4), 1)
        source = new.split("accumulate", 2, [steps, threads, vector], state.workload.total_out)
        new.notes["expand_split"] = new.notes["expand_steps"] = source
        new.notes["thread_level"] = 1  # of the split's lengths
        new.reorder("accumulate", 0, 2, 4, 3, 1, 5)
        new.annotate("accumulate", 0, "blockIdx.x")
        new.annotate("accumulate", BLOCK, "blockIdx.y")
        new.annotate("accumulate", THREAD, "threadIdx.x")
        new.annotate("accumulate", 5, "vectorize")
        new.annotate("accumulate", 4, "unroll")
        new.annotate("accumulate", STEP, "unroll")
        return [self._quantities(new)]

    @staticmethod
    def _quantities(new: SketchState) -> SketchState:
        width = new.workload.total_out

        def columns(a: Annotation) -> int:
            return a["expand.steps"] * a["expand.threads"] * a["expand.vector"]

        new.limit("threads per block", new.target.max_threads, lambda a: a["expand.threads"])
        new.estimate("expand.columns", columns)
        new.estimate("expand.blocks_per_tile", lambda a: ceil_div(width, columns(a)))
        new.estimate("expand.idle_columns", lambda a: -width % columns(a) / width)
        return new


@dataclass(frozen=True)
class WideColumns:
    """accumulate: each thread owns a few neighbouring columns, all of them at once.

    One step only, so that everything a thread needs (B, y) can be asked for before v is there.
    """

    name: str = "wide_columns"
    stage: str = "accumulate"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "matrix" in state.notes:
            return []
        new = state.fork(self.name)
        threads = new.param("expand.threads", "warps", (32, 64, 96, 128, 192, 256, 512), 128)
        vector = new.param("expand.vector", "vector", (1, 2, 4, 8), 1)
        width = new.workload.total_out
        source = new.split("accumulate", 2, [threads, vector], width)
        new.notes["expand_split"] = new.notes["early_b"] = source
        new.notes["thread_level"] = 0  # of the split's lengths
        # t, i, block, thread, vector -> t, block, thread, i, vector
        new.reorder("accumulate", 0, 2, 3, 1, 4)
        new.annotate("accumulate", 0, "blockIdx.x")
        new.annotate("accumulate", BLOCK, "blockIdx.y")
        new.annotate("accumulate", THREAD, "threadIdx.x")
        new.annotate("accumulate", 4, "vectorize")
        new.annotate("accumulate", 3, "unroll")
        # The old values of y first of all: t, block; own loops: t, i, n
        new.cache_read("accumulate", "local", "accumulate")
        new.compute_at("accumulate_in", "accumulate", BLOCK)
        new.follow_split("accumulate_in", 4, source, 2)
        # t, block, t, i, n, thread, vector
        new.reorder("accumulate_in", 0, 1, 5, 2, 3, 4, 6)
        new.annotate("accumulate_in", 2, "threadIdx.x")
        new.annotate("accumulate_in", 6, "vectorize")
        new.annotate("accumulate_in", 4, "unroll")
        dependent_launch(new, A_FIRST)

        def columns(a: Annotation) -> int:
            return a["expand.threads"] * a["expand.vector"]

        new.limit("threads per block", new.target.max_threads, lambda a: a["expand.threads"])
        new.limit("columns of a block", width + 32, columns)
        new.estimate("expand.columns", columns)
        new.estimate("expand.blocks_per_tile", lambda a: ceil_div(width, columns(a)))
        new.estimate("expand.idle_columns", lambda a: -width % columns(a) / width)
        return [new]


@dataclass(frozen=True)
class ExpandInWideColumns:
    """expand: a thread's sums, in registers."""

    name: str = "registers"
    stage: str = "expand"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "early_b" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("expand", "local", "accumulate")
        new.compute_at("expand", "accumulate", THREAD)
        # own loops behind t, block, thread: t, i, n, r
        for loop in (4, 5, 6):
            new.annotate("expand", loop, "unroll")
        return [new]


@dataclass(frozen=True)
class EarlyB:
    """gather_b: the rows of B go to registers before anything waits for v.

    The stage stands in front of the sum over v's parts, with thread loops of its own; what a
    thread loads is what it multiplies later, so the values stay in its registers.
    """

    name: str = "early_b"
    stage: str = "gather_b"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "early_b" not in state.notes:
            return []
        new = state.fork(self.name)
        w = new.workload
        widest = vector_width(w.rank, w.element_bytes)
        new.cache_read("gather_b", "local", "expand")
        new.compute_at("gather_b", "accumulate", BLOCK)
        # behind t, block: t, n, r -> thread, t, n, group, element
        new.follow_split("gather_b", 3, new.notes["early_b"], 2)
        new.split("gather_b", 6, [widest], w.rank)
        # t, block, t, n, thread, vector, group, element
        new.reorder("gather_b", 0, 1, 4, 2, 3, 5, 6, 7)
        new.annotate("gather_b", 2, "threadIdx.x")
        new.annotate("gather_b", 7, "vectorize")
        new.annotate("gather_b", 6, "unroll")
        new.annotate("gather_b", 5, "unroll")
        new.pragma("expand", 4, "decompose_reduction")
        half = w.rank * w.element_bytes // 4
        new.estimate("expand.b_registers", lambda a: half * a["expand.vector"])
        new.limit("registers for B", 160, lambda a: half * a["expand.vector"])
        new.limit("products written out by expand", MAX_WRITTEN_OUT, lambda a: _products(w.rank, a))
        return [new]


@dataclass(frozen=True)
class ExpandInColumns:
    """expand: accumulate in registers inside the step loop of the columns."""

    name: str = "registers"
    stage: str = "expand"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "expand_steps" not in state.notes:
            return []
        new = state.fork(self.name)
        new.cache_read("expand", "local", "accumulate")
        new.compute_at("expand", "accumulate", STEP)
        # own loops behind t, block, thread, step: t, i, n, r
        for loop in (5, 6, 7):
            new.annotate("expand", loop, "unroll")
        return [new]


@dataclass(frozen=True)
class DirectB:
    """gather_b: the rows of B go straight to registers, all loads before the first use."""

    name: str = "direct_b"
    stage: str = "gather_b"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "expand_steps" not in state.notes:
            return []
        new = state.fork(self.name)
        w = new.workload
        widest = vector_width(w.rank, w.element_bytes)
        vector = new.param("expand.load", "vector", powers_of_two(1, widest), widest)
        new.limit(
            "separate loads of B in a step",
            max(MAX_LOADS, w.rank // widest),
            lambda a: w.rank * a["expand.vector"] // a["expand.load"],
        )
        new.cache_read("gather_b", "local", "expand")
        new.compute_at("gather_b", "accumulate", STEP)
        # own loops behind t, block, thread, step: t, n, r
        new.split("gather_b", 6, [vector], w.rank)
        new.annotate("gather_b", 7, "vectorize")
        new.annotate("gather_b", 6, "unroll")
        new.annotate("gather_b", 5, "unroll")
        new.pragma("expand", 5, "decompose_reduction")
        half = w.rank * w.element_bytes // 4
        new.estimate("expand.b_registers", lambda a: half * a["expand.vector"])
        new.limit("registers for B", 160, lambda a: half * a["expand.vector"])
        new.limit("products written out by expand", MAX_WRITTEN_OUT, lambda a: _products(w.rank, a))
        return [new]
