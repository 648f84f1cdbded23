"""Tile sizes."""

from __future__ import annotations

import random

from dop.search.mutator.base import StepMutator, nearest
from dop.space.sketch import Annotation, Domain, Sketch

_EXCHANGE = 0.3
"""Share of mutations that hand the factor to another tile, so that their product is kept."""


class TileMutator(StepMutator):
    """A neighbouring size; sometimes another tile of the same half gives or takes the factor."""

    kind = "tile"

    def mutate(
        self, sketch: Sketch, values: Annotation, domain: Domain, rng: random.Random
    ) -> dict[str, int]:
        changed = super().mutate(sketch, values, domain, rng)
        half = domain.name.partition(".")[0]
        others = [
            d
            for d in sketch.domains
            if d.kind == "tile" and d.name != domain.name and d.name.partition(".")[0] == half
        ]
        if others and rng.random() < _EXCHANGE:
            other = rng.choice(others)
            before, after = values[domain.name], changed[domain.name]
            wanted = values[other.name] * before // max(1, after)
            changed[other.name] = nearest(other, wanted)
        return changed
