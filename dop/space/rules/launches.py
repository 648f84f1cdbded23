"""How kernels follow each other."""

from __future__ import annotations

from dop.space.rule import SketchState


def dependent_launch(state: SketchState) -> None:
    """Lets the search choose programmatic dependent launch of the expand kernel, where it exists:
    on Hopper and newer. Elsewhere the sketch is the same without it."""
    if state.target.arch.removeprefix("sm_")[:2] >= "90":
        value = state.param("expand.dependent", "pipeline", (0, 1), 1)
        state.pragma("accumulate", 0, "dependent_launch", value)
