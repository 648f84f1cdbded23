"""`dop export`: the tuned kernels as a CUDA header or as binaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dop.cli import export_engines
from dop.cli.output import emit, note
from dop.errors import ExportError

if TYPE_CHECKING:
    from dop.export.select import Kernel, Selection

app = typer.Typer(
    help="Ship what a log holds: a CUDA header, a library.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.command()(export_engines.vllm)
app.command()(export_engines.sglang)

_LOG = typer.Option(..., "--log", help="The tuning log.", show_default=False)
_DEVICE = typer.Option(None, help="Name of the device, if the log holds several.")
_REGRET = typer.Option(
    5.0, min=0.0, help="Percent that a kernel may lose in a scenario to save another kernel."
)
_MODEL = typer.Option(None, help="Ship only the layers of this model.")
_TP = typer.Option(1, help="Shards of that model.")
_RANKS = typer.Option(None, "--ranks", help="Ship only these ranks, e.g. 8,16,64.")
_FILE = typer.Option(Path("src/sgmv.cuh"), "--output", "-o", help="File to write.")
_FOLDER = typer.Option(..., "--output", "-o", help="Folder to write.", show_default=False)
_LOG_FIRST = typer.Argument(..., help="The tuning log.", show_default=False)
_PACK = typer.Option(..., "--output", "-o", help="File to write, NAME.doppack.", show_default=False)
_OLD_PACK = typer.Argument(..., help="The pack.", show_default=False)
_CATALOG = typer.Argument(..., help="The folder.", show_default=False)
_JSON = typer.Option(False, "--json", help="Print one JSON document.")
_REUSE = typer.Option(
    None, help="Take unchanged kernels from this pack. Default: the output, if it exists."
)
_JOBS = typer.Option(0, "--jobs", "-j", min=0, help="Processes that build; 0: one per core.")


@app.command()
def cuh(
    log: Path = _LOG,
    output: Path = _FILE,
    model: str | None = _MODEL,
    tp: int = _TP,
    ranks: str | None = _RANKS,
    device: str | None = _DEVICE,
    regret: float = _REGRET,
    as_json: bool = _JSON,
) -> None:
    """Write a self-contained CUDA C++ header: kernels, dispatch and host API."""
    from dop.export.cuda_header import header_of
    from dop.export.files import write_file
    from dop.export.select import read_measured

    _check_file(output)
    _check_regret(regret)
    measured = read_measured(log, device=device, kind="cuda", keep=_keep(model, tp, ranks))
    found = header_of(measured, regret / 100)
    told = (*(f"warning: {w}" for w in measured.warnings), *(f"note: {n}" for n in found.notes))
    for line in told:
        note(line)
    data = found.text.encode()
    write_file(output, data)
    _report(found.selection, output, len(data), as_json, found.notes, found.own, found.kernels)


@app.command()
def library(
    log: Path = _LOG,
    output: Path = _FOLDER,
    device: str | None = _DEVICE,
    regret: float = _REGRET,
    jobs: int = typer.Option(1, "--jobs", "-j", min=0, help="Processes that build; 0: all cores."),
    as_json: bool = _JSON,
) -> None:
    """Write binaries (cubins, or a shared library) with an index; they load without TVM."""
    from dop.export.build import default_processes
    from dop.export.library import export_library

    selection = _select(log, device, None, regret)
    export_library(selection, output, processes=jobs or default_processes())
    size = sum(file.stat().st_size for file in output.iterdir())
    _report(selection, output, size, as_json)


@app.command()
def pack(
    log: Path = _LOG_FIRST,
    output: Path = _PACK,
    dtype: str = typer.Option("fp16,bf16", help="Element types to ship."),
    model: str | None = _MODEL,
    tp: int = _TP,
    ranks: str | None = _RANKS,
    device: str | None = _DEVICE,
    regret: float = _REGRET,
    sources: bool = typer.Option(
        True, help="Ship the CUDA sources too, from which other architectures are served."
    ),
    early: int | None = typer.Option(
        None,
        min=0,
        metavar="TOKENS",
        help="Up to so many tokens kernels may be shipped that read weights before they wait for "
        "the kernel before them; 0: none. Default: up to where dop tune measures them.",
    ),
    reuse: Path | None = _REUSE,
    rebuild: bool = typer.Option(False, "--rebuild", help="Build every kernel anew."),
    jobs: int = _JOBS,
    as_json: bool = _JSON,
) -> None:
    """Write one compressed file that serving loads: put it into a folder of DOP_PACK_PATH."""
    from dop.export.build import default_processes
    from dop.export.dtypes import parse_dtypes
    from dop.export.make_pack import make_pack
    from dop.export.select import read_measured
    from dop.space.early import EARLY_TOKENS

    _check_pack(output, regret)
    keep = _keep(model, tp, ranks, beside=True)
    measured = read_measured(log, device=device, kind="cuda", keep=keep)
    for warning in measured.warnings:
        note(f"warning: {warning}")

    def progress(done: int, count: int) -> None:
        if done % 20 == 0 or done == count:
            note(f"{done} of {count} kernels built")

    packed = make_pack(
        measured,
        output,
        dtypes=parse_dtypes(dtype),
        max_regret=regret / 100,
        processes=jobs or default_processes(),
        sources=sources,
        early=EARLY_TOKENS if early is None else early,
        reuse=None if rebuild else reuse or output,
        progress=progress,
    )
    note(packed.effort)
    for line in packed.notes:
        note(f"note: {line}")
    _report(packed.selection, output, packed.size_bytes, as_json, packed.notes)


@app.command()
def traces(pack: Path = _OLD_PACK, log: Path = _LOG, as_json: bool = _JSON) -> None:
    """Add the kernels' steps to a pack of an older version: dop tune can then begin with them."""
    from dop.database.jsonl import read_log
    from dop.export.traces import add_traces

    found, missing = add_traces(pack, read_log(log).require_entries().entries)
    lacking = f"; {missing} are not in {log}" if missing else ""
    emit(
        {"pack": str(pack), "traces": found, "missing": missing},
        as_json,
        f"{pack}: {found} traces{lacking}.",
    )


@app.command()
def catalog(folder: Path = _CATALOG, as_json: bool = _JSON) -> None:
    """Write catalog.json for a folder of packs; the shipped ones need it."""
    from dop.packs.catalog import write_catalog

    entries = write_catalog(folder)
    lines = [f"{e.path}: {len(e.workloads)} workloads, {e.size_bytes:,} bytes" for e in entries]
    total = sum(entry.size_bytes for entry in entries)
    emit(entries, as_json, "\n".join([*lines, f"{len(entries)} packs, {total:,} bytes."]))


def _check_pack(output: Path, regret: float) -> None:
    from dop.export.pack import SUFFIX

    _check_file(output)
    if output.suffix != SUFFIX:
        raise ExportError(f"{output} is no name of a pack.", f"Let it end in {SUFFIX}.")
    _check_regret(regret)


def _check_regret(regret: float) -> None:
    from dop.errors import ConfigError

    if not regret >= 0:
        raise ConfigError(f"a regret of {regret} percent.", "Give 0 or more.")


def _keep(
    model: str | None, tp: int, ranks: str | None, *, beside: bool = False
) -> Callable[[str], bool]:
    """Whether a workload key is asked for, in whatever type it was tuned; calls in two pieces only
    if `beside`."""
    from dop.config import model_shape, parse_ranks
    from dop.workload import Workload

    wanted_ranks = set(parse_ranks(ranks)) if ranks is not None else None
    shapes = set(model_shape(model).sharded(tp).values()) if model is not None else None

    def keep(key: str) -> bool:
        workload = Workload.parse(key)
        shape = (workload.in_features, workload.out_features)
        return (
            (beside or not workload.beside)
            and (shapes is None or shape in shapes)
            and (wanted_ranks is None or workload.rank in wanted_ranks)
        )

    return keep


def _check_file(output: Path) -> None:
    if output.is_dir():
        raise ExportError(f"{output} is a folder.", "Give the name of a file.")


def _select(log: Path, device: str | None, kind: str | None, regret: float) -> Selection:
    from dop.export.select import select

    keep = _keep(None, 1, None)
    selection = select(log, device=device, kind=kind, max_regret=regret / 100, keep=keep)
    for warning in selection.warnings:
        note(f"warning: {warning}")
    return selection


def _report(
    selection: Selection,
    output: Path,
    size_bytes: int,
    as_json: bool,
    notes: Sequence[str] = (),
    own: Selection | None = None,
    shipped: Sequence[Kernel] = (),
) -> None:
    shipped = shipped or selection.kernels
    found: dict[str, object] = {
        "output": output,
        "bytes": size_bytes,
        "kernels": [kernel.name for kernel in shipped],
        "worst_regret": _worst(selection),
        "table": selection.table.to_json(),
        "provenance": selection.provenance.to_json(),
        "notes": list(notes),
    }
    text = selection.table.text()
    if own is not None:
        arch = own.target.arch
        table = own.table.to_json()
        found["own"] = {"arch": arch, "worst_regret": _worst(own), "table": table}
        text += f"\n\nWhere it is compiled for {arch}:\n\n{own.table.text()}"
    kernels, workloads = len(shipped), len(selection.table.workloads)
    last = f"{output}: {kernels} kernels for {workloads} workloads, {size_bytes:,} bytes."
    emit(found, as_json, f"{text}\n\n{last}")


def _worst(selection: Selection) -> dict[str, float]:
    return {key: table.worst_regret for key, table in selection.table.workloads.items()}
