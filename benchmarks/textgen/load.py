"""Many requests over more adapters than there are slots: does anything break or leak?"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.textgen.engine import Arm
from benchmarks.textgen.workload import SEED, Job
from dop.errors import ConfigError

PROMPT, OUTPUT = 32, 16
"""Tokens of a request."""
WARM = 0.1
"""Share of the requests that is served before memory is looked at for the first time."""


@dataclass(frozen=True)
class Load:
    """How much is served: requests, spread evenly over adapters."""

    requests: int
    adapters: int


@dataclass(frozen=True)
class Loaded:
    """What an arm made of it.

    Attributes:
        requests, adapters: served.
        answered: requests that got all of their tokens.
        seconds: for all of them.
        bytes_before, bytes_after: memory of the GPU that is handed out; None on a CPU.
    """

    requests: int
    adapters: int
    answered: int
    seconds: float
    bytes_before: int | None
    bytes_after: int | None

    def as_dict(self) -> dict[str, Any]:
        """For the JSON lines."""
        return asdict(self)


def parse(text: str) -> Load:
    """ "2000:500".

    Raises:
        ConfigError: it is something else.
    """
    try:
        requests, adapters = (int(n) for n in text.split(":"))
        if not 1 <= adapters <= requests:
            raise ValueError(text)
    except ValueError as error:
        raise ConfigError(f"--load {text}.", "Use REQUESTS:ADAPTERS, e.g. 2000:500.") from error
    return Load(requests, adapters)


def jobs_of(load: Load, vocabulary: int, seed: int = SEED) -> list[Job]:
    """The requests: every adapter as often as any other, in random order."""
    rng = random.Random(seed)
    adapters = [i % load.adapters for i in range(load.requests)]
    rng.shuffle(adapters)
    return [
        Job([rng.randrange(1, vocabulary) for _ in range(PROMPT)], OUTPUT, adapter)
        for adapter in adapters
    ]


def run(arm: Arm, load: Load, vocabulary: int, concurrency: int) -> Loaded:
    """Serve the load; memory is read after a tenth of it was served once, and at the end."""
    jobs = jobs_of(load, vocabulary)
    arm.run(jobs[: max(concurrency, int(WARM * len(jobs)))], concurrency)
    before = arm.device_bytes()
    begin = time.monotonic()
    times = arm.run(jobs, concurrency)
    seconds = time.monotonic() - begin
    answered = sum(len(t.token_s) == j.output for t, j in zip(times, jobs, strict=True))
    return Loaded(load.requests, load.adapters, answered, seconds, before, arm.device_bytes())


def lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each arm, from `Loaded.as_dict`."""
    out = []
    for arm, one in found.items():
        line = (
            f"{arm}: {one['answered']} of {one['requests']} requests over {one['adapters']} "
            f"adapters in {one['seconds']:.0f} s"
        )
        if one["bytes_before"] is not None:
            grown = one["bytes_after"] - one["bytes_before"]
            line += f", {one['bytes_before'] >> 20} MiB of the GPU before, {grown:+d} bytes after"
        out.append(line)
    return out
