"""What a search strategy is: it is asked for candidates and told their measurements."""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

from dop.errors import ConstraintError
from dop.scenario import Scenario
from dop.search.history import History, Result
from dop.space.early import may_serve
from dop.space.sketch import Candidate, Space
from dop.target import Target
from dop.workload import Workload

_SMALL_SPACE = 20_000
"""A space up to this size is walked through once random draws find nothing new."""


class Strategy(ABC):
    """Proposes candidates of one family (a workload on a target, under several scenarios).

    It never builds or times anything. All randomness comes from `rng`: given the same seed and the
    same measurements the proposals are the same. No trace is proposed twice, nor one it was told.

    Args:
        space: what may be proposed.
        workload: the problem of the family.
        target: the device of the family.
        scenarios: the batches that every candidate is measured under.
        rng: source of all randomness.
        max_defaults: most of the sketches' heuristic defaults to propose first.
    """

    def __init__(
        self,
        space: Space,
        workload: Workload,
        target: Target,
        scenarios: Sequence[Scenario],
        rng: random.Random,
        max_defaults: int = 32,
    ) -> None:
        self.space = space
        self.workload = workload
        self.target = target
        self.scenarios = tuple(scenarios)
        self.rng = rng
        self.history = History(self.scenarios)
        self._least_tokens = min(s.tokens for s in self.scenarios)
        self._defaults = list(space.defaults()[:max_defaults])

    def ask(self, n: int) -> list[Candidate]:
        """Up to `n` new candidates: first the untuned defaults and what `first` was given, then
        what the strategy proposes.

        Fewer (or none) come back when the space is exhausted.
        """
        chosen: list[Candidate] = []
        while self._defaults and len(chosen) < n:
            default = self._defaults.pop(0)
            if self.history.mark(default):
                chosen.append(default)
        if len(chosen) < n:
            chosen += self._propose(n - len(chosen))
        return chosen

    def tell(self, results: Sequence[Result]) -> None:
        """Take in measurements, also of candidates that were not asked for (a resumed log)."""
        self.history.add(results)

    def restore(self, results: Sequence[Result]) -> None:
        """Take in what a resumed log holds, like `tell`; `learn` is left to the caller."""
        self.history.add(results)

    def learn(self) -> None:
        """Draw conclusions from everything told: the slow part of `tell`, if there is one."""
        return

    @property
    def is_new(self) -> bool:
        """Whether little is known yet, so that hints of the nearest workloads are what it needs."""
        return True

    def hint(self, candidates: Sequence[Candidate]) -> None:
        """Candidates that did well elsewhere; a strategy may use or ignore them."""
        del candidates

    def first(self, candidates: Sequence[Candidate]) -> None:
        """Candidates to propose right behind the defaults, whatever is thought of them."""
        self._defaults += candidates

    def predicted_s(self, candidate: Candidate, scenario: Scenario) -> float | None:
        """What was expected of a candidate when it was proposed, in seconds; None if nothing."""
        del candidate, scenario
        return None

    def rank_correlation(self) -> float | None:
        """Spearman correlation of predictions with what was then measured; None if unknown."""
        return None

    @abstractmethod
    def _propose(self, n: int) -> list[Candidate]:
        """Up to `n` candidates that `history.mark` accepted."""

    def _of_use(self, annotation: Iterable[tuple[str, int]]) -> bool:
        """Whether a point may serve any of the batches."""
        return may_serve(annotation, self._least_tokens)

    def _newcomers(self, n: int) -> list[Candidate]:
        """Up to `n` random new candidates, each marked as seen."""
        found: list[Candidate] = []
        for _ in range(20 * n):
            if len(found) == n:
                return found
            try:
                candidate = self.space.sample(self.rng)
            except ConstraintError:
                break
            if self._of_use(candidate.annotation) and self.history.mark(candidate):
                found.append(candidate)
        if len(found) < n and self.space.size() <= _SMALL_SPACE:
            found += self._left_over(n - len(found))
        return found

    def _left_over(self, n: int) -> list[Candidate]:
        """`n` random ones of all candidates that were not proposed yet."""
        left = [
            candidate
            for candidate in _all(self.space)
            if self._of_use(candidate.annotation)
            and not self.history.saw((candidate.sketch.name, candidate.annotation))
        ]
        self.rng.shuffle(left)
        return list(itertools.islice((c for c in left if self.history.mark(c)), n))


def _all(space: Space) -> Iterator[Candidate]:
    for sketch in space.sketches:
        names = [d.name for d in sketch.domains]
        for values in itertools.product(*(d.choices for d in sketch.domains)):
            annotation = dict(zip(names, values, strict=True))
            if sketch.broken_limit(annotation) is None:
                yield Candidate.of(sketch, annotation)
