"""Numbers that describe a candidate under a scenario, without building it.

A row joins the annotation (one column per parameter name), the sketch (its number), the sketch's
analytic estimates, statistics of its steps, and the scenario; products of the two (tiles, blocks,
waves, bytes per flop) come last. What a sketch lacks is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dop.cost_model.base import FloatArray, Point
from dop.scenario import Scenario
from dop.space.sketch import Annotation, Sketch, Space
from dop.space.step import (
    ANNOTATIONS,
    STEPS,
    AnnotationStep,
    FollowFusedSplitStep,
    FollowSplitStep,
    FuseStep,
    Num,
    Param,
    ReorderStep,
    SplitStep,
    Step,
)
from dop.target import Target
from dop.workload import Workload

PointKey = tuple[str, tuple[tuple[str, int], ...]]

Factors = tuple[Num, ...]
"""A loop's length as a product; an empty tuple is a length that only the batch decides."""

_SCENARIO_COLUMNS = ("tokens", "adapters", "mean_rows", "max_rows", "bare_rows", "cold")
_CROSS_COLUMNS = ("tiles", "padding", "blocks", "waves", "bytes_per_flop", "floor_bytes")
_PER_TILE = ".blocks_per_tile"
"""Estimates of this name say how large a grid is; what it comes to for a batch is a column."""
_SIZES = ("blocks", "waves")
_GRID = tuple(ANNOTATIONS.index(name) for name in ("blockIdx.x", "blockIdx.y", "blockIdx.z"))


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is known of a sketch before its numbers are."""

    number: int
    counts: tuple[int, ...]
    marked: tuple[tuple[Factors, ...], ...]
    tile: Num


class FeatureExtractor:
    """Rows of features for the points of one space; rows are cached by point."""

    def __init__(self, space: Space, workload: Workload, target: Target) -> None:
        self._workload = workload
        self._target = target
        self._params = sorted({d.name for s in space.sketches for d in s.domains})
        self._estimates = sorted({name for s in space.sketches for name in s.estimates})
        self._grids = [n for n in self._estimates if n.endswith(_PER_TILE)]
        self._plans = {s.name: _plan(i, s) for i, s in enumerate(space.sketches)}
        self._halves = sorted({name.partition(".")[0] for name in self._params})
        self._cache: dict[PointKey, tuple[FloatArray, int, tuple[float, ...]]] = {}
        self.names: tuple[str, ...] = (
            "sketch",
            *self._params,
            *(f"product.{half}" for half in self._halves),
            *(f"estimate.{name}" for name in self._estimates),
            *(f"steps.{code}" for code in STEPS),
            *(f"length.{name}" for name in ANNOTATIONS),
            *_SCENARIO_COLUMNS,
            *_CROSS_COLUMNS,
            *(f"{kind}.{name.removesuffix(_PER_TILE)}" for name in self._grids for kind in _SIZES),
        )

    def rows(self, points: Sequence[Point], scenarios: Sequence[Scenario]) -> FloatArray:
        """Rows of every point under every scenario: [points * scenarios, names]."""
        out = np.empty((len(points), len(scenarios), len(self.names)))
        batch = np.array([_scenario_row(s) for s in scenarios]).reshape(len(scenarios), -1)
        cross = len(self.names) - len(_CROSS_COLUMNS) - len(_SIZES) * len(self._grids)
        own = cross - len(_SCENARIO_COLUMNS)
        tables = _BatchTables(self._workload, scenarios)
        for i, point in enumerate(points):
            row, rows, grids = self._point_row(point)
            out[i, :, :own] = row
            out[i, :, own:cross] = batch
            out[i, :, cross:] = self._cross(tables, rows, grids)
        return out.reshape(len(points) * len(scenarios), len(self.names))

    def pair_rows(self, pairs: Sequence[tuple[Point, Scenario]]) -> FloatArray:
        """One row per given pair: [pairs, names]."""
        out = np.empty((len(pairs), len(self.names)))
        places: dict[str, list[int]] = {}
        for i, (_, scenario) in enumerate(pairs):
            places.setdefault(scenario.key, []).append(i)
        for chosen in places.values():
            out[chosen] = self.rows([pairs[i][0] for i in chosen], [pairs[chosen[0]][1]])
        return out

    def _point_row(self, point: Point) -> tuple[FloatArray, int, tuple[float, ...]]:
        """The point's own columns, its rows per tile, and blocks per tile of each of its grids."""
        key = (point.sketch.name, point.annotation)
        known = self._cache.get(key)
        if known is None:
            values, plan = dict(point.annotation), self._plan(point.sketch)
            per_tile = 1.0
            for kind in _GRID:
                length = _length(plan.marked[kind], values)
                per_tile *= 1.0 if math.isnan(length) else max(1.0, length)
            row = self._describe(point.sketch, values)
            grids = tuple(_estimate(point.sketch, name, values) for name in self._grids)
            known = (row, max(1, _value(plan.tile, values)), (per_tile, *grids))
            self._cache[key] = known
        return known

    def _describe(self, sketch: Sketch, values: Annotation) -> FloatArray:
        plan = self._plan(sketch)
        row: list[float] = [plan.number]
        row += [float(values.get(name, math.nan)) for name in self._params]
        for half in self._halves:
            mine = [max(1, v) for n, v in values.items() if n.partition(".")[0] == half]
            row.append(float(math.prod(mine)) if mine else math.nan)
        row += [_estimate(sketch, name, values) for name in self._estimates]
        row += [float(count) for count in plan.counts]
        row += [_length(loops, values) for loops in plan.marked]
        return np.array(row)

    def _plan(self, sketch: Sketch) -> _Plan:
        plan = self._plans.get(sketch.name)
        if plan is None:
            plan = self._plans[sketch.name] = _plan(-1, sketch)
        return plan

    def _cross(self, tables: _BatchTables, rows: int, grids: tuple[float, ...]) -> FloatArray:
        """Columns that need both the point and the batch: [scenarios, columns]."""
        tiles = tables.tiles(rows)
        blocks = tiles * grids[0]
        padded = tiles * rows
        moved = tables.min_bytes + tables.adapter_bytes * tiles
        per_flop = moved / (tables.row_flops * np.maximum(padded, 1.0))
        waves = blocks / self._target.units
        columns = [tiles, padded / tables.tokens, blocks, waves, per_flop, tables.min_bytes]
        for per_tile in grids[1:]:
            launched = tiles * per_tile
            columns += [launched, np.ceil(launched / self._target.units)]
        return np.stack(columns, axis=1)


class _BatchTables:
    """Quantities of the batches that many points share."""

    def __init__(self, workload: Workload, scenarios: Sequence[Scenario]) -> None:
        self._segments = [s.segments for s in scenarios]
        self._tiles: dict[int, FloatArray] = {}
        self.tokens = np.array([float(s.tokens) for s in scenarios])
        self.min_bytes = np.array(
            [float(workload.min_bytes(s.tokens, max(1, s.adapters))) for s in scenarios]
        )
        self.adapter_bytes = float(workload.min_bytes(0, 1))
        self.row_flops = float(workload.flops(1))

    def tiles(self, rows: int) -> FloatArray:
        """Row tiles of each batch; one per token in the row form: [scenarios]."""
        found = self._tiles.get(rows)
        if found is None:
            counts = [float(sum(-(-n // rows) for n in used)) for used in self._segments]
            found = self._tiles[rows] = self.tokens if rows == 1 else np.array(counts)
        return found


def _scenario_row(scenario: Scenario) -> tuple[float, ...]:
    segments = scenario.segments or (0,)
    mean = sum(segments) / len(segments)
    rows = (mean, max(segments), scenario.bare_rows)
    return (scenario.tokens, scenario.adapters, *rows, float(scenario.cold))


def _estimate(sketch: Sketch, name: str, values: Annotation) -> float:
    function = sketch.estimates.get(name)
    return float(function(values)) if function is not None else math.nan


def _value(number: Num, values: Annotation) -> int:
    if isinstance(number, Param):
        return values.get(number.name, 1) + number.offset
    return number


def _length(loops: tuple[Factors, ...], values: Annotation) -> float:
    """Product of the lengths of the loops marked in one way; NaN if there is none."""
    if not loops:
        return math.nan
    return float(math.prod(_value(n, values) for factors in loops for n in factors))


def _plan(number: int, sketch: Sketch) -> _Plan:
    counts = tuple(sum(step.code == code for step in sketch.steps) for code in STEPS)
    return _Plan(number, counts, _marked(sketch.steps), _tile(sketch))


def _tile(sketch: Sketch) -> Num:
    """Rows of a tile: the split that leads the trace, else the token axis's first parameter."""
    first = next((s for s in sketch.steps if isinstance(s, SplitStep)), None)
    if first is not None and first.stage == 0 and len(first.lengths) == 1:
        return first.lengths[0]
    name = next((d.name for d in sketch.domains if d.name.startswith("tokens.")), None)
    return Param(name) if name else 1


def _marked(steps: Sequence[Step]) -> tuple[tuple[Factors, ...], ...]:
    """Lengths of the annotated loops by annotation, as far as the splits fix them."""
    loops: dict[int, list[Factors]] = {}
    marked: list[list[Factors]] = [[] for _ in ANNOTATIONS]
    for step in steps:
        stage = loops.setdefault(step.stage, [])
        if isinstance(step, AnnotationStep):
            marked[step.annotation].append(_loop(stage, step.iter))
        else:
            _follow(step, stage, steps)
    return tuple(tuple(kind) for kind in marked)


def _loop(stage: list[Factors], position: Num) -> Factors:
    if isinstance(position, Param):
        return ()
    _reach(stage, position)
    return stage[position]


def _reach(stage: list[Factors], position: int) -> None:
    stage.extend(() for _ in range(position + 1 - len(stage)))


def _follow(step: Step, stage: list[Factors], steps: Sequence[Step]) -> None:
    """Apply what a step does to one stage's loops; a position that is still open ends it."""
    if isinstance(step, SplitStep | FollowSplitStep | FollowFusedSplitStep):
        position = step.iter
        if not isinstance(position, Param):
            _reach(stage, position)
            stage[position : position + 1] = _parts(step, steps)
    elif isinstance(step, FuseStep):
        _reach(stage, step.iters[-1])
        fused = tuple(n for i in step.iters for n in stage[i])
        stage[step.iters[0] : step.iters[-1] + 1] = [fused]
    elif isinstance(step, ReorderStep):
        _reach(stage, len(step.order) - 1)
        stage[: len(step.order)] = [stage[i] for i in step.order]


def _parts(step: Step, steps: Sequence[Step]) -> list[Factors]:
    """The loops that a split leaves, outermost first; () is the part that no length fixes."""
    if isinstance(step, SplitStep):
        fixed: list[Factors] = [(n,) for n in step.lengths]
        return [(), *fixed] if step.inner_to_outer else [*fixed, ()]
    if isinstance(step, FollowSplitStep):
        source = steps[step.src_step] if step.src_step < len(steps) else None
        lengths = source.lengths if isinstance(source, SplitStep) else ()
        followed: list[Factors] = [(n,) for n in lengths[: step.n_split]]
        return [(), *followed]
    assert isinstance(step, FollowFusedSplitStep)
    product: Factors = tuple(
        source.lengths[step.level]
        for index in step.src_steps
        if index < len(steps) and isinstance(source := steps[index], SplitStep)
        if step.level < len(source.lengths)
    )
    return [(), product] if step.factor_or_nparts else [product, ()]
