"""Questions to a log: the best per task, what failed, what it cost, and whether it is sound.

One rule stands above the rest: nothing wrong is ever reported as best. `usable` and `best` are the
only judges of that; every export and table goes through them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from dop.database.jsonl import BadLine, LogContents
from dop.database.record import Record
from dop.database.wire import Entry
from dop.errors import ConfigError, DopError, Failure, LogError, TraceError
from dop.scenario import Scenario
from dop.space.stages import Stages
from dop.space.step import (
    CacheReadStep,
    ComputeAtStep,
    FollowFusedSplitStep,
    FollowSplitStep,
    SplitStep,
    Step,
)
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload

TOLERANCE: Mapping[str, float] = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 1e-4}
"""Largest error, max |got - want| / max |want|, of a record that may be best, by element type.

The accuracy gate's own bounds (measure/accuracy.py), held here too because a log may come from
anywhere; a test keeps the two equal.
"""

MAX_TOKENS = 1 << 24
"""Most rows of a scenario that is looked into: its lengths are a list of that many numbers."""


def tolerance_of(workload_key: str) -> float:
    """The tolerance of a workload key's element type; the tightest one if it names none."""
    parts = workload_key.split("/")
    dtype = parts[1] if len(parts) > 1 else ""
    return TOLERANCE.get(dtype, min(TOLERANCE.values()))


def usable(entry: Entry) -> bool:
    """Whether an entry may be best: it ran, was checked, was right, and its times are times."""
    return (
        entry.failure is Failure.NONE
        and entry.accuracy is not None
        and 0 <= entry.accuracy <= tolerance_of(entry.workload_key)
        and 0 < entry.median_s < math.inf
    )


def ranked(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries that may be best, fastest first, by task; each trace once, tasks in file order.

    The latest measurement of a trace under a task is the one that counts, so that a lucky early
    one does not win and a trace that failed later is out. A trace that gave a wrong result under
    any scenario of a workload on a device is out under all of them.
    """
    latest: dict[tuple[str, str], Entry] = {}
    wrong: set[tuple[str, str, str]] = set()
    for entry in entries:
        if entry.failure is Failure.CORRECTNESS:
            wrong.add((entry.workload_key, entry.device_name, entry.trace_key))
        key = (entry.task_key, entry.trace_key)
        known = latest.get(key)
        if known is None or entry.timestamp >= known.timestamp:
            latest[key] = entry
    tasks: dict[str, list[Entry]] = {}
    for (task, trace), entry in latest.items():
        if usable(entry) and (entry.workload_key, entry.device_name, trace) not in wrong:
            tasks.setdefault(task, []).append(entry)
    for found in tasks.values():
        found.sort(key=attrgetter("median_s"))
    return tasks


def best(entries: Iterable[Entry], *, device: str | None = None) -> dict[str, Entry]:
    """The fastest right entry of every task that has one.

    Args:
        entries: of one log or several.
        device: only tasks of this device.

    Returns:
        By `Task.key`, in file order. Every entry's record can be had: a line whose steps are
        broken is passed over for the next.
    """
    if device is not None:
        entries = (entry for entry in entries if entry.device_name == device)
    winners = {}
    for task, found in ranked(entries).items():
        for entry in found:
            if not problems_of(entry):
                winners[task] = entry
                break
    return winners


def history(entries: Iterable[Entry], task_key: str) -> list[tuple[Entry, float]]:
    """The entries of a task in the order of their measurement, with the best time so far.

    Returns:
        Pairs of entry and seconds; infinite until the first usable entry.
    """
    found = sorted((e for e in entries if e.task_key == task_key), key=attrgetter("timestamp"))
    pairs = []
    fastest = math.inf
    for entry in found:
        if usable(entry):
            fastest = min(fastest, entry.median_s)
        pairs.append((entry, fastest))
    return pairs


def failures(entries: Iterable[Entry]) -> dict[Failure, list[Entry]]:
    """The failed entries by class, classes in the order of their numbers."""
    found: dict[Failure, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.failure is not Failure.NONE:
            found[entry.failure].append(entry)
    return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class Stats:
    """A log in figures.

    Attributes:
        records: usable lines.
        tasks: distinct tasks.
        traces: distinct traces.
        ok: records with times.
        failures: records per failure class, by the class's name.
        devices: records per device.
        targets: records per target string.
        versions: distinct versions of every tool, in order of appearance.
        first: earliest timestamp, seconds since 1970; None for an empty log.
        last: latest timestamp.
        cost_s: wall time spent on building and measuring, in seconds.
    """

    records: int
    tasks: int
    traces: int
    ok: int
    failures: dict[str, int]
    devices: dict[str, int]
    targets: dict[str, int]
    versions: dict[str, list[str]]
    first: int | None
    last: int | None
    cost_s: float


def stats(entries: Sequence[Entry]) -> Stats:
    """The figures of a log."""
    classes = Counter(entry.failure for entry in entries)
    versions: dict[str, dict[str, None]] = {}
    for seen in {id(entry.versions): entry.versions for entry in entries}.values():
        for tool, version in seen.items():
            versions.setdefault(tool, {})[version] = None
    times = [entry.timestamp for entry in entries]
    return Stats(
        records=len(entries),
        tasks=len({entry.task_key for entry in entries}),
        traces=len({entry.trace_key for entry in entries}),
        ok=classes.pop(Failure.NONE, 0),
        failures={failure.name.lower(): n for failure, n in sorted(classes.items())},
        devices=dict(Counter(entry.device_name for entry in entries)),
        targets=dict(Counter(entry.target_key for entry in entries)),
        versions={tool: list(seen) for tool, seen in versions.items()},
        first=min(times, default=None),
        last=max(times, default=None),
        cost_s=math.fsum(entry.cost_s for entry in entries if math.isfinite(entry.cost_s)),
    )


def merge(logs: Iterable[LogContents]) -> list[bytes]:
    """The lines of several logs in the order given, each measurement once.

    Two lines are the same measurement if task, target, trace, timestamp and outcome agree. Lines
    of a newer schema are carried over as they are; corrupt and torn ones are left behind.
    """
    lines: list[bytes] = []
    seen: set[object] = set()
    for contents in logs:
        for key, raw in _keyed(contents):
            if key not in seen:
                seen.add(key)
                lines.append(raw)
    return lines


def _keyed(contents: LogContents) -> Iterator[tuple[object, bytes]]:
    """Lines in file order with what identifies each."""
    numbered: list[tuple[int, object, bytes]] = [(n, raw, raw) for n, raw in contents.newer]
    numbered += [(e.line, _identity(e), e.raw) for e in contents.entries]
    for _, key, raw in sorted(numbered, key=lambda item: item[0]):
        yield key, raw


def _identity(entry: Entry) -> object:
    return entry.task_key, entry.target_key, entry.trace_key, entry.timestamp, entry.failure


def prune(contents: LogContents, keep: int, *, drop_failures: bool = False) -> list[bytes]:
    """The lines that remain: the best `keep` traces of every task, and the failures.

    Args:
        contents: the log.
        keep: traces per task, 1 or more.
        drop_failures: leave the failures out as well; a later search may then repeat them.
    """
    kept = {id(e) for found in ranked(contents.entries).values() for e in found[:keep]}
    lines: list[tuple[int, bytes]] = list(contents.newer)
    for entry in contents.entries:
        failed = entry.failure is not Failure.NONE
        if id(entry) in kept or (failed and not drop_failures):
            lines.append((entry.line, entry.raw))
    return [raw for _, raw in sorted(lines, key=lambda item: item[0])]


def problems_of(entry: Entry) -> list[str]:
    """Everything that is wrong with a line that could be read, in words; empty if it is sound."""
    found: list[str] = []
    parsers: tuple[tuple[Callable[[str], object], str], ...] = (
        (Workload.parse, entry.workload_key),
        (_scenario, entry.scenario_key),
    )
    for parse, key in parsers:
        try:
            parse(key)
        except (ConfigError, ValueError, OverflowError) as error:
            found.append(str(error))
    try:
        check_structure(entry.record().trace)
    except DopError as error:
        found.append(str(error))
    if entry.failure is Failure.NONE:
        found += _time_problems(entry)
    return found


def _scenario(key: str) -> Scenario:
    """Scenario of a key, without building one that would fill the memory."""
    tokens = key.split("/")[0].removeprefix("T")
    if tokens.isdecimal() and (len(tokens) > 9 or int(tokens) > MAX_TOKENS):
        raise ConfigError(f"a batch of {tokens[:20]} tokens is beyond any model.")
    return Scenario.parse(key)


def _time_problems(entry: Entry) -> list[str]:
    if not all(0 < s < math.inf for s in entry.seconds):
        return ["a time is not finite."]
    if entry.accuracy is None:
        return ["the accuracy is missing, so it cannot be best."]
    limit = tolerance_of(entry.workload_key)
    if not 0 <= entry.accuracy <= limit:
        return [f"its error of {entry.accuracy:.3g} is above {limit:g}, so it cannot be best."]
    return []


def check_structure(trace: Trace) -> None:
    """Checks what can be known of a trace without applying it: stages and followed splits exist.

    Raises:
        TraceError: a step names a stage or a split that is not there; it gives the position.
    """
    stages = Stages()
    for position, step in enumerate(trace.steps):
        try:
            _check_step(step, stages, trace.steps[:position])
            stages = stages.after(step)
        except TraceError as error:
            raise TraceError(f"step {position}: {error.cause}", error.action) from error


def _check_step(step: Step, stages: Stages, before: Sequence[Step]) -> None:
    stages.name(step.stage)
    if isinstance(step, ComputeAtStep):
        stages.name(step.target_stage)
        if step.target_stage == step.stage:
            raise TraceError("a stage cannot be computed inside itself.")
    if isinstance(step, CacheReadStep):
        for reader in step.reader_stages:
            stages.name(reader)
    sources: tuple[int, ...] = ()
    if isinstance(step, FollowSplitStep):
        sources = (step.src_step,)
    elif isinstance(step, FollowFusedSplitStep):
        sources = step.src_steps
    for source in sources:
        if source >= len(before) or not isinstance(before[source], SplitStep):
            raise TraceError(f"step {source} is no earlier split to follow.")


@dataclass(frozen=True, slots=True)
class Validation:
    """The outcome of checking every line of a log."""

    records: int
    newer: int
    problems: tuple[BadLine, ...]


def validate(contents: LogContents) -> Validation:
    """Checks every line: JSON, keys, trace structure, times, accuracy."""
    problems = list(contents.corrupt)
    hidden = contents.corrupt_count - len(contents.corrupt)
    if hidden:
        problems.append(BadLine(contents.corrupt[-1].line, f"and {hidden} more corrupt lines"))
    if contents.torn:
        problems.append(BadLine(contents.torn.line, f"cut off: {contents.torn.cause}"))
    for entry in contents.entries:
        problems += [BadLine(entry.line, cause) for cause in problems_of(entry)]
    problems.sort(key=lambda bad: bad.line)
    return Validation(len(contents.entries), len(contents.newer), tuple(problems))


@dataclass(frozen=True, slots=True)
class Compatibility:
    """Which entries count on a target.

    Attributes:
        entries: those measured on it.
        other_devices: records of other devices or targets, by name.
        other_versions: tools whose version differs, with the versions found.
    """

    entries: list[Entry]
    other_devices: dict[str, int] = field(default_factory=dict)
    other_versions: dict[str, list[str]] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """What a person should know, one line each."""
        found = [
            f"{count} records of {name} are kept in the log but do not count on this device."
            for name, count in self.other_devices.items()
        ]
        found += [
            f"records were measured with {tool} {', '.join(versions)}; times may differ now."
            for tool, versions in self.other_versions.items()
        ]
        return found


def target_of(record: Record) -> Target:
    """The target that a record was made for, from its target string and hardware parameters.

    Raises:
        LogError: the target string is not of the form that `Target.key` writes.
    """
    kind, *options = record.target_key.split() or [""]
    values = dict(option.lstrip("-").partition("=")[::2] for option in options)
    hardware = (*record.hardware_params, *[0] * 8)
    arch = values.get("arch" if kind == "cuda" else "mcpu")
    if kind not in ("cuda", "llvm") or not arch:
        raise LogError(
            f"{record.target_key!r} is not a target.", "It should read like cuda -arch=sm_90a."
        )
    return Target(
        kind="cuda" if kind == "cuda" else "cpu",
        arch=arch,
        device_name=record.device_name,
        units=hardware[0],
        max_threads=hardware[5],
        max_smem_bytes=hardware[3],
        max_registers=hardware[4],
        l2_bytes=0,
        vector_bytes=hardware[1],
        features=values.get("mattr", ""),
    )


def check_compatible(
    entries: Iterable[Entry], target: Target, versions: Mapping[str, str] | None = None
) -> Compatibility:
    """The entries of `target`; those of another device or target string are set apart.

    Args:
        entries: of one log or several.
        target: where the kernels shall run.
        versions: the toolchain here; a tool that an entry does not name is not compared.
    """
    mine: list[Entry] = []
    others: Counter[str] = Counter()
    differing: dict[str, dict[str, None]] = {}
    for entry in entries:
        if entry.device_name != target.device_name:
            others[entry.device_name or "an unnamed device"] += 1
        elif entry.target_key != target.key:
            others[f"{entry.device_name} ({entry.target_key})"] += 1
        else:
            mine.append(entry)
            for tool, version in (versions or {}).items():
                given = entry.versions.get(tool, version)
                if given != version:
                    differing.setdefault(tool, {})[given] = None
    return Compatibility(mine, dict(others), {t: list(v) for t, v in differing.items()})
