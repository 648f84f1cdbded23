"""The SGMV operator beside its peers on this GPU: vLLM, SGLang, torch, cuBLAS; floors beside them.

    python -m benchmarks.bench_sgmv                               # Llama-3.1-8B, ranks 8..128
    python -m benchmarks.bench_sgmv --ranks 16 --tokens 1,16,64 --budget 60
    python -m benchmarks.bench_sgmv --peers DIR                   # engines' kernel files, prepared
    python -m benchmarks.bench_sgmv --host                        # host cost of one eager call
    python -m benchmarks.bench_sgmv --device cpu --ranks 8 --tokens 1,4 --layers o

Per case, every contender becomes a CUDA graph of calls over weight sets larger than the L2 cache;
the graphs are replayed in turns, on a flushed cache. Each graph that is timed is checked against a
float64 reference in the same run. What was measured is in a table, in a JSON file (default:
benchmarks/results/sgmv-<device>-<date>.json) and, with --plot, in a figure. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import engines, results
from benchmarks.peers.ahead import compile_ahead, warm_compilers
from benchmarks.peers.cases import DECODE_TOKENS, PREFILL_TOKENS, Case, build_cases
from benchmarks.peers.contenders import Contender, own
from benchmarks.peers.results import Row
from benchmarks.peers.run import Bench, measure_host, run
from dop import collect_env
from dop.config import workloads_from_model
from dop.errors import ConfigError, DopError
from dop.scenario import MIXES

RANKS = (8, 16, 32, 64, 128)
DEFAULT = ("dop", "vllm", "csgmv", "c128", "triton", "v2", "torch", "cublas")
CPU_DEFAULT = ("dop", "torch", "bmm", "dense")
TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
NO_GPU = "bench_sgmv: torch sees no CUDA device; run it on a GPU, or with --device cpu"


def pick(names: Sequence[str] | None, device: str) -> list[Contender]:
    """The contenders: those named, else all that are here.

    Raises:
        ConfigError: one was named that is not here.
    """
    available = {contender.name: contender for contender in own(device)}
    missing: list[str] = []
    if device == "cuda":
        found, missing = engines.find()
        available |= {contender.name: contender for contender in found}
    if names is None:
        for line in missing:
            print(f"not here: {line}")
        names = [n for n in (DEFAULT if device == "cuda" else CPU_DEFAULT) if n in available]
    if unknown := [name for name in names if name not in available]:
        raise ConfigError(
            f"contender {unknown[0]!r} is not here.",
            f"Here: {', '.join(available)}. " + "; ".join(missing),
        )
    return [available[name] for name in names]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", default="Llama-3.1-8B", help="shipped name or config.json")
    found.add_argument("--tp", type=int, default=1, help="tensor-parallel shards")
    found.add_argument("--ranks", type=_ints, default=RANKS)
    found.add_argument("--tokens", type=_ints, help="batch sizes; above 256 is prefill")
    found.add_argument("--mixes", type=_names, default=MIXES)
    found.add_argument("--layers", type=_names, help="of qkv, o, gate_up, down; default all")
    found.add_argument("--cases", type=_names, default=(), help="keys or patterns, decode:T1:*")
    found.add_argument("--slots", type=int, default=0, help="slots of the stacks at least")
    found.add_argument("--contenders", type=_names, help="default: all that are here")
    found.add_argument("--peers", type=Path, metavar="DIR", help="engines' prepared kernel files")
    found.add_argument("--dtype", choices=tuple(TYPES), help="default bf16; fp32 on a CPU")
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--reps", type=int, default=21, help="timed rounds")
    found.add_argument("--budget", type=float, default=600.0, help="seconds; no case starts after")
    found.add_argument("--jobs", type=int, default=0, help="processes that compile peers ahead")
    found.add_argument("--host", action="store_true", help="host cost of one eager call instead")
    found.add_argument("--out", type=Path, help="JSON file")
    found.add_argument("--plot", type=Path, help="figure of the layers, .svg or .png")
    found.add_argument("--list", action="store_true", help="print the cases and end")
    found.add_argument("--shard", help=argparse.SUPPRESS)
    return found


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def cases_from(options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for.

    Raises:
        ConfigError: a model, rank, layer, mix or pattern cannot be used.
    """
    dtype = TYPES[options.dtype or ("fp32" if options.device == "cpu" else "bf16")]
    workloads = workloads_from_model(options.model, ranks=options.ranks, tp=options.tp, dtype=dtype)
    if options.layers is not None:
        layers = {w.name.removesuffix("_proj") for w in workloads}
        if unknown := [name for name in options.layers if name not in layers]:
            raise ConfigError(f"layer {unknown[0]!r} is unknown.", f"Use {', '.join(layers)}.")
        workloads = [w for w in workloads if w.name.removesuffix("_proj") in options.layers]
    tokens = DECODE_TOKENS if options.device == "cpu" else DECODE_TOKENS + PREFILL_TOKENS
    return build_cases(
        workloads, options.tokens or tokens, options.mixes, options.cases, options.slots
    )


def document(
    options: argparse.Namespace, arguments: Sequence[str], floors: dict[str, float]
) -> dict[str, Any]:
    """Where, when and how a run was made."""
    name = "cpu"
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        from dop.measure.hostinfo import cpu_target

        name = cpu_target().device_name
    versions = collect_env.versions() | engines.versions() | {"torch": torch.__version__}
    manifest = options.peers / "MANIFEST.json" if options.peers else None
    return {
        "model": options.model,
        "tp": options.tp,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.bench_sgmv " + " ".join(arguments),
        "revision": collect_env.revision(),
        "peers": json.loads(manifest.read_text()).get("note", "") if manifest else "",
        "versions": versions,
        "env": {
            "device": name,
            "torch": torch.__version__,
            "triton": versions.get("triton"),
            "dtype": options.dtype or ("fp32" if options.device == "cpu" else "bf16"),
            **floors,
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments)
    if options.device == "cuda" and not options.list and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    try:
        with torch.no_grad():
            return _main(options, arguments)
    except DopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    started = time.monotonic()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    cases = cases_from(options)
    if options.list:
        print("\n".join(case.key for case in cases))
        return 0
    if options.peers:
        engines.use_folder(options.peers)
    contenders = pick(options.contenders, options.device)
    if options.shard:
        index, count = map(int, options.shard.split("/"))
        warm_compilers(cases[index::count], contenders, options.device)
        return 0
    if options.host:
        found = document(options, arguments, {})
        found["host"] = measure_host(cases, contenders, options.device)
        found["rows"] = []
        if options.out:
            results.write(options.out, found)
        return 0
    if options.jobs:
        compile_ahead(options.jobs, arguments, options.budget / 2)
    return _compare(options, arguments, cases, contenders, started + options.budget)


def _compare(
    options: argparse.Namespace,
    arguments: Sequence[str],
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    deadline: float,
) -> int:
    bench = Bench(cases, options.device, options.reps)
    found = document(options, arguments, bench.floors)
    rows: list[Row] = []
    try:
        for row in run(bench, cases, contenders, deadline):
            if row.get("error"):
                print(f"{row['key']} {row['peer']}: {row['error']}", flush=True)
            rows.append(row)
    except (KeyboardInterrupt, RuntimeError) as stop:  # Ctrl-C, or a CUDA context that is lost
        print(f"stopped: {type(stop).__name__} {str(stop)[:200]}", file=sys.stderr)
    found |= {"summary": results.summary(rows), "rows": rows}
    if not rows:
        return 1
    path = options.out or results.default_path(str(found["env"]["device"]))
    results.write(path, found)
    layers = list(dict.fromkeys(case.layer for case in cases))
    _print(found, layers, path)
    if options.plot:
        from benchmarks.plot_sgmv import draw

        draw(found, options.plot)
    return 0 if all(not r.get("error") for r in rows if r["peer"] == "dop") else 1


def _print(found: dict[str, Any], layers: Sequence[str], path: Path) -> None:
    env = found["env"]
    title = (
        f"{found['model']}, {' + '.join(layers)}: us per layer on {env['device']}, {env['dtype']}; "
        f"floor = bytes over {env['copy_gbps']:.0f} GB/s, a launch {env['empty_node_us']:.2f} us"
    )
    results.show(*results.table(found["rows"], layers), title)
    print("\n".join(results.summary_lines(found["summary"])))
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
