"""`dop export`: the tuned kernels as a CUDA header or as binaries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dop.cli.output import emit, note
from dop.errors import ExportError

if TYPE_CHECKING:
    from dop.export.select import Selection

app = typer.Typer(
    help="Ship what a log holds: a CUDA header, a library.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_LOG = typer.Option(..., "--log", help="The tuning log.", show_default=False)
_DEVICE = typer.Option(None, help="Name of the device, if the log holds several.")
_REGRET = typer.Option(
    5.0, min=0.0, help="Percent that a kernel may lose in a scenario to save another kernel."
)
_FILE = typer.Option(Path("src/sgmv.cuh"), "--output", "-o", help="File to write.")
_FOLDER = typer.Option(..., "--output", "-o", help="Folder to write.", show_default=False)
_JSON = typer.Option(False, "--json", help="Print one JSON document.")


@app.command()
def cuh(
    log: Path = _LOG,
    output: Path = _FILE,
    device: str | None = _DEVICE,
    regret: float = _REGRET,
    as_json: bool = _JSON,
) -> None:
    """Write a self-contained CUDA C++ header: kernels, dispatch and host API."""
    from dop.export.cuda_header import header
    from dop.export.files import write_file

    _check_file(output)
    selection = _select(log, device, "cuda", regret)
    text = header(selection).encode()
    write_file(output, text)
    _report(selection, output, len(text), as_json)


@app.command()
def library(
    log: Path = _LOG,
    output: Path = _FOLDER,
    device: str | None = _DEVICE,
    regret: float = _REGRET,
    as_json: bool = _JSON,
) -> None:
    """Write binaries (cubins, or a shared library) with an index; they load without TVM."""
    from dop.export.library import export_library

    selection = _select(log, device, None, regret)
    export_library(selection, output)
    size = sum(file.stat().st_size for file in output.iterdir())
    _report(selection, output, size, as_json)


def _check_file(output: Path) -> None:
    if output.is_dir():
        raise ExportError(f"{output} is a folder.", "Give the name of a file.")


def _select(log: Path, device: str | None, kind: str | None, regret: float) -> Selection:
    from dop.export.select import select

    selection = select(log, device=device, kind=kind, max_regret=regret / 100)
    for warning in selection.warnings:
        note(f"warning: {warning}")
    return selection


def _report(selection: Selection, output: Path, size_bytes: int, as_json: bool) -> None:
    found = {
        "output": output,
        "bytes": size_bytes,
        "kernels": [kernel.name for kernel in selection.kernels],
        "worst_regret": {k: t.worst_regret for k, t in selection.table.workloads.items()},
        "table": selection.table.to_json(),
        "provenance": selection.provenance.to_json(),
    }
    kernels, workloads = len(selection.kernels), len(selection.table.workloads)
    last = f"{output}: {kernels} kernels for {workloads} workloads, {size_bytes:,} bytes."
    emit(found, as_json, f"{selection.table.text()}\n\n{last}")
