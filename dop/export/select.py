"""Which kernels an export ships: a log in, the table and its traces out. No TVM."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dop.database.jsonl import read_log
from dop.database.record import Record
from dop.database.wire import Entry
from dop.dispatch.cover import MAX_REGRET, build_table
from dop.dispatch.table import Fit, Table
from dop.errors import ConfigError, DopError, ExportError, Failure, LogError
from dop.export.provenance import Provenance, provenance_of
from dop.space.early import EARLY
from dop.space.step import PragmaStep, Step
from dop.target import Target
from dop.workload import Workload

_NEVER = (Failure.LAUNCH, Failure.CORRECTNESS)
"""What faulted or was wrong in one batch is shipped for none: some other batch may do it too."""

_SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A trace to ship for a workload.

    Attributes:
        workload: what it computes.
        trace_key: `Trace.key`.
        record: one of its records.
        fits: the scenarios that the table gives to it.
        transferred_from: key of the workload that the record is of, if it was tuned in another
            dtype (see `dop.export.transfer`).
    """

    workload: Workload
    trace_key: str
    record: Record
    fits: tuple[Fit, ...]
    transferred_from: str = ""

    @property
    def name(self) -> str:
        """Identifier, unique in an export."""
        return f"{workload_name(self.workload)}_{self.trace_key}"


@dataclass(frozen=True, slots=True)
class Selection:
    """Everything that an exporter needs.

    Attributes:
        target: the device that was measured, as far as the records tell.
        kernels: by workload, in the order of the table.
        warnings: what a person should know, one line each.
        winners: records of the fastest of each batch, shipped or not: what tuning may begin with.
    """

    table: Table
    target: Target
    kernels: tuple[Kernel, ...]
    provenance: Provenance
    warnings: tuple[str, ...] = ()
    winners: tuple[Entry, ...] = ()

    def of(self, workload_key: str) -> tuple[Kernel, ...]:
        """The kernels of one workload."""
        return tuple(k for k in self.kernels if k.workload.key == workload_key)


def workload_name(workload: Workload) -> str:
    """A workload as an identifier, e.g. bf16_r16_4096_4096_1024_1024."""
    widths = "_".join(map(str, workload.out_features))
    name = f"{_SHORT[workload.dtype]}_r{workload.rank}_{workload.in_features}_{widths}"
    return f"{name}_beside" if workload.beside else name


@dataclass(frozen=True, slots=True)
class Measured:
    """What a log holds of one device.

    Attributes:
        log: the file.
        entries: of the device and its newest target.
        warnings: what a person should know, one line each.
    """

    log: Path
    entries: tuple[Entry, ...]
    device_name: str
    target_key: str
    warnings: tuple[str, ...]


def select(
    log: Path,
    *,
    device: str | None = None,
    kind: str | None = None,
    max_regret: float = MAX_REGRET,
    keep: Callable[[str], bool] | None = None,
) -> Selection:
    """The kernels of a log.

    Args:
        log: the tuning log.
        device: name of the device; needed if the log holds several.
        kind: "cuda" or "cpu": consider only such devices.
        max_regret: see `dop.dispatch.cover`.
        keep: says of a workload key whether to ship it; None: all.

    Raises:
        ConfigError: the regret is negative or no number.
        LogError: the log cannot be read or holds no record.
        ExportError: no device fits, several do, or none has a usable record.
    """
    if not max_regret >= 0:
        raise ConfigError(f"a regret of {max_regret:.0%}.", "Give 0 percent or more.")
    return choose(read_measured(log, device=device, kind=kind, keep=keep), max_regret)


def read_measured(
    log: Path,
    *,
    device: str | None = None,
    kind: str | None = None,
    keep: Callable[[str], bool] | None = None,
) -> Measured:
    """The entries of one device of a log; arguments and errors as `select`."""
    if not log.exists():
        raise LogError(f"{log} does not exist.", "Run dop tune first, or check the path.")
    contents = read_log(log).require_entries()
    entries = [e for e in contents.entries if kind in (None, _kind(e))]
    name = _device(log, contents.entries, entries, device, kind)
    entries = [e for e in entries if e.device_name == name]
    target_key = max(entries, key=lambda e: e.timestamp).target_key
    warnings = contents.warnings()
    others = Counter(e.target_key for e in entries if e.target_key != target_key)
    warnings += [
        f"{count} records of {name} for {other!r} are not used; the newest are for {target_key!r}."
        for other, count in others.items()
    ]
    mine = [e for e in entries if e.target_key == target_key]
    if keep is not None:
        mine = [e for e in mine if keep(e.workload_key)]
        if not mine:
            raise ExportError(
                f"{log} holds no record of those workloads.", "See dop log stats for what it holds."
            )
    return Measured(log, tuple(mine), name, target_key, tuple(warnings))


def choose(
    measured: Measured,
    max_regret: float,
    banned: Collection[tuple[str, str]] = (),
    given: Mapping[str, Sequence[str]] | None = None,
) -> Selection:
    """Few kernels that serve everything that was measured.

    Args:
        measured: the records.
        max_regret: see `dop.dispatch.cover`.
        banned: (workload key, trace key) that cannot be built.
        given: see `dop.dispatch.cover.build_table`.

    Raises:
        ExportError: nothing usable is left.
    """
    out = {(e.workload_key, e.trace_key) for e in measured.entries if e.failure in _NEVER}
    out.update(banned)
    entries = [e for e in measured.entries if (e.workload_key, e.trace_key) not in out]
    built = build_table(
        entries,
        device=measured.device_name,
        target_key=measured.target_key,
        max_regret=max_regret,
        given=given,
    )
    kernels = []
    for key, table in built.table.workloads.items():
        workload = Workload.parse(key)
        for trace in table.trace_keys:
            fits = tuple(fit for fit in table.fits if fit.trace_key == trace)
            kernels.append(Kernel(workload, trace, built.entries[key, trace].record(), fits))
    target = target_of(kernels[0].record)
    origin = provenance_of(measured.log, measured.entries)
    winners = tuple(built.fastest.values())
    return Selection(built.table, target, tuple(kernels), origin, measured.warnings, winners)


def having(measured: Measured, is_it: Callable[[Step], bool]) -> set[tuple[str, str]]:
    """(Workload key, trace key) of the kernels with such a step."""
    found: set[tuple[str, str]] = set()
    for entry in {(e.workload_key, e.trace_key): e for e in measured.entries if e.ok}.values():
        with contextlib.suppress(DopError):
            if any(map(is_it, entry.trace().steps)):
                found.add((entry.workload_key, entry.trace_key))
    return found


def is_early(step: Step) -> bool:
    """Whether it makes a kernel read its tables and weights before it waits for the one before."""
    return isinstance(step, PragmaStep) and (step.name, step.value) == ("dependent_launch", EARLY)


def takes_maps(step: Step) -> bool:
    """Whether it makes a kernel take tensor maps, see dop/measure/tensor_map.py."""
    return isinstance(step, PragmaStep) and step.name == "engine" and step.value != 0


def _kind(entry: Entry) -> str:
    return "cuda" if entry.target_key.startswith("cuda") else "cpu"


def _device(
    log: Path, everything: list[Entry], entries: list[Entry], device: str | None, kind: str | None
) -> str:
    names = list(dict.fromkeys(e.device_name for e in entries))
    listed = ", ".join(repr(n) for n in names)
    if device is not None:
        if device in names:
            return device
        all_names = ", ".join(repr(n) for n in dict.fromkeys(e.device_name for e in everything))
        what = f"{kind} record" if kind else "record"
        raise ExportError(f"{log} holds no {what} of {device!r}.", f"Its devices are: {all_names}.")
    if not names:
        raise ExportError(
            f"{log} holds no record of a {kind} device.",
            "Run dop tune on one, or use dop export library for a CPU.",
        )
    if len(names) > 1:
        raise ExportError(
            f"{log} holds records of {len(names)} devices.", f"Give --device: {listed}."
        )
    return names[0]


def target_of(record: Record) -> Target:
    """The target of a record, as far as its line tells (the cache size is not in it).

    Raises:
        ExportError: its target string is not one that Dop writes.
    """
    params = record.hardware_params
    key = record.target_key
    found = re.fullmatch(
        r"cuda -arch=(?P<cuda>\S+)"
        r"|llvm -mcpu=(?P<cpu>\S+)(?: -mattr=(?P<features>\S+))? -num-cores=(?P<cores>\d+)",
        key,
    )
    if not found or len(params) < 6:
        raise ExportError(f"{key!r} is not a target.", "Check the log with dop log validate.")
    units, vector_bytes, _, smem, registers, threads = params[:6]
    arch = found["cuda"] or found["cpu"]
    kind = "cuda" if found["cuda"] else "cpu"
    features = found["features"] or ""
    return Target(
        kind, arch, record.device_name, units, threads, smem, registers, 0, vector_bytes, features
    )
