"""The short way: tune SGMV for a model on this machine and show what was found.

    python best.py

With a GPU: Llama-3.1-8B in bfloat16; else Llama-3.2-1B in float32; rank 16. Writes a tuning log
and a report, and prints Dop's best kernels beside its untuned default and torch's two ways to do
the same, all measured here and now. Behind the untuned defaults the search begins with what the
installed packs know of the model or the nearest ones (--no-packs: from nothing; none that ships is
for CPUs). Run again to continue from the log.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.bench_cpu import Row
    from dop.family import Family
    from dop.target import Target

MODELS = {"cuda": "Llama-3.1-8B", "cpu": "Llama-3.2-1B"}
INTERRUPTED = 130


def arguments() -> argparse.Namespace:
    """The options; none is needed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a shipped model's name or a path to config.json")
    parser.add_argument("--ranks", default="16", help="such as 8,16,64")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if any")
    parser.add_argument("--budget", default="120s", help="time for tuning: 90s, 10m, 1h")
    parser.add_argument("--log", type=Path, default=Path("best.log.jsonl"))
    parser.add_argument("--report", type=Path, default=Path("best.report.html"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-packs", action="store_true", help="search from nothing")
    return parser.parse_args()


def compare(families: Sequence[Family], target: Target, log: Path) -> Iterator[Row]:
    """Best kernels of the log, the default and torch, timed now; tasks without a best left out."""
    from dop.database.jsonl import read_log
    from dop.database.query import best

    known = best(read_log(log).entries, device=target.device_name)
    if target.kind == "cpu":
        import torch

        torch.set_num_threads(target.units)
        # torch's threads start here: later ones would inherit the one core we are pinned to.
        torch.randn(512, 512) @ torch.randn(512, 512) + torch.zeros(1 << 18).sum()
    for family in families:
        scenarios = [s for s in family.scenarios if family.task(s).key in known]
        if not scenarios:
            continue
        if target.kind == "cpu":
            from benchmarks.bench_cpu import bench

            yield from bench(family.workload, scenarios, target, log, resident=True)
        else:
            from benchmarks.bench_cuda import bench as bench_cuda

            yield from bench_cuda(family.workload, scenarios, target, log)


def show(rows: Iterator[Row], target: Target) -> list[Row]:
    """Print the comparison as it is measured."""
    print(f"\n{target.device_name}: microseconds per call, the last two against the better torch")
    print(
        f"{'projection':16} {'batch':20} {'dop':>9} {'default':>9} {'torch loop':>10} "
        f"{'torch bmm':>10} {'dop':>7} {'default':>8}"
    )
    found = []
    for row in rows:
        print(
            f"{row.workload[:16]:16} {row.scenario[:20]:20} {row.dop_us:9.1f} "
            f"{row.default_us:9.1f} {row.loop_us:10.1f} {row.bmm_us:10.1f} "
            f"{row.speedup:6.2f}x {row.default_speedup:7.2f}x",
            flush=True,
        )
        found.append(row)
    return found


def conclude(rows: Sequence[Row]) -> str:
    """The comparison in two sentences."""
    from dop.report.data import geometric_mean

    mean = geometric_mean([row.speedup for row in rows])
    default = geometric_mean([row.default_speedup for row in rows])
    if mean is None or default is None:
        return "Nothing worked; `dop log stats` says what failed."
    worst = min(rows, key=lambda row: row.speedup)
    return (
        f"Over {len(rows)} cases Dop is {mean:.2f}x as fast as the better of torch's two "
        f"(geometric mean); the untuned default {default:.2f}x. "
        f"Worst case: {worst.speedup:.2f}x ({worst.workload}, {worst.scenario})."
    )


def run(options: argparse.Namespace) -> int:
    """Tune, compare, report; returns the exit code."""
    from dop.cli.request import Request, seconds_of
    from dop.cli.tune import search
    from dop.database.jsonl import read_log
    from dop.effort import QUICK
    from dop.measure.hostinfo import find_target
    from dop.report.data import collect
    from dop.report.html import write

    began = time.monotonic()
    target = find_target(options.device)
    model = options.model or MODELS[target.kind]
    families = Request(model, ranks=options.ranks).families(target)
    cases = sum(len(family.scenarios) for family in families)
    print(f"{model}, rank {options.ranks}, on {target.device_name}: {cases} cases to tune")
    effort = replace(QUICK, budget_s=seconds_of(options.budget))
    result = search(families, options.log, effort, options.seed, packs=not options.no_packs)
    progress = result.progress
    print(f"tuned {progress.trials} candidates in {progress.elapsed_s:.0f} s", flush=True)
    if not result.interrupted:
        rows = show(compare(families, target, options.log), target)
        print(f"\n{conclude(rows)}")
    if progress.records + progress.resumed:
        write(collect(read_log(options.log)), options.report)
    print(
        f"log: {options.log}  report: {options.report}  ({time.monotonic() - began:.0f} s in all)"
    )
    return INTERRUPTED if result.interrupted else 0


def main() -> int:
    """`run` with every expected error as one line."""
    options = arguments()
    try:
        from dop.errors import DopError
    except ModuleNotFoundError:
        sys.exit("error: Dop is not installed here. pip install -e '.[tune]'")
    try:
        return run(options)
    except DopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing. pip install -e '.[tune]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {options.log}.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
