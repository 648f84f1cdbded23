"""Sketches, annotations and candidates: structure, numbers, and the two together."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from dop.errors import ConstraintError, TraceError
from dop.space.step import Param, Step
from dop.space.trace import Trace

Annotation = Mapping[str, int]
"""Value of every parameter of a sketch, by name."""

KINDS = (
    "tile",
    "split_k",
    "vector",
    "unroll",
    "location",
    "pipeline",
    "warps",
    "align",
    "binding",
)
"""What a parameter decides; there is one mutator per kind."""


@dataclass(frozen=True, slots=True)
class Domain:
    """The values a parameter may take.

    Attributes:
        name: the parameter, "<half>.<what>"; the half ("shrink", "expand", "tokens") is what
            crossover swaps.
        kind: one of KINDS.
        choices: allowed values, ascending.
        default: value in the untuned heuristic candidate.
    """

    name: str
    kind: str
    choices: tuple[int, ...]
    default: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is not a kind of parameter")
        if self.default not in self.choices or list(self.choices) != sorted(set(self.choices)):
            raise ValueError(f"{self.name}: default {self.default} of {self.choices}")


@dataclass(frozen=True, slots=True)
class Limit:
    """A quantity of a candidate and the most it may be.

    Attributes:
        name: what is limited, with its unit ("threads per block", "shared memory bytes").
        maximum: largest allowed value.
        value: the quantity as a function of the annotation.
    """

    name: str
    maximum: int
    value: Callable[[Annotation], int]


@dataclass(frozen=True, slots=True)
class Sketch:
    """A structure with open numbers, derived by rules.

    Attributes:
        name: the choices that led here, joined by "/": readable and unique within a space.
        steps: the trace, with Param where a number is open.
        domains: one per parameter.
        limits: checked before anything is built.
        estimates: quantities a cost model may use, by name ("threads", "smem_bytes", ...).
    """

    name: str
    steps: tuple[Step, ...]
    domains: tuple[Domain, ...]
    limits: tuple[Limit, ...] = ()
    estimates: Mapping[str, Callable[[Annotation], float]] = field(default_factory=dict)

    def default(self) -> dict[str, int]:
        """The heuristic annotation: every parameter at its default."""
        return {d.name: d.default for d in self.domains}

    def sample(self, rng: random.Random) -> dict[str, int]:
        """A random annotation; it may break a limit."""
        return {d.name: rng.choice(d.choices) for d in self.domains}

    def broken_limit(self, annotation: Annotation) -> str | None:
        """The first limit that the annotation breaks, in words, or None."""
        for domain in self.domains:
            if annotation.get(domain.name) not in domain.choices:
                value = annotation.get(domain.name)
                return f"{domain.name} = {value} is not one of {domain.choices}"
        for limit in self.limits:
            value = limit.value(annotation)
            if value > limit.maximum:
                return f"{limit.name}: {value}, at most {limit.maximum}"
        return None

    def excess(self, annotation: Annotation) -> float:
        """How far an annotation within the domains is beyond the limits: 0 where it is valid."""
        over = ((limit.value(annotation), limit.maximum) for limit in self.limits)
        return sum(math.log2((value + 1) / (most + 1)) for value, most in over if value > most)

    def bind(self, annotation: Annotation) -> Trace:
        """The trace for an annotation.

        Raises:
            ConstraintError: the annotation breaks a limit.
        """
        broken = self.broken_limit(annotation)
        if broken:
            raise ConstraintError(f"{self.name}: {broken}.")
        return Trace(tuple(step.bind(annotation) for step in self.steps))

    def match(self, trace: Trace) -> dict[str, int] | None:
        """The annotation that turns this sketch into `trace`, or None if there is none."""
        if len(trace.steps) != len(self.steps):
            return None
        found: dict[str, int] = {}
        for mine, given in zip(self.steps, trace.steps, strict=True):
            if mine == given:  # most steps have no open number
                continue
            if type(mine) is not type(given):
                return None
            names = mine.__match_args__
            if not all(_unify(getattr(mine, n), getattr(given, n), found) for n in names):
                return None
        if any(d.name not in found for d in self.domains):
            return None
        return None if self.broken_limit(found) else found

    def resembling(self, trace: Trace) -> dict[str, int] | None:
        """An annotation like that of a trace which another version of this sketch made.

        Read off the longest common run of steps; parameters that it does not tell keep their
        defaults. None if that breaks a limit, or if less than half of the steps are common.
        """
        pairs = _common(self.steps, trace.steps)
        if 2 * len(pairs) < len(self.steps):
            return None
        found: dict[str, int] = {}
        for mine, given in pairs:
            for name in mine.__match_args__:
                _unify(getattr(mine, name), getattr(given, name), found)
        values = {d.name: d.default for d in self.domains}
        values |= {d.name: found[d.name] for d in self.domains if found.get(d.name) in d.choices}
        return None if self.broken_limit(values) else values


def _common(mine: Sequence[Step], given: Sequence[Step]) -> list[tuple[Step, Step]]:
    """Steps of a sketch with those of a trace that they may stand for, in order, as many as
    possible: the longest common subsequence."""
    same = [[_stands_for(m, g) for g in given] for m in mine]
    longest = [[0] * (len(given) + 1) for _ in range(len(mine) + 1)]
    for i in reversed(range(len(mine))):
        for j in reversed(range(len(given))):
            longest[i][j] = (
                1 + longest[i + 1][j + 1]
                if same[i][j]
                else max(longest[i + 1][j], longest[i][j + 1])
            )
    pairs, i, j = [], 0, 0
    while i < len(mine) and j < len(given):
        if same[i][j]:
            pairs.append((mine[i], given[j]))
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def _stands_for(mine: Step, given: Step) -> bool:
    if type(mine) is not type(given):
        return False
    found: dict[str, int] = {}
    return all(_unify(getattr(mine, n), getattr(given, n), found) for n in mine.__match_args__)


def _unify(mine: object, given: object, found: dict[str, int]) -> bool:
    if isinstance(mine, Param):
        if not isinstance(given, int):
            return False
        value = given - mine.offset
        return found.setdefault(mine.name, value) == value
    if isinstance(mine, tuple) and any(isinstance(m, Param) for m in mine):
        values = given if isinstance(given, tuple) else (given,)
        if len(values) != len(mine):
            return False
        return all(
            _unify(m, g, found)
            for m, g in zip(mine, cast(tuple[object, ...], values), strict=False)
        )
    return mine == given


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sketch with its annotation; `trace` is what gets built and stored."""

    sketch: Sketch
    annotation: tuple[tuple[str, int], ...]
    trace: Trace

    @staticmethod
    def of(sketch: Sketch, annotation: Annotation) -> Candidate:
        """The candidate of an annotation.

        Raises:
            ConstraintError: the annotation breaks a limit.
        """
        values = tuple(sorted(annotation.items()))
        return Candidate(sketch, values, sketch.bind(annotation))

    @property
    def values(self) -> dict[str, int]:
        """The annotation as a dictionary."""
        return dict(self.annotation)


@dataclass(frozen=True, slots=True)
class Space:
    """All sketches of one workload on one target."""

    sketches: tuple[Sketch, ...]

    def __post_init__(self) -> None:
        if not self.sketches:
            raise ConstraintError("the search space is empty: no rule fits this workload.")

    def sample(self, rng: random.Random, tries: int = 200) -> Candidate:
        """A random candidate within all limits: first a sketch, then its numbers.

        Raises:
            ConstraintError: no valid candidate was found in `tries` draws.
        """
        for _ in range(tries):
            sketch = rng.choice(self.sketches)
            annotation = sketch.sample(rng)
            if sketch.broken_limit(annotation) is None:
                return Candidate.of(sketch, annotation)
        raise ConstraintError(f"no valid candidate in {tries} draws.", "Relax the limits.")

    def defaults(self) -> tuple[Candidate, ...]:
        """The untuned heuristic candidate of every sketch that has a valid one, in order."""
        return tuple(
            Candidate.of(sketch, sketch.default())
            for sketch in self.sketches
            if sketch.broken_limit(sketch.default()) is None
        )

    def match(self, trace: Trace) -> Candidate:
        """The candidate of a trace.

        Raises:
            TraceError: no sketch of the space has this structure.
        """
        for sketch in self.sketches:
            annotation = sketch.match(trace)
            if annotation is not None:
                return Candidate.of(sketch, annotation)
        raise TraceError("the trace belongs to no sketch of this space.")

    def size(self) -> int:
        """Number of annotations over all sketches, limits not counted."""
        total = 0
        for sketch in self.sketches:
            points = 1
            for domain in sketch.domains:
                points *= len(domain.choices)
            total += points
        return total
