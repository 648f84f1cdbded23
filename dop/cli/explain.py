"""`dop explain`: which tuned kernel serves a batch, and why. Works without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dop.cli.output import emit, note
from dop.errors import ConfigError

if TYPE_CHECKING:
    from dop.packs.answer import Batch
    from dop.workload import Workload

_MODEL = typer.Option(None, "--model", "-m", help="A shipped model, or a config.json.")
_LAYER = typer.Option(None, help="qkv, o, gate_up or down; all if not given.")
_WORKLOAD = typer.Option(
    None, help="A workload key instead of model, layer, rank and type, as logs name it."
)
_RANK = typer.Option(16, help="Rank of the weight stacks.")
_TOKENS = typer.Option(None, help="Rows of the batch, or of the CUDA graph.")
_ADAPTERS = typer.Option(None, help="Distinct adapters; not given: not known.")
_SLOTS = typer.Option(None, min=1, help="Adapters that the weight stacks hold at most.")
_DTYPE = typer.Option("bf16", help="Element type: bf16, fp16 or fp32.")
_TP = typer.Option(1, help="Shards of the model.")
_BESIDE = typer.Option(
    False, "--beside", help="For calls in two pieces beside the base layer's matmul (vLLM)."
)
_NAME = typer.Option(None, "--device-name", help='A GPU by name, e.g. "NVIDIA H100".')
_ARCH = typer.Option(None, help="Its architecture, e.g. sm_90, if its name is not known.")
_PACK = typer.Option(None, help="Look into this pack only.")
_LOG = typer.Option(None, "--log", help="Ask a tuning log instead of packs.")
_TABLE = typer.Option(False, "--table", help="Print the whole table with its regret.")
_REGRET = typer.Option(5.0, min=0.0, help="With --log: as dop export's.")
_JSON = typer.Option(False, "--json", help="Print one JSON document.")


def explain(
    model: str | None = _MODEL,
    layer: str | None = _LAYER,
    workload: str | None = _WORKLOAD,
    rank: int = _RANK,
    tokens: int | None = _TOKENS,
    adapters: int | None = _ADAPTERS,
    slots: int | None = _SLOTS,
    dtype: str = _DTYPE,
    tp: int = _TP,
    beside: bool = _BESIDE,
    device_name: str | None = _NAME,
    arch: str | None = _ARCH,
    pack: Path | None = _PACK,
    log: Path | None = _LOG,
    table: bool = _TABLE,
    regret: float = _REGRET,
    as_json: bool = _JSON,
) -> None:
    """Say which tuned kernel serves a batch, and why; or print a dispatch table."""
    chosen = _workloads(model, layer, workload, rank, dtype, tp)
    if beside:
        chosen = [replace(w, beside=True) for w in chosen]
    if log is not None:
        _from_log(
            log, device_name, chosen, _Asked(tokens, adapters, slots), table, regret / 100, as_json
        )
        return
    if table:
        _tables(chosen, device_name, arch, pack, as_json)
        return
    _answers(_required(chosen), _Asked(tokens, adapters, slots), device_name, arch, pack, as_json)


@dataclass(frozen=True)
class _Asked:
    """The batch that is asked about."""

    tokens: int | None
    adapters: int | None
    slots: int | None

    def batch(self, workload: Workload, device: str, arch: str) -> Batch:
        """It, for a layer on a device."""
        from dop.packs.answer import Batch

        return Batch(workload, _tokens(self.tokens), self.adapters, device, arch, self.slots)


def _workloads(
    model: str | None, layer: str | None, key: str | None, rank: int, dtype: str, tp: int
) -> list[Workload]:
    """The layers that are asked about; none if neither a model nor a key is given."""
    from dop.config import layers_of, workloads_from_model
    from dop.export.dtypes import parse_dtypes
    from dop.workload import Workload

    if key is not None:
        if model is not None or layer is not None:
            raise ConfigError("--workload says it all.", "Leave --model and --layer out.")
        return [Workload.parse(key)]
    if model is None:
        if layer is not None:
            raise ConfigError("--layer needs a model.", "Give --model.")
        return []
    types = parse_dtypes(dtype)
    found = [w for t in types for w in workloads_from_model(model, ranks=[rank], tp=tp, dtype=t)]
    return found if layer is None else layers_of(found, [layer], model)


def _required(workloads: list[Workload]) -> list[Workload]:
    if not workloads:
        raise ConfigError("no layer is given.", "Give --model NAME or --workload KEY.")
    return workloads


def _tokens(tokens: int | None) -> int:
    if tokens is None:
        raise ConfigError("no batch is given.", "Give --tokens N, and --adapters N if known.")
    return tokens


def _answers(
    workloads: list[Workload],
    asked: _Asked,
    device_name: str | None,
    arch: str | None,
    pack: Path | None,
    as_json: bool,
) -> None:
    from dop.packs.answer import explain
    from dop.packs.devices import device_of

    name, architecture, assumed = device_of(device_name, arch)
    if assumed:
        note(assumed)
    answers = [explain(asked.batch(w, name, architecture), pack) for w in workloads]
    text = "\n\n".join(answer.text() for answer in answers)
    emit(answers, as_json, text)


def _tables(
    workloads: list[Workload],
    device_name: str | None,
    arch: str | None,
    pack: Path | None,
    as_json: bool,
) -> None:
    """The tables of the packs that serve; of all packs' workloads if none is asked for."""
    from dop.packs import known_packs
    from dop.packs.answer import library_for
    from dop.packs.devices import device_of

    name, architecture, assumed = device_of(device_name, arch)
    if assumed:
        note(assumed)
    keys = [w.key for w in workloads] or sorted({k for e in known_packs() for k in e.workloads})
    found = []
    for key in keys:
        library = library_for(key, name, architecture, pack)
        if library is None:
            raise ConfigError(f"no pack holds {key} for {name}.", "Ask a log: --log FILE.")
        found.append(library.table.only([key]))
    emit([t.to_json() for t in found], as_json, "\n\n".join(t.text() for t in found))


def _from_log(
    log: Path,
    device_name: str | None,
    workloads: list[Workload],
    asked: _Asked,
    whole: bool,
    max_regret: float,
    as_json: bool,
) -> None:
    """The table that `dop export` would make of a log, or what it gives for a batch."""
    from dop.dispatch.holdout import holdout, lines
    from dop.export.select import choose, read_measured
    from dop.packs.answer import table_answer
    from dop.workload import Workload

    keys = {w.key for w in workloads}
    measured = read_measured(
        log, device=device_name, keep=(lambda key: key in keys) if keys else None
    )
    selection = choose(measured, max_regret)
    if whole or asked.tokens is None:
        losses = holdout(selection.table.workloads.values(), measured.entries)
        data = {"table": selection.table.to_json(), "left_out": losses}
        emit(data, as_json, "\n".join([selection.table.text(), "", *lines(losses)]))
        return
    device, arch = selection.target.device_name, selection.target.arch
    answers = []
    for key in selection.table.workloads:
        batch = asked.batch(Workload.parse(key), device, arch)
        sketches = {k.trace_key: k.record.sketch for k in selection.of(key)}
        origin = selection.provenance.to_json()
        answers.append(table_answer(batch, selection.table, sketches, str(log), origin))
    emit(answers, as_json, "\n\n".join(answer.text() for answer in answers))
