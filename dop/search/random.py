"""Random search: the yardstick for every other strategy."""

from __future__ import annotations

from dop.search.strategy import Strategy
from dop.space.sketch import Candidate


class RandomStrategy(Strategy):
    """The defaults, then uniform draws (a sketch, then its numbers), none twice."""

    def _propose(self, n: int) -> list[Candidate]:
        return self._newcomers(n)
