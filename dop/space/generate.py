"""The search space constructor: rules turn the bare stages into sketches."""

from __future__ import annotations

from collections.abc import Sequence

from dop.errors import ConstraintError
from dop.space.rule import Rule, SketchState
from dop.space.rules import RULES
from dop.space.sketch import Sketch, Space
from dop.target import Target
from dop.workload import Workload

ORDER = ("tokens", "accumulate", "expand", "gather_b", "shrink", "gather_a", "gather_x")
"""Stages from the result back to the inputs: a producer is placed inside its consumer's loops,
so the consumer comes first."""


def derive(
    workload: Workload, target: Target, rules: Sequence[Rule] | None = None
) -> tuple[Sketch, ...]:
    """Every sketch that the rules derive, in a stable order."""
    rules = RULES if rules is None else rules
    states = [SketchState(workload, target)]
    for stage in ORDER:
        states = [
            grown
            for state in states
            for rule in rules
            if rule.stage == stage
            for grown in rule.apply(state)
        ]
    return tuple(state.sketch() for state in states)


def build_space(workload: Workload, target: Target, rules: Sequence[Rule] | None = None) -> Space:
    """The search space of a workload on a target.

    Raises:
        ConstraintError: no rule fits, or no sketch has a valid default.
    """
    space = Space(derive(workload, target, rules))
    if not space.defaults():
        raise ConstraintError(
            f"no sketch has a valid default for {workload.key} on {target.key}.",
            "Report the shape; a rule's defaults break a limit.",
        )
    return space
