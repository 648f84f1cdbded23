"""From measured rows to figures: speed against the best peer, against floors, and the bars.

Rows are those of `bench_peers.py` (peers.json, or its lines) and of `bench_sgmv`, which writes the
same: one row per case and contender. Standard library only.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dop.errors import ConfigError

OPERATORS = ("dop", "extra")
"""What the operator is called in bench_sgmv's rows and in bench_peers.py's."""
VLLM = "vllm"
ERROR_SLACK = 1.05
"""An allowance, not a measurement: errors of two operators that round alike differ by chance."""


@dataclass
class CaseTimes:
    """What one run measured on one case.

    Attributes:
        key: name of the case.
        floor_us: bytes that must move over the run's copy bandwidth; 0 if that is unknown.
        us: microseconds per call, by contender.
        errors: relative error of the result, by contender.
        failed: message, by contender that did not run or was wrong.
    """

    key: str
    layer: str
    rank: int
    kind: str
    tokens: int
    mix: str
    server: bool
    floor_us: float = 0.0
    us: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def operator_us(self) -> float | None:
        """The operator's time, None if it has none."""
        return next((self.us[name] for name in OPERATORS if name in self.us), None)

    @property
    def operator_failed(self) -> str:
        """Why the operator has no time, "" if it has one or was not asked."""
        return next((self.failed[name] for name in OPERATORS if name in self.failed), "")

    @property
    def best_peer(self) -> tuple[str, float] | None:
        """Name and time of the fastest peer that was right."""
        peers = {name: us for name, us in self.us.items() if name not in OPERATORS}
        return min(peers.items(), key=lambda item: item[1]) if peers else None

    @property
    def speedup(self) -> float | None:
        """Best peer over the operator; None unless both were measured."""
        mine, best = self.operator_us, self.best_peer
        return best[1] / mine if mine and best else None

    def speedup_over(self, peer: str) -> float | None:
        """One peer over the operator."""
        mine, other = self.operator_us, self.us.get(peer)
        return other / mine if mine and other else None

    @property
    def error_ratio(self) -> float | None:
        """The operator's error over the most exact peer's."""
        mine = next((self.errors[name] for name in OPERATORS if name in self.errors), None)
        others = [e for name, e in self.errors.items() if name not in OPERATORS and e > 0]
        return mine / min(others) if mine is not None and others else None


def read_rows(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Environment and rows of a results file: a JSON document, or one JSON row per line; a name
    that ends in .gz is unpacked.

    Raises:
        ConfigError: it cannot be read, or holds no rows.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", "Give a results file.") from None
    document: Any = None
    try:
        document = json.loads(text)
    except ValueError:
        rows = [row for row in map(_row, text.splitlines()) if row]
    else:
        if isinstance(document, dict) and "rows" in document:
            rows = [row for row in document["rows"] if isinstance(row, dict)]
        else:
            rows = [row for row in (document,) if isinstance(row, dict) and "key" in row]
    if not rows:
        raise ConfigError(f"{path} holds no rows.", "Give peers.json, or lines of its rows.")
    env = document.get("env", {}) if isinstance(document, dict) else {}
    return env, rows


def _row(line: str) -> dict[str, Any] | None:
    """Row of a line; None for what is no row (a last line that was cut off)."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "key" in row else None


def cases_of(rows: Iterable[Mapping[str, Any]], copy_gbps: float = 0.0) -> dict[str, CaseTimes]:
    """Cases by key. A row without a time or with an error counts as failed."""
    cases: dict[str, CaseTimes] = {}
    for row in rows:
        key, peer = str(row["key"]), str(row.get("peer", "-"))
        case = cases.get(key)
        if case is None:
            case = _parse(key)
            if case is None:
                continue
            cases[key] = case
        if row.get("floor_us"):
            case.floor_us = float(row["floor_us"])
        elif copy_gbps and row.get("floor_bytes"):
            case.floor_us = float(row["floor_bytes"]) / copy_gbps / 1e3
        if row.get("error") or not row.get("both_us"):
            case.failed[peer] = str(row.get("error") or "no time")
            continue
        case.us[peer] = float(row["both_us"])
        if row.get("err") is not None:
            case.errors[peer] = float(row["err"])
    return cases


def _parse(key: str) -> CaseTimes | None:
    """Case of a key such as decode:T64:distinct:qkv:r16:tight; None if it is none."""
    try:
        kind, tokens, mix, layer, rank, mode = key.split(":")
        return CaseTimes(key, layer, int(rank[1:]), kind, int(tokens[1:]), mix, mode == "server")
    except ValueError:
        return None


def geomean(values: Sequence[float]) -> float:
    """Geometric mean of positive values."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


@dataclass(frozen=True)
class Figure:
    """One figure beside what is wanted of it.

    Attributes:
        value: None if the cases it needs were not measured.
        wanted: bound; a lower one if `at_least`, else an upper one.
        cases: number of cases behind the value.
    """

    name: str
    value: float | None
    wanted: float
    at_least: bool
    cases: int
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        """Whether the bar holds; None if it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.wanted if self.at_least else self.value <= self.wanted


def bars(cases: Iterable[CaseTimes]) -> list[Figure]:
    """The figures that the operator is held to, of a Llama-3.1-8B layer on one GPU.

    A case on which the operator failed has speed 0: no minimum hides it.
    """
    tight = [case for case in cases if not case.server]
    decode = [case for case in tight if case.kind == "decode"]
    prefill = [case for case in tight if case.kind == "prefill"]
    figures = [
        *_speed("decode, best peer of each case", decode, 1.6, 1.0, lambda c: c.speedup),
        *_speed("decode, vLLM", decode, 3.0, None, lambda c: c.speedup_over(VLLM)),
        *_speed("prefill, best peer of each case", prefill, 1.2, 1.0, lambda c: c.speedup),
    ]
    one, _ = layer_sum(tight, 16, 1, "distinct")
    figures.append(Figure("layer, T=1, rank 16", one, 16.0, False, 4, "us"))
    many, _ = layer_sum(tight, 16, 64, "distinct")
    figures.append(Figure("layer, T=64 distinct, rank 16", many, 80.0, False, 4, "us"))
    wide, floor = layer_sum(tight, 64, 128, "distinct")
    share = floor / wide * 100 if wide and floor else None
    figures.append(Figure("copy bandwidth, T=128 distinct, rank 64", share, 75.0, True, 4, "%"))
    ratios = [case.error_ratio for case in tight if case.error_ratio is not None]
    worst = max(ratios) if ratios else None
    figures.append(
        Figure("error over the best peer's, worst", worst, ERROR_SLACK, False, len(ratios))
    )
    return figures


def _speed(
    name: str,
    cases: Sequence[CaseTimes],
    mean: float,
    least: float | None,
    speedup: Callable[[CaseTimes], float | None],
) -> list[Figure]:
    """Geometric mean and, if asked for, minimum of a speed-up."""
    values = [value for value in map(speedup, cases) if value is not None]
    lost = sum(1 for case in cases if case.operator_failed)
    count = len(values) + lost
    typical = 0.0 if lost else geomean(values) if values else None
    found = [Figure(f"{name}: geometric mean", typical, mean, True, count)]
    if least is not None:
        lowest = 0.0 if lost else min(values, default=None)
        found.append(Figure(f"{name}: minimum", lowest, least, True, count))
    return found


def layer_sum(
    cases: Iterable[CaseTimes], rank: int, tokens: int, mix: str
) -> tuple[float | None, float]:
    """Microseconds of the operator and of the floors over one layer; None if a part is missing."""
    parts = [c for c in cases if (c.rank, c.tokens, c.mix) == (rank, tokens, mix)]
    times = [case.operator_us for case in parts]
    if not parts or any(us is None for us in times):
        return None, 0.0
    return sum(us for us in times if us is not None), sum(case.floor_us for case in parts)


def by(cases: Iterable[CaseTimes], what: str) -> list[tuple[str, int, float, float, float | None]]:
    """Per kind and value of an attribute: cases, mean speed-up, least, mean share of the floor."""
    groups: dict[tuple[str, Any], list[CaseTimes]] = defaultdict(list)
    for case in cases:
        if case.speedup is not None and not case.server:
            groups[case.kind, getattr(case, what)].append(case)
    rows = []
    for (kind, value), mine in sorted(groups.items(), key=lambda item: item[0]):
        speeds = [case.speedup for case in mine if case.speedup is not None]
        shares = [c.floor_us / c.operator_us for c in mine if c.operator_us and c.floor_us]
        share = geomean(shares) if shares else None
        rows.append((f"{kind} {what} {value}", len(mine), geomean(speeds), min(speeds), share))
    return rows


def worst(cases: Iterable[CaseTimes], count: int) -> list[CaseTimes]:
    """The cases with the lowest speed against their best peer, lowest first."""
    ranked = [case for case in cases if case.speedup is not None]
    return sorted(ranked, key=lambda case: (case.speedup or 0.0, case.key))[:count]
