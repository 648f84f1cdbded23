"""How kernels follow each other."""

from __future__ import annotations

import re

from dop.space.early import DEPENDENT, EARLY
from dop.space.rule import SketchState

HOPPER = 90
A_FIRST = (0, 1, 2, EARLY)
"""Where all of A is asked for in front of x."""


def dependent_launch(
    state: SketchState, values: tuple[int, ...] = (0, 1, 2), kernels: int = 2
) -> None:
    """Lets the search choose programmatic dependent launches, where they exist: on Hopper and
    newer. Elsewhere the sketch is the same without them, and so it is beside the base layer's
    matmul, where two kernels are launched plainly (dop/ops/beside.py).

    Values: 0 none; 1 the expand kernel; 2 the shrink kernel too, which waits before it reads
    anything (and the only dependent form of a sketch of one kernel), the default; 3 the same, but
    it reads its tables and A before it waits. That wants a shrink whose loads of A all stand in
    front of those of x, and a caller who knows that A is complete (dop/ops/settled.py); measured
    for small batches only (dop/space/early.py).
    """
    if state.workload.beside and kernels == 2:
        return
    arch = re.match(r"sm_(\d+)", state.target.arch)
    if arch and int(arch[1]) >= HOPPER:
        value = state.param(DEPENDENT, "pipeline", values, 2)
        state.pragma("accumulate", 0, "dependent_launch", value)
