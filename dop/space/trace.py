"""A trace: the ordered steps that turn SGMV's plain program into one kernel. The only form of a
candidate that is stored."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from dop.errors import TraceError
from dop.space.step import Json, Step, parse_step

MAX_STEPS = 512


@dataclass(frozen=True)
class Trace:
    """Steps in the order in which they are applied."""

    steps: tuple[Step, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once: the search keeps traces in sets, and their steps are many."""
        return hash(self.steps)

    def __reduce__(self) -> tuple[type[Trace], tuple[tuple[Step, ...]]]:
        """Without what is cached: another process hashes text differently."""
        return Trace, (self.steps,)

    def to_json(self) -> list[list[Json]]:
        """The steps as they are written to a log.

        Raises:
            TraceError: a step still has an open number.
        """
        return [step.to_json() for step in self.steps]

    @staticmethod
    def from_json(data: object) -> Trace:
        """Trace of its JSON form.

        Raises:
            TraceError: an element is not a step; the message gives its position.
        """
        if not isinstance(data, list):
            raise TraceError("a trace is a list of steps.")
        if len(data) > MAX_STEPS:
            raise TraceError(f"{len(data)} steps; a trace has at most {MAX_STEPS}.")
        steps = []
        for position, item in enumerate(data):
            try:
                steps.append(parse_step(item))
            except TraceError as error:
                raise TraceError(f"step {position}: {error.cause}", error.action) from error
        return Trace(tuple(steps))

    @cached_property
    def key(self) -> str:
        """Short identity of the trace: equal traces have equal keys."""
        text = json.dumps(self.to_json(), separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
