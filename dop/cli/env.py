"""`dop env`: what runs here."""

from __future__ import annotations

import typer

from dop.cli.output import emit


def env(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document."),
) -> None:
    """Show versions, CPU and GPUs: what a bug report needs."""
    from dop import collect_env

    found = collect_env.collect()
    emit(found, as_json, "\n".join(collect_env.lines(found)))
