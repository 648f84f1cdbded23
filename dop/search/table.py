"""An exhaustively measured sub-space as a file: a search is judged on it without a device.

The file is gzip-compressed JSON and holds everything needed to search it again, also after the
rules that made its sketch have changed:

    {"version": 1, "workload": key, "target": {...}, "scenario": key, "sketch": name,
     "steps": [{"code": "SP", "stage": 2, "lengths": [{"param": "shrink.tile", "offset": 0}]}, ...],
     "domains": [[name, kind, [choices], default], ...],
     "estimates": [names],
     "records": [[{parameter: value, ...}, seconds or null, failure, [estimates]], ...]}

Points that break a limit are absent; they are what `broken_limit` refuses.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dop.errors import ConfigError, DopError, Failure
from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.space.sketch import Annotation, Candidate, Domain, Limit, Sketch, Space
from dop.space.step import STEPS, Param, Step
from dop.target import Target
from dop.workload import Workload

VERSION = 1

Point = tuple[tuple[str, int], ...]
"""An annotation, sorted by name."""


@dataclass(frozen=True, slots=True)
class Row:
    """A measured point: seconds, or None with its failure class, and the sketch's estimates."""

    seconds: float | None
    failure: Failure
    estimates: tuple[float, ...]

    def measurement(self) -> Measurement:
        """The row as a measurer would have returned it."""
        if self.seconds is None:
            return Measurement.failed(self.failure, f"recorded as {self.failure.name.lower()}")
        return Measurement((self.seconds,))


@dataclass(slots=True)
class SpaceTable:
    """A sub-space of one sketch, and what its points measured under one scenario."""

    workload: Workload
    target: Target
    scenario: Scenario
    sketch: Sketch
    estimate_names: tuple[str, ...]
    rows: dict[Point, Row] = field(default_factory=dict)

    def add(self, candidate: Candidate, measurement: Measurement) -> None:
        """Note what a candidate of the sketch measured."""
        values = candidate.values
        estimates = tuple(float(self.sketch.estimates[n](values)) for n in self.estimate_names)
        seconds = measurement.median_s if measurement.ok else None
        self.rows[candidate.annotation] = Row(seconds, measurement.failure, estimates)

    def space(self) -> Space:
        """The recorded points as a space of one sketch."""
        return Space((self.recorded_sketch(),))

    def recorded_sketch(self) -> Sketch:
        """The sketch with the estimates of the file; points without a row break a limit."""
        rows, names = self.rows, self.estimate_names

        def estimate(index: int) -> Callable[[Annotation], float]:
            return lambda values: rows[_point(values)].estimates[index]

        recorded = Limit("points that were not recorded", 0, lambda v: int(_point(v) not in rows))
        return dataclasses.replace(
            self.sketch,
            limits=(recorded,),
            estimates={name: estimate(i) for i, name in enumerate(names)},
        )

    def measure(self, candidate: Candidate) -> Measurement:
        """What the candidate measured.

        Raises:
            ConfigError: the point is not in the table.
        """
        row = self.rows.get(candidate.annotation)
        if row is None:
            raise ConfigError("the table has no such point.", "Propose points of its space only.")
        return row.measurement()

    def best_s(self) -> float:
        """The best time in the table in seconds."""
        return min(r.seconds for r in self.rows.values() if r.seconds is not None)


def _point(values: Annotation) -> Point:
    return tuple(sorted(values.items()))


def restricted(sketch: Sketch, fixed: Mapping[str, int]) -> Sketch:
    """The sketch with some parameters held at one value.

    Raises:
        ConfigError: the sketch has no such parameter, or it cannot take that value.
    """
    domains = {d.name: d for d in sketch.domains}
    for name, value in fixed.items():
        if name not in domains or value not in domains[name].choices:
            raise ConfigError(f"{sketch.name} has no {name} = {value}.", "Check the parameter.")
    return dataclasses.replace(
        sketch,
        domains=tuple(
            Domain(d.name, d.kind, (fixed[d.name],), fixed[d.name]) if d.name in fixed else d
            for d in sketch.domains
        ),
    )


def save_table(path: str | os.PathLike[str], table: SpaceTable) -> None:
    """Write a table; the file appears whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    content = {
        "version": VERSION,
        "workload": table.workload.key,
        "target": dataclasses.asdict(table.target),
        "scenario": table.scenario.key,
        "sketch": table.sketch.name,
        "steps": [_step_out(step) for step in table.sketch.steps],
        "domains": [[d.name, d.kind, list(d.choices), d.default] for d in table.sketch.domains],
        "estimates": list(table.estimate_names),
        "records": [
            [dict(point), row.seconds, int(row.failure), list(row.estimates)]
            for point, row in table.rows.items()
        ],
    }
    where = Path(path)
    part = where.with_name(f".{where.name}.part")
    try:
        with part.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
            file.write(json.dumps(content, separators=(",", ":")).encode())
        os.replace(part, where)
    except OSError as error:
        raise ConfigError(f"{where} cannot be written: {error.strerror}.") from error


def load_table(path: str | os.PathLike[str]) -> SpaceTable:
    """The table of a file.

    Raises:
        ConfigError: the file cannot be read or is no table.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = json.loads(file.read())
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}")
        return _table(content)
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, DopError) as error:
        raise ConfigError(
            f"{path} is not a recorded space: {error}.", "Record it again (record_space.py)."
        ) from error


def _table(content: Mapping[str, Any]) -> SpaceTable:
    domains = tuple(Domain(n, k, tuple(c), d) for n, k, c, d in content["domains"])
    steps = tuple(_step_in(step) for step in content["steps"])
    table = SpaceTable(
        Workload.parse(content["workload"]),
        Target(**content["target"]),
        Scenario.parse(content["scenario"]),
        Sketch(content["sketch"], steps, domains),
        tuple(content["estimates"]),
    )
    for values, seconds, failure, estimates in content["records"]:
        table.rows[_point(values)] = Row(seconds, Failure(failure), tuple(estimates))
    return table


def _step_out(step: Step) -> dict[str, Any]:
    fields = {f.name: _out(getattr(step, f.name)) for f in dataclasses.fields(step)}
    return {"code": step.code, **fields}


def _out(value: object) -> object:
    if isinstance(value, Param):
        return {"param": value.name, "offset": value.offset}
    return [_out(v) for v in value] if isinstance(value, tuple) else value


def _step_in(data: Mapping[str, Any]) -> Step:
    fields: dict[str, Any] = {name: _in(value) for name, value in data.items() if name != "code"}
    return STEPS[data["code"]](**fields)


def _in(value: object) -> object:
    if isinstance(value, Mapping):
        return Param(str(value["param"]), int(value.get("offset", 0)))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_in(v) for v in value)
    return value
