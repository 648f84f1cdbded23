"""A figure of a results file of bench_sgmv: one layer, the operator beside its peers and the floor.

    python -m benchmarks.plot_sgmv benchmarks/results/sgmv-<device>-<date>.json -o docs/sgmv.svg

One panel per mix; the groups of slices of a layer are added up. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.results import layer_rows
from benchmarks.peers.summary import CaseTimes
from dop.errors import ConfigError, DopError, MissingDependencyError

STYLES = {
    "dop": ("Dop", "#0b5fa5", "o", "-", 2.2),
    "extra": ("Dop", "#0b5fa5", "o", "-", 2.2),
    "v2": ("SGLang triton_v2", "#d1701f", "^", "-", 1.2),
    "csgmv": ("SGLang csgmv", "#e3a857", "v", "-", 1.2),
    "c128": ("SGLang csgmv, chunks of 128", "#b58900", "v", ":", 1.2),
    "triton": ("SGLang triton", "#8f6fb5", "D", "-", 1.2),
    "vllm": ("vLLM", "#3d9970", "s", "-", 1.2),
    "torch": ("torch, loop over adapters", "#9a9a9a", "x", "--", 1.0),
    "cublas": ("cuBLAS, one adapter", "#555555", "+", "--", 1.0),
}
OTHER = ("#bbbbbb", ".", ":", 1.0)


def panels(document: dict[str, Any], rank: int) -> dict[str, list[CaseTimes]]:
    """Whole layers by mix, by rising number of tokens; one token counts for every mix.

    Raises:
        ConfigError: the file has no whole layer of that rank.
    """
    complete = [row for row in document["rows"] if "layer" in row]  # others name a failure
    layers = list(dict.fromkeys(str(row["layer"]) for row in complete))
    rows = [row for row in complete if row["rank"] == rank and not _server(row)]
    totals = [case for case in layer_rows(rows, layers) if case.us]
    if not totals:
        ranks = sorted({row["rank"] for row in complete})
        raise ConfigError(f"no whole layer of rank {rank}.", f"The file has ranks {ranks}.")
    mixes = dict.fromkeys(case.mix for case in totals if case.tokens > 1) or {"distinct": None}
    return {
        mix: sorted((c for c in totals if c.mix == mix or c.tokens == 1), key=lambda c: c.tokens)
        for mix in mixes
    }


def _server(row: dict[str, Any]) -> bool:
    return str(row["key"]).endswith(":server")


def draw(document: dict[str, Any], out: Path, rank: int | None = None) -> None:
    """Writes the figure, in the format of the file's ending.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigError: the file has no whole layer of that rank.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingDependencyError(
            "matplotlib is not installed.", "pip install 'dop[bench]'."
        ) from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    ranks = sorted({int(row["rank"]) for row in document["rows"] if "rank" in row})
    rank = rank or (16 if 16 in ranks or not ranks else ranks[0])
    mixes = panels(document, rank)
    plt.rcParams.update({"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "dop"})
    figure, axes = plt.subplots(
        1, len(mixes), figsize=(3.2 * len(mixes) + 0.8, 3.8), sharey=True, squeeze=False
    )
    for axis, (mix, cases) in zip(axes[0], mixes.items(), strict=True):
        _panel(axis, mix, cases)
    axes[0][0].set_ylabel("microseconds per layer")
    handles = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()),
        list(handles),
        frameon=False,
        fontsize=9,
        ncols=4,
        loc="lower center",
    )
    env = document["env"]
    title = f"{document['model']}, rank {rank}, {env['dtype']}: SGMV of one layer, {env['device']}"
    figure.suptitle(f"{title}, {document['date']}", fontsize=10)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


def _panel(axis: Any, mix: str, cases: Sequence[CaseTimes]) -> None:
    """One mix: a line per contender, broken between decode and prefill."""
    tokens = [case.tokens for case in cases]
    floors = [case.floor_us for case in cases]
    axis.fill_between(tokens, floors, color="#eeeeee", label="floor: bytes over copy bandwidth")
    for peer in dict.fromkeys(name for case in cases for name in case.us):
        label, color, marker, style, width = STYLES.get(peer, (peer, *OTHER))
        for kind in ("decode", "prefill"):
            mine = [case for case in cases if case.kind == kind and peer in case.us]
            axis.plot(
                [case.tokens for case in mine],
                [case.us[peer] for case in mine],
                style,
                color=color,
                marker=marker,
                ms=4,
                lw=width,
                label=label,
            )
    axis.set(xscale="log", yscale="log", title=f"{mix} adapters", xlabel="tokens in the batch")
    axis.set_xticks(tokens, [str(count) for count in tokens], fontsize=8, rotation=45)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--rank", type=int, help="default: 16 if the file has it")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/sgmv.svg"))
    options = parser.parse_args(arguments)
    try:
        draw(_read(options.results), options.output, options.rank)
    except DopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", "Give a results file.") from None
    if not isinstance(document, dict) or not document.get("rows") or "env" not in document:
        raise ConfigError(f"{path} is no results file of bench_sgmv.", "Give one.")
    document.setdefault("model", "Llama-3.1-8B")  # bench_peers.py measures that one alone
    document.setdefault("date", "")
    return document


if __name__ == "__main__":
    sys.exit(main())
