"""Which kernel serves a batch, and why, in plain words; no GPU is needed. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dop.dispatch.table import Fit, Row, Table, WorkloadTable
from dop.errors import ConfigError
from dop.export.choice import Library
from dop.export.index import KernelInfo, arch_number
from dop.export.load import load_cuda
from dop.packs import Match, find, find_call
from dop.packs.fallback import without_pack
from dop.scenario import Scenario
from dop.workload import Workload

SHOWN = 3
"""Measured batches that are shown beside an answer."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What is asked.

    Attributes:
        workload: the layer.
        tokens: rows of the batch, or of the CUDA graph that is captured.
        adapters: distinct adapters expected; None if that is not known.
        device_name: e.g. "NVIDIA H200".
        arch: e.g. "sm_90".
        slots: adapters that the weight stacks have room for; None if that is not known.
    """

    workload: Workload
    tokens: int
    adapters: int | None
    device_name: str
    arch: str
    slots: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"{self.tokens} tokens.", "Give 1 or more.")
        if self.adapters is not None and not 1 <= self.adapters <= self.tokens:
            raise ConfigError(
                f"{self.adapters} adapters in a batch of {self.tokens} tokens.",
                "Give 1 to as many as there are tokens.",
            )
        if self.slots is not None and self.slots < 1:
            raise ConfigError(f"{self.slots} slots.", "Give 1 or more.")


@dataclass(frozen=True, slots=True)
class Alternative:
    """A shipped kernel's time in a measured batch."""

    trace_key: str
    seconds: float
    regret: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """A measured batch near the one that is asked for.

    Attributes:
        scenario: `Scenario.key`.
        seconds: of the kernel that serves; None if it was not measured there.
        best_s: of the fastest kernel of the log.
        regret: loss of the kernel that serves against it.
        floor_s: least time that the bytes allow.
        alternatives: the pack's other kernels, fastest first.
    """

    scenario: str
    seconds: float | None
    best_s: float
    regret: float | None
    floor_s: float | None
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Which kernel serves a batch.

    Attributes:
        batch: what was asked.
        served_by: "pack", "log" (as an export of the log would), "nvrtc" (built from a pack's
            source), "generic", "torch" or "nothing".
        kernel, trace, sketch, form: of the tuned kernel; "" without one.
        pack: path; "" without one.
        bucket: token count of the rows that decide; 0 without a table.
        worst: with unknown adapters: largest loss over the bucket's batches (those that the slots
            allow), and where.
        reasons: why, one line each.
        evidence: measured batches near this one.
        provenance: of the pack.
    """

    batch: Batch
    served_by: str
    kernel: str = ""
    trace: str = ""
    sketch: str = ""
    form: str = ""
    pack: str = ""
    bucket: int = 0
    worst: float | None = None
    worst_scenario: str = ""
    reasons: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The answer for people."""
        from dop.packs.words import text_of

        return text_of(self)


def explain(batch: Batch, pack: Path | None = None) -> Answer:
    """Which kernel serves a batch.

    Args:
        batch: what is asked.
        pack: look only into this pack; None: where the operator looks.

    Raises:
        ExportError: a pack is damaged, or the architecture is none.
    """
    key = batch.workload.key
    if pack is not None:
        library: Library = load_cuda(pack)
        if key not in library.table.workloads:
            return without_pack(batch, [f"{pack} does not hold {key}"])
        return _tuned(batch, library, "pack", [])
    passed: list[str] = []
    for held, match in find_call(batch.device_name, batch.arch, key):
        served = replace(batch, workload=Workload.parse(held, batch.workload.name))
        notes = [match.note] if match.note else []
        if held != key:
            notes.append(f"no pack serves {key}: what serves it alone does so beside a matmul, too")
        library = match.library()
        info = library.choose(held, batch.tokens, batch.adapters, batch.slots)
        if match.how != Match.SOURCE:
            return _tuned(served, library, "pack", notes)
        if info.source and info.min_arch <= arch_number(batch.arch)[0]:
            return _tuned(served, library, "nvrtc", notes)
        needs = f"needs sm_{info.min_arch} or newer" if info.source else "is of its GPU alone"
        passed.append(f"{match.entry.path.name} holds {info.name}, whose source {needs}")
    return without_pack(batch, passed)


def library_for(
    workload_key: str, device_name: str, arch: str, pack: Path | None = None
) -> Library | None:
    """The pack whose table decides for a workload; None if none holds it.

    Raises:
        ExportError: a pack is damaged.
    """
    if pack is not None:
        library = load_cuda(pack)
        return library if workload_key in library.table.workloads else None
    matches = find(device_name, arch, workload_key)
    return matches[0].library() if matches else None


def _tuned(batch: Batch, library: Library, served_by: str, notes: Sequence[str]) -> Answer:
    row = library.table.workloads[batch.workload.key].row(batch.tokens, batch.adapters, batch.slots)
    info = library.kernel(batch.workload.key, row.trace_key)
    sketches = {info.trace_key: info.sketch}
    answer = table_answer(
        batch, library.table, sketches, str(library.path), library.index.provenance
    )
    reasons = (*answer.reasons, *notes)
    return replace(
        answer, served_by=served_by, kernel=info.name, form=_form(batch, info), reasons=reasons
    )


def table_answer(
    batch: Batch,
    table: Table,
    sketches: Mapping[str, str],
    source: str,
    provenance: Mapping[str, Any],
) -> Answer:
    """What a table says of a batch.

    Args:
        batch: what is asked; its workload is in the table.
        table: of a pack or a log.
        sketches: names of structures by trace key.
        source: path of the pack or log.
        provenance: as `Provenance.to_json` wrote it.
    """
    mine = table.workloads[batch.workload.key]
    row = mine.row(batch.tokens, batch.adapters, batch.slots)
    unknown = batch.adapters is None
    return Answer(
        batch,
        "log",
        row.trace_key,
        row.trace_key,
        sketches.get(row.trace_key, ""),
        "",
        source,
        row.tokens,
        row.worst if unknown else None,
        row.worst_scenario if unknown else "",
        (*_bucket_reason(batch, mine, row), *_row_reason(batch, mine, row)),
        tuple(_evidence(fit, row.trace_key) for fit in nearest_fits(batch, mine, row.tokens)),
        provenance,
    )


def _form(batch: Batch, info: KernelInfo) -> str:
    if not info.tile_rows:
        return "row form: one token at a time"
    return (
        f"tile form: tiles of {info.tile_rows} rows of one adapter, "
        f"{batch.tokens // info.tile_rows} + min({batch.tokens}, slots) of them launched"
    )


def _bucket_reason(batch: Batch, table: WorkloadTable, row: Row) -> list[str]:
    tokens, bucket = batch.tokens, row.tokens
    measured = sorted({r.tokens for r in table.rows} - set(table.between))
    if bucket in table.between and bucket > measured[-1]:
        how = f"beyond the largest measured count, {measured[-1]}; its times are extrapolated"
    elif bucket in table.between:
        low = max(n for n in measured if n < bucket)
        high = min(n for n in measured if n > bucket)
        how = f"not measured; its times are interpolated between {low} and {high} tokens"
    else:
        how = "measured"
    if bucket < tokens:
        return [f"{tokens} tokens: more than the largest bucket, {bucket} ({how}), which serves"]
    if bucket == tokens:
        return [f"{tokens} tokens: the bucket of {bucket} ({how})"]
    return [f"{tokens} tokens: the next larger bucket, {bucket} ({how})"]


def _row_reason(batch: Batch, table: WorkloadTable, row: Row) -> list[str]:
    if batch.adapters is None:
        bound = table.bound(batch.tokens, batch.slots) if batch.slots else None
        over = "over the bucket"
        if bound is not None:
            over += (
                f"'s batches of {bound.rows_from:.3g} or more rows per segment, since there are no "
                f"more than {batch.slots} adapters"
            )
        line = (
            "the adapters are not known (as when a CUDA graph is captured): every kernel is right "
            f"for every batch, and this one takes the least time {over} together"
        )
        if row.worst is None:
            return [line]
        return [f"{line}; it loses at most {row.worst:.1%}, at {row.worst_scenario}"]
    adapters = min(batch.adapters, batch.slots or batch.adapters)
    rows = batch.tokens / adapters
    longest = row.rows_upto == math.inf
    limit = "the longest segments" if longest else f"up to {row.rows_upto:.3g} rows"
    return [
        f"{batch.tokens} tokens over {adapters} adapters: {rows:.3g} rows per segment; "
        f"the row for {limit} decides"
    ]


def nearest_fits(batch: Batch, table: WorkloadTable, bucket: int) -> list[Fit]:
    """The measured batches most like this one: of the bucket if it was measured, else of its
    neighbours; with unknown adapters all that the slots allow."""
    known = [(fit, Scenario.parse(fit.scenario_key)) for fit in table.fits]
    counts = sorted({s.tokens for _, s in known})
    around = [max((n for n in counts if n <= bucket), default=counts[0] if counts else 0)]
    around += [n for n in counts if n >= bucket][:1]
    near = [(f, s) for f, s in known if s.tokens in around]
    if batch.adapters is None:
        bound = table.bound(batch.tokens, batch.slots) if batch.slots else None
        least = 0.0 if bound is None else bound.rows_from
        mine = [(f, s) for f, s in near if s.tokens == around[-1]]
        return [f for f, s in mine if s.tokens / max(1, s.adapters) >= least]
    place = _position(batch.tokens, batch.tokens / batch.adapters)

    def distance(item: tuple[Fit, Scenario]) -> float:
        scenario = item[1]
        rows = scenario.tokens / max(1, scenario.adapters)
        return abs(_position(scenario.tokens, rows) - place)

    per_count = 1 if len(set(around)) > 1 else SHOWN - 1
    found: list[Fit] = []
    for count in dict.fromkeys(around):
        there = sorted((item for item in near if item[1].tokens == count), key=distance)
        found += [fit for fit, _ in there[:per_count]]
    return found


def _position(tokens: int, rows: float) -> float:
    """0 if every row has an adapter of its own, 1 if all share one (see dispatch/between.py)."""
    return math.log(rows) / math.log(tokens) if tokens > 1 and rows >= 1 else 0.0


def _evidence(fit: Fit, trace: str) -> Evidence:
    times = dict(fit.others)
    if fit.seconds is not None:
        times[fit.trace_key] = fit.seconds
    mine = times.pop(trace, None)
    others = sorted(times.items(), key=lambda item: item[1])
    return Evidence(
        fit.scenario_key,
        mine,
        fit.best_s,
        None if mine is None else mine / fit.best_s - 1,
        fit.floor_s,
        tuple(Alternative(t, s, s / fit.best_s - 1) for t, s in others),
    )
