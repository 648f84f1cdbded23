"""What a cost model is: it ranks candidates before they are built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dop.scenario import Scenario
from dop.space.sketch import Sketch

FloatArray = NDArray[np.float64]


class Point(Protocol):
    """Anything with a sketch and its numbers: a candidate, or one that was not bound yet."""

    @property
    def sketch(self) -> Sketch:
        """The structure."""
        ...

    @property
    def annotation(self) -> tuple[tuple[str, int], ...]:
        """The numbers, sorted by name."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """What was measured at a point: `seconds` is infinite for a failure.

    `scenario_key` is `scenario.key`, made once: a long log has it looked up a million times.
    """

    point: Point
    scenario: Scenario
    seconds: float
    scenario_key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scenario_key", self.scenario.key)


class CostModel(ABC):
    """Learns from samples of one workload and predicts times under its scenarios."""

    @property
    @abstractmethod
    def trained(self) -> bool:
        """Whether predictions mean anything yet."""

    @abstractmethod
    def update(self, samples: Sequence[Sample]) -> None:
        """Train anew on all samples so far."""

    @abstractmethod
    def predict(self, points: Sequence[Point], scenarios: Sequence[Scenario]) -> FloatArray:
        """log(time / best time known for the scenario): [points, scenarios]; lower is faster.

        Only meaningful once `trained`.
        """

    def deviation(self, points: Sequence[Point], scenarios: Sequence[Scenario]) -> FloatArray:
        """Standard deviation of `predict` in log time; 0 where the model does not know it."""
        return np.zeros((len(points), len(scenarios)))

    def least_known(
        self, points: Sequence[Point], scenarios: Sequence[Scenario], n: int
    ) -> list[int]:
        """Indices of `n` points that together leave the least unknown; none if it cannot say."""
        del points, scenarios, n
        return []


class NoModel(CostModel):
    """Knows nothing: every point is alike, so the order stays random."""

    @property
    def trained(self) -> bool:
        return False

    def update(self, samples: Sequence[Sample]) -> None:
        del samples

    def predict(self, points: Sequence[Point], scenarios: Sequence[Scenario]) -> FloatArray:
        return np.zeros((len(points), len(scenarios)))
