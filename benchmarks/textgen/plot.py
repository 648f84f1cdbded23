"""The figure of a run: retention by case beside its bound, and the time to the first token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.textgen.engine import stock_of
from dop.errors import MissingDependencyError
from dop.scenario import MIXES

if TYPE_CHECKING:
    from benchmarks.textgen.results import CaseResult

COLORS = {
    "base": "#c9c9c9",
    "stock": "#9a9a9a",
    "tuned-json": "#b8860b",
    "loop": "#d9a3a3",
    "dop": "#0b5fa5",
    "stock+specialize": "#6b6b6b",
    "tuned-json+specialize": "#7d5f08",
    "dop+specialize": "#5fa8d3",
}
OTHERS = ("#2a9d8f", "#e07a5f", "#8e6c8a", "#c9a227")
"""Arms with other switches, in their order."""


def color_of(arm: str, arms: Sequence[str]) -> str:
    """Color of one of a plot's arms."""
    others = [name for name in arms if name not in COLORS]
    return COLORS.get(arm) or OTHERS[others.index(arm) % len(OTHERS)]


def plot(path: Path, title: str, results: Sequence[CaseResult]) -> None:
    """Bars of retention (of tokens/s without the arm base) by case, the bound as a line.

    Cases whose outputs have one token get a panel of their own: times to the first token, of
    stock over the arm's (without stock: milliseconds).

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib is not installed.", "pip install 'dop[bench]'."
        ) from error
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "dop"})
    panels = [
        (draw, cases)
        for draw, decodes in ((_paces, True), (_first_tokens, False))
        if (cases := [r for r in results if r.decodes == decodes])
    ]
    widest = max((len(cases) for _, cases in panels), default=1)
    rows = max(1, len(panels))
    figure, axes = plt.subplots(
        rows, 1, figsize=(max(5.5, 1.2 + 0.75 * widest), 0.6 + 2.7 * rows), squeeze=False
    )
    for axis, (draw, unsorted) in zip(axes[:, 0], panels, strict=False):
        cases = sorted(unsorted, key=_place)
        draw(axis, cases)
        _dress(axis, cases)
    handles = {
        label: handle
        for axis in axes[:, 0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.suptitle(title, fontsize=7)
    figure.tight_layout()
    figure.legend(
        handles.values(),
        handles.keys(),
        frameon=False,
        fontsize=8,
        ncols=len(handles) or 1,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.02),
    )
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def _place(result: CaseResult) -> tuple[int, int]:
    """Small batches first, then from all adapters different to one."""
    return result.case.batch_size, MIXES.index(result.case.popularity)


def _bars(axis: Any, values: dict[str, list[float | None]]) -> None:
    """Groups of bars, one colour an arm; None leaves a bar out."""
    width = 0.8 / max(1, len(values))
    for offset, (arm, heights) in enumerate(values.items()):
        shift = (offset - (len(values) - 1) / 2) * width
        known = [(i + shift, h) for i, h in enumerate(heights) if h is not None]
        axis.bar([x for x, _ in known], [h for _, h in known], width * 0.92,
                 color=color_of(arm, list(values)), label=arm)  # fmt: skip


def _paces(axis: Any, cases: Sequence[CaseResult]) -> None:
    based = all("base" in r.runs for r in cases)
    arms = [a for a in dict.fromkeys(a for r in cases for a in r.runs) if not based or a != "base"]
    _bars(axis, {
        a: [None if a not in r.runs else r.retention(a) if based else r.pace(a) for r in cases]
        for a in arms
    })  # fmt: skip
    if based:
        for i, result in enumerate(cases):
            bound = result.bound or 1.0
            axis.plot([i - 0.42, i + 0.42], [bound, bound], color="#333333", lw=1,
                      label="bound: reading the adapters alone" if i == 0 else None)  # fmt: skip
    axis.set_ylabel("share of the base model's tokens/s" if based else "tokens/s")


def _first_tokens(axis: Any, cases: Sequence[CaseResult]) -> None:
    ratios = all(any(a.partition("+")[0] == "stock" for a in r.runs) for r in cases)
    arms = dict.fromkeys(a for r in cases for a in r.runs)

    def height(result: CaseResult, arm: str) -> float | None:
        if arm not in result.runs:
            return None
        if not ratios:
            return result.row(arm)["ttft_mean_ms"]
        return result.ttft_ratio(arm, stock_of(arm, result.runs) or arm)

    _bars(axis, {a: [height(r, a) for r in cases] for a in arms})
    axis.set_ylabel("time to first token: stock / arm" if ratios else "time to first token, ms")


def _dress(axis: Any, cases: Sequence[CaseResult]) -> None:
    several = len({r.case.lengths for r in cases}) > 1
    labels = [
        f"{r.case.popularity}\nb{r.case.batch_size}" + (f"\n{r.case.lengths}" if several else "")
        for r in cases
    ]
    axis.set_xticks(range(len(cases)), labels, fontsize=7 if len(cases) > 8 else 9)
    if not several:
        axis.set_xlabel(f"lengths {cases[0].case.lengths}", fontsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
