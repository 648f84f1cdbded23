"""The report's charts as inline SVG. All times are microseconds; no data gives an empty text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dop.report.data import FailureView, FamilyView, SketchView, TaskView, geometric_mean
from dop.report.svg import (
    INK,
    MUTED,
    Canvas,
    Scale,
    format_us,
    shorten,
    text_width,
)

FULL, HALF = 1124.0, 548.0
"""Widths in pixels: of the page, and of one of two columns."""

ROW, SKETCH_ROW = 21.0, 40.0
MAX_PANELS = 8
MAX_ROWS = 48
"""Rows of one chart; the table beside it has them all."""

MIX_COLOUR = {
    "distinct": "var(--s1)",
    "uniform": "var(--s2)",
    "skewed": "var(--s4)",
    "identical": "var(--s3)",
    "recorded": "var(--s5)",
}
OTHER = "var(--s6)"


def _colour(task: TaskView) -> str:
    return MIX_COLOUR.get(task.mix, OTHER)


def _mixes(tasks: Sequence[TaskView]) -> list[tuple[str, str]]:
    """Legend of the mixes that occur."""
    seen = {task.mix for task in tasks}
    known = [(colour, mix) for mix, colour in MIX_COLOUR.items() if mix in seen]
    return known + [(OTHER, "other")] * bool(seen - set(MIX_COLOUR))


def task_label(task: TaskView) -> str:
    """Batch of a task in a few words."""
    cold = ", cold" if task.cold else ""
    if task.mix == "recorded":
        return f"{task.tokens} recorded, {task.adapters} adapters{cold}"
    return f"{task.tokens} {task.mix}{cold}" if task.tokens else shorten(task.scenario_key, 30)


def _gutter(labels: Sequence[str]) -> float:
    return max(map(text_width, labels), default=0) + 12


def search_curves(family: FamilyView) -> str:
    """Best so far against candidates: a panel per number of tokens, a line per batch."""
    shown = [task for task in family.tasks if task.curve]
    counts = _spread(sorted({task.tokens for task in shown}), MAX_PANELS)
    if not counts:
        return ""
    columns = min(4, len(counts))
    rows = math.ceil(len(counts) / columns)
    panel_w, panel_h = FULL / max(columns, 2), 200.0
    canvas = Canvas(panel_w * columns, panel_h * rows + 50)
    canvas.legend(48, 8, _mixes(shown))
    for place, tokens in enumerate(counts):
        row, column = divmod(place, columns)
        panel = [task for task in shown if task.tokens == tokens]
        origin = (column * panel_w, 22 + row * panel_h)
        last = place + columns >= len(counts)
        _curve_panel(canvas, panel, family.trials, origin, panel_w, panel_h, last)
    return canvas.svg("best time so far against candidates measured")


def _spread(values: list[int], most: int) -> list[int]:
    """At most `most` of the values, the ends among them."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _curve_panel(
    canvas: Canvas,
    tasks: Sequence[TaskView],
    trials: int,
    origin: tuple[float, float],
    width: float,
    height: float,
    last: bool,
) -> None:
    left, top = origin[0] + 48, origin[1] + 30
    right, bottom = origin[0] + width - 14, origin[1] + height - 22
    low = min(task.curve[-1][1] for task in tasks) * 0.94
    high = max(max(task.curve[0][1] for task in tasks) * 1.06, low * 1.25)
    x = Scale(0, max(trials, 2), left, right, log=False)
    y = Scale(low, high, bottom, top)
    tokens = tasks[0].tokens
    canvas.text(left, top - 14, f"{tokens} token{'s' * (tokens != 1)}", colour=INK)
    canvas.y_axis(y, left, right, "us" if origin[0] == 0 else "")
    for value in x.ticks(4):
        canvas.text(x(value), bottom + 12, format_us(value), "middle")
    if last:
        canvas.text((left + right) / 2, bottom + 28, "candidates", "middle")
    for task in tasks:
        points: list[tuple[float, float]] = []
        for trial, best in task.curve:
            if points:
                points.append((x(trial), points[-1][1]))
            points.append((x(trial), y(best)))
        points.append((right, points[-1][1]))
        canvas.path(points, _colour(task), f"{task_label(task)}: {format_us(task.curve[-1][1])} us")
        canvas.dot(*points[0], 2.5, _colour(task))


def predictions(family: FamilyView) -> str:
    """Predicted against measured time of the candidates that the cost model had foreseen."""
    if len(family.points) < 3:
        return ""
    low = min(min(p) for p in family.points) * 0.85
    high = max(max(p) for p in family.points) * 1.15
    size = 420.0
    canvas = Canvas(HALF, size + 64)
    x = Scale(low, high, 52, 52 + size)
    y = Scale(low, high, 22 + size, 22)
    canvas.x_axis(x, 22, 22 + size, "predicted, us")
    canvas.y_axis(y, 52, 52 + size, most=6)
    canvas.text(52, 8, "measured, us")
    canvas.line(x(low), y(low), x(high), y(high), MUTED, 1.2)
    canvas.dots([(x(p), y(m)) for p, m in family.points], "var(--s1)", 2.6)
    return canvas.svg("predicted against measured time")


def floors(family: FamilyView) -> str:
    """Per task: from the floor to the best (bar), and the untuned default (ring)."""
    tasks = [task for task in family.tasks if task.best_us is not None][:MAX_ROWS]
    if not tasks:
        return ""
    values = [v for t in tasks for v in (t.best_us, t.floor_us, t.default_us) if v and v > 0]
    gutter = _gutter([task_label(task) for task in tasks])
    bottom = 26 + ROW * len(tasks)
    canvas = Canvas(HALF, bottom + 40)
    x = Scale(min(values) * 0.85, max(values) * 1.2, gutter, HALF - 16)
    canvas.line(gutter + 5, 3, gutter + 5, 13, INK, 2)
    canvas.text(gutter + 12, 8, "floor")
    canvas.rect(gutter + 58, 4, 22, 8, _colour(tasks[0]))
    canvas.text(gutter + 86, 8, "up to the best")
    canvas.ring(gutter + 194, 8, 3.5, MUTED)
    canvas.text(gutter + 204, 8, "untuned default")
    canvas.x_axis(x, 20, bottom, "us")
    for row, task in enumerate(tasks):
        _floor_row(canvas, x, 26 + ROW * (row + 0.5), gutter, task)
    return canvas.svg("best kernel against its floor and the default")


def _floor_row(canvas: Canvas, x: Scale, y: float, gutter: float, task: TaskView) -> None:
    best, floor = task.best_us or 0.0, task.floor_us
    words = f"best {format_us(best)} us"
    canvas.text(gutter - 8, y, task_label(task), "end")
    if task.default_us:
        canvas.line(x(best), y, x(task.default_us), y, MUTED)
        canvas.ring(x(task.default_us), y, 3.5, MUTED, f"default {format_us(task.default_us)} us")
    if not floor or floor <= 0:
        canvas.dot(x(best), y, 4, _colour(task), title=words)
        return
    left, right = sorted((floor, best))
    words += f", floor {format_us(floor)} us, {best / floor:.2f} times the floor"
    canvas.rect(x(left), y - 5.5, x(right) - x(left), 11, _colour(task), words)
    canvas.line(x(floor), y - 8, x(floor), y + 8, INK, 2)


def overview(families: Sequence[FamilyView]) -> str:
    """One row per family: how far its tasks are from their floors, and from the default."""
    shown = [f for f in families if any(t.best_us for t in f.tasks)][:MAX_ROWS]
    if not shown:
        return ""
    labels = [shorten(f.title, 48) for f in shown]
    gutter = _gutter(labels)
    row = 30.0
    bottom = 8 + row * len(shown)
    canvas = Canvas(FULL, bottom + 42)
    for place, label in enumerate(labels):
        canvas.text(gutter - 10, 8 + row * (place + 0.5), label, "end")
    middle = (gutter + FULL) / 2
    for left, right, value, label, colour in (
        (gutter, middle - 18, _over_floor, "best over its floor (1 is the limit)", "var(--s1)"),
        (middle + 18, FULL - 16, _speedup, "untuned default over the best", "var(--s3)"),
    ):
        rows = [[v for v in map(value, f.tasks) if v and math.isfinite(v)] for f in shown]
        _strip(canvas, rows, (left, right, bottom), row, label, colour)
    return canvas.svg("families against their floors and their defaults")


def _over_floor(task: TaskView) -> float | None:
    return task.over_floor


def _speedup(task: TaskView) -> float | None:
    return task.speedup


def _strip(
    canvas: Canvas,
    rows: Sequence[Sequence[float]],
    place: tuple[float, float, float],
    height: float,
    label: str,
    colour: str,
) -> None:
    """A dot per task, a tick at the geometric mean."""
    left, right, bottom = place
    known = [value for row in rows for value in row]
    if not known:
        canvas.text((left + right) / 2, bottom / 2, "not in the log", "middle")
        return
    low, high = min(*known, 1.0), max(*known, 1.3)
    x = Scale(low * (low / high) ** 0.04, high * (high / low) ** 0.04, left, right)
    canvas.x_axis(x, 4, bottom, label)
    canvas.line(x(1.0), 4, x(1.0), bottom, MUTED, 1.4)
    for number, values in enumerate(rows):
        y = 8 + height * (number + 0.5)
        canvas.dots([(x(v), y) for v in values], colour, 4)
        mean = geometric_mean(values)
        if mean:
            canvas.line(x(mean), y - 10, x(mean), y + 10, INK, 2)


def failure_bar(failures: Sequence[FailureView], ok: int) -> str:
    """One bar: the share of records that ran and were right, and of each failure class."""
    colours = ("var(--s4)", "var(--s2)", "var(--s5)", "var(--s7)", "var(--s6)", "var(--s1)", MUTED)
    parts = [("right", ok, "var(--s3)")]
    parts += [(f.name, f.count, colours[i % len(colours)]) for i, f in enumerate(failures)]
    total = sum(count for _, count, _ in parts)
    if not total:
        return ""
    canvas = Canvas(FULL, 62)
    left = 0.0
    entries = []
    for name, count, colour in parts:
        words = f"{name} {100 * count / total:.1f} %"
        width = FULL * count / total
        canvas.rect(left, 4, width, 26, colour, words)
        left += width
        entries.append((colour, words))
    canvas.legend(0, 50, entries)
    return canvas.svg("share of right and failed records")


def sketch_ranges(sketches: Sequence[SketchView]) -> str:
    """Per sketch: where 80 % of its times lie, as multiples of the task's best."""
    shown = [s for s in sketches if s.quantiles][:MAX_ROWS]
    if not shown:
        return ""
    bottom = 8 + SKETCH_ROW * len(shown)
    canvas = Canvas(FULL, bottom + 42)
    highest = max(s.quantiles[2] for s in shown if s.quantiles)
    x = Scale(0.95, max(highest * 1.1, 1.5), 10, FULL - 16)
    canvas.x_axis(x, 4, bottom, "time over the best of its task: 10 to 90 % (bar), median (dot)", 8)
    for row, sketch in enumerate(shown):
        _sketch_row(canvas, x, 8 + SKETCH_ROW * row, sketch)
    return canvas.svg("times of every sketch")


def _sketch_row(
    canvas: Canvas, x: Callable[[float], float], top: float, sketch: SketchView
) -> None:
    """The name stands above the bar: names are long and differ at both ends."""
    low, middle, high = sketch.quantiles or (1.0, 1.0, 1.0)
    words = f"{sketch.name}: median {middle:.2f}"
    canvas.text(x(1.0) + 6, top + 10, shorten(sketch.name, 150), colour=INK)
    canvas.rect(x(low), top + 22, x(high) - x(low), 8, "var(--s1)", words)
    canvas.dot(x(middle), top + 26, 5, INK, title=words)
