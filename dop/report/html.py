"""The report: one HTML file that needs no network, for a person and for keeping."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from dop.database.explain import Explanation, date_words, explain
from dop.errors import DopError, LogError
from dop.report import charts
from dop.report.data import (
    FamilyView,
    ReportData,
    TaskView,
    geometric_mean,
    loop_nest_of,
)
from dop.report.page import SCRIPT, STYLE
from dop.report.svg import format_us

MAX_FAMILIES = 24
"""Families that get charts of their own; the table of tasks has them all."""

LARGE_LOG = 30_000
"""Records above which loops are left out unless asked for: loading TVM takes 3 s or more."""

NEST_SECONDS = 4.0
"""Wall time after which no further winner's loops are derived: the report must stay quick."""


def render(data: ReportData, nests: bool | None = None) -> str:
    """The whole page.

    Args:
        data: what it shows.
        nests: show the winners' loops; by default unless the log is large.
    """
    body = [
        _header(data),
        _key_figures(data),
        _overview(data),
        _families(data, data.stats.records <= LARGE_LOG if nests is None else nests),
        _sketches(data),
        _failures(data),
        _footer(data),
    ]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>Dop: {escape(data.path)}</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(body)
        + f"<script>{SCRIPT}</script></body></html>\n"
    )


def write(data: ReportData, output: Path, nests: bool | None = None) -> None:
    """Render the report and put it at `output`, whole or not at all; `nests` as for `render`.

    Raises:
        LogError: `output` is the log itself.
        OSError: the file cannot be written.
    """
    if output.exists() and os.path.samefile(output, data.path):
        raise LogError(f"{output} is the log itself.", "Give another -o.")
    text = render(data, nests).encode("utf-8", "replace")
    if output.exists() and not output.is_file():  # a device or a pipe cannot be replaced
        output.write_bytes(text)
        return
    descriptor, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, output)
    except BaseException:
        os.unlink(temporary)
        raise


def summary(data: ReportData) -> str:
    """What the log says, in one or two sentences."""
    done = [task for task in data.tasks if task.best_us is not None]
    if not done:
        return f"None of {len(data.tasks)} tasks has a right result yet."
    text = f"{len(done)} of {len(data.tasks)} tasks have a proven kernel."
    faster = geometric_mean([t.speedup for t in done if t.speedup])
    above = geometric_mean([t.over_floor for t in done if t.over_floor])
    parts = []
    if faster:
        parts.append(f"{faster:.2f}x faster than the untuned default")
    if above:
        parts.append(f"{above:.2f} times their floor")
    return f"{text} In the geometric mean they are {' and '.join(parts)}." if parts else text


def _floor_note(data: ReportData) -> str:
    """Says what a time below the floor means, if there is one."""
    below = sum(1 for task in data.tasks if (task.over_floor or 1.0) < 0.98)
    if not below:
        return ""
    return (
        f" {below} tasks are below it: their weights came from a cache, or the machine was busy "
        "while the bandwidth was measured."
    )


def _header(data: ReportData) -> str:
    stats = data.stats
    devices = ", ".join(stats.devices)
    when = "" if stats.first is None else date_words(stats.first)
    facts = " \N{MIDDLE DOT} ".join(escape(x) for x in (devices, ", ".join(stats.targets), when))
    notes = "".join(f"<p class=warn>{escape(text)}</p>" for text in data.warnings)
    return (
        f"<header><h1>Tuning report</h1><p class=path>{escape(data.path)}</p>"
        f"<p class=muted>{facts}</p><p class=lead>{escape(summary(data))}</p>{notes}</header>"
    )


def _key_figures(data: ReportData) -> str:
    stats = data.stats
    ranked = [f.spearman for f in data.families if f.spearman is not None]
    figures = [
        (f"{stats.tasks:,}", "tasks"),
        (f"{stats.traces:,}", "candidates"),
        (f"{stats.records:,}", "measurements"),
        (f"{100 * stats.ok / max(1, stats.records):.1f} %", "ran and were right"),
        (_duration(stats.cost_s), "building and measuring"),
    ]
    if ranked:
        mean = math.fsum(ranked) / len(ranked)
        figures.append((f"{mean:.2f}", "rank correlation of the cost model"))
    boxes = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in figures)
    return f"<section class=figures>{boxes}</section>"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _overview(data: ReportData) -> str:
    chart = charts.overview(data.families)
    if not chart:
        return ""
    return (
        "<section><h2>Where it stands</h2><p class=muted>A dot is a task, the tick the geometric "
        "mean. The floor is the bytes that must move over the measured memory bandwidth, or an "
        f"empty launch if that takes longer.{_floor_note(data)}</p>"
        f"<figure>{chart}</figure></section>"
    )


def _families(data: ReportData, nests: bool) -> str:
    shown = data.families[:MAX_FAMILIES]
    several = len({family.device for family in shown}) > 1
    options = "".join(
        f"<option value=f{i}>{escape(_title(f, several))}</option>" for i, f in enumerate(shown)
    )
    deadline = time.monotonic() + NEST_SECONDS if nests else 0.0
    sections = []
    for place, family in enumerate(shown):
        heading = f"<h2>{escape(_title(family, several))}</h2>"
        sections.append(
            f"<section class=family id=f{place}>{heading}{_family(family, deadline)}</section>"
        )
    left_out = len(data.families) - len(shown)
    more = f"<p class=muted>{left_out} more: use --task to choose.</p>" if left_out else ""
    chooser = (
        f"<nav hidden><label>Workload <select id=choose>{options}</select></label></nav>"
        if len(shown) > 1
        else ""
    )
    return chooser + "\n".join(sections) + more


def _title(family: FamilyView, with_device: bool) -> str:
    return f"{family.title} on {family.device}" if with_device else family.title


def _family(family: FamilyView, deadline: float) -> str:
    records = sum(task.candidates for task in family.tasks)
    facts = f"{family.trials:,} candidates, {records:,} measurements"
    if family.spearman is not None:
        facts += f"; predicted and measured times correlate by rank with {family.spearman:.2f}"
    parts = [f"<p class=muted>{escape(family.workload_key)}: {facts}.</p>"]
    curves = charts.search_curves(family)
    if curves:
        parts.append(f"<h3>Search</h3><figure>{curves}</figure>")
    left = charts.floors(family)
    right = charts.predictions(family)
    columns = ""
    if left:
        columns += f"<div><h3>Best against floor and default</h3><figure>{left}</figure></div>"
    columns += "<div><h3>Predicted against measured</h3>"
    columns += f"<figure>{right}</figure>" if right else f"<p class=muted>{_NO_MODEL}</p>"
    parts.append(f"<div class=two>{columns}</div></div>")
    parts.append(_task_table(family.tasks))
    parts.append(_winner(family, deadline))
    return "\n".join(parts)


_NO_MODEL = "The cost model was not trained yet when these candidates were measured."


def _task_table(tasks: Iterable[TaskView]) -> str:
    heads = (
        "tokens",
        "mix",
        "adapters",
        "best, us",
        "floor, us",
        "over floor",
        "default, us",
        "speed-up",
        "error",
        "failed",
        "line",
        "sketch",
    )
    rows = []
    for task in tasks:
        rows.append(
            (
                str(task.tokens),
                f"{task.mix}, cold" if task.cold else task.mix,
                str(task.adapters),
                _us(task.best_us),
                _us(task.floor_us),
                _ratio(task.over_floor),
                _us(task.default_us),
                _ratio(task.speedup),
                "" if task.accuracy is None else f"{task.accuracy:.1e}",
                f"{task.failed} of {task.candidates}",
                str(task.line or ""),
                task.sketch,
            )
        )
    return "<h3>Tasks</h3>" + _table(heads, rows, text=(1,), path=(11,))


def _us(value: float | None) -> str:
    return "" if value is None else format_us(value)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    text: Sequence[int] = (),
    path: Sequence[int] = (),
) -> str:
    """A table whose columns sort on a click.

    Args:
        heads: of the columns.
        rows: numbers as text, set to the right.
        text: columns of prose, set to the left and broken where needed.
        path: columns of long names, set to the left on one line.
    """
    kind = {**dict.fromkeys(text, " class=t"), **dict.fromkeys(path, " class=n")}

    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{kind.get(i, '')}>{escape(value)}</{tag}>" for i, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f"<div class=scroll><table><thead><tr>{cells(heads, 'th')}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _winner(family: FamilyView, deadline: float) -> str:
    if family.winner is None:
        return "<h3>Winner</h3><p class=muted>No candidate was right under any batch yet.</p>"
    entry = family.winner
    won = sum(task.best_us is not None for task in family.tasks)
    try:
        words = _steps_first(explain(entry.record()))
    except DopError as error:
        words = str(error)
    nest = (
        loop_nest_of(entry)
        if time.monotonic() < deadline
        else f"(left out to stay quick; dop log explain --line {entry.line} shows them)"
    )
    return (
        f"<h3>Winner</h3><p class=muted>Line {entry.line} of the log, best in "
        f"{family.winner_tasks} of {won} tasks: {escape(entry.sketch or 'no name')}.</p>"
        "<div class=code><div><h4>Its steps in words</h4>"
        f"<pre class=wrap>{escape(words)}</pre></div>"
        f"<div><h4>Its loops</h4><pre>{escape(nest)}</pre></div></div>"
    )


def _steps_first(words: Explanation) -> str:
    """An explanation with what is read most at the top."""
    facts, _, steps = words.text().partition("\nSteps:\n")
    return f"{steps}\n\n{facts}" if steps else facts


def _sketches(data: ReportData) -> str:
    chart = charts.sketch_ranges(data.sketches)
    heads = ("sketch", "measurements", "failed", "tasks won", "its best over the best")
    rows = [
        (
            s.name,
            f"{s.records:,}",
            f"{100 * s.failed / s.records:.1f} %",
            str(s.wins),
            _ratio(s.near),
        )
        for s in data.sketches
    ]
    figure = f"<figure>{chart}</figure>" if chart else ""
    return (
        f"<section><h2>Sketches</h2><p class=muted>A sketch is a structure without numbers; "
        f"its name lists the choices made stage by stage.</p>{figure}"
        f"{_table(heads, rows, path=(0,))}</section>"
    )


def _failures(data: ReportData) -> str:
    chart = charts.failure_bar(data.failures, data.stats.ok)
    rows = [
        (f.name, f"{f.count:,}", f"{100 * f.share:.1f} %", f.message, str(f.line))
        for f in data.failures
    ]
    table = (
        _table(("class", "records", "share", "most frequent message", "line"), rows, text=(0, 3))
        if rows
        else "<p class=muted>No measurement failed.</p>"
    )
    return f"<section><h2>Failures</h2><figure>{chart}</figure>{table}</section>"


def _footer(data: ReportData) -> str:
    versions = "; ".join(f"{tool} {', '.join(v)}" for tool, v in data.stats.versions.items())
    return (
        "<footer><p>Times are medians of one call (shrink and expand) in microseconds. "
        "A candidate that failed, or was wrong under any batch, is never shown as best. "
        "<code>dop log explain LOG --line N</code> explains any line.</p>"
        f"<p>{escape(versions)}</p><p>sha256 of the log: <code>{data.sha256}</code></p></footer>"
    )
