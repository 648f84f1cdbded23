"""`dop export vllm` and `dop export sglang`: tuned options for the engines' own kernels."""

from __future__ import annotations

from pathlib import Path

import typer

from dop.cli.output import emit, note

_LOG = typer.Option(..., "--log", help="The log of `dop engine tune`.", show_default=False)
_FOLDER = typer.Option(..., "--output", "-o", help="Folder to write.", show_default=False)
_DEVICE = typer.Option(None, help="Name of the device, if the log holds several.")
_JSON = typer.Option(False, "--json", help="Print one JSON document.")


def vllm(
    log: Path = _LOG, output: Path = _FOLDER, device: str | None = _DEVICE, as_json: bool = _JSON
) -> None:
    """Write the JSON folder that vLLM reads its LoRA kernels' block sizes from."""
    from dop.engine_kernels.log import one_device, read
    from dop.export.vllm import check_with_vllm, export_vllm

    records, skipped = read(log)
    _warn(skipped)
    mine, name = one_device(records, device)
    found = export_vllm(mine, output, name)
    checked = check_with_vllm(output, found, name)
    how = "vLLM's loader finds each" if checked else "not checked: vllm is not installed here"
    emit(
        {"output": output, "device": name, "entries": len(found), "checked": checked},
        as_json,
        f"{output}: {len(found)} entries; {how}.\nVLLM_TUNED_CONFIG_FOLDER={output}",
    )


def sglang(
    log: Path = _LOG, output: Path = _FOLDER, device: str | None = _DEVICE, as_json: bool = _JSON
) -> None:
    """Write the JSON folder that SGLang reads its csgmv kernels' block sizes from."""
    from dop.engine_kernels.log import one_device, read
    from dop.export.sglang import export_sglang, triton_version_of

    records, skipped = read(log)
    _warn(skipped)
    mine, name = one_device(records, device)
    mine = [record for record in mine if record.task.engine == "sglang"]
    version = triton_version_of(mine)
    found = export_sglang(mine, output, name, version)
    emit(
        {"output": output, "device": name, "files": len(found), "triton": version},
        as_json,
        f"{output}: {len(found)} files for Triton {version}.\nSGLANG_LORA_CONFIG_DIR={output}",
    )


def _warn(skipped: int) -> None:
    if skipped:
        note(f"warning: {skipped} lines are not records of an engine's kernel.")
