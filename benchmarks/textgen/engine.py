"""What an arm of the comparison has to offer, whatever the engine behind it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from benchmarks.textgen.timing import Timing
from benchmarks.textgen.workload import Job

ARMS = {
    "base": "the model without adapters",
    "stock": "the engine's own LoRA kernels (transformers: PEFT's loop over the batch's adapters)",
    "tuned-json": "the engine's own kernels with tuned configs (vLLM only)",
    "dop": "dop.ops",
    "loop": "stock, but one adapter at a time: no batch mixes adapters",
}


class Arm(Protocol):
    """An engine that is loaded and serves requests."""

    def run(self, jobs: Sequence[Job], concurrency: int) -> list[Timing]:
        """Serve the jobs, at most `concurrency` in flight; their times in the same order."""
        ...

    def device_bytes(self) -> int | None:
        """Memory of the GPU that torch has handed out to the arm's process; None on a CPU."""
        ...

    def close(self) -> None:
        """Free what the arm holds; may be called twice."""
        ...


class OneAdapterAtATime:
    """The arm "loop": another arm, which gets the jobs of one adapter after the other's."""

    def __init__(self, arm: Arm) -> None:
        self._arm = arm

    def run(self, jobs: Sequence[Job], concurrency: int) -> list[Timing]:
        """Serve the jobs adapter by adapter."""

        def adapter(index: int) -> int:
            chosen = jobs[index].adapter
            return -1 if chosen is None else chosen

        found: dict[int, Timing] = {}
        for _, group in groupby(sorted(range(len(jobs)), key=adapter), key=adapter):
            mine = list(group)
            times = self._arm.run([jobs[i] for i in mine], concurrency)
            found.update(zip(mine, times, strict=True))
        return [found[i] for i in range(len(jobs))]

    def device_bytes(self) -> int | None:
        """That of the other arm."""
        return self._arm.device_bytes()

    def close(self) -> None:
        """Nothing: the other arm is closed by its owner."""
