"""Dop against torch on this CPU: the operator for one model's projections, float32.

    python benchmarks/bench_cpu.py --log FILE              # kernels of a tuning log
    python benchmarks/bench_cpu.py --log FILE --budget 3m  # tune first

Four contenders per case: Dop's best kernel of the log, Dop's untuned default, and torch's two ways
to do it, a loop of matrix products per adapter and a gathered batched product. All are called from
Python, with the same number of threads, on the same arrays, turn by turn in one process, so that
whatever else the machine does meets all of them. A figure is the best of the rounds' medians: on a
shared host one and the same kernel was seen to vary by a factor of two from second to second.

Weights: `--weights resident` (default) calls with the same adapters again and again, as a loop
around one layer does; `rotating` takes other adapters every call, so that weights come from memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from dop import collect_env
from dop.config import workloads_from_model
from dop.database.jsonl import Log, read_log
from dop.database.query import best
from dop.effort import QUICK
from dop.errors import DopError
from dop.family import Family
from dop.lowering.codegen import generate
from dop.measure.builder import BuildTask, build
from dop.measure.hostinfo import cpu_target
from dop.measure.local import LocalMeasurer
from dop.measure.runner_cpu import Calls, Library
from dop.measure.tensors_cpu import Batch, TensorCache, Weights
from dop.scenario import Scenario, named
from dop.space.generate import build_space
from dop.space.trace import Trace
from dop.target import Target
from dop.tune import tune
from dop.workload import Workload

TOKENS = (1, 8, 32, 128)
MIXES = ("distinct", "uniform", "identical")
ROUNDS = 11
ROUND_S = 6e-3
ROUND_CALLS = 10
"""Least time and fewest calls of a contender's turn: the caches are cold at first."""
LONG_TURN_S = 0.1
REST_S = 0.02
"""Pause before a turn. Idle threads of torch's OpenMP spin for a while before they sleep, on cores
that the next contender needs: without the pause a kernel of 18 us took up to 357."""
HOPELESS = 8.0
CORES = sorted(os.sched_getaffinity(0))
"""What this process may use, read before any kernel is loaded: loading one pins the thread that
does it, and asking afterwards would leave the next kernels a single core."""
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One case: microseconds per call of each contender."""

    workload: str
    scenario: str
    dop_us: float
    default_us: float
    loop_us: float
    bmm_us: float
    trace: str

    @property
    def baseline_us(self) -> float:
        """The better of torch's two."""
        return min(self.loop_us, self.bmm_us)

    @property
    def speedup(self) -> float:
        """Baseline over Dop's best kernel."""
        return self.baseline_us / self.dop_us

    @property
    def default_speedup(self) -> float:
        """Baseline over Dop's untuned default."""
        return self.baseline_us / self.default_us


@cache
def start_torch(threads: int) -> None:
    """torch's threads start before ours are pinned: a thread inherits the cores of its maker.

    The products and sums are large enough for all of them.
    """
    torch.set_num_threads(threads)
    square = torch.randn(2048, 2048)
    for _ in range(3):
        square = torch.addmm(square, square, square).mul_(1e-3)


def torch_calls(batch: Batch, weights: Weights) -> tuple[list[Call], list[Call]]:
    """torch's loop and gathered bmm, one call per window of adapters."""
    x = torch.from_numpy(batch.x)
    y = torch.from_numpy(batch.y)
    a = [torch.from_numpy(stack) for stack in weights.a]
    b = [torch.from_numpy(stack) for stack in weights.b]
    widths = [stack.shape[1] for stack in b]
    parts = [y.narrow(1, sum(widths[:s]), width) for s, width in enumerate(widths)]
    loops, bmms = [], []
    for rows in batch.rows:
        slots = torch.from_numpy(rows.astype(np.int64))
        groups = [(int(s), (slots == s).nonzero()[:, 0]) for s in sorted(set(rows.tolist()))]
        loops.append(_loop(x, parts, a, b, groups))
        bmms.append(_bmm(x, parts, a, b, slots))
    return loops, bmms


Tensors = Sequence[torch.Tensor]


def _loop(
    x: torch.Tensor,
    parts: Tensors,
    a: Tensors,
    b: Tensors,
    groups: list[tuple[int, torch.Tensor]],
) -> Call:
    """Matrix products adapter by adapter; a single adapter needs no gathering of rows."""

    def one() -> None:
        slot = groups[0][0]
        for y, down, up in zip(parts, a, b, strict=True):
            y.addmm_(x @ down[slot].T, up[slot].T)

    def many() -> None:
        for slot, rows in groups:
            mine = x[rows]
            for y, down, up in zip(parts, a, b, strict=True):
                y.index_add_(0, rows, (mine @ down[slot].T) @ up[slot].T)

    return one if len(groups) == 1 else many


def _bmm(x: torch.Tensor, parts: Tensors, a: Tensors, b: Tensors, slots: torch.Tensor) -> Call:
    """Each row with its own gathered matrices."""

    def call() -> None:
        rows = x.unsqueeze(1)
        for y, down, up in zip(parts, a, b, strict=True):
            v = torch.bmm(rows, down[slots].transpose(1, 2))
            y += torch.bmm(v, up[slots].transpose(1, 2)).squeeze(1)

    return call


class Kernel:
    """A built trace in this process, with its calls per batch."""

    def __init__(self, workload: Workload, trace: Trace, target: Target, cores: list[int]) -> None:
        built = build(generate, BuildTask(workload, trace), target)
        if built.artifact is None:
            raise DopError(f"{workload.key}: {built.message}", "Validate the log.")
        self.artifact = built.artifact
        self.library = Library(built.artifact.binary, cores)

    def calls(self, batch: Batch, weights: Weights) -> list[Call]:
        """One call per window; the first result is checked against the reference.

        Raises:
            DopError: the result is wrong.
        """
        calls = Calls(self.library, self.artifact, weights)
        failure, message, _ = calls.check(batch, "float32")
        if message:
            raise DopError(f"{self.artifact.workload_key}: {failure.name}: {message}")
        timed = calls.prepare(batch)
        run, scalars = self.library.lib.dop_run, timed._scalars
        return [partial(run, pointers, scalars) for pointers in timed._arrays]


def _goes_on(calls: int, spent_s: float) -> bool:
    """Whether a turn needs another call; a very slow contender has three."""
    if spent_s > LONG_TURN_S:
        return calls < 3
    return calls < ROUND_CALLS or spent_s < ROUND_S


def alternate(
    contenders: Sequence[Sequence[Call]], places: Sequence[Collection[int]]
) -> list[float]:
    """Microseconds per call: contenders in turn, best of the rounds' medians.

    One that is hopelessly behind after a few rounds is left out of the rest.

    Args:
        contenders: calls of each.
        places: cores of the calling thread in each one's turn (its other threads keep theirs).
    """
    found: list[list[float]] = [[] for _ in contenders]
    positions = [0] * len(contenders)
    for round_ in range(ROUNDS):
        for i, calls in enumerate(contenders):
            if round_ >= 1 and min(found[i]) > HOPELESS * min(map(min, found)):
                continue
            os.sched_setaffinity(0, places[i])
            time.sleep(REST_S)
            samples: list[float] = []
            begin = time.perf_counter()
            while _goes_on(len(samples), time.perf_counter() - begin):
                call = calls[positions[i] % len(calls)]
                positions[i] += 1
                start = time.perf_counter()
                call()
                samples.append(time.perf_counter() - start)
            # The first half warms the caches up again.
            found[i].append(statistics.median(samples[len(samples) // 2 :]))
    return [min(medians) * 1e6 for medians in found]


def tune_first(
    workloads: list[Workload], scenarios: tuple[Scenario, ...], target: Target, log: Path, s: float
) -> None:
    """Tunes all workloads within `s` seconds into the log."""
    families = [Family(w, target, scenarios) for w in workloads]
    with Log.open(log) as out, LocalMeasurer(target) as measurer:
        result = tune(families, measurer=measurer, log=out, budget_s=s, effort=QUICK)
    progress = result.progress
    print(f"tuned {progress.trials} candidates in {progress.elapsed_s:.0f} s", flush=True)


def traces_of(
    workload: Workload, scenarios: Sequence[Scenario], target: Target, log: Path
) -> dict[str, Trace]:
    """Best trace of the log per scenario key.

    One token is one and the same batch under every mix; such scenarios share the fastest of their
    winners, since what each was measured to need varies by more than the kernels differ.

    Raises:
        DopError: a case is missing from the log.
    """
    winners = best(read_log(log).entries, device=target.device_name)
    fastest: dict[tuple[int, ...], tuple[float, Trace]] = {}
    for scenario in scenarios:
        entry = winners.get(f"{workload.key}|{scenario.key}|{target.device_name}")
        if entry is None:
            raise DopError(f"the log has no {workload.key} {scenario.key}.", "Tune it: --budget.")
        record = entry.record()
        mine = record.measurement.median_s, record.trace
        other = fastest.get(scenario.segments, mine)
        fastest[scenario.segments] = min(mine, other, key=lambda pair: pair[0])
    return {s.key: fastest[s.segments][1] for s in scenarios}


def bench(
    workload: Workload,
    scenarios: Sequence[Scenario],
    target: Target,
    log: Path,
    resident: bool,
) -> Iterator[Row]:
    """Rows of one workload as they are measured."""
    start_torch(target.units)
    cores = CORES[: target.units]
    cache = TensorCache(target)
    weights = cache.weights(workload, scenarios, 1)
    traces = traces_of(workload, scenarios, target, log)
    default = build_space(workload, target).defaults()[0].trace
    kernels: dict[str, Kernel] = {}
    for trace in (default, *traces.values()):
        if trace.key not in kernels:
            kernels[trace.key] = Kernel(workload, trace, target, cores)
    for scenario in scenarios:
        batch = cache.batch(workload, scenario, timed=not resident)
        trace = traces[scenario.key]
        loop, bmm = torch_calls(batch, weights)
        mine = kernels[trace.key].calls(batch, weights)
        untuned = kernels[default.key].calls(batch, weights)
        places = [cores[:1], cores[:1], cores, cores]
        dop_us, default_us, loop_us, bmm_us = alternate([mine, untuned, loop, bmm], places)
        name = workload.name
        yield Row(name, scenario.key, dop_us, default_us, loop_us, bmm_us, trace.key)


def geomean(values: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """The figures of the bar."""
    return {
        "geomean": geomean([r.speedup for r in rows]),
        "min": min(r.speedup for r in rows),
        "default_geomean": geomean([r.default_speedup for r in rows]),
        "default_min": min(r.default_speedup for r in rows),
    }


def show(row: Row) -> None:
    """One line of the table."""
    print(
        f"{row.workload:10} {row.scenario:20} {row.dop_us:9.1f} {row.default_us:9.1f} "
        f"{row.loop_us:10.1f} {row.bmm_us:10.1f} {row.speedup:6.2f}x {row.default_speedup:6.2f}x",
        flush=True,
    )


def write(path: Path, rows: Sequence[Row], target: Target, arguments: argparse.Namespace) -> None:
    """The JSON file of a run."""
    document = {
        "device": target.device_name,
        "target": target.key,
        "threads": target.units,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {**collect_env.versions(), "torch": torch.__version__},
        "revision": collect_env.revision(),
        "weights": arguments.weights,
        "budget": arguments.budget,
        "summary": summary(rows),
        "rows": [asdict(r) | {"speedup": r.speedup} for r in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Llama-3.2-1B")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--budget", help="tune first, for example 3m")
    parser.add_argument("--weights", choices=("resident", "rotating"), default="resident")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--only", help="projections, comma separated")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _seconds(text: str) -> float:
    from dop.cli.request import seconds_of

    return seconds_of(text)


def main() -> int:
    """Runs the comparison; returns the exit code."""
    arguments = _arguments()
    target = cpu_target()
    workloads = workloads_from_model(arguments.model, ranks=(arguments.rank,), dtype="float32")
    if arguments.only:
        workloads = [w for w in workloads if w.name in arguments.only.split(",")]
    tokens = [int(t) for t in arguments.tokens.split(",")]
    unique = {s.key: s for t in tokens for s in (named(mix, t) for mix in MIXES)}
    scenarios = tuple(unique.values())
    if arguments.budget:
        tune_first(workloads, scenarios, target, arguments.log, _seconds(arguments.budget))
    print(f"{target.device_name}, {target.units} threads, weights {arguments.weights}; us per call")
    print(
        f"{'':31} {'dop':>9} {'default':>9} {'torch loop':>10} {'torch bmm':>10} {'dop':>7} default"
    )
    rows = []
    for workload in workloads:
        resident = arguments.weights == "resident"
        for row in bench(workload, scenarios, target, arguments.log, resident):
            rows.append(row)
            show(row)
    figures = summary(rows)
    print(", ".join(f"{name} {value:.2f}x" for name, value in figures.items()))
    slug = target.device_name.lower().replace(" ", "-")
    out = arguments.out or Path(__file__).parent / "results" / (
        f"cpu-{slug}-{time.strftime('%Y-%m-%d')}.json"
    )
    write(out, rows, target, arguments)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DopError as error:
        sys.exit(f"error: {error}")
