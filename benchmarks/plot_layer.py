"""The README's figure: one decoder layer, Dop beside torch, from a committed results file.

    python -m benchmarks.plot_layer benchmarks/results/cuda-<device>-<date>.json -o docs/layer.svg

One panel per mix; the four projections of a layer are added up. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

SERIES = {
    "torch": ("torch: better of loop and bmm", "#9a9a9a", "s", "--"),
    "default": ("Dop, untuned default", "#7fb2d9", "o", "-"),
    "dop": ("Dop, tuned", "#0b5fa5", "o", "-"),
}
MIXES = ("distinct", "uniform", "identical")


def layers(document: dict[str, Any], rank: int) -> dict[str, dict[int, dict[str, float]]]:
    """Microseconds of a layer by mix, tokens and contender.

    The results file lists every projection at every rank in the order they were measured; a batch
    of one token counts for every mix.
    """
    totals: dict[tuple[str, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    ranks = sorted({row["rank"] for row in document["rows"]})
    assert rank in ranks, f"no rows of rank {rank}; there are {ranks}"
    for row in document["rows"]:
        if row["rank"] != rank:
            continue
        tokens, mix, _ = row["scenario"].split("/")
        total = totals[mix, int(tokens.removeprefix("T"))]
        total["dop"] += row["dop_us"]
        total["default"] += row["default_us"]
        total["torch"] += min(row["loop_us"], row["bmm_us"])
    found: dict[str, dict[int, dict[str, float]]] = {}
    for mix in MIXES:
        mine = {t: dict(v) for (m, t), v in totals.items() if m == mix or t == 1}
        found[mix] = dict(sorted(mine.items()))
    return found


def draw(document: dict[str, Any], rank: int, out: Path) -> None:
    """Write the figure."""
    plt.rcParams.update({"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "dop"})
    figure, axes = plt.subplots(1, len(MIXES), figsize=(10, 3.4), sharey=True)
    for axis, (mix, series) in zip(axes, layers(document, rank).items(), strict=True):
        for key, (label, color, marker, style) in SERIES.items():
            figures = [series[t][key] for t in series]
            axis.plot(list(series), figures, style, color=color, marker=marker, ms=4, label=label)
        axis.set(xscale="log", yscale="log", title=f"{mix} adapters", xlabel="tokens in the batch")
        axis.set_xticks(list(series), [str(t) for t in series])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("microseconds per layer")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"{document['model']}, rank {rank}, bf16: SGMV of one layer (qkv + o + gate_up + down), "
        f"{document['device']}, {document['date']}",
        fontsize=10,
    )
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/layer.svg"))
    options = parser.parse_args()
    draw(json.loads(options.results.read_text()), options.rank, options.output)


if __name__ == "__main__":
    main()
