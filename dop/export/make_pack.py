"""`dop export pack`: from a tuned log to one compressed file that serving loads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dop.errors import DopError, ExportError
from dop.export.build import Generate, Outcome, build_all
from dop.export.cuda_text import ONE_GPU, take_apart
from dop.export.index import FORMAT, VERSION
from dop.export.library import described, job_of
from dop.export.pack import SOURCES, hashed_name, write_pack
from dop.export.reuse import BUILDER, MIN_ARCH, Reusable, builder
from dop.export.select import Kernel, Measured, Selection, choose, having, is_early
from dop.export.traces import TRACES, traces_of
from dop.export.transfer import in_dtypes, without
from dop.measure.artifact import Artifact
from dop.scenario import Scenario
from dop.space.early import EARLY_TOKENS
from dop.space.step import SplitStep

Key = tuple[str, str]
"""Workload key and trace key."""

TILE_SIZES = (8, 16, 32, 48, 64, 80, 128)
"""Rows of tiles that a plan has tables for (dop/ops/plan.py); other kernels cannot be served."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A pack that was written.

    Attributes:
        path: the file.
        size_bytes: of it.
        selection: what is in it.
        binaries: distinct cubins.
        cubin_bytes: of them, uncompressed.
        built, reused: kernels that were built now, and that came from an existing pack.
        build_s: seconds that building took.
        notes: what a person should know, one line each.
    """

    path: Path
    size_bytes: int
    selection: Selection
    binaries: int
    cubin_bytes: int
    notes: tuple[str, ...]
    built: int = 0
    reused: int = 0
    build_s: float = 0.0

    @property
    def effort(self) -> str:
        """What it took, for people."""
        each = f", {self.build_s / self.built:.2f} s each" if self.built else ""
        return (
            f"{self.built} kernels built in {self.build_s:.0f} s{each}; "
            f"{self.reused} reused from an existing pack."
        )


def make_pack(
    measured: Measured,
    path: Path,
    *,
    dtypes: Sequence[str],
    max_regret: float,
    processes: int = 1,
    sources: bool = True,
    early: int = EARLY_TOKENS,
    reuse: Path | None = None,
    generate: Generate | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Chooses, builds and writes.

    A kernel of the log that this version of Dop cannot build any more, or that no plan can serve,
    is passed over, and what serves its batches is chosen anew. A kernel that cannot be built in the
    type it is transferred to takes its workload out in that type. Both are noted.

    Args:
        measured: of a CUDA device.
        path: the file to write.
        dtypes: element types to ship, see `dop.export.transfer`.
        max_regret: see `dop.dispatch.cover`.
        processes: that build at a time.
        sources: ship the CUDA sources too, of kernels that other architectures can build.
        early: most tokens of a batch for which kernels may be chosen that read tables and weights
            before they wait for the kernel before them; 0: none.
        reuse: an existing pack; its kernels are taken where they would be built the same, see
            `dop.export.reuse`.
        generate: stand-in for the code generator.
        progress: is told (kernels built, kernels to build).

    Raises:
        ExportError: nothing can be shipped, or the file cannot be written.
        MissingDependencyError: there is no compiler.
    """
    if not measured.target_key.startswith("cuda"):
        raise ExportError(
            f"{measured.device_name} is no CUDA device.", "Use dop export library for CPUs."
        )
    outcomes: dict[Key, Outcome] = {}
    existing = Reusable(reuse, measured.target_key, sources)
    reused: set[Key] = set()
    began = time.monotonic()
    skipped = _unplannable(measured)
    notes = []
    if skipped:
        notes.append(f"{len(skipped)} kernels want tiles that no plan has; they are passed over.")
    measured, left_out = _early_up_to(measured, early)
    if left_out:
        limit = f"beyond {early} tokens" if early else "everywhere"
        notes.append(f"{left_out} kernels that read weights before they wait: left out {limit}.")
    banned: dict[Key, str] = {}
    while True:
        selection = in_dtypes(choose(measured, max_regret, skipped | banned.keys()), dtypes)
        reused |= _take(selection, outcomes, existing)
        _build(selection, outcomes, processes, generate, progress)
        broken = _broken(selection, outcomes)
        if not broken:
            break
        banned |= broken
    build_s = time.monotonic() - began
    notes += [f"{k[0]}: {k[1]} is passed over: {w}" for k, w in banned.items()]
    selection, dropped = _transferable(selection, outcomes)
    notes += dropped
    artifacts = {k: a for k, a in outcomes.items() if isinstance(a, Artifact)}
    index, files = _contents(selection, artifacts, notes, max_regret, sources)
    size = write_pack(path, index, files)
    cubins = {name: data for name, data in files.items() if name.endswith(".cubin")}
    total = sum(map(len, cubins.values()))
    told = (*notes, *([existing.note] if existing.note else []))
    built = len(outcomes.keys() - reused)
    return Packed(path, size, selection, len(cubins), total, told, built, len(reused), build_s)


def _key(kernel: Kernel) -> Key:
    return kernel.workload.key, kernel.trace_key


def _take(selection: Selection, outcomes: dict[Key, Outcome], existing: Reusable) -> set[Key]:
    """Takes from an existing pack what it has; returns the keys."""
    found: set[Key] = set()
    for kernel in selection.kernels:
        key = _key(kernel)
        artifact = None if key in outcomes else existing.artifact(*key)
        if artifact is not None:
            outcomes[key] = artifact
            found.add(key)
    return found


def _build(
    selection: Selection,
    outcomes: dict[Key, Outcome],
    processes: int,
    generate: Generate | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Builds what has not been built yet."""
    todo = {k.name: k for k in selection.kernels if _key(k) not in outcomes}
    jobs = [job_of(kernel, selection) for kernel in todo.values()]
    built = build_all(jobs, processes=processes, generate=generate)
    for done, (job, outcome) in enumerate(built, 1):
        outcomes[_key(todo[job.name])] = _servable(outcome)
        if progress is not None:
            progress(done, len(jobs))


def _early_up_to(measured: Measured, tokens: int) -> tuple[Measured, int]:
    """Without the times of early kernels for larger batches, and how many kernels lost some."""
    early = having(measured, is_early)
    lost: set[Key] = set()
    kept = []
    for entry in measured.entries:
        key = (entry.workload_key, entry.trace_key)
        if key in early and Scenario.parse(entry.scenario_key).tokens > tokens:
            lost.add(key)
        else:
            kept.append(entry)
    return replace(measured, entries=tuple(kept)), len(lost)


def _unplannable(measured: Measured) -> set[Key]:
    """Kernels for tiles of heights without tables: known from the trace, so none is built."""
    found: set[Key] = set()
    for entry in {(e.workload_key, e.trace_key): e for e in measured.entries if e.ok}.values():
        with contextlib.suppress(DopError):
            first = entry.trace().steps[0]
            if not isinstance(first, SplitStep) or (first.stage, first.extent) != (0, None):
                continue  # the row form; the ragged axis alone has no extent
            if first.lengths[0] not in TILE_SIZES:
                found.add((entry.workload_key, entry.trace_key))
    return found


def _servable(outcome: Outcome) -> Outcome:
    if isinstance(outcome, Artifact) and outcome.tile_rows not in (0, *TILE_SIZES):
        return ExportError(f"it wants tiles of {outcome.tile_rows} rows, which no plan has.")
    return outcome


def _broken(selection: Selection, outcomes: dict[Key, Outcome]) -> dict[Key, str]:
    """Kernels that cannot be built in the very type that they were tuned in."""
    found: dict[Key, str] = {}
    for kernel in selection.kernels:
        outcome = outcomes[_key(kernel)]
        if isinstance(outcome, ExportError) and not kernel.transferred_from:
            found[_key(kernel)] = outcome.cause
    return found


def _transferable(
    selection: Selection, outcomes: dict[Key, Outcome]
) -> tuple[Selection, list[str]]:
    notes: dict[str, str] = {}
    for kernel in selection.kernels:
        outcome = outcomes[_key(kernel)]
        if isinstance(outcome, ExportError):
            key = kernel.workload.key
            notes.setdefault(key, f"{key} is not shipped: {outcome.cause}")
    for key in notes:
        selection = without(selection, key)
    if not selection.kernels:
        raise ExportError("no kernel can be built.", next(iter(notes.values())))
    return selection, list(notes.values())


class _Texts:
    """Sources side by side: they share most of their text, and compress three times better."""

    def __init__(self) -> None:
        self._parts: dict[bytes, int] = {}
        self._end = 0

    def add(self, text: str) -> tuple[int, int]:
        """Offset and length in bytes of a text; equal texts are stored once."""
        data = text.encode()
        if data not in self._parts:
            self._parts[data] = self._end
            self._end += len(data)
        return self._parts[data], len(data)

    def joined(self) -> bytes:
        """All of them."""
        return b"".join(self._parts)


def _contents(
    selection: Selection,
    artifacts: dict[Key, Artifact],
    notes: Sequence[str],
    max_regret: float,
    sources: bool,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Index and files of the pack."""
    files: dict[str, bytes] = {}
    kernels = []
    texts = _Texts()
    for kernel in selection.kernels:
        artifact = artifacts[_key(kernel)]
        file = hashed_name(artifact.binary, "cubin")
        files[file] = artifact.binary
        entry = described(kernel, artifact, (file, ""))
        del entry["scenarios"]  # the table holds them
        known = artifact.resources.get(MIN_ARCH)
        entry[MIN_ARCH] = int(known) if known else take_apart(artifact.source).min_arch
        if kernel.transferred_from:
            entry["transferred_from"] = kernel.transferred_from
        # A reused kernel without source was shipped without it.
        if sources and artifact.source and not ONE_GPU.search(artifact.source):
            entry["source"] = SOURCES
            entry["source_span"] = texts.add(artifact.source)
        kernels.append(entry)
    if texts.joined():
        files[SOURCES] = texts.joined()
    files[TRACES] = traces_of(selection)
    transferred = sorted({k.workload.key for k in selection.kernels if k.transferred_from})
    provenance = {
        **selection.provenance.to_json(),
        "max_regret": max_regret,
        BUILDER: builder(),
        "transferred": transferred,
    }
    index = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "cuda",
        "provenance": provenance,
        "notes": list(notes),
        "table": _rounded(selection.table.to_json()),
        "kernels": kernels,
    }
    return index, files


def _rounded(data: object) -> object:
    """Seconds to four digits: no clock measured more, and the index stays small. The limits of
    rows stay as they are, since every language compares the same number."""
    if isinstance(data, float):
        return float(f"{data:.4g}") if data < 0.1 else float(f"{data:.6g}")
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_rounded(item) for item in data]
    return data
