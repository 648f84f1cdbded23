"""Crossover: the shrink half of one parent with the expand half of another."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dop.search.mutator.base import nearest
from dop.space.sketch import Annotation, Sketch

SHRINK, EXPAND = "shrink", "expand"


def half_of(name: str) -> str:
    """The half of a parameter's name: what stands before the dot."""
    return name.partition(".")[0]


def domains_of(sketch: Sketch, half: str) -> frozenset[str]:
    """Names of a sketch's parameters in one half."""
    return frozenset(d.name for d in sketch.domains if half_of(d.name) == half)


def cross(
    left: tuple[Sketch, Annotation],
    right: tuple[Sketch, Annotation],
    sketches: Sequence[Sketch],
    rng: random.Random,
) -> tuple[Sketch, dict[str, int]] | None:
    """The child with `left`'s shrink half and `right`'s expand half, or None if nothing fits.

    The child's sketch has the parameters of `left`'s shrink and of `right`'s expand: one of the
    parents' where that holds, else any such sketch of the space. Every other half ("tokens")
    comes whole from one parent. The child may break a limit.
    """
    sketch = _joined(left[0], right[0], sketches, rng)
    if sketch is None:
        return None
    source: dict[str, Annotation] = {SHRINK: left[1], EXPAND: right[1]}
    values: dict[str, int] = {}
    for domain in sketch.domains:
        half = half_of(domain.name)
        if half not in source:
            source[half] = rng.choice((left, right))[1]
        chosen = source[half]
        other = right[1] if chosen is left[1] else left[1]
        given = chosen.get(domain.name, other.get(domain.name))
        values[domain.name] = domain.default if given is None else nearest(domain, given)
    return sketch, values


def _joined(
    left: Sketch, right: Sketch, sketches: Sequence[Sketch], rng: random.Random
) -> Sketch | None:
    if left.name == right.name:
        return left
    shrink, expand = domains_of(left, SHRINK), domains_of(right, EXPAND)

    def fits(sketch: Sketch) -> bool:
        return domains_of(sketch, SHRINK) == shrink and domains_of(sketch, EXPAND) == expand

    parents = [s for s in (left, right) if fits(s)]
    if parents:
        return rng.choice(parents)
    fitting = [s for s in sketches if fits(s)]
    return rng.choice(fitting) if fitting else None
