"""CPU: blocks of columns of y, in one parallel region or two.

One region: a thread owns a tile and does all of it, v never leaves its cache. Two regions: shrink
and expand each spread over all threads, by slices, ranks and columns too; this keeps every core
busy when there are fewer tiles than threads, and costs a second start of the threads (3 to 8 us).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.rules.numbers import ceil_div, dividing, powers_of_two
from dop.space.sketch import Annotation
from dop.target import Target

FLOAT_BYTES = 4


def lanes(target: Target, *axes: int) -> int:
    """float32 elements of a vector register, fewer if that many do not divide every axis.

    A vector never crosses the end of an axis or the border of two slices: TVM does not predicate
    the lanes of a vector correctly (wrong sums with in_features 200 and 16 lanes).
    """
    width = max(1, target.vector_bytes // FLOAT_BYTES)
    return max(dividing(math.gcd(width, *axes), powers_of_two(1, width)))


def column_lanes(state: SketchState) -> int:
    """Lanes of a vector of columns."""
    return lanes(state.target, *state.workload.out_features)


def feature_lanes(state: SketchState) -> int:
    """Lanes of a vector of in_features."""
    return lanes(state.target, state.workload.in_features)


def tile_rows(state: SketchState) -> tuple[int, ...]:
    """Rows of a tile that the sketch allows."""
    for domain in state.domains:
        if domain.name == "tokens.tile_rows":
            return domain.choices
    return (1,)


def block_loop(state: SketchState) -> int:
    """Position of the loop over column blocks in accumulate."""
    return 0 if state.notes["regions"] == 2 else 1


@dataclass(frozen=True)
class ColumnBlocks:
    """accumulate: blocks of columns, vectors within them; `regions` parallel regions."""

    regions: int
    stage: str = "accumulate"

    @property
    def name(self) -> str:
        """Appears in sketch names."""
        return "one_region" if self.regions == 1 else "two_regions"

    def apply(self, state: SketchState) -> list[SketchState]:
        """Splits the columns into blocks of vectors: (tile, block), row, vector, lane."""
        if state.target.kind != "cpu" or "register_blocks" in state.notes:
            return []
        new = state.fork(self.name)
        width = column_lanes(new)
        vectors = new.param("expand.vectors", "tile", (1, 2, 4, 8, 16), 8)
        new.split("accumulate", 2, [vectors, width], new.workload.total_out)
        new.reorder("accumulate", 0, 2, 1, 3, 4)
        new.annotate("accumulate", 4, "vectorize")
        if self.regions == 2:
            new.fuse("accumulate", 0, 1)
        new.annotate("accumulate", 0, "parallel")
        new.notes["regions"] = self.regions
        columns = new.workload.total_out
        # As many blocks as threads at least, so that a batch of one tile keeps them busy.
        most = max(1, columns // (width * new.target.units)) if self.regions == 2 else columns
        new.limit("vectors of a column block", max(most, 1), lambda a: a["expand.vectors"])

        def blocks(a: Annotation) -> int:
            return ceil_div(columns, a["expand.vectors"] * width)

        new.estimate("expand.blocks_per_tile", blocks)
        new.estimate(
            "expand.idle_columns", lambda a: -columns % (a["expand.vectors"] * width) / columns
        )
        new.estimate("regions", lambda a: self.regions)
        return [new]
