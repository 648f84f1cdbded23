"""Warps or threads of a block."""

from __future__ import annotations

import random

from dop.search.mutator.base import StepMutator, nearest
from dop.space.sketch import Annotation, Domain, Sketch

_KEEP_PACE = 0.3
"""Share of mutations in which a tile of the same half grows or shrinks with the warps."""


class WarpsMutator(StepMutator):
    """A neighbouring count; sometimes a tile follows, so that the work per warp is kept."""

    kind = "warps"

    def mutate(
        self, sketch: Sketch, values: Annotation, domain: Domain, rng: random.Random
    ) -> dict[str, int]:
        changed = super().mutate(sketch, values, domain, rng)
        half = domain.name.partition(".")[0]
        tiles = [d for d in sketch.domains if d.kind == "tile" and d.name.partition(".")[0] == half]
        if tiles and rng.random() < _KEEP_PACE:
            tile = rng.choice(tiles)
            before, after = values[domain.name], changed[domain.name]
            changed[tile.name] = nearest(tile, values[tile.name] * after // max(1, before))
        return changed
