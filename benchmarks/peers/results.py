"""The results of a run: rows, the JSON document and the tables.

Rows are those of bench_peers.py, so that `summarise_peers` reads both.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.cases import Case
from benchmarks.peers.summary import CaseTimes, cases_of, geomean
from benchmarks.peers.timing import Times

Row = dict[str, Any]

WIDE = 160
"""Columns of a table that goes into a file."""


def row_of(case: Case, peer: str, **facts: Any) -> Row:
    """A row of one contender on one case; `facts` say how it went."""
    return {
        "peer": peer,
        "key": case.key,
        "layer": case.layer,
        "workload": case.workload.key,
        "rank": case.workload.rank,
        "kind": case.kind,
        "T": case.tokens,
        "assign": case.mix,
        "active": case.active,
        "slots": case.slots,
        "floor_bytes": case.floor_bytes,
        "flops": case.workload.flops(case.tokens),
        **facts,
    }


def timed(times: Times, floor_us: float) -> Row:
    """The fields of a row that its times fill."""
    return {
        "both_us": times.median,
        "both_min": times.least,
        "both_p90": times.p90,
        "floor_us": floor_us,
        "x_floor": times.median / floor_us if floor_us else None,
    }


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Geometric mean and minimum of the operator's speed against the best peer, and vLLM.

    Per kind of batch; a kind without comparisons has no entry.
    """
    cases = cases_of(rows).values()
    found: dict[str, Any] = {}
    for kind in ("decode", "prefill"):
        mine = [case for case in cases if case.kind == kind]
        for name, values in {
            f"{kind}_best_peer": [case.speedup for case in mine],
            f"{kind}_vllm": [case.speedup_over("vllm") for case in mine],
        }.items():
            speeds = [value for value in values if value is not None]
            if speeds:
                found[name] = {"geomean": geomean(speeds), "min": min(speeds), "cases": len(speeds)}
        failed = sum(1 for case in mine if case.operator_failed)
        if failed:
            found[f"{kind}_failed"] = failed
    return found


def summary_lines(found: Mapping[str, Any]) -> list[str]:
    """The summary in words."""
    lines = []
    for name, value in found.items():
        kind, _, against = name.partition("_")
        if isinstance(value, int):
            lines.append(f"{kind}: the operator FAILED on {value} cases")
            continue
        peer = {"best_peer": "the best peer of each case", "vllm": "vLLM"}[against]
        lines.append(
            f"{kind}, against {peer}: {value['geomean']:.2f}x in the geometric mean, "
            f"{value['min']:.2f}x at least, {value['cases']} cases"
        )
    return lines


def layer_rows(rows: Iterable[Mapping[str, Any]], layers: Sequence[str]) -> list[CaseTimes]:
    """Whole layers: the groups of slices added up, where a contender has all of them."""
    groups: dict[tuple[str, int, int, str, bool], list[CaseTimes]] = {}
    for case in cases_of(rows).values():
        group = (case.kind, case.rank, case.tokens, case.mix, case.server)
        groups.setdefault(group, []).append(case)
    found = []
    for (kind, rank, tokens, mix, server), parts in groups.items():
        total = CaseTimes("", "layer", rank, kind, tokens, mix, server)
        total.floor_us = sum(case.floor_us for case in parts)
        whole = len(parts) == len(layers)
        for peer in parts[0].us:
            if whole and all(peer in case.us for case in parts):
                total.us[peer] = sum(case.us[peer] for case in parts)
        found.append(total)
    return sorted(found, key=lambda c: (c.kind, c.rank, c.tokens))


def table(rows: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> tuple[list[str], list[Row]]:
    """Heads and rows of the table of layers, ready to be printed."""
    totals = layer_rows(rows, layers)
    peers = list(dict.fromkeys(str(row["peer"]) for row in rows))
    heads = ["rank", "tokens", "adapters", "floor", *peers, "speed"]
    lines = []
    for case in totals:
        line: Row = {"rank": case.rank, "tokens": case.tokens, "adapters": case.mix}
        line["floor"] = _us(case.floor_us)
        line |= {peer: _us(case.us.get(peer)) for peer in peers}
        line["speed"] = f"{case.speedup:.2f}x" if case.speedup else "-"
        lines.append(line)
    return heads, lines


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def show(heads: Sequence[str], lines: Sequence[Row], title: str) -> None:
    """Prints a table; with rich if that is installed."""
    print(title)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(h), *(len(str(row[h])) for row in lines), 1) for h in heads]
        for row in [dict(zip(heads, heads, strict=True)), *lines]:
            print("  ".join(f"{row[h]!s:>{n}}" for h, n in zip(heads, widths, strict=True)))
        return
    pretty = Table(*heads)
    for column in pretty.columns:
        column.justify = "right"
    for row in lines:
        pretty.add_row(*(str(row[head]) for head in heads))
    width = None if sys.stdout.isatty() else WIDE
    Console(width=width).print(pretty)


def default_path(device: str) -> Path:
    """benchmarks/results/sgmv-<device>-<date>.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"
    name = f"sgmv-{slug}-{time.strftime('%Y-%m-%d')}.json"
    return Path(__file__).resolve().parents[1] / "results" / name


def write(path: Path, document: Mapping[str, Any]) -> None:
    """The JSON file, one row per line."""
    rows = document["rows"]
    head = {key: value for key, value in document.items() if key != "rows"}
    text = json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n  '
    text += ",\n  ".join(json.dumps(row) for row in rows) + "\n ]\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)
