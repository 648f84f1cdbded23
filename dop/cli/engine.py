"""`dop engine`: tune the Triton kernels that a serving engine ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dop.cli.output import emit, note
from dop.errors import ConfigError

if TYPE_CHECKING:
    from dop.engine_kernels.tune import EngineRunner, Outcome

app = typer.Typer(
    help="Tune the LoRA kernels that a serving engine ships.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


_LOG = typer.Option(Path("engine-kernels.jsonl"), help="Log; an existing one goes on.")


@app.callback()
def _group() -> None:
    """Tune the LoRA kernels that a serving engine ships."""


@app.command()
def tune(
    engine: str = typer.Option(..., help="vllm or sglang.", show_default=False),
    model: str = typer.Option(..., help="A shipped model's name, or a path to config.json."),
    ranks: str = typer.Option("16", help="Ranks of the engine's stacks, such as 16,64."),
    slots: int = typer.Option(64, min=1, help="The engine's max_loras."),
    tokens: str = typer.Option("1,8,32,64,256,2048", help="Tokens per step to tune for."),
    tp: int = typer.Option(1, help="Tensor-parallel shards."),
    dtype: str = typer.Option("bfloat16", help="float16 or bfloat16."),
    trials: int = typer.Option(32, min=1, help="Most candidates per kernel and shape."),
    budget: str = typer.Option("10m", help="Wall time of the whole run: 90s, 10m, 1h."),
    log: Path = _LOG,
    seed: int = typer.Option(0, help="Seed of the search."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document."),
) -> None:
    """Search the block sizes of the engine's own Triton kernels on this GPU.

    `dop export vllm` and `dop export sglang` turn the log into the engine's files.
    """
    from dop.cli.request import seconds_of
    from dop.config import parse_ranks, workloads_from_model
    from dop.effort import effort_of
    from dop.engine_kernels.task import tasks_of
    from dop.engine_kernels.tune import tune_engine
    from dop.measure.hostinfo import find_target

    work = workloads_from_model(model, ranks=parse_ranks(ranks), tp=tp, dtype=dtype)
    tasks = tasks_of(engine, work, slots)
    sizes, budget_s = _tokens(tokens), seconds_of(budget)
    target = find_target("cuda")
    outcomes = tune_engine(
        tasks,
        runner=_runner(engine, target.l2_bytes),
        target=target,
        tokens=sizes,
        path=log,
        effort=effort_of("quick"),
        trials=trials,
        budget_s=budget_s,
        seed=seed,
        on_task=lambda outcome: note(_line(outcome)),
    )
    found = [
        {"task": o.task.key, "trials": o.trials, "gain_over_default": o.gain} for o in outcomes
    ]
    emit({"log": log, "tasks": found}, as_json, f"{log}: {len(outcomes)} kernels and shapes.")


def _runner(engine: str, l2_bytes: int) -> EngineRunner:
    if engine == "vllm":
        from dop.engine_kernels.run_vllm import VllmRunner

        return VllmRunner(l2_bytes)
    from dop.engine_kernels.run_sglang import SglangRunner

    return SglangRunner(l2_bytes)


def _tokens(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 0 < int(part) <= 1 << 20 for part in parts):
        raise ConfigError(f"--tokens {text!r} is not a list of numbers.", "Write it like 1,8,32.")
    return tuple(dict.fromkeys(map(int, parts)))


def _line(outcome: Outcome) -> str:
    return f"{outcome.task.key}: {outcome.gain:.2f}x of the default, {outcome.trials} trials"
