"""The structural mutation: another sketch, with the numbers that both have."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dop.search.mutator.base import nearest
from dop.space.sketch import Annotation, Sketch


def change_sketch(
    sketch: Sketch, values: Annotation, sketches: Sequence[Sketch], rng: random.Random
) -> tuple[Sketch, dict[str, int]]:
    """Another sketch of the space, shared parameters kept (or moved to the nearest choice).

    Parameters that only the new sketch has start at their default. The same pair comes back if
    there is no other sketch.
    """
    others = [s for s in sketches if s.name != sketch.name]
    if not others:
        return sketch, dict(values)
    chosen = _similar(sketch, others, rng)
    return chosen, carry(chosen, values)


def carry(sketch: Sketch, values: Annotation) -> dict[str, int]:
    """Values for `sketch`: given ones where their parameter exists, defaults elsewhere."""
    return {
        d.name: nearest(d, values[d.name]) if d.name in values else d.default
        for d in sketch.domains
    }


def _similar(sketch: Sketch, others: Sequence[Sketch], rng: random.Random) -> Sketch:
    """One of the others; the more parts of the name it shares, the likelier."""
    mine = set(sketch.name.split("/"))
    weights = [1.0 + len(mine & set(other.name.split("/"))) for other in others]
    return rng.choices(list(others), weights)[0]
