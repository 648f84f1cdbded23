"""CUDA, plain cores, expand half: threads own columns of y.

Block: one tile and a group of columns. A thread walks `steps` groups of `vector` neighbouring
columns; for each it reads the columns' rows of B into registers (16-byte loads), multiplies with v
and updates y. The sum over the split-K partials of v is done once per block, in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.numbers import ceil_div, powers_of_two, vector_width
from dop.space.sketch import Annotation

BLOCK, THREAD, STEP = 1, 2, 3
"""Loop positions in accumulate: t, column block, thread, step, row, vector."""


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
        new.notes["expand_split"] = source
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
class ExpandInColumns:
    """expand: accumulate in registers inside the step loop of the columns."""

    name: str = "registers"
    stage: str = "expand"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda" or "expand_split" not in state.notes:
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
        if state.target.kind != "cuda" or "expand_split" not in state.notes:
            return []
        new = state.fork(self.name)
        w = new.workload
        widest = vector_width(w.rank, w.element_bytes)
        vector = new.param("expand.load", "vector", powers_of_two(1, widest), widest)
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
        return [new]
