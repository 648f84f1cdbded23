"""`dop report`: a tuning log as one self-contained HTML file."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from dop.cli.output import emit, note


def report(
    log: Annotated[Path, Argument(metavar="LOG", help="Tuning log.")],
    output: Annotated[Path, Option("-o", "--output", help="File to write.")] = Path("report.html"),
    task: Annotated[
        list[str] | None, Option(help="Only tasks whose name contains this; may be repeated.")
    ] = None,
    nest: Annotated[
        bool | None,
        Option("--nest/--no-nest", help="Loops of the winners (default: unless the log is large)."),
    ] = None,
    as_json: Annotated[
        bool, Option("--json", help="Print the figures as one JSON document.")
    ] = False,
) -> None:
    """Write a report of LOG: search curves, predictions, floors, failures, winners."""
    from dop.database.jsonl import read_log
    from dop.report.data import collect
    from dop.report.html import summary, write

    contents = read_log(log)
    gc.freeze()  # a large log's entries stay to the end; walking over them again takes seconds
    data = collect(contents, task or ())
    for warning in data.warnings:
        note(warning)
    write(data, output, nest)
    found = {
        "report": output,
        "log": data.path,
        "sha256": data.sha256,
        "stats": data.stats,
        "tasks": data.tasks,
        "sketches": data.sketches,
        "failures": data.failures,
    }
    emit(found, as_json, f"{summary(data)}\n{output} shows the search, the floors and the winners.")
