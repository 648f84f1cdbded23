"""How kernels follow each other."""

from __future__ import annotations

import re

from dop.space.rule import SketchState

HOPPER = 90


def dependent_launch(state: SketchState) -> None:
    """Lets the search choose programmatic dependent launch of the expand kernel, where it exists:
    on Hopper and newer. Elsewhere the sketch is the same without it."""
    arch = re.match(r"sm_(\d+)", state.target.arch)
    if arch and int(arch[1]) >= HOPPER:
        value = state.param("expand.dependent", "pipeline", (0, 1), 1)
        state.pragma("accumulate", 0, "dependent_launch", value)
