"""Measure a whole sub-space of one sketch, so that searches can be judged on it without the device.

    python benchmarks/record_space.py --workload "sgmv/float32/r16/2048->2048" \
        --scenario T32/uniform/6 --device cpu --out tests/data --points 1500

Every point is measured, none is sampled: choices are thinned evenly until the product has the
wanted size, and --fix holds parameters at a value. One build serves all scenarios; each gets a file
space_<device>_<tokens>_<mix>.json.gz (dop/search/table.py says what is in it). Running the same
command again continues where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dop.errors import ConfigError, DopError
from dop.measure.base import Job, Measurer
from dop.measure.hostinfo import find_target
from dop.scenario import Scenario
from dop.search.table import SpaceTable, load_table, restricted, save_table
from dop.space.sketch import Candidate, Domain, Sketch
from dop.target import Target
from dop.workload import Workload

COUNTABLE = 300_000
"""Products up to this size are enumerated to count the points within the limits."""


def points(sketch: Sketch) -> Iterator[Candidate]:
    """Every candidate of a sketch that is within its limits, in a fixed order."""
    names = [d.name for d in sketch.domains]
    for values in itertools.product(*(d.choices for d in sketch.domains)):
        annotation = dict(zip(names, values, strict=True))
        if sketch.broken_limit(annotation) is None:
            yield Candidate.of(sketch, annotation)


def thinned(sketch: Sketch, most: int) -> Sketch:
    """The sketch with fewer choices: at most `most` points within the limits.

    The parameter with the most choices loses one at a time; its default and its ends stay longest.
    """
    while True:
        product = math.prod(len(d.choices) for d in sketch.domains)
        if product <= most:
            return sketch
        if product <= COUNTABLE and count(sketch) <= most:
            return sketch
        widest = max(sketch.domains, key=lambda d: len(d.choices))
        domains = tuple(_fewer(d) if d is widest else d for d in sketch.domains)
        sketch = dataclasses.replace(sketch, domains=domains)


def count(sketch: Sketch) -> int:
    """Points within the limits."""
    names = [d.name for d in sketch.domains]
    return sum(
        sketch.broken_limit(dict(zip(names, values, strict=True))) is None
        for values in itertools.product(*(d.choices for d in sketch.domains))
    )


def _fewer(domain: Domain) -> Domain:
    """The domain without the choice that lies closest to its neighbours."""
    inner = [c for c in domain.choices[1:-1] if c != domain.default]
    candidates = inner or [c for c in domain.choices if c != domain.default]

    def gap(choice: int) -> float:
        place = domain.choices.index(choice)
        low = domain.choices[max(0, place - 1)]
        high = domain.choices[min(len(domain.choices) - 1, place + 1)]
        return (high + 1) / (low + 1)

    gone = min(candidates, key=gap)
    kept = tuple(c for c in domain.choices if c != gone)
    return Domain(domain.name, domain.kind, kept, domain.default)


def choose(workload: Workload, target: Target, name: str | None) -> Sketch:
    """The sketch of a name; without one, the sketch with the most points."""
    from dop.space.generate import build_space

    sketches = build_space(workload, target).sketches
    if name is None:
        return max(sketches, key=lambda s: math.prod(len(d.choices) for d in s.domains))
    found = [s for s in sketches if s.name == name]
    if not found:
        names = "\n  ".join(s.name for s in sketches)
        raise ConfigError(f"no sketch {name!r}; there are:\n  {names}")
    return found[0]


def table_path(folder: Path, target: Target, scenario: Scenario) -> Path:
    """File of a scenario's table; a GPU's has its name: times of two kinds are two tables."""
    kind = (
        re.sub(r"[^a-z0-9]+", "-", target.device_name.lower()) if target.kind == "cuda" else "cpu"
    )
    cold = "_cold" if scenario.cold else ""
    return folder / f"space_{kind}_T{scenario.tokens}_{scenario.mix}{cold}.json.gz"


def opened(
    path: Path, workload: Workload, target: Target, scenario: Scenario, sketch: Sketch
) -> SpaceTable:
    """The table of the file with what it holds, or an empty one."""
    table = SpaceTable(workload, target, scenario, sketch, tuple(sorted(sketch.estimates)))
    if path.exists():
        held = load_table(path)
        same = (held.workload.key, held.target, held.scenario.key, held.sketch.name)
        if same != (workload.key, target, scenario.key, sketch.name):
            raise ConfigError(f"{path} holds another space: {same}.", "Give another --out.")
        if held.sketch.steps != sketch.steps or held.sketch.domains != sketch.domains:
            raise ConfigError(f"{path} was recorded with another sketch.", "Give another --out.")
        table.rows.update(held.rows)
    return table


def record(
    tables: Sequence[tuple[Path, SpaceTable]],
    measurer: Measurer,
    batch: int,
    minutes: float,
) -> bool:
    """Measure what the tables lack; False if the time ended first."""
    sketch, workload = tables[0][1].sketch, tables[0][1].workload
    everything = list(points(sketch))
    missing = [c for c in everything if any(c.annotation not in t.rows for _, t in tables)]
    chosen = {c.trace: c for c in missing}
    by_scenario = {t.scenario.key: t for _, t in tables}
    jobs = [
        Job(c.trace, workload, tuple(t.scenario for _, t in tables if c.annotation not in t.rows))
        for c in missing
    ]
    batches = [jobs[i : i + batch] for i in range(0, len(jobs), batch)]
    began = time.monotonic()
    for place, current in enumerate(batches):
        done = len(everything) - len(jobs) + place * batch
        print(f"{done} of {len(everything)} points", flush=True)
        if time.monotonic() - began > 60 * minutes:
            return False
        following = batches[place + 1] if place + 1 < len(batches) else []
        try:
            for job, scenario, measurement in measurer.measure(current):
                by_scenario[scenario.key].add(chosen[job.trace], measurement)
                measurer.prefetch(following)  # behind this batch's own builds
                following = []
        finally:
            for path, table in tables:
                save_table(path, table)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", required=True, help="sgmv/float32/r16/2048->2048")
    parser.add_argument("--scenario", nargs="+", required=True, help="T32/uniform/6")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--sketch", help="name; default: the one with the most points")
    parser.add_argument("--fix", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--points", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this long")
    parser.add_argument("--out", type=Path, default=Path("tests/data"))
    options = parser.parse_args()
    try:
        workload = Workload.parse(options.workload)
        target = find_target(options.device)
        fixed = {n: int(v) for n, _, v in (item.partition("=") for item in options.fix)}
        sketch = thinned(
            restricted(choose(workload, target, options.sketch), fixed), options.points
        )
        print(f"{sketch.name}: {count(sketch)} points on {target.device_name}")
        for domain in sketch.domains:
            print(f"  {domain.name} ({domain.kind}): {domain.choices}")
        options.out.mkdir(parents=True, exist_ok=True)
        tables = []
        for key in options.scenario:
            scenario = Scenario.parse(key)
            path = table_path(options.out, target, scenario)
            tables.append((path, opened(path, workload, target, scenario, sketch)))
        from dop.measure.local import LocalMeasurer

        with LocalMeasurer(target) as measurer:
            return 0 if record(tables, measurer, options.batch, options.minutes) else 3
    except DopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
