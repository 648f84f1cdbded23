"""What a person sees while tuning: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from dop.errors import Failure
from dop.progress import Event, FamilyView, Note, Progress, TaskResult, TuneResult
from dop.scenario import short_key

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

_LINE_EVERY_S = 5.0
_DRAW_EVERY_S = 0.25
_TABLE_WIDTH = 130


class Display(Protocol):
    """Shows events as they come; a context manager around the run."""

    def __call__(self, event: Event) -> None: ...

    def __enter__(self) -> Display: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def display(quiet: bool = False) -> Display:
    """The live table if standard error is a terminal, else plain lines; notes only if quiet."""
    if quiet or not sys.stderr.isatty():
        return PlainDisplay(quiet)
    return LiveDisplay()


class PlainDisplay:
    """A line every few seconds on standard error."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._next = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            _line(event.text)
        elif not self._quiet and time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_EVERY_S
            _line(summary_line(event))

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del kind, error, trace


class LiveDisplay:
    """A table that is redrawn in place."""

    def __init__(self) -> None:
        from rich.live import Live

        from dop.cli.output import err

        self._live: Live = Live(console=err(), auto_refresh=False, transient=True)
        self._next = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self._live.console.print(event.text, markup=False)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + _DRAW_EVERY_S
            self._live.update(_picture(event), refresh=True)

    def __enter__(self) -> LiveDisplay:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)


def summary_line(progress: Progress) -> str:
    """One line for a log file: trials, speed-up, share of the floor, failures, time left."""
    tasks = [task for family in progress.families for task in family.tasks]
    parts = [
        f"{progress.elapsed_s:.0f} s",
        f"{progress.trials} trials",
        f"{progress.current}" if progress.current else "",
        f"speed-up over default {_times(speed_up(tasks))}",
        f"floor {_percent(floor_share(tasks))}",
        f"failures {_failures(progress)}",
        f"model Spearman {_number(_spearman(progress))}",
        _left(progress),
    ]
    return ", ".join(part for part in parts if part)


def speed_up(tasks: Iterable[TaskResult]) -> float:
    """Geometric mean of default over best; NaN if no task has both."""
    return _mean([t.default_s / t.best_s for t in tasks if t.default_s and t.best_s])


def floor_share(tasks: Iterable[TaskResult]) -> float:
    """Geometric mean of floor over best (1 is perfect); NaN if no task has both."""
    return _mean([t.floor_s / t.best_s for t in tasks if t.floor_s and t.best_s])


def print_final(console: Console, result: TuneResult) -> None:
    """The summary line and the table of all tasks; never narrower than the table where piped."""
    if not console.is_terminal:
        console.width = max(console.width, _TABLE_WIDTH)
    console.print(_title(result), markup=False)
    console.print(final_table(result))


def final_table(result: TuneResult) -> Table:
    """Best, default and floor of every task."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("workload", "rank", "batch"):
        table.add_column(name)
    for name in ("best us", "default us", "speed-up", "floor us", "of floor", "error"):
        table.add_column(name, justify="right")
    for family in result.progress.families:
        for task in family.tasks:
            table.add_row(*_task_row(task))
        table.add_section()
    return table


def _task_row(task: TaskResult) -> tuple[str, ...]:
    ratio = task.default_s / task.best_s if task.default_s and task.best_s else math.nan
    share = task.floor_s / task.best_s if task.floor_s and task.best_s else math.nan
    return (
        task.workload.name,
        str(task.workload.rank),
        short_key(task.scenario.key, 32),
        _us(task.best_s),
        _us(task.default_s),
        _times(ratio),
        _us(task.floor_s),
        _percent(share),
        "-" if task.accuracy is None else f"{task.accuracy:.1e}",
    )


def _title(result: TuneResult) -> str:
    progress = result.progress
    ended = {"interrupt": "interrupted", "trials": "all trials done", "exhausted": "nothing left"}
    why = ended.get(result.stopped_by, "budget used")
    tasks = result.tasks
    return (
        f"{progress.trials} trials, {progress.records} records in {progress.elapsed_s:.0f} s "
        f"({why}); geometric mean {_times(speed_up(tasks))} of the default, "
        f"{_percent(floor_share(tasks))} of the floor; failures {_failures(progress)}"
    )


def _picture(progress: Progress) -> Table:
    from rich.table import Table

    caption = (
        f"{progress.elapsed_s:.0f} s   {_left(progress)}   trials {progress.trials}   "
        f"failures {_failures(progress)}"
    )
    table = Table(caption=caption, caption_justify="left")
    table.add_column("workload")
    table.add_column("rank", justify="right")
    for name in ("trials", "best us", "floor us", "of floor", "speed-up", "Spearman"):
        table.add_column(name, justify="right")
    for family in progress.families:
        table.add_row(*_family_row(family, family.workload.name == progress.current))
    return table


def _family_row(family: FamilyView, current: bool) -> tuple[str, ...]:
    best = _mean([task.best_s for task in family.tasks if task.best_s])
    floor = _mean([task.floor_s for task in family.tasks if task.floor_s])
    return (
        ("> " if current else "  ") + family.workload.name,
        str(family.workload.rank),
        str(family.trials),
        _us(best),
        _us(floor),
        _percent(floor_share(family.tasks)),
        _times(speed_up(family.tasks)),
        _number(family.spearman),
    )


def _mean(values: Sequence[float]) -> float:
    """Geometric mean; NaN of nothing."""
    if not values:
        return math.nan
    return math.exp(sum(math.log(v) for v in values) / len(values))


def _spearman(progress: Progress) -> float | None:
    values = [f.spearman for f in progress.families if f.spearman is not None]
    return sum(values) / len(values) if values else None


def _failures(progress: Progress) -> str:
    counts = {f: progress.failures.get(f, 0) for f in Failure if progress.failures.get(f, 0)}
    return ", ".join(f"{f.name.lower()} {n}" for f, n in counts.items()) or "none"


def _left(progress: Progress) -> str:
    return f"{progress.left_s:.0f} s left" if math.isfinite(progress.left_s) else "no time limit"


def _us(seconds: float | None) -> str:
    return "-" if seconds is None or math.isnan(seconds) else f"{seconds * 1e6:.1f}"


def _times(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}x"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
