"""The figures of a report, taken from a log's light entries: no TVM, no drawing.

A log of 100,000 records is passed over a few times and never parsed as a whole; what is drawn is
thinned here, so that the report's size does not grow with the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dop.database import query
from dop.database.jsonl import LogContents
from dop.database.wire import Entry
from dop.errors import ConfigError, DopError, Failure, LogError
from dop.scenario import COLD, MIXES
from dop.workload import Workload

DEFAULT_MARK = " (default)"
"""Follows the sketch's name in the records of untuned defaults; `dop.tune.DEFAULT_MARK`."""

MAX_POINTS = 600
"""Points of one predicted-against-measured chart; more are thinned evenly."""

NO_PLACE = 1 << 30
"""Place of a default whose sketch the rules do not derive any more."""

WORST_RATIO = 100.0
"""Slower than this times the task's best counts as this slow in a sketch's distribution."""


@dataclass(slots=True)
class TaskView:
    """One task: what is best, and how the search came to it. Times in microseconds.

    Attributes:
        curve: pairs of (candidates of the family so far, best time so far), improvements only.
        default_us: the untuned heuristic default: of the first sketch of the space whose default
            worked, which is at `default_place`; None if the log holds none.
        candidates: records of the task; `failed` of them have no time.
        line: where the best stands in the log.
    """

    key: str
    workload_key: str
    scenario_key: str
    device: str
    tokens: int
    mix: str
    adapters: int
    cold: bool
    best_us: float | None = None
    floor_us: float | None = None
    default_us: float | None = None
    accuracy: float | None = None
    sketch: str = ""
    line: int = 0
    trace_key: str = ""
    candidates: int = 0
    failed: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    default_place: int = NO_PLACE

    @property
    def speedup(self) -> float | None:
        """Time of the default over that of the best."""
        if self.best_us is None or self.default_us is None:
            return None
        return self.default_us / self.best_us

    @property
    def over_floor(self) -> float | None:
        """Time of the best over its floor."""
        if self.best_us is None or not self.floor_us:
            return None
        return self.best_us / self.floor_us


@dataclass(slots=True)
class FamilyView:
    """Tasks of one workload on one device: a candidate is built once for all of them.

    Attributes:
        trials: distinct candidates.
        points: (predicted, measured) in microseconds, thinned.
        predictions: how many records carry a prediction.
        spearman: mean over the tasks of the rank correlation of predicted and measured.
        winner: the record that wins most tasks; None if nothing worked.
        winner_tasks: how many it wins.
    """

    workload_key: str
    device: str
    tasks: list[TaskView]
    trials: int
    points: list[tuple[float, float]]
    predictions: int
    spearman: float | None
    winner: Entry | None
    winner_tasks: int

    @property
    def title(self) -> str:
        """The shapes in words."""
        return workload_words(self.workload_key)


@dataclass(slots=True)
class SketchView:
    """What one structure gave, over all tasks.

    Attributes:
        records: its records; `failed` of them have no time.
        wins: tasks whose best it is.
        near: best time of this sketch over the task's best, geometric mean over its tasks.
        quantiles: 10, 50 and 90 % quantiles of (time / the task's best) of its records.
    """

    name: str
    records: int
    failed: int
    wins: int
    near: float | None
    quantiles: tuple[float, float, float] | None


@dataclass(slots=True)
class FailureView:
    """One failure class: how often, and its most frequent message with a line to look at."""

    name: str
    count: int
    share: float
    message: str
    line: int


@dataclass(slots=True)
class ReportData:
    """Everything a report shows."""

    path: str
    sha256: str
    stats: query.Stats
    families: list[FamilyView]
    sketches: list[SketchView]
    failures: list[FailureView]
    warnings: list[str]

    @property
    def tasks(self) -> list[TaskView]:
        """Every task, family by family."""
        return [task for family in self.families for task in family.tasks]


def collect(contents: LogContents, tasks: Sequence[str] = ()) -> ReportData:
    """The figures of a log.

    Args:
        contents: the log as it was read.
        tasks: keep only tasks whose key contains one of these texts; empty keeps all.

    Raises:
        LogError: the log holds no record, or none of a task that was asked for.
    """
    contents.require_entries()
    entries = contents.entries
    if tasks:
        entries = [e for e in entries if any(text in e.task_key for text in tasks)]
        if not entries:
            raise LogError(
                f"{contents.path} holds no task whose name contains {' or '.join(tasks)}.",
                "dop log best lists its tasks.",
            )
    winners = query.best(entries)
    views = _tasks(entries, winners)
    return ReportData(
        path=str(contents.path),
        sha256=_digest(contents.path),
        stats=query.stats(entries),
        families=_families(entries, views, winners),
        sketches=_sketches(entries, winners),
        failures=_failures(entries),
        warnings=contents.warnings(),
    )


def workload_words(key: str) -> str:
    """A workload key for a heading: shapes, rank, type."""
    try:
        workload = Workload.parse(key)
    except ConfigError:
        return key
    widths = " + ".join(map(str, workload.out_features))
    shape = f"{workload.in_features} \N{RIGHTWARDS ARROW} {widths}"
    return f"{shape}, rank {workload.rank}, {workload.dtype}"


def split_scenario(key: str) -> tuple[int, str, int]:
    """Tokens, mix and adapters of a scenario key; zeros where it is not one."""
    tokens, mix, *rest = [*key.split("/"), "", ""]
    count = int(tokens[1:]) if tokens[:1] == "T" and tokens[1:].isdecimal() else 0
    if mix == "recorded":
        return count, mix, len([n for n in rest[0].split(",") if n])
    return count, mix, int(rest[0]) if rest[0].isdecimal() else 0


def _digest(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
    return ""


def _tasks(entries: Iterable[Entry], winners: dict[str, Entry]) -> dict[str, TaskView]:
    """Views by task key, in file order, with their search curves."""
    wrong = {
        (e.workload_key, e.device_name, e.trace_key)
        for e in entries
        if e.failure is Failure.CORRECTNESS
    }
    views: dict[str, TaskView] = {}
    trials: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    places: dict[tuple[str, str], dict[str, int]] = {}
    for entry in entries:
        seen = trials[entry.workload_key, entry.device_name]
        trial = seen.setdefault(entry.trace_key, len(seen) + 1)
        key = entry.task_key
        if key not in views:
            views[key] = _new_task(entry, winners.get(key))
        view = views[key]
        view.candidates += 1
        view.failed += not entry.ok
        if (entry.workload_key, entry.device_name, entry.trace_key) in wrong:
            continue
        if query.usable(entry):
            _advance(view, trial, entry)
            if entry.sketch.endswith(DEFAULT_MARK):
                where = entry.workload_key, entry.device_name
                if where not in places:
                    places[where] = _places(entry)
                _take_default(view, entry, places[where])
    return views


def _places(entry: Entry) -> dict[str, int]:
    """Place of every sketch of the entry's space, by name: answers arrive out of order."""
    from dop.space.generate import derive

    with contextlib.suppress(DopError, ValueError):
        target = query.target_of(entry.record())
        sketches = derive(Workload.parse(entry.workload_key), target)
        return {sketch.name: place for place, sketch in enumerate(sketches)}
    return {}


def _take_default(view: TaskView, entry: Entry, places: dict[str, int]) -> None:
    """Keep the default of the first sketch; among unknown sketches the first record."""
    place = places.get(entry.sketch.removesuffix(DEFAULT_MARK), NO_PLACE)
    if view.default_us is None or place < view.default_place:
        view.default_us, view.default_place = entry.median_s * 1e6, place


def _new_task(entry: Entry, best: Entry | None) -> TaskView:
    tokens, mix, adapters = split_scenario(entry.scenario_key)
    view = TaskView(
        key=entry.task_key,
        workload_key=entry.workload_key,
        scenario_key=entry.scenario_key,
        device=entry.device_name,
        tokens=tokens,
        mix=mix,
        adapters=adapters,
        cold=entry.scenario_key.endswith(COLD),
    )
    if best is not None:
        view.best_us = best.median_s * 1e6
        view.floor_us = None if best.floor_s is None else best.floor_s * 1e6
        view.accuracy = best.accuracy
        view.sketch = best.sketch.removesuffix(DEFAULT_MARK)
        view.line = best.line
        view.trace_key = best.trace_key
    return view


def _advance(view: TaskView, trial: int, entry: Entry) -> None:
    """Take one right measurement into the task's curve."""
    time_us = entry.median_s * 1e6
    if not view.curve or time_us < view.curve[-1][1]:
        if view.curve and view.curve[-1][0] == trial:
            view.curve.pop()
        view.curve.append((trial, time_us))


def _families(
    entries: Iterable[Entry], views: dict[str, TaskView], winners: dict[str, Entry]
) -> list[FamilyView]:
    grouped: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        grouped[entry.workload_key, entry.device_name].append(entry)
    families = []
    for (workload, device), found in grouped.items():
        keys = dict.fromkeys(entry.task_key for entry in found)
        tasks = sorted((views[k] for k in keys), key=_batch_order)
        winner, count = _winner([winners[k] for k in keys if k in winners])
        pairs = [(e.predicted_s * 1e6, e.median_s * 1e6) for e in found if e.predicted_s and e.ok]
        families.append(
            FamilyView(
                workload_key=workload,
                device=device,
                tasks=tasks,
                trials=len({entry.trace_key for entry in found}),
                points=_thinned([p for p in pairs if math.isfinite(p[0] * p[1]) and min(p) > 0]),
                predictions=len(pairs),
                spearman=_spearman(found),
                winner=winner,
                winner_tasks=count,
            )
        )
    return families


def _batch_order(task: TaskView) -> tuple[int, int, str]:
    place = MIXES.index(task.mix) if task.mix in MIXES else len(MIXES)
    return task.tokens, place, task.scenario_key


def _winner(bests: Sequence[Entry]) -> tuple[Entry | None, int]:
    """Of the trace that is best most often, the record of its largest batch."""
    if not bests:
        return None, 0
    counts = Counter(entry.trace_key for entry in bests)
    trace, count = counts.most_common(1)[0]
    mine = [entry for entry in bests if entry.trace_key == trace]
    return max(mine, key=lambda e: split_scenario(e.scenario_key)[0]), count


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    return points[::stride]


def _spearman(entries: Iterable[Entry]) -> float | None:
    """Mean rank correlation over the tasks with at least 8 predicted and measured records."""
    from dop.cost_model.metric import spearman

    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in entries:
        if entry.ok and entry.predicted_s:
            pairs[entry.task_key].append((entry.predicted_s, entry.median_s))
    found = [spearman(*zip(*p, strict=True)) for p in pairs.values() if len(p) >= 8]
    found = [value for value in found if math.isfinite(value)]
    return math.fsum(found) / len(found) if found else None


def _sketches(entries: Iterable[Entry], winners: dict[str, Entry]) -> list[SketchView]:
    records: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    ratios: dict[str, list[float]] = defaultdict(list)
    nearest: dict[str, dict[str, float]] = defaultdict(dict)
    best_s = {key: entry.median_s for key, entry in winners.items()}
    for entry in entries:
        name = entry.sketch.removesuffix(DEFAULT_MARK) or "(not named)"
        records[name] += 1
        failed[name] += not entry.ok
        floor = best_s.get(entry.task_key)
        if entry.ok and floor:
            ratio = entry.median_s / floor
            ratios[name].append(min(ratio, WORST_RATIO))
            mine = nearest[name]
            mine[entry.task_key] = min(ratio, mine.get(entry.task_key, math.inf))
    wins = Counter(
        entry.sketch.removesuffix(DEFAULT_MARK) or "(not named)" for entry in winners.values()
    )
    views = [
        SketchView(
            name=name,
            records=count,
            failed=failed[name],
            wins=wins[name],
            near=geometric_mean(list(nearest[name].values())),
            quantiles=_quantiles(ratios[name]),
        )
        for name, count in records.items()
    ]
    return sorted(views, key=lambda v: (-v.wins, v.near or math.inf, v.name))


def _quantiles(values: list[float]) -> tuple[float, float, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    last = len(ordered) - 1
    low, middle, high = (ordered[round(share * last)] for share in (0.1, 0.5, 0.9))
    return low, middle, high


def geometric_mean(values: Sequence[float]) -> float | None:
    """Geometric mean of positive values; None of nothing."""
    good = [v for v in values if 0 < v < math.inf]
    return math.exp(math.fsum(map(math.log, good)) / len(good)) if good else None


def _failures(entries: Sequence[Entry]) -> list[FailureView]:
    views = []
    for failure, found in query.failures(entries).items():
        messages = Counter(entry.message for entry in found)
        message = messages.most_common(1)[0][0]
        line = next(entry.line for entry in found if entry.message == message)
        views.append(
            FailureView(
                name=failure.name.lower(),
                count=len(found),
                share=len(found) / len(entries),
                message=message,
                line=line,
            )
        )
    return sorted(views, key=lambda v: -v.count)


def loop_nest_of(entry: Entry) -> str:
    """The winner's loops, or one line that says why they cannot be shown."""
    try:
        from dop.lowering.nest import loop_nest

        record = entry.record()
        return loop_nest(Workload.parse(record.workload_key), record.trace, query.target_of(record))
    except ImportError as error:
        return f"(not shown: {error.name or 'TVM'} is not installed; pip install 'dop[tune]')"
    except DopError as error:
        return f"(not shown: {error.cause})"
    except Exception as error:  # TVM's own errors on a trace of another version
        return f"(not shown: {type(error).__name__})"
