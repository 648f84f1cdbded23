"""Making a point valid that breaks a limit.

Parameters that limits tie together (a tile's rows, the warps that share them, the registers that a
block has) never move if every change must be valid alone.
"""

from __future__ import annotations

import random

from dop.space.sketch import Annotation, Sketch

ROUNDS = 4
"""Further changes at most."""

TRIES = 8
"""Changes among which a round takes the best."""


def repaired(
    sketch: Sketch, values: Annotation, kept: frozenset[str], rng: random.Random
) -> dict[str, int] | None:
    """The point with a few more changes, each towards the limits; None if that does not help.

    Args:
        kept: parameters that stay as they are.
    """
    found = dict(values)
    others = [d for d in sketch.domains if len(d.choices) > 1 and d.name not in kept]
    excess = sketch.excess(found)
    for _ in range(ROUNDS if others else 0):
        if excess <= 0:
            break
        domains = [rng.choice(others) for _ in range(TRIES)]
        changed = [found | {d.name: rng.choice(d.choices)} for d in domains]
        less, place = min((sketch.excess(values), i) for i, values in enumerate(changed))
        if less < excess:
            excess, found = less, changed[place]
    return None if excess > 0 else found
