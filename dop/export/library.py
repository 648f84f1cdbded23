"""`dop export library`: the chosen kernels as binaries with an index, to be loaded without TVM.

A library is a folder: `index.json`, `traces.json` (`dop.export.traces`), and either one cubin per
kernel (CUDA) or `libdop_sgmv.so` with a plain C entry per kernel and `dop_sgmv.h` that declares
them (CPU). `dop.export.load` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dop.errors import ExportError
from dop.export.build import BuildJob, Generate, build_all, generated
from dop.export.files import sha256_hex, write_folder
from dop.export.index import FORMAT, INDEX, VERSION, describe
from dop.export.select import Kernel, Selection
from dop.export.traces import TRACES, traces_of
from dop.measure.artifact import Artifact, pack

CPU_LIBRARY = "libdop_sgmv.so"
CPU_HEADER = "dop_sgmv.h"

Built = tuple[dict[str, bytes], dict[str, Artifact], dict[str, tuple[str, str]]]
"""Files by name, artifacts by kernel, (file, C entry or "") by kernel."""


def export_library(
    selection: Selection,
    folder: Path,
    generate: Generate | None = None,
    *,
    processes: int = 1,
) -> dict[str, Any]:
    """Builds the kernels and writes the folder, whole or not at all; returns the index.

    Args:
        selection: what to ship.
        folder: where to.
        generate: stand-in for the code generator.
        processes: that build at a time (CUDA).

    Raises:
        ExportError: a kernel cannot be built, or the folder cannot be written.
        MissingDependencyError: there is no compiler.
    """
    jobs = [job_of(kernel, selection) for kernel in selection.kernels]
    if selection.target.kind == "cuda":
        files, artifacts, places = _build_cuda(jobs, generate, processes)
    else:
        files, artifacts, places = _build_cpu(selection, jobs, generate)
    files[TRACES] = traces_of(selection)
    index: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "kind": selection.target.kind,
        "provenance": selection.provenance.to_json(),
        "table": selection.table.to_json(),
        "files": {name: sha256_hex(data) for name, data in files.items()},
        "kernels": [
            described(kernel, artifacts[kernel.name], places[kernel.name])
            for kernel in selection.kernels
        ],
    }
    text = json.dumps(index, indent=1, allow_nan=False) + "\n"
    write_folder(folder, {**files, INDEX: text.encode()}, marker=INDEX)
    return index


def job_of(kernel: Kernel, selection: Selection) -> BuildJob:
    """What it takes to build a kernel of a selection."""
    return BuildJob(kernel.name, kernel.workload, kernel.record.trace, selection.target)


def described(kernel: Kernel, artifact: Artifact, place: tuple[str, str]) -> dict[str, Any]:
    """A kernel's part of the index: its file, and its C entry or ""."""
    scenarios = {
        fit.scenario_key: {"seconds": fit.seconds, "floor_s": fit.floor_s} for fit in kernel.fits
    }
    return describe(kernel.name, kernel.trace_key, kernel.record.sketch, artifact, place, scenarios)


def _build_cuda(jobs: list[BuildJob], generate: Generate | None, processes: int) -> Built:
    artifacts: dict[str, Artifact] = {}
    for job, built in build_all(jobs, processes=processes, generate=generate):
        if isinstance(built, ExportError):
            raise built
        artifacts[job.name] = built
    files = {f"{name}.cubin": artifact.binary for name, artifact in artifacts.items()}
    return files, artifacts, {name: (f"{name}.cubin", "") for name in artifacts}


def _build_cpu(selection: Selection, jobs: list[BuildJob], generate: Generate | None) -> Built:
    """One library for all kernels, so that they share one pool of threads."""
    from dop.measure.compile_cpu import link

    codes = {job.name: generated(job, generate) for job in jobs}
    entries = {f"dop_{name}": code for name, code in codes.items()}
    library = link(entries, strip=True)
    artifacts = {name: pack(code, library, {}) for name, code in codes.items()}
    files = {
        CPU_LIBRARY: library,
        CPU_HEADER: _c_header(selection, artifacts).encode(),
    }
    return files, artifacts, {name: (CPU_LIBRARY, f"dop_{name}") for name in codes}


_C_HEAD = """\
/* SGMV on the CPU: y[t] += (x[t] @ A[slot(t)].T) @ B[slot(t)].T. Made by Dop; do not edit.
 *
%s
 *
 * Every kernel is one entry: int entry(void **arguments, const int64_t *scalars)
 *   arguments  data pointers in the order given at the entry; contiguous, row-major, 64-byte
 *              aligned; the a's of one call in one allocation, and so the b's; y_in = y (in place)
 *              x [tokens, in]  a<s> [slots, rank, in]  b<s> [slots, out<s>, rank]
 *              y [tokens, sum of out]  tables int32:
 *              tile_slot, tile_row0, tile_rows [tiles]  row_index [tokens]: tokens sorted by slot
 *              and cut into tiles of at most `rows` tokens of one slot; tile t holds
 *              row_index[tile_row0[t]], ..., tile_rows[t] of them. Tokens without adapter are in
 *              no tile.   token_slot [tokens]: slot of each token
 *   scalars    tokens, tiles, slots
 *   returns 0, -1 (refused, see dop_last_error), -2 (misaligned), -3 (stacks too far apart)
 * Which entry is fastest for a batch stands in index.json ("table").
 */
#ifndef DOP_SGMV_H
#define DOP_SGMV_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

/* Threads, the caller included, and the core of each (NULL: not pinned); 1 until it is called. */
int dop_threads(int count, const int *cores);
/* Ends the threads; call it before the library is closed. */
void dop_shutdown(void);
/* Text of this thread's last error. */
const char *dop_last_error(void);
"""


def _c_header(selection: Selection, artifacts: Mapping[str, Artifact]) -> str:
    provenance = "\n".join(f" * {line}" for line in selection.provenance.lines())
    lines = [_C_HEAD % provenance]
    for kernel in selection.kernels:
        artifact = artifacts[kernel.name]
        rows = f"tiles of {artifact.tile_rows} rows" if artifact.tile_rows else "token_slot"
        lines += [
            f"/* {kernel.workload.key}, trace {kernel.trace_key}: {rows}",
            f" * {', '.join(artifact.arguments)} */",
            f"int dop_{kernel.name}(void **arguments, const int64_t *scalars);",
            "",
        ]
    lines += ["#ifdef __cplusplus", "}", "#endif", "#endif", ""]
    return "\n".join(lines)
