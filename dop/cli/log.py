"""`dop log`: what a tuning log holds, in words, and how to merge, prune and check logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from dop.cli.output import emit, note
from dop.errors import BuildError, DopError, LogError, MissingDependencyError, TraceError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dop.database.jsonl import LogContents
    from dop.database.record import Record
    from dop.database.wire import Entry

app = typer.Typer(
    help="Read, explain, merge, prune and check tuning logs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_LOG = typer.Argument(..., help="A tuning log.", show_default=False)
_LOGS = typer.Argument(..., help="One or more tuning logs.", show_default=False)
_JSON = typer.Option(False, "--json", help="Print one JSON document.")
_OUTPUT = typer.Option(..., "--output", "-o", help="The log to write.")
_OUTPUT_OR_LOG = typer.Option(
    None, "--output", "-o", help="The log to write; without it, LOG itself (with --force)."
)
_FORCE = typer.Option(False, "--force", help="Replace the output if it is there.")


@app.command()
def best(
    logs: list[Path] = _LOGS,
    task: str = typer.Option("", help="Only tasks whose key contains this."),
    device: str = typer.Option("", help="Only tasks of this device."),
    as_json: bool = _JSON,
) -> None:
    """Show the fastest right record of every task."""
    contents = [_read(path) for path in logs]
    rows = [row for row in _best_rows(contents, device) if task in str(row["task"])]
    if not rows:
        note("no task has a record that ran, was checked and was right.")
    emit(rows, as_json, _on_console(_best_tables(rows)) if rows else "")


@app.command()
def explain(
    log: Path = _LOG,
    task: str = typer.Option("", help="Number in `dop log best`, or a part of the task's key."),
    best: bool = typer.Option(False, "--best", help="The best record of the task (default)."),
    line: int = typer.Option(0, min=0, help="The record in this line of the file instead."),
    nest: bool | None = typer.Option(
        None, "--nest/--no-nest", help="Loop nest before and after (default: if TVM is there)."
    ),
    source: bool = typer.Option(False, "--source", help="The generated code as well."),
    as_json: bool = _JSON,
) -> None:
    """Tell in plain words what a record is and what each of its steps does."""
    from dop.database.explain import explain as explain_record

    if line and (task or best):
        raise LogError("--line names a record already.", "Leave out --task and --best.")
    record = _choose(_read(log), task, line)
    words = explain_record(record)
    data = words.to_json()
    if not as_json:
        print(words.text(), flush=True)
    if as_json and nest is None:
        nest = False  # a program asks for what it wants
    before, after = _nests(record, nest)
    if after:
        data["nest_before"], data["nest_after"] = before, after
    code = _source(record) if source else ""
    if code:
        data["source"] = code
    if as_json:
        emit(data, True)
        return
    for title, text in (("Loops before", before), ("Loops after", after), ("Code", code)):
        if text:
            print(f"\n{title}:\n{text}", flush=True)


@app.command()
def stats(logs: list[Path] = _LOGS, as_json: bool = _JSON) -> None:
    """Show what the logs hold: records, tasks, failures, devices, versions, time spent."""
    from dop.database.query import stats as figures

    contents = [_read(path) for path in logs]
    found = figures([entry for log in contents for entry in log.entries])
    rows = {
        "records": f"{found.records:,}",
        "tasks": f"{found.tasks:,}",
        "traces": f"{found.traces:,}",
        "with times": f"{found.ok:,}",
        "failures": _counts(found.failures) or "none",
        "devices": _counts(found.devices),
        "targets": _counts(found.targets),
        "versions": "; ".join(f"{tool} {', '.join(v)}" for tool, v in found.versions.items()),
        "first, last": f"{_date(found.first)}, {_date(found.last)}",
        "spent": f"{found.cost_s:,.0f} s building and measuring",
    }
    table = _table(("", ""), [[k, v] for k, v in rows.items()], header=False)
    emit(found, as_json, _on_console([("", table)]))


@app.command()
def merge(
    logs: list[Path] = _LOGS,
    output: Path = _OUTPUT,
    force: bool = _FORCE,
    as_json: bool = _JSON,
) -> None:
    """Join logs into one, each measurement once, in the order given."""
    from dop.database import jsonl, query

    contents = [_read(path, empty_ok=True) for path in logs]
    lines = query.merge(contents)
    count = jsonl.write_log(output, lines, force=force, inputs=contents)
    read = sum(len(c.entries) + len(c.newer) for c in contents)
    data = {"output": output, "read": read, "written": count, "duplicates": read - count}
    emit(data, as_json, f"{output}: {count} records, {read - count} duplicates left out.")


@app.command()
def prune(
    log: Path = _LOG,
    output: Path | None = _OUTPUT_OR_LOG,
    keep: int = typer.Option(10, min=1, help="Traces to keep per task, best first."),
    drop_failures: bool = typer.Option(False, "--drop-failures", help="Leave failures out too."),
    force: bool = _FORCE,
    as_json: bool = _JSON,
) -> None:
    """Keep the best records of every task and, unless told otherwise, the failures."""
    from dop.database import jsonl, query

    contents = _read(log)
    target = output or log
    lines = query.prune(contents, keep, drop_failures=drop_failures)
    count = jsonl.write_log(target, lines, force=force, inputs=[contents])
    dropped = len(contents.entries) + len(contents.newer) - count
    data = {"output": target, "written": count, "dropped": dropped}
    emit(data, as_json, f"{target}: {count} records kept, {dropped} dropped.")


@app.command()
def validate(log: Path = _LOG, as_json: bool = _JSON) -> None:
    """Check every line of a log; exit code 1 if something is wrong with any."""
    from dop.database import jsonl, query

    contents = jsonl.read_log(log)
    found = query.validate(contents)
    lines = [f"line {bad.line}: {bad.cause}" for bad in found.problems]
    if found.newer:
        lines.append(f"{found.newer} lines of a newer version of Dop were not checked.")
    verdict = f"{len(found.problems)} problems" if found.problems else "no problems"
    lines.append(f"{log}: {found.records} records, {verdict}.")
    emit(found, as_json, "\n".join(lines))
    if found.problems:
        raise typer.Exit(1)


def _read(path: Path, *, empty_ok: bool = False) -> LogContents:
    """The contents of a log that holds a record; its warnings go to standard error."""
    from dop.database import jsonl

    contents = jsonl.read_log(path)
    if not (empty_ok and contents.size == 0):
        contents.require_entries()
    for warning in contents.warnings():
        note(f"warning: {warning}")
    return contents


def _best_rows(contents: Sequence[LogContents], device: str) -> list[dict[str, object]]:
    from dop.database import query

    files = {id(entry): log.path for log in contents for entry in log.entries}
    entries = [entry for log in contents for entry in log.entries]
    winners = query.best(entries, device=device or None)
    return [
        _best_row(number, entry, files[id(entry)])
        for number, entry in enumerate(winners.values(), start=1)
    ]


def _best_row(number: int, entry: Entry, path: Path) -> dict[str, object]:
    return {
        "number": number,
        "task": entry.task_key,
        "workload": entry.workload_key,
        "scenario": entry.scenario_key,
        "device": entry.device_name,
        "median_s": entry.median_s,
        "floor_s": entry.floor_s,
        "accuracy": entry.accuracy,
        "sketch": entry.sketch,
        "trace": entry.trace_key,
        "timestamp": entry.timestamp,
        "file": str(path),
        "line": entry.line,
    }


def _best_tables(rows: Sequence[dict[str, object]]) -> list[tuple[str, Table]]:
    """A table per workload and device, with its heading."""
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        title = f"{row['workload']} on {row['device']}"
        groups.setdefault(title, []).append(_best_cells(row))
    heads = ("#", "batch", "us", "x floor", "error", "line", "sketch")
    numbers = ("#", "us", "x floor", "error", "line")
    return [(title, _table(heads, cells, numbers=numbers)) for title, cells in groups.items()]


def _best_cells(row: dict[str, object]) -> list[str]:
    seconds, floor = row["median_s"], row["floor_s"]
    assert isinstance(seconds, (int, float))
    over = f"{seconds / floor:.2f}" if isinstance(floor, (int, float)) and floor > 0 else "-"
    return [
        str(row["number"]),
        str(row["scenario"]),
        f"{seconds * 1e6:.2f}",
        over,
        f"{row['accuracy']:.1e}",
        str(row["line"]),
        str(row["sketch"]),
    ]


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[str] = (),
    header: bool = True,
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_header=header)
    for head in heads:
        justify: Literal["left", "right"] = "right" if head in numbers else "left"
        short = head in numbers
        table.add_column(head, justify=justify, overflow="fold", no_wrap=short)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a name with [brackets] is no markup
    return table


def _on_console(tables: Sequence[tuple[str, Table]]) -> Callable[[Console], None]:
    """Prints tables as wide as the terminal, or unfolded where a program reads them."""

    def show(console: Console) -> None:
        if not console.is_terminal:
            console.width = 1000
        for title, table in tables:
            if title:
                console.print(title, markup=False)
            console.print(table)

    return show


def _choose(contents: LogContents, task: str, line: int) -> Record:
    """The record that the options name.

    Raises:
        LogError: there is no such record.
    """
    from dop.database import query

    if line:
        found = next((entry for entry in contents.entries if entry.line == line), None)
        if found is None:
            bad = next((b.cause for b in contents.corrupt if b.line == line), "no record there")
            raise LogError(f"{contents.path}: line {line}: {bad}.", "Give the line of a record.")
        return _record(contents, found)
    winners = list(query.best(contents.entries).values())
    if not winners:
        raise LogError(
            f"{contents.path}: no task has a record that ran, was checked and was right.",
            "Give --line N to explain a record all the same.",
        )
    if task.isdecimal() and 1 <= int(task) <= len(winners):
        return _record(contents, winners[int(task) - 1])
    matching = [entry for entry in winners if task in entry.task_key]
    if not matching or task.isdecimal():
        raise LogError(
            f"{contents.path}: no task {task!r}; it has {len(winners)}.",
            "`dop log best` lists them with their numbers.",
        )
    if len(matching) > 1:
        note(f"{len(matching)} tasks; this is {matching[0].task_key}. --task chooses another.")
    return _record(contents, matching[0])


def _record(contents: LogContents, entry: Entry) -> Record:
    try:
        return entry.record()
    except DopError as error:
        raise LogError(
            f"{contents.path}: line {entry.line}: {error.cause}", error.action
        ) from error


def _nests(record: Record, wanted: bool | None) -> tuple[str, str]:
    """Loop nests before and after the steps; empty if they are not wanted or cannot be had.

    Raises:
        DopError: they were asked for and cannot be had.
    """
    if wanted is False:
        return "", ""
    from dop.database.query import target_of
    from dop.workload import Workload

    try:
        loop_nest = _lowering().loop_nest
        workload, target = Workload.parse(record.workload_key), target_of(record)
        before = loop_nest(workload, record.trace, target, 0)
        return before, loop_nest(workload, record.trace, target, None)
    except MissingDependencyError:
        if wanted:
            raise
        note("the loop nest needs TVM: pip install 'dop[tune]'")
    except (TraceError, BuildError, LogError) as error:
        if wanted:
            raise
        note(f"the loop nest cannot be shown: {error}")
    return "", ""


def _source(record: Record) -> str:
    """The generated code.

    Raises:
        DopError: TVM is missing, or the trace does not build.
    """
    from dop.database.query import target_of
    from dop.workload import Workload

    generate = _lowering().generate
    workload = Workload.parse(record.workload_key)
    return str(generate(workload, record.trace, target_of(record)).source)


class _Lowering:
    """The two functions that need TVM, imported when they are first wanted."""

    def __init__(self) -> None:
        from dop.lowering.codegen import generate
        from dop.lowering.nest import loop_nest

        self.generate = generate
        self.loop_nest = loop_nest


def _lowering() -> _Lowering:
    try:
        return _Lowering()
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the package {error.name!r} is not installed.",
            "Install the tuner: pip install 'dop[tune]'",
        ) from error


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _date(timestamp: int | None) -> str:
    from dop.database.explain import date_words

    return "-" if timestamp is None else date_words(timestamp)
