"""`python -m dop.packs`: `dop explain` for packs where only the run time is installed.

    python -m dop.packs --model Llama-3.1-8B --rank 16 --tokens 32 --adapters 8

Standard library only; `dop explain` also reads logs and prints tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from dop.config import workloads_from_model
from dop.errors import ConfigError, DopError
from dop.export.dtypes import parse_dtypes
from dop.packs.answer import Answer, Batch, explain
from dop.packs.devices import device_of
from dop.workload import Workload


def main(argv: Sequence[str] | None = None) -> int:
    """Prints which kernel serves a batch; returns 0, or 2 with one line for wrong input."""
    options = _parser().parse_args(argv)
    try:
        answers = _answers(options)
    except DopError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([dataclasses.asdict(answer) for answer in answers]))
    else:
        print("\n\n".join(answer.text() for answer in answers))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dop.packs", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a shipped model, or a config.json")
    parser.add_argument("--workload", help="a workload key instead of model, rank and type")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--beside", action="store_true", help="for calls in two pieces")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--adapters", type=int, help="not given: not known")
    parser.add_argument("--slots", type=int, help="adapters that the weight stacks hold at most")
    parser.add_argument("--device-name")
    parser.add_argument("--arch")
    parser.add_argument("--json", action="store_true")
    return parser


def _answers(options: argparse.Namespace) -> list[Answer]:
    name, arch, note = device_of(options.device_name, options.arch)
    if note:
        print(note, file=sys.stderr)
    return [
        explain(Batch(workload, options.tokens, options.adapters, name, arch, options.slots))
        for workload in _workloads(options)
    ]


def _workloads(options: argparse.Namespace) -> list[Workload]:
    found = _layers(options)
    return [dataclasses.replace(w, beside=True) for w in found] if options.beside else found


def _layers(options: argparse.Namespace) -> list[Workload]:
    if options.workload is not None:
        return [Workload.parse(options.workload)]
    if options.model is None:
        raise ConfigError("no layer is given.", "Give --model NAME or --workload KEY.")
    return [
        workload
        for dtype in parse_dtypes(options.dtype)
        for workload in workloads_from_model(
            options.model, ranks=[options.rank], tp=options.tp, dtype=dtype
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
