"""What a run found: by case and arm, beside the base model and the bound; lines, table, plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.textgen.engine import stock_of
from benchmarks.textgen.plot import plot
from benchmarks.textgen.timing import Run
from benchmarks.textgen.workload import Case


@dataclass
class CaseResult:
    """All runs of one case.

    Attributes:
        case: what was served.
        read_ms: time that reading the adapters of one batch once takes at copy bandwidth.
        runs: arm -> its runs, one a repeat.
    """

    case: Case
    read_ms: float
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def pace(self, arm: str) -> float:
        """Tokens per second of an arm, the median of its repeats."""
        return median(run.pace for run in self.runs[arm])

    def ratio(self, arm: str, other: str) -> float | None:
        """Pace of an arm over another's: median of the repeats' ratios; None if one is missing."""
        if arm not in self.runs or other not in self.runs:
            return None
        pairs = zip(self.runs[arm], self.runs[other], strict=True)
        return median(a.pace / b.pace for a, b in pairs)

    def retention(self, arm: str) -> float | None:
        """Share of the base model's pace."""
        return self.ratio(arm, "base")

    @property
    def bound(self) -> float | None:
        """Largest possible retention: the base model's step plus the reading of the adapters.

        None without the base model, or without decode steps.
        """
        steps = [ms for run in self.runs.get("base", ()) if (ms := run.token_ms) is not None]
        return median(steps) / (median(steps) + self.read_ms) if steps else None

    def of_bound(self, arm: str) -> float | None:
        """Share of the largest possible retention that an arm reaches."""
        retention, bound = self.retention(arm), self.bound
        return retention / bound if retention and bound else None

    @property
    def decodes(self) -> bool:
        """Whether its requests have decode steps at all."""
        return self.case.decodes

    def ttft_ratio(self, arm: str, other: str) -> float | None:
        """Mean time to first token of the other arm over this one's: above 1 is faster."""
        if arm not in self.runs or other not in self.runs:
            return None
        pairs = zip(self.runs[arm], self.runs[other], strict=True)
        return median(b.ttft_ms.mean / a.ttft_ms.mean for a, b in pairs)

    def row(self, arm: str) -> dict[str, Any]:
        """The figures of one line of the table."""
        runs = self.runs[arm]
        paces = [run.pace for run in runs]
        steps = [run.step_ms for run in runs if run.step_ms is not None]

        def middle(name: str, figure: str) -> float | None:
            stats = [getattr(run, name) for run in runs]
            return median(getattr(s, figure) for s in stats) if all(stats) else None

        row: dict[str, Any] = {
            "batch": self.case.batch_size,
            "popularity": self.case.popularity,
            "lengths": self.case.lengths,
            "arm": arm,
            "repeats": len(runs),
            "tokens_per_s": median(paces),
            "spread": (max(paces) - min(paces)) / median(paces),
            "step_ms": median(steps) if steps else None,
        }
        for name in ("ttft_ms", "tpot_ms"):
            row |= {f"{name[:-3]}_{f}_ms": middle(name, f) for f in ("mean", "p50", "p99")}
        is_base = arm == "base"
        row["retention"] = None if is_base else self.retention(arm)
        row["bound"] = None if is_base else self.bound
        row["of_bound"] = None if is_base else self.of_bound(arm)
        stock = stock_of(arm, self.runs)
        row["over_stock"] = self.ratio(arm, stock) if stock else None
        row["ttft_over_stock"] = self.ttft_ratio(arm, stock) if stock else None
        return row


COLUMNS = (
    ("batch", "batch", "d"),
    ("popularity", "popularity", "s"),
    ("lengths", "lengths", "s"),
    ("arm", "arm", "s"),
    ("tokens_per_s", "tok/s", ".1f"),
    ("spread", "spread", ".1%"),
    ("step_ms", "step ms", ".2f"),
    ("ttft_mean_ms", "TTFT ms", ".1f"),
    ("ttft_p50_ms", "p50", ".1f"),
    ("ttft_p99_ms", "p99", ".1f"),
    ("tpot_mean_ms", "TPOT ms", ".2f"),
    ("tpot_p50_ms", "p50", ".2f"),
    ("tpot_p99_ms", "p99", ".2f"),
    ("retention", "retention", ".2f"),
    ("bound", "bound", ".2f"),
    ("of_bound", "of bound", ".0%"),
    ("over_stock", "x stock", ".2f"),
    ("ttft_over_stock", "TTFT x", ".2f"),
)


def rows(results: Iterable[CaseResult]) -> list[dict[str, Any]]:
    """One row for each case and arm."""
    return [result.row(arm) for result in results for arm in result.runs]


def table(results: Sequence[CaseResult]) -> str:
    """A Markdown table, its columns aligned."""
    head = [title for _, title, _ in COLUMNS]
    lines = [head]
    for row in rows(results):
        lines.append(["" if row[k] is None else format(row[k], f) for k, _, f in COLUMNS])
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    words = {"s"}
    out = []
    for number, line in enumerate(lines):
        cells = [
            cell.ljust(w) if COLUMNS[i][2] in words else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("| " + " | ".join(cells) + " |")
        if number == 0:
            bars = ("-" * w if COLUMNS[i][2] in words else "-" * (w - 1) + ":"
                    for i, w in enumerate(widths))  # fmt: skip
            out.append("| " + " | ".join(bars) + " |")
    return "\n".join(out)


def means(results: Sequence[CaseResult]) -> list[dict[str, Any]]:
    """Geometric mean and least value over the cases of the same lengths, one for each arm."""
    found = []
    for lengths in dict.fromkeys(r.case.lengths for r in results):
        mine = [r for r in results if r.case.lengths == lengths]
        for arm in dict.fromkeys(arm for r in mine for arm in r.runs):
            line: dict[str, Any] = {"lengths": lengths, "arm": arm, "cases": len(mine)}
            rows = [r.row(arm) for r in mine if arm in r.runs]
            for name in ("over_stock", "ttft_over_stock"):
                line[name] = _mean([row[name] for row in rows])
            if arm != "base":
                line["retention"] = _mean([r.retention(arm) for r in mine])
                line["of_bound"] = _mean([r.of_bound(arm) for r in mine])
            found.append({k: v for k, v in line.items() if v is not None})
    return found


WORDS = {
    "over_stock": "x stock",
    "ttft_over_stock": "x stock's TTFT",
    "retention": " retention",
    "of_bound": " of the bound",
}


def summary(results: Sequence[CaseResult]) -> list[str]:
    """The means as lines: "64:96 dop: 1.90x stock (least 1.20), ..."."""
    lines = []
    for mean in means(results):
        words = [
            f"{mean[k]['geomean']:.2f}{what} (least {mean[k]['least']:.2f})"
            for k, what in WORDS.items()
            if k in mean
        ]
        if words:
            lines.append(f"{mean['lengths']} {mean['arm']}: " + ", ".join(words))
    return lines


def _mean(values: Sequence[float | None]) -> dict[str, float] | None:
    """Geometric mean and least of the values that are there; None if there are none."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    return {"geomean": math.exp(fmean(math.log(v) for v in known)), "least": min(known)}


def write(folder: Path, header: dict[str, Any], results: Sequence[CaseResult]) -> None:
    """results.jsonl, table.md, plot.svg."""
    write_lines(folder, header, results)
    (folder / "table.md").write_text(f"{title(header)}\n\n{table(results)}\n")
    plot(folder / "plot.svg", title(header), results)


def write_lines(folder: Path, header: dict[str, Any], results: Sequence[CaseResult]) -> None:
    """results.jsonl: a header, then every run and every row. Written anew after every case."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [{"kind": "run", **header}]
    lines += [{"kind": "repeat", **repeat} for repeat in repeats(results)]
    lines += [{"kind": "row", **row} for row in rows(results)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    partial = folder / "results.jsonl.part"
    partial.write_text(text)
    partial.replace(folder / "results.jsonl")


def repeats(results: Iterable[CaseResult]) -> list[dict[str, Any]]:
    """Every run of every case and arm."""
    found = []
    for result in results:
        for arm, runs in result.runs.items():
            where = {"case": result.case.key, "arm": arm, "read_ms": result.read_ms}
            found += [{**where, "repeat": i, **run.as_dict()} for i, run in enumerate(runs)]
    return found


def title(header: dict[str, Any]) -> str:
    """What was measured, in one line."""
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items())
    return (
        f"{header['model']}, rank {header['rank']}, {header['dtype']}, {header['engine']}, "
        f"{header['device']}, {header['date']} ({versions})"
    )
