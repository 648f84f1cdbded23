"""What a run of bench_peers.py (or bench_sgmv) says: geometric means and minima, bars, worst cases.

    python -m benchmarks.summarise_peers out/peers.json
    python -m benchmarks.summarise_peers ranks-16-64.json ranks-8-32-128.json --worst 30
    python -m benchmarks.summarise_peers rows.jsonl --copy-gbps 4300 --strict

Several files are read as one: parts of one set of cases, each measured with its peers. A case that
stands in two files is taken from the later one whole, so that no ratio mixes two runs. `--operator`
does mix them, for a quick look at a change: the operator's rows come from that file alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers.summary import (
    OPERATORS,
    CaseTimes,
    Figure,
    bars,
    by,
    cases_of,
    read_rows,
    worst,
)
from dop.errors import DopError

GROUPS = ("rank", "tokens", "mix", "layer")


def read(paths: Sequence[Path], copy_gbps: float) -> tuple[list[dict[str, Any]], list[CaseTimes]]:
    """Environments and cases of all files.

    Raises:
        ConfigError: a file cannot be read or holds no rows.
    """
    environments, cases = [], {}
    for path in paths:
        env, rows = read_rows(path)
        environments.append(env)
        cases.update(cases_of(rows, copy_gbps or float(env.get("copy_gbps") or 0.0)))
    return environments, list(cases.values())


def replace_operator(cases: Sequence[CaseTimes], newer: Sequence[CaseTimes]) -> list[CaseTimes]:
    """The cases of `newer`, with the peers of `cases` instead of its own."""
    peers = {case.key: case for case in cases}
    found = []
    for case in newer:
        other = peers.get(case.key)
        if other is not None:
            for mine, theirs in (
                (case.us, other.us),
                (case.errors, other.errors),
                (case.failed, other.failed),
            ):
                _replace(mine, theirs)
        found.append(case)
    return found


def _replace(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    kept = {name: value for name, value in mine.items() if name in OPERATORS}
    mine.clear()
    mine.update(kept | {name: value for name, value in theirs.items() if name not in OPERATORS})


def report(environments: Sequence[dict[str, Any]], cases: Sequence[CaseTimes], most: int) -> str:
    """The whole text."""
    lines = [_environment(env) for env in environments if env]
    lines += _coverage(cases)
    lines += ["", f"{'bar':<52}{'figure':>10} {'wanted':>11}  cases"]
    lines += [_bar(figure) for figure in bars(cases)]
    lines += ["", f"{'against the best peer':<28}{'cases':>6}{'mean':>8}{'min':>8}{'floor':>8}"]
    for what in GROUPS:
        for name, count, mean, least, share in by(cases, what):
            floor = f"{share:.0%}" if share else "-"
            lines.append(f"{name:<28}{count:>6}{mean:>7.2f}x{least:>7.2f}x{floor:>8}")
    lines += ["", f"{'worst cases, us':<44}{'dop':>8}{'floor':>8}{'best':>8}  peer      speed"]
    lines += [_worst(case) for case in worst(cases, most)]
    return "\n".join(lines)


def _environment(env: dict[str, Any]) -> str:
    return (
        f"{env.get('device')}, torch {env.get('torch')}, triton {env.get('triton')}, "
        f"{env.get('dtype')}; copy {env.get('copy_gbps') or 0:.0f} GB/s, "
        f"empty kernel in a graph {env.get('empty_node_us') or 0:.2f} us"
    )


def _coverage(cases: Sequence[CaseTimes]) -> list[str]:
    """Cases by kind, what failed, and which peer was the best how often."""
    kinds = Counter("server" if case.server else case.kind for case in cases)
    lines = ["cases: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items())]
    best = Counter(case.best_peer[0] for case in cases if case.best_peer)
    lines.append("best peer: " + ", ".join(f"{peer} {n}" for peer, n in best.most_common()))
    unpaired = sum(1 for case in cases if case.speedup is None)
    if unpaired:
        lines.append(f"{unpaired} cases lack the operator or every peer: they count nowhere")
    for peer, count in Counter(p for case in cases for p in case.failed).most_common():
        example = next(case for case in cases if peer in case.failed)
        lines.append(f"{peer} failed {count} times ({example.key}: {example.failed[peer][:90]})")
    return lines


def _bar(figure: Figure) -> str:
    verdict = {True: "", False: "  MISSED", None: ""}[figure.met]
    digits = 2 if figure.unit == "x" else 1
    value = "not run" if figure.value is None else f"{figure.value:.{digits}f} {figure.unit}"
    sign = ">=" if figure.at_least else "<="
    wanted = f"{sign} {figure.wanted:g} {figure.unit}"
    return f"{figure.name:<52}{value:>10} {wanted:>11} {figure.cases:>6}{verdict}"


def _worst(case: CaseTimes) -> str:
    best = case.best_peer
    assert best is not None
    return (
        f"{case.key:<44}{case.operator_us:>8.1f}{case.floor_us:>8.1f}{best[1]:>8.1f}"
        f"  {best[0]:<8}{case.speedup:>6.2f}x"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line; returns the exit code: 1 if --strict and a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--worst", type=int, default=20, help="number of cases to list")
    parser.add_argument("--copy-gbps", type=float, default=0.0, help="if the file lacks it")
    parser.add_argument("--operator", type=Path, metavar="FILE", help="newer rows of the operator")
    parser.add_argument("--json", action="store_true", help="bars and worst cases as JSON")
    parser.add_argument("--strict", action="store_true", help="exit 1 unless every bar holds")
    options = parser.parse_args(arguments)
    try:
        environments, cases = read(options.files, options.copy_gbps)
        if options.operator:
            more, newer = read([options.operator], options.copy_gbps)
            environments, cases = [*environments, *more], replace_operator(cases, newer)
    except DopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures = bars(cases)
    if options.json:
        found = {
            "env": environments,
            "bars": [asdict(figure) | {"met": figure.met} for figure in figures],
            "worst": [
                asdict(case) | {"speedup": case.speedup} for case in worst(cases, options.worst)
            ],
        }
        print(json.dumps(found, indent=1))
    else:
        print(report(environments, cases, options.worst))
    return 1 if options.strict and not all(figure.met for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
