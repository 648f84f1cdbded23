"""What LoRA adds to the base layers' matmuls in a CUDA graph: behind them, and with shrink beside.

    python -m benchmarks.bench_behind_matmul [--model Llama-3.1-8B] [--ranks 16] [--out FILE]
    python -m benchmarks.bench_behind_matmul --tokens 1,64 --mix uniform,identical

A graph holds a few of a model's layers: qkv, o, gate_up and down in turn, each with weights of its
own, a matmul by cuBLAS with a small kernel in front that makes its x of the last one's y. (With one
kind of layer over and over kernels' code stays in L2, and shrinks end in time that in a model do
not.)
Graphs without LoRA, with `dop.ops.add_lora` for any adapters, and with `dop.ops.beside` for any
adapters, for few or many, and for their number take turns on a flushed L2 cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.torch_cuda import replay_ms
from dop import collect_env, ops
from dop.cli.request import Request
from dop.errors import DopError, MissingDependencyError
from dop.integrations.step_plan import StepPlans
from dop.integrations.vllm_graphs import few_adapters
from dop.measure.hostinfo import find_target
from dop.ops.beside import Beside
from dop.scenario import Scenario
from dop.workload import Workload

LAYERS = 3
"""Of each kind in a graph."""
SLOTS = 64
DEVICE = "cuda"
REPLAYS = 15
FLUSH_BYTES = 200 << 20
TOKENS = "1,8,16,32,64,128"
MIXES = "distinct,uniform,identical"
WAYS = ("matmul", "behind", "beside", "split", "known")
"""Nothing but matmuls; `add_lora`; `Beside` for any adapters; for few or many, as in the graphs of
vLLM's plugin; for the number of adapters, as with specialize_active_lora."""


@dataclass(frozen=True)
class Row:
    """A rank and a batch; microseconds for a layer, that is one linear of each kind.

    Attributes:
        rank, scenario: which.
        matmul_us: the base layer alone.
        behind_us, beside_us, split_us, known_us: what LoRA adds to it, see WAYS.
        spread: of the replays, the largest of all, as a share of the matmuls.
    """

    rank: int
    scenario: str
    matmul_us: float
    behind_us: float
    beside_us: float
    split_us: float
    known_us: float
    spread: float


@dataclass(frozen=True)
class Linear:
    """One linear's weights."""

    weight: torch.Tensor
    a: list[torch.Tensor]
    b: list[torch.Tensor]


def row_of(rank: int, scenario: Scenario, seconds: dict[str, Sequence[float]]) -> Row:
    """The row of a case from the seconds per layer of every replay, by way."""
    middle = {way: statistics.median(found) * 1e6 for way, found in seconds.items()}
    spread = max(max(found) - min(found) for found in seconds.values()) * 1e6
    alone = middle.pop("matmul")
    added = {f"{way}_us": us - alone for way, us in middle.items()}
    return Row(rank, scenario.key, alone, **added, spread=spread / alone)


def _normal(kind: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=kind) / shape[-1] ** 0.5


def _linears(workloads: Sequence[Workload]) -> list[Linear]:
    found = []
    for w in (w for _ in range(LAYERS) for w in workloads):
        kind = getattr(torch, w.dtype)
        a = [_normal(kind, SLOTS, w.rank, w.in_features) for _ in w.out_features]
        b = [_normal(kind, SLOTS, n, w.rank) for n in w.out_features]
        found.append(Linear(_normal(kind, w.total_out, w.in_features), a, b))
    return found


def _feed(x: torch.Tensor, y: torch.Tensor | None, source: torch.Tensor) -> None:
    """A small kernel that makes x of the y before it; of `source` where there is none."""
    if y is None:
        torch.mul(source, 1.0, out=x)
    elif y.shape[1] >= x.shape[1]:
        torch.mul(y[:, : x.shape[1]], 1.0, out=x)
    else:
        torch.add(source, y[:, :1], out=x)


def bench(workloads: Sequence[Workload], scenarios: Sequence[Scenario]) -> Iterator[Row]:
    """Rows of one rank on the current GPU; workloads: a model's layers, in order."""
    linears, rank = _linears(workloads), workloads[0].rank
    kind = getattr(torch, workloads[0].dtype)
    stream, beside = torch.cuda.Stream(), Beside(torch.cuda.Stream())
    flush = torch.zeros(FLUSH_BYTES // 4, device=DEVICE)
    with torch.cuda.stream(stream):
        for scenario in scenarios:
            tokens = scenario.tokens
            source = {w.in_features: _normal(kind, tokens, w.in_features) for w in workloads}
            x = {width: torch.empty_like(made) for width, made in source.items()}
            y = {w.total_out: _normal(kind, tokens, w.total_out) for w in workloads}
            slots = torch.tensor(scenario.token_to_adapter(0), dtype=torch.int32)
            plans = {
                way: StepPlans(
                    tokens,
                    SLOTS,
                    rank,
                    DEVICE,
                    tokens,
                    hint_small=way == "known",
                    few=partial(few_adapters, slots=SLOTS) if way == "split" else None,
                )
                for way in WAYS
            }
            for each in plans.values():
                each.update(slots)

            def layers(way: str, source=source, x=x, y=y, plans=plans, tokens=tokens):
                plan, last = plans[way].plan(tokens), None
                for each in linears:
                    mine, out = x[each.weight.shape[1]], y[each.weight.shape[0]]
                    _feed(mine, last, source[each.weight.shape[1]])
                    pending = None
                    if way in ("beside", "split", "known"):
                        pending = beside.begin(mine, each.a, each.b, plan)
                    torch.mm(mine, each.weight.t(), out=out)
                    if pending is not None:
                        beside.finish(pending, out)
                    elif way == "behind":
                        ops.add_lora(out, mine, each.a, each.b, plan)
                    last = out

            for way in WAYS:
                layers(way)  # loads what cannot be loaded while capturing
            torch.cuda.synchronize()
            graphs = {way: _captured(stream, lambda way=way: layers(way)) for way in WAYS}
            yield row_of(rank, scenario, _timed(graphs, flush))


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
    """A table."""
    head = "rank  batch              matmuls us  + behind  + beside   + split   + known  spread"
    return "\n".join([head, *map(_line, rows)])


def _line(row: Row) -> str:
    added = f"{row.behind_us:9.2f} {row.beside_us:9.2f} {row.split_us:9.2f} {row.known_us:9.2f}"
    return f"{row.rank:4}  {row.scenario:18} {row.matmul_us:10.1f} {added} {row.spread:7.1%}"


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
        families = request.families(target)
        for rank in dict.fromkeys(family.workload.rank for family in families):
            mine = [family for family in families if family.workload.rank == rank]
            batches = [s for s in mine[0].scenarios if s.adapters <= SLOTS]
            for row in bench([family.workload for family in mine], batches):
                rows.append(row)
                print(_line(row), file=sys.stderr, flush=True)
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
