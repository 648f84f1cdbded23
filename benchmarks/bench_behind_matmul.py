"""What LoRA adds to the base layer's matmul in a CUDA graph: behind it, and with shrink beside it.

    python -m benchmarks.bench_behind_matmul [--model Llama-3.1-8B] [--ranks 16] [--out FILE]
    python -m benchmarks.bench_behind_matmul --tokens 1,64 --mix uniform,identical

A graph holds a few layers of one kind, each with weights of its own: a small kernel that writes x,
the matmul by cuBLAS, LoRA, and a small kernel that reads y. Graphs with `dop.ops.add_lora`, with
`dop.ops.beside` and without LoRA take turns on a flushed L2 cache. Kernels are chosen as for a CUDA
graph, in which the adapters are not known.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.torch_cuda import replay_ms
from dop import collect_env, ops
from dop.cli.request import Request
from dop.errors import DopError, MissingDependencyError
from dop.measure.hostinfo import find_target
from dop.ops.beside import Beside
from dop.scenario import Scenario
from dop.workload import Workload

LAYERS = 6
"""Of a graph; their matmuls read more than L2 holds."""
SLOTS = 64
DEVICE = "cuda"
REPLAYS = 9
FLUSH_BYTES = 200 << 20
TOKENS = "1,8,16,32,64,128"
MIXES = "distinct,uniform,identical"
WAYS = ("matmul", "behind", "beside")
FIGURES = ("matmul_us", "behind_us", "beside_us")


@dataclass(frozen=True)
class Row:
    """A layer and a batch.

    Attributes:
        layer, rank, scenario: which.
        matmul_us: the base layer alone, microseconds.
        behind_us, beside_us: what LoRA adds to it, microseconds.
        spread: of the replays, the largest of the three, as a share of the matmul.
    """

    layer: str
    rank: int
    scenario: str
    matmul_us: float
    behind_us: float
    beside_us: float
    spread: float


def row_of(workload: Workload, scenario: Scenario, seconds: dict[str, Sequence[float]]) -> Row:
    """The row of a case from the seconds per layer of every replay, by way."""
    middle = {way: statistics.median(found) * 1e6 for way, found in seconds.items()}
    spread = max(max(found) - min(found) for found in seconds.values()) * 1e6
    alone = middle["matmul"]
    return Row(
        workload.name,
        workload.rank,
        scenario.key,
        alone,
        middle["behind"] - alone,
        middle["beside"] - alone,
        spread / alone,
    )


def bench(workload: Workload, scenarios: Sequence[Scenario]) -> Iterator[Row]:
    """Rows of one layer on the current GPU."""
    kind = getattr(torch, workload.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=kind) / shape[-1] ** 0.5

    width, rank = workload.in_features, workload.rank
    weights = [normal(workload.total_out, width) for _ in range(LAYERS)]
    a = [[normal(SLOTS, rank, width) for _ in workload.out_features] for _ in range(LAYERS)]
    b = [[normal(SLOTS, n, rank) for n in workload.out_features] for _ in range(LAYERS)]
    stream, beside = torch.cuda.Stream(), Beside(torch.cuda.Stream())
    flush = torch.zeros(FLUSH_BYTES // 4, device=DEVICE)
    with torch.cuda.stream(stream):
        for scenario in scenarios:
            source = normal(scenario.tokens, width)
            x, seen = torch.empty_like(source), normal(scenario.tokens, 64)
            y = normal(scenario.tokens, workload.total_out)
            slots = torch.tensor(scenario.token_to_adapter(0), dtype=torch.int32, device=DEVICE)
            plan = ops.segment_plan(slots, slots=SLOTS)
            ops.add_lora(y, x, a[0], b[0], plan)  # loads what cannot be loaded while capturing

            def layers(way: str, x=x, y=y, source=source, seen=seen, plan=plan):
                for i, weight in enumerate(weights):
                    torch.mul(source, 1.0, out=x)
                    pending = beside.begin(x, a[i], b[i], plan) if way == "beside" else None
                    torch.mm(x, weight.t(), out=y)
                    if pending is not None:
                        beside.finish(pending, y)
                    elif way == "behind":
                        ops.add_lora(y, x, a[i], b[i], plan)
                    torch.mul(y[:, :64], 1.0, out=seen)

            torch.cuda.synchronize()
            graphs = {way: _captured(stream, lambda way=way: layers(way)) for way in WAYS}
            yield row_of(workload, scenario, _timed(graphs, flush))


def _captured(stream: Any, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def _timed(
    graphs: dict[str, torch.cuda.CUDAGraph], flush: torch.Tensor
) -> dict[str, Sequence[float]]:
    """Seconds per layer of every replay but the first."""
    turns = [
        {way: replay_ms(graph, flush) * 1e-3 / LAYERS for way, graph in graphs.items()}
        for _ in range(REPLAYS + 1)
    ]
    return {way: tuple(turn[way] for turn in turns[1:]) for way in graphs}


def text_of(rows: Sequence[Row]) -> str:
    """A table; a line over all layers for each rank and batch."""
    head = (
        f"{'layer':14} {'rank':>4}  {'batch':18} {'matmul us':>9} {'+ behind':>9} {'+ beside':>9}"
    )
    lines = [head]
    for rank in dict.fromkeys(row.rank for row in rows):
        for scenario in dict.fromkeys(row.scenario for row in rows if row.rank == rank):
            mine = [row for row in rows if (row.rank, row.scenario) == (rank, scenario)]
            for row in mine:
                lines.append(_line(row.layer, row))
            sums = {name: sum(getattr(row, name) for row in mine) for name in FIGURES}
            lines.append(_line("all layers", replace(mine[0], **sums)))
    return "\n".join(lines)


def _line(name: str, row: Row) -> str:
    times = f"{row.matmul_us:9.1f} {row.behind_us:9.2f} {row.beside_us:9.2f}"
    return f"{name:14} {row.rank:4}  {row.scenario:18} {times}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--mix", default=MIXES)
    parser.add_argument("--out", type=Path, help="JSON document, with device, versions and date")
    parser.add_argument("--json", action="store_true", help="print the document")
    given = parser.parse_args(arguments)
    try:
        if not torch.cuda.is_available():
            raise MissingDependencyError("torch sees no CUDA device.", "Run it where there is one.")
        target = find_target("cuda")
        request = Request(
            given.model, ranks=given.ranks, tp=given.tp, dtype=given.dtype,
            tokens=given.tokens, mix=given.mix,
        )  # fmt: skip
        rows: list[Row] = []
        for family in request.families(target):
            for row in bench(family.workload, [s for s in family.scenarios if s.adapters <= SLOTS]):
                rows.append(row)
                print(_line(row.layer, row), file=sys.stderr, flush=True)
    except DopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    document = {
        "benchmark": "behind_matmul",
        "model": given.model,
        "dtype": given.dtype,
        "slots": SLOTS,
        "device": target.device_name,
        "versions": collect_env.versions(),
        "revision": collect_env.revision(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [asdict(row) for row in rows],
    }
    if given.out is not None:
        given.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document) if given.json else text_of(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
