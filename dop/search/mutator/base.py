"""What a mutator is: it changes one parameter, sometimes with others that must keep pace."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import ClassVar

from dop.space.sketch import Annotation, Domain, Sketch


class Mutator(ABC):
    """Changes parameters of one kind; stays within the domains, not always within the limits."""

    kind: ClassVar[str]

    @abstractmethod
    def mutate(
        self, sketch: Sketch, values: Annotation, domain: Domain, rng: random.Random
    ) -> dict[str, int]:
        """A copy of `values` in which `domain`'s parameter differs.

        A domain with one choice is returned unchanged.
        """


class StepMutator(Mutator):
    """Moves to a neighbouring choice, seldom further: distance d has probability ~ 2**-d."""

    reach: ClassVar[float] = 0.5
    """Probability of going one choice further."""

    def mutate(
        self, sketch: Sketch, values: Annotation, domain: Domain, rng: random.Random
    ) -> dict[str, int]:
        del sketch
        changed = dict(values)
        changed[domain.name] = neighbour(domain, values[domain.name], rng, self.reach)
        return changed


class AnyMutator(Mutator):
    """Jumps to any other choice: for parameters whose choices have no order."""

    def mutate(
        self, sketch: Sketch, values: Annotation, domain: Domain, rng: random.Random
    ) -> dict[str, int]:
        del sketch
        changed = dict(values)
        others = [c for c in domain.choices if c != values[domain.name]]
        if others:
            changed[domain.name] = rng.choice(others)
        return changed


def neighbour(domain: Domain, value: int, rng: random.Random, reach: float) -> int:
    """Another choice near `value`; `value` itself if it is the only one."""
    choices = domain.choices
    if len(choices) == 1:
        return value
    here = choices.index(value)
    distance = 1
    while distance < len(choices) - 1 and rng.random() < reach:
        distance += 1
    sides = [i for i in (here - distance, here + distance) if 0 <= i < len(choices)]
    while not sides:
        distance -= 1
        sides = [i for i in (here - distance, here + distance) if 0 <= i < len(choices)]
    return choices[rng.choice(sides)]


def nearest(domain: Domain, value: int) -> int:
    """The allowed choice closest to `value` by ratio (by difference where one is not positive)."""

    def distance(choice: int) -> tuple[float, int]:
        if choice > 0 and value > 0:
            return (max(choice, value) / min(choice, value), choice)
        return (abs(choice - value) + 1.0, choice)

    return min(domain.choices, key=distance)
