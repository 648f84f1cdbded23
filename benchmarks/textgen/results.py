"""What a run found: by case and arm, beside the base model and the bound; lines, table, plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

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
        retention, bound = self.retention(arm), self.bound

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
        row["retention"] = None if is_base else retention
        row["bound"] = None if is_base else bound
        row["of_bound"] = retention / bound if retention and bound and not is_base else None
        row["over_stock"] = None if arm == "stock" else self.ratio(arm, "stock")
        row["ttft_over_stock"] = None if arm == "stock" else self.ttft_ratio(arm, "stock")
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


def summary(results: Sequence[CaseResult]) -> list[str]:
    """Geometric means over the cases of the same lengths, a line for each arm."""
    lines = []
    for lengths in dict.fromkeys(r.case.lengths for r in results):
        mine = [r for r in results if r.case.lengths == lengths]
        for arm in dict.fromkeys(arm for r in mine for arm in r.runs):
            words = []
            if arm != "stock":
                words += _mean("x stock", [r.ratio(arm, "stock") for r in mine])
                words += _mean("x stock's TTFT", [r.ttft_ratio(arm, "stock") for r in mine])
            if arm != "base":
                words += _mean(" retention", [r.retention(arm) for r in mine])
            if words:
                lines.append(f"{lengths} {arm}: " + ", ".join(words))
    return lines


def _mean(what: str, values: Sequence[float | None]) -> list[str]:
    """ "1.90x stock (least 1.20)", in a list that is empty if there are no values."""
    known = [v for v in values if v is not None]
    return [f"{_geometric(known):.2f}{what} (least {min(known):.2f})"] if known else []


def _geometric(values: Sequence[float]) -> float:
    return math.exp(fmean(math.log(v) for v in values))


def write(folder: Path, header: dict[str, Any], results: Sequence[CaseResult]) -> None:
    """results.jsonl, table.md, plot.svg."""
    write_lines(folder, header, results)
    (folder / "table.md").write_text(f"{title(header)}\n\n{table(results)}\n")
    plot(folder / "plot.svg", header, results)


def write_lines(folder: Path, header: dict[str, Any], results: Sequence[CaseResult]) -> None:
    """results.jsonl: a header, then every run and every row. Written anew after every case."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "run", **header}]
    for result in results:
        for arm, runs in result.runs.items():
            where = {"case": result.case.key, "arm": arm, "read_ms": result.read_ms}
            lines += [
                {"kind": "repeat", **where, "repeat": i, **run.as_dict()}
                for i, run in enumerate(runs)
            ]
    lines += [{"kind": "row", **row} for row in rows(results)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    partial = folder / "results.jsonl.part"
    partial.write_text(text)
    partial.replace(folder / "results.jsonl")


def title(header: dict[str, Any]) -> str:
    """What was measured, in one line."""
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items())
    return (
        f"{header['model']}, rank {header['rank']}, {header['dtype']}, {header['engine']}, "
        f"{header['device']}, {header['date']} ({versions})"
    )


COLORS = {
    "base": "#c9c9c9",
    "stock": "#9a9a9a",
    "tuned-json": "#b8860b",
    "loop": "#d9a3a3",
    "dop": "#0b5fa5",
}


def plot(path: Path, header: dict[str, Any], results: Sequence[CaseResult]) -> None:
    """Bars of retention (of tokens/s without the arm base) by case, the bound as a line."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "dop"})
    based = all("base" in r.runs for r in results)
    arms = [
        a for a in dict.fromkeys(a for r in results for a in r.runs) if not based or a != "base"
    ]
    figure, axis = plt.subplots(figsize=(max(5.0, 0.75 * len(results) * len(arms) ** 0.5 + 2), 3.6))
    width = 0.8 / max(1, len(arms))
    for offset, arm in enumerate(arms):
        places, heights = [], []
        for i, result in enumerate(results):
            if arm in result.runs:
                places.append(i + (offset - (len(arms) - 1) / 2) * width)
                heights.append((result.retention(arm) or 0) if based else result.pace(arm))
        axis.bar(places, heights, width * 0.92, color=COLORS[arm], label=arm)
    if based:
        for i, result in enumerate(results):
            bound = result.bound or 1.0
            axis.plot([i - 0.42, i + 0.42], [bound, bound], color="#333333", lw=1,
                      label="bound: reading the adapters alone" if i == 0 else None)  # fmt: skip
    several = len({r.case.lengths for r in results}) > 1
    labels = [
        f"{r.case.popularity}\nb{r.case.batch_size}" + (f"\n{r.case.lengths}" if several else "")
        for r in results
    ]
    axis.set_xticks(range(len(results)), labels)
    axis.set_ylabel("share of the base model's tokens/s" if based else "tokens/s")
    axis.set_title(title(header).split(" (")[0], fontsize=9)
    axis.legend(frameon=False, fontsize=8, ncols=len(arms) + 1, loc="upper center",
                bbox_to_anchor=(0.5, -0.24 if several else -0.16))  # fmt: skip
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
