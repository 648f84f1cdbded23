"""What the lines of a log are to the families of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from dop.database.jsonl import Log
from dop.database.wire import Entry
from dop.errors import DopError, LogError, TraceError
from dop.family import Family, FamilyState
from dop.measurement import Measurement
from dop.space.sketch import Candidate, Space
from dop.space.trace import Trace
from dop.target import Target

DEFAULT_MARK = " (default)"
"""Follows the sketch's name in the records of untuned defaults."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A trace of the log; `candidate` is None if no sketch of today's space has its form."""

    trace: Trace
    sketch: str
    place: int | None
    candidate: Candidate | None


def recorded(state: FamilyState, entry: Entry) -> Recorded | None:
    """The trace of a line, parsed once for all its lines; None if it is none."""
    try:
        trace = entry.trace()
    except DopError:
        return None
    sketch = entry.sketch.removesuffix(DEFAULT_MARK)
    candidate = state.candidate(trace, sketch)
    return Recorded(trace, sketch, state.default_place(trace), candidate)


def alike(space: Space, entry: Entry) -> Candidate | None:
    """The candidate of a line in a space, or the one most like it if its sketch has changed since;
    None if no sketch of its name is left, or the line holds no trace."""
    try:
        trace = entry.trace()
    except DopError:
        return None
    return alike_trace(space, trace, entry.sketch)


def alike_trace(space: Space, trace: Trace, name: str) -> Candidate | None:
    """As `alike`, of a trace and the name of its sketch."""
    with contextlib.suppress(TraceError):
        return space.match(trace)
    name = name.removesuffix(DEFAULT_MARK)
    for sketch in space.sketches:
        values = sketch.resembling(trace) if sketch.name == name else None
        if values is not None:
            return Candidate.of(sketch, values)
    return None


def figures_of(entry: Entry) -> Measurement:
    """The line's figures, without its resources: a hundred thousand lines must load in seconds."""
    return Measurement(
        entry.seconds,
        entry.failure,
        entry.message,
        entry.accuracy,
        entry.floor_s,
        cost_s=entry.cost_s,
    )


def same_device(entry: Entry, target: Target) -> bool:
    """Whether a line was measured on a device, for its target."""
    return entry.device_name == target.device_name and entry.target_key == target.key


def check_device(log: Log, families: Sequence[Family]) -> None:
    """Refuse a log that holds nothing of this device: it was most likely named by mistake.

    Raises:
        LogError: all its records are of other devices, or of a newer version.
    """
    target = families[0].target
    if log.entries and not any(same_device(e, target) for e in log.entries):
        other = log.entries[-1]
        raise LogError(
            f"{log.path} was measured on {other.device_name} ({other.target_key}); this is "
            f"{target.device_name} ({target.key}).",
            "Give another --log; times of different devices do not compare.",
        )
    if log.contents.newer and not log.entries:
        raise LogError(
            f"{log.path} was written by a newer version of Dop.",
            "Upgrade Dop, or give another --log.",
        )
