"""`dop tune`: model shapes, ranks and traffic in, tuning log out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from typer import Option

if TYPE_CHECKING:
    from dop.effort import Effort
    from dop.family import Family
    from dop.measure.base import Measurer
    from dop.prior import Prior
    from dop.progress import Event, TuneResult
    from dop.scenario import Scenario
    from dop.target import Target

INTERRUPTED = 130
SHOWN = 5
"""Batches without measurements that a warning names."""

StandIns: TypeAlias = "Sequence[tuple[Scenario, Scenario]]"
"""Batches of a traffic file that are not measured, each with the one that stands for it."""


def tune(
    model: Annotated[str, Option(help="A shipped model's name, or a path to config.json.")],
    adapters: Annotated[
        Path | None, Option(help="Folder of PEFT adapters: says ranks and modules.")
    ] = None,
    ranks: Annotated[str | None, Option(help="Ranks, such as 8,16,64. Default: 16.")] = None,
    tp: Annotated[int, Option(help="Tensor-parallel shards; shapes are those of one.")] = 1,
    traffic: Annotated[Path | None, Option(help="JSON histogram of batches.")] = None,
    device: Annotated[
        str | None, Option(help="cuda or cpu. Default: the GPU if there is one.")
    ] = None,
    budget: Annotated[
        str | None, Option(help="Wall time: 90s, 10m, 1h. Default: the effort's.")
    ] = None,
    trials: Annotated[int | None, Option(min=1, help="Most candidates to build.")] = None,
    effort: Annotated[str, Option(help="quick, full or transfer.")] = "quick",
    log: Annotated[Path | None, Option(help="Tuning log; one that exists is continued.")] = None,
    like: Annotated[
        Path | None, Option(help="Log of another device: what was fastest there is tried first.")
    ] = None,
    packs: Annotated[
        bool,
        Option(
            "--packs/--no-packs",
            help="Try first what the installed packs know of these workloads, or of the nearest "
            "ones; --no-packs searches from nothing.",
        ),
    ] = True,
    dtype: Annotated[str | None, Option(help="float16, bfloat16 or float32.")] = None,
    tokens: Annotated[str | None, Option(help="Batch sizes, such as 1,8,32.")] = None,
    mix: Annotated[str | None, Option(help="Some of distinct,uniform,skewed,identical.")] = None,
    layers: Annotated[str | None, Option(help="Only these layers, such as o,down.")] = None,
    beside: Annotated[
        bool,
        Option(
            "--beside",
            help="Tune calls in two pieces: shrink beside the base layer's matmul, as the vLLM "
            "plugin's CUDA graphs have it. Needs a GPU.",
        ),
    ] = False,
    cold: Annotated[
        bool,
        Option(
            "--cold",
            help="Measure each batch also with x and y in memory instead of the cache, and no "
            "slots beyond its adapters. Needs a GPU.",
        ),
    ] = False,
    seed: Annotated[int, Option(help="Seed of the search.")] = 0,
    as_json: Annotated[bool, Option("--json", help="Print one JSON document at the end.")] = False,
) -> int:
    """Tune SGMV for a model, its adapters and its traffic on this machine.

    Everything measured is appended to the log at once. The same command continues from it. Behind
    the untuned defaults come kernels of the installed packs (DOP_PACK_PATH, then those that ship
    with Dop).
    """
    from dop.cli.output import note
    from dop.cli.request import Request, log_path, seconds_of
    from dop.effort import effort_of
    from dop.measure.hostinfo import find_target

    profile = effort_of(effort)
    if budget is not None:
        profile = replace(profile, budget_s=seconds_of(budget))
    if trials is not None:
        profile = replace(profile, trials=trials)
        if budget is None:
            profile = replace(profile, budget_s=float("inf"))
    target = find_target(device)
    request = Request(model, adapters, ranks, tp, traffic, dtype, tokens, mix, beside, layers, cold)
    families = request.families(target)
    chosen = [s for s in families[0].scenarios if not s.cold]
    stand_ins = request.left_out(chosen)
    for line in left_out_lines(stand_ins, chosen):
        note(line)
    path = log or log_path(model, target)
    result = search(families, path, profile, seed, quiet=as_json, like=like, packs=packs)
    _report(result, path, as_json, stand_ins)
    return INTERRUPTED if result.interrupted else 0


def search(
    families: Sequence[Family],
    path: Path,
    effort: Effort,
    seed: int = 0,
    *,
    quiet: bool = False,
    like: Path | None = None,
    packs: bool = True,
) -> TuneResult:
    """Tune with everything opened and closed around it.

    Args:
        families: of one target.
        path: the log.
        effort: as for any device; batches grow where builds overlap with timing.
        seed: of the search.
        quiet: print notes only.
        like: log of another device.
        packs: begin with what the installed packs know.
    """
    from dop import collect_env
    from dop.cli.progress import display
    from dop.database.jsonl import Log, read_log
    from dop.progress import Note
    from dop.tune import Provenance, tune

    others = read_log(like).require_entries().entries if like is not None else ()
    provenance = Provenance(collect_env.versions(), collect_env.revision())
    target = families[0].target
    with display(quiet) as show, Log.open(path) as log, _measurer(target) as measurer:
        batches = len(families[0].scenarios)
        show(
            Note(
                f"{len(families)} workloads x {batches} batches on {target.device_name}; log {path}"
            )
        )
        priors = installed_kernels(families, show) if packs else []
        return tune(
            families,
            measurer=measurer,
            log=log,
            effort=_for_builders(effort, target),
            seed=seed,
            on_event=show,
            provenance=provenance,
            like=others,
            priors=priors,
        )


def installed_kernels(families: Sequence[Family], show: Callable[[Event], None]) -> list[Prior]:
    """What the installed packs know in the families' types; packs that cannot be read are notes."""
    from dop.packs.priors import known_kernels
    from dop.progress import Note

    kind = families[0].target.kind
    found: list[Prior] = []
    for dtype in dict.fromkeys(family.workload.dtype for family in families):
        found += known_kernels(kind, dtype, lambda line: show(Note(line)))
    return found


def _for_builders(effort: Effort, target: Target) -> Effort:
    """On CUDA builds overlap with timing: a batch keeps every builder busy twice over."""
    from dop.measure.local import MAX_BUILDERS

    if target.kind != "cuda":
        return effort
    batch = max(effort.batch, 2 * MAX_BUILDERS)
    return replace(effort, batch=batch, search=replace(effort.search, first_batch=batch))


def _measurer(target: Target) -> Measurer:
    from dop.measure.local import LocalMeasurer

    measurer = LocalMeasurer(target)
    measurer.warm_up()  # the workers import while packs are read and spaces built
    return measurer


def left_out_lines(stand_ins: StandIns, chosen: Sequence[Scenario]) -> list[str]:
    """What a person should know of the batches of a traffic file that are not tuned for."""
    if not stand_ins:
        return []
    # A representative's weight contains that of the batches which it stands for.
    total = sum(s.weight for s in chosen)
    share = sum(s.weight for s, _ in stand_ins) / total if total else 0.0
    shown = ", ".join(f"{short(s.key)} by {short(r.key)}" for s, r in stand_ins[:SHOWN])
    more = f", and {len(stand_ins) - SHOWN} more (--json names all)" * (len(stand_ins) > SHOWN)
    return [
        f"warning: of {len(chosen) + len(stand_ins)} kinds of batches in the traffic file, "
        f"{len(chosen)} are measured; the other {len(stand_ins)} ({share:.1%} of all that was "
        f"counted) are represented by the nearest: {shown}{more}."
    ]


def short(key: str) -> str:
    """A scenario's key, cut to what a line can hold."""
    return key if len(key) <= 40 else key[:37] + "..."


def _report(result: TuneResult, path: Path, as_json: bool, stand_ins: StandIns) -> None:
    from dop.cli.output import emit, note
    from dop.cli.progress import print_final

    emit(summary(result, path, stand_ins), as_json, lambda console: print_final(console, result))
    if result.interrupted:
        note(f"interrupted; everything measured is in {path}. The same command continues.")
    failed = [t for t in result.tasks if t.best is None]
    if failed and not as_json:
        note(f"{len(failed)} tasks have no working candidate yet; see `dop log stats {path}`.")


def summary(result: TuneResult, path: Path, stand_ins: StandIns = ()) -> dict[str, object]:
    """What --json prints: the run (`packs`: kernels that came first, by the pack they are of), one
    object per task with times in microseconds, and the batches of a traffic file that were not
    measured, each with the one that stands for it."""
    progress = result.progress
    return {
        "log": str(path),
        "stopped_by": result.stopped_by,
        "elapsed_s": progress.elapsed_s,
        "trials": progress.trials,
        "records": progress.records,
        "resumed": progress.resumed,
        "packs": dict(result.begun_with),
        "failures": {f.name.lower(): n for f, n in progress.failures.items()},
        "spearman": {f.workload.key: f.spearman for f in progress.families},
        "tasks": [
            {
                "workload": task.workload.key,
                "name": task.workload.name,
                "scenario": task.scenario.key,
                "best_us": _us(task.best_s),
                "default_us": _us(task.default_s),
                "floor_us": _us(task.floor_s),
                "accuracy": task.accuracy,
                "sketch": task.best.sketch if task.best else None,
                "trace": task.best.trace.key if task.best else None,
            }
            for task in result.tasks
        ],
        "left_out": [
            {"scenario": s.key, "weight": s.weight, "represented_by": r.key} for s, r in stand_ins
        ],
    }


def _us(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6
