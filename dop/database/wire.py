"""Records as lines of JSON, and back: the wire form of the tuning log.

The line is the auto-scheduler's record, with a "dop" object for what that form lacks. A line is
data: reading one builds values and nothing else. docs/log.md describes every field.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from dop.database.record import LOG_VERSION, SCHEMA_VERSION, Record
from dop.errors import Failure, LogError, TraceError
from dop.measurement import Measurement
from dop.space.step import Step, parse_step
from dop.space.trace import MAX_STEPS, Trace

SECONDS_PER_FAILURE: tuple[float, ...] = ()
"""A failure has no time; the old form's 1e10 would look like one to whoever averages times."""

_FAILURES = {int(f): f for f in Failure}
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class NewerSchemaError(LogError):
    """A line that a newer version of Dop wrote: counted and skipped, never misread."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A line of a log with everything but its steps: light enough to keep 100,000 of them.

    Attributes:
        line: line number in its file, from 1; 0 if it is not from a file.
        raw: the line as it stands in the file, without its end.
        workload_key: `Workload.key`.
        target_key: `Target.key`.
        scenario_key: `Scenario.key`.
        device_name: `Target.device_name`.
        trace_key: `Trace.key` of the steps.
        seconds: one figure per repeat; empty on failure.
        failure: failure class.
        message: what went wrong, or "".
        accuracy: max |got - want| / max |want|; None if it was not checked.
        floor_s: least time that the bytes allow, in seconds, if known.
        predicted_s: what the cost model expected, in seconds, if it was trained.
        cost_s: wall time of building and measuring, in seconds.
        timestamp: seconds since 1970.
        sketch: name of the sketch.
        versions: toolchain versions; shared between lines that agree.
    """

    line: int
    raw: bytes
    workload_key: str
    target_key: str
    scenario_key: str
    device_name: str
    trace_key: str
    seconds: tuple[float, ...]
    failure: Failure
    message: str
    accuracy: float | None
    floor_s: float | None
    predicted_s: float | None
    cost_s: float
    timestamp: int
    sketch: str
    versions: Mapping[str, str]

    @property
    def task_key(self) -> str:
        """Same form as `Task.key`: entries of one task compete with each other."""
        return f"{self.workload_key}|{self.scenario_key}|{self.device_name}"

    @property
    def ok(self) -> bool:
        """Whether the candidate ran and was right."""
        return self.failure is Failure.NONE

    @property
    def median_s(self) -> float:
        """Median time in seconds; infinite for a failure."""
        seconds = self.seconds
        if len(seconds) % 2:  # a report asks half a million times
            return seconds[0] if len(seconds) == 1 else sorted(seconds)[len(seconds) // 2]
        return statistics.median(seconds) if seconds else math.inf

    def measurement(self) -> Measurement:
        """What came out, without the resources: all that a search wants to know, and quick."""
        return Measurement(
            self.seconds,
            self.failure,
            self.message,
            self.accuracy,
            self.floor_s,
            cost_s=self.cost_s,
        )

    def trace(self) -> Trace:
        """The steps alone; traces that share steps share their objects.

        Raises:
            TraceError: they are not steps.
            LogError: the line is not what it was.
        """
        cut = _cut(self.raw)
        return self.record().trace if cut is None else _trace(cut[0])

    def record(self) -> Record:
        """The whole record, steps included.

        Raises:
            TraceError: the line is whole but its steps are not steps.
            LogError: another field is not what it should be.
        """
        cut = _cut(self.raw)
        try:
            data = orjson.loads(self.raw if cut is None else cut[1])
            trace = Trace.from_json(data["i"][1][1]) if cut is None else _trace(cut[0])
        except ValueError as error:
            raise LogError(f"not JSON ({str(error)[:80]})") from error
        return _record(data, self, trace)


def dump(record: Record) -> bytes:
    """The record as one line of JSON, without a line end.

    Raises:
        LogError: the record would not read back equal (a number out of range, open numbers).
    """
    try:
        steps = record.trace.to_json()
        if Trace.from_json(steps) != record.trace:
            raise LogError(
                f"a {record.sketch or 'nameless'} trace does not survive being written.",
                "Use plain ints and strings in its steps.",
            )
    except TraceError as error:
        raise LogError(f"a record cannot be written: {error.cause}", error.action) from error
    measurement = record.measurement
    line: dict[str, object] = {
        "i": [
            [record.workload_key, record.target_key, list(record.hardware_params), "", 0, []],
            [[], steps],
        ],
        "r": [
            [_number_out(s) for s in measurement.seconds] or list(SECONDS_PER_FAILURE),
            int(measurement.failure),
            _number_out(measurement.cost_s),
            record.timestamp,
        ],
        "v": LOG_VERSION,
        "dop": _extras(record),
    }
    try:
        return orjson.dumps(line)
    except TypeError:
        pass  # text that is not Unicode, such as a compiler's output, or a number too large
    try:
        return orjson.dumps(_printable(line))
    except TypeError as error:
        raise LogError(
            f"a record of {record.task_key} cannot be written: {error}.",
            "Seeds, timestamps and resources must fit in 64 bits.",
        ) from error


def _extras(record: Record) -> dict[str, object]:
    measurement = record.measurement
    return {
        "schema": SCHEMA_VERSION,
        "scenario": record.scenario_key,
        "device": record.device_name,
        "versions": dict(record.versions),
        "accuracy": _number_out(measurement.accuracy),
        "failure": measurement.failure.name.lower(),
        "message": measurement.message,
        "resources": {name: _number_out(v) for name, v in measurement.resources.items()},
        "seed": record.seed,
        "revision": record.revision,
        "sketch": record.sketch,
        "predicted_s": _number_out(record.predicted_s),
        "floor_s": _number_out(measurement.floor_s),
    }


def _number_out(value: float | None) -> float | int | str | None:
    """JSON has no infinity: it and nan are written as words, or they would come back as null."""
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    if math.isfinite(number):
        return number
    return "nan" if math.isnan(number) else ("inf" if number > 0 else "-inf")


def _printable(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_printable(v) for v in value]
    if isinstance(value, dict):
        return {str(_printable(k)): _printable(v) for k, v in value.items()}
    return value


def parse(line: bytes) -> Record:
    """The record of a line.

    Raises:
        NewerSchemaError: a newer version wrote it.
        LogError: the line is not a record; the cause says which part.
        TraceError: its steps are not steps.
    """
    return parse_entry(line).record()


@dataclass(frozen=True, slots=True)
class Shared:
    """What the lines of a log have in common, so that it is kept and checked once.

    Attributes:
        versions: by their items.
        steps: keys of the traces whose text was found to be JSON; a trace is measured under many
            scenarios, and reading its steps is most of the work of reading a line.
    """

    versions: dict[object, Mapping[str, str]] = field(default_factory=dict)
    steps: set[str] = field(default_factory=set)


def parse_entry(line: bytes, number: int = 0, shared: Shared | None = None) -> Entry:
    """The light view of a line; its steps are JSON, but not looked into.

    Args:
        line: one line of the log, with or without its end.
        number: its number in the file.
        shared: what the lines before it had.

    Raises:
        NewerSchemaError: a newer version wrote it.
        LogError: the line is not a record; the cause says which part.
    """
    raw = line.strip()
    shared = shared or Shared()
    try:
        data, key = _load(raw, shared.steps)
    except ValueError as error:  # includes invalid UTF-8 and too deep a nesting
        raise LogError(f"not JSON ({str(error)[:80]})") from error
    try:
        return _entry(data, raw, key, number, shared.versions)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise LogError(_why(error)) from error


_STEPS_BEGIN, _STEPS_END = b"],[[],[", b']]],"r":['
"""What stands around the steps in a line that `dump` wrote."""


def _cut(raw: bytes) -> tuple[bytes, bytes] | None:
    """The steps' own bytes, and the line with `[]` in their place; None for an unusual line."""
    if raw.count(_STEPS_BEGIN) != 1 or raw.count(_STEPS_END) != 1:
        return None
    begin = raw.index(_STEPS_BEGIN) + len(_STEPS_BEGIN) - 1
    end = raw.index(_STEPS_END) + 1
    return (raw[begin:end], raw[:begin] + b"[]" + raw[end:]) if begin < end else None


def _load(raw: bytes, known: set[str]) -> tuple[Any, str]:
    """The line as data, without its steps if their key could be had from their bytes."""
    cut = _cut(raw)
    # What json.dumps escapes and orjson does not would give another key.
    if cut is None or not cut[0].isascii() or b"\x7f" in cut[0]:
        return orjson.loads(raw), ""
    text, rest = cut
    key = hashlib.sha256(text).hexdigest()[:16]
    data = orjson.loads(rest)
    if key not in known:
        orjson.loads(text)
        known.add(key)
    return data, key


@functools.lru_cache(maxsize=4096)
def _trace(text: bytes) -> Trace:
    data = orjson.loads(text)
    try:
        if len(data) <= MAX_STEPS:
            return Trace(tuple([_step(orjson.dumps(item)) for item in data]))
    except (TraceError, TypeError):  # TypeError: nested too deep to be written
        pass
    return Trace.from_json(data)  # names what is wrong and where


@functools.lru_cache(maxsize=1 << 14)
def _step(text: bytes) -> Step:
    """The step of its text: the thousands of traces of a log share most of theirs."""
    return parse_step(orjson.loads(text))


def _trace_key(steps: list[Any]) -> str:
    """`Trace.key` of steps that were read in full."""
    with contextlib.suppress(TraceError):  # named when the record is asked for
        return Trace.from_json(steps).key
    return hashlib.sha256(orjson.dumps(steps)).hexdigest()[:16]


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f'"{error.args[0]}" is missing'
    if isinstance(error, IndexError):
        return "a list is too short"
    return str(error)[:160]


def _entry(
    data: Any, raw: bytes, key: str, number: int, versions: dict[object, Mapping[str, str]]
) -> Entry:
    if not isinstance(data, dict):
        raise ValueError("a record is an object")
    extras = data["dop"]
    if not isinstance(extras, dict):
        raise ValueError('"dop" is not an object')
    _check_schema(extras["schema"])
    head, state = _list(data["i"], "i", 2)[:2]
    _list(head, "i[0]", 2)
    steps = _list(_list(state, "i[1]", 2)[1], "the steps", 0)
    seconds, error_no, cost, timestamp = _list(data["r"], "r", 4)[:4]
    failure = _failure(error_no, extras.get("failure"))
    return Entry(
        line=number,
        raw=raw,
        workload_key=sys.intern(_text(head[0], "the workload key")),
        target_key=sys.intern(_text(head[1], "the target")),
        scenario_key=sys.intern(_text(extras["scenario"], "the scenario")),
        device_name=sys.intern(_text(extras["device"], "the device")),
        trace_key=key or _trace_key(steps),
        seconds=_seconds(seconds, failure),
        failure=failure,
        message=_text(extras.get("message", ""), "the message"),
        accuracy=_number(extras.get("accuracy"), "the accuracy"),
        floor_s=_number(extras.get("floor_s"), "floor_s"),
        predicted_s=_number(extras.get("predicted_s"), "predicted_s"),
        cost_s=_needed(cost, "the cost"),
        timestamp=_index(timestamp, "the timestamp"),
        sketch=sys.intern(_text(extras.get("sketch", ""), "the sketch")),
        versions=_versions(extras.get("versions", {}), versions),
    )


def _check_schema(schema: object) -> None:
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise ValueError("the schema version is not a number")
    if schema > SCHEMA_VERSION:
        raise NewerSchemaError(
            f"schema {schema} is newer than {SCHEMA_VERSION}, the newest that this version reads",
            "Upgrade Dop to use it.",
        )


def _failure(error_no: object, name: object) -> Failure:
    """The failure class; its number and its name must agree, so that no failure is overlooked."""
    if isinstance(error_no, bool) or not isinstance(error_no, int):
        raise ValueError("error_no is not a number")
    failure = _FAILURES.get(error_no)
    if failure is None:
        raise ValueError(f"error_no {error_no} is unknown")
    if name is not None and name != failure.name.lower():
        raise ValueError(f"error_no {error_no} and failure {str(name)[:40]!r} disagree")
    return failure


def _seconds(value: object, failure: Failure) -> tuple[float, ...]:
    if failure is not Failure.NONE:
        return SECONDS_PER_FAILURE
    seconds = tuple(_list(value, "the times", 1))
    if not all(type(s) is float for s in seconds):
        seconds = tuple([_needed(s, "a time") for s in seconds])
    if not min(seconds) > 0 or any(s != s for s in seconds):
        raise ValueError("a time is not positive")
    return seconds


def _versions(value: object, shared: dict[object, Mapping[str, str]]) -> Mapping[str, str]:
    if isinstance(value, dict):
        known = shared.get(tuple(value.items()))
        if known is not None:
            return known
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ValueError("the versions are not names with texts")
    return shared.setdefault(tuple(value.items()), value)


def _record(data: Any, entry: Entry, trace: Trace) -> Record:
    head, extras = data["i"][0], data["dop"]
    try:
        hardware = head[2] if len(head) > 2 else []
        resources = extras.get("resources", {})
        if not isinstance(resources, dict):
            raise ValueError("the resources are not names with numbers")
        measurement = Measurement(
            entry.seconds,
            entry.failure,
            entry.message,
            entry.accuracy,
            entry.floor_s,
            {name: _needed(v, f"resource {name}") for name, v in resources.items()},
            entry.cost_s,
        )
        return Record(
            workload_key=entry.workload_key,
            target_key=entry.target_key,
            hardware_params=tuple(_whole(n, "hardware_params") for n in hardware),
            scenario_key=entry.scenario_key,
            device_name=entry.device_name,
            trace=trace,
            measurement=measurement,
            timestamp=entry.timestamp,
            sketch=entry.sketch,
            versions=entry.versions,
            seed=_whole(extras.get("seed", 0), "the seed"),
            revision=_text(extras.get("revision", ""), "the revision"),
            predicted_s=entry.predicted_s,
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise LogError(_why(error)) from error


def _list(value: object, what: str, at_least: int) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is not a list")
    if len(value) < at_least:
        raise ValueError(f"{what} has {len(value)} elements, {at_least} wanted")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is not a text")
    return value


def _number(value: Any, what: str) -> float | None:
    if value is None or type(value) is float:
        return value
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is not a number")
    return value


def _needed(value: Any, what: str) -> float:
    number = _number(value, what)
    if number is None:
        raise ValueError(f"{what} is missing")
    return number


def _whole(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{what} is not a whole number")
    return value


def _index(value: object, what: str) -> int:
    number = _whole(value, what)
    if number < 0:
        raise ValueError(f"{what} is negative")
    return number
