"""`dop export library`: the chosen kernels as binaries with an index, to be loaded without TVM.

A library is a folder: `index.json`, and either one cubin per kernel (CUDA) or `libdop_sgmv.so` with
a plain C entry per kernel and `dop_sgmv.h` that declares them (CPU). `dop.export.load` reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dop.errors import DopError, ExportError
from dop.export.files import write_folder
from dop.export.select import Kernel, Selection
from dop.measure.artifact import Artifact, GeneratedLike, pack

if TYPE_CHECKING:
    from dop.space.trace import Trace
    from dop.target import Target
    from dop.workload import Workload

Generate = Callable[["Workload", "Trace", "Target"], GeneratedLike]

INDEX = "index.json"
FORMAT = "dop-library"
VERSION = 1
CPU_LIBRARY = "libdop_sgmv.so"
CPU_HEADER = "dop_sgmv.h"


def export_library(
    selection: Selection, folder: Path, generate: Generate | None = None
) -> dict[str, Any]:
    """Builds the kernels and writes the folder, whole or not at all; returns the index.

    Raises:
        ExportError: a kernel cannot be built, or the folder cannot be written.
        MissingDependencyError: there is no compiler.
    """
    codes = {kernel.name: _generated(kernel, selection, generate) for kernel in selection.kernels}
    build = _build_cuda if selection.target.kind == "cuda" else _build_cpu
    files, artifacts, places = build(selection, codes)
    index: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "kind": selection.target.kind,
        "provenance": selection.provenance.to_json(),
        "table": selection.table.to_json(),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "kernels": [
            _describe(kernel, artifacts[kernel.name], places[kernel.name])
            for kernel in selection.kernels
        ],
    }
    text = json.dumps(index, indent=1, allow_nan=False) + "\n"
    write_folder(folder, {**files, INDEX: text.encode()}, marker=INDEX)
    return index


def _generated(kernel: Kernel, selection: Selection, generate: Generate | None) -> GeneratedLike:
    if generate is None:
        from dop.lowering.codegen import generate as generate_code

        generate = generate_code
    try:
        return generate(kernel.workload, kernel.record.trace, selection.target)
    except DopError as error:
        raise ExportError(
            f"{kernel.name} cannot be generated: {error.cause}",
            "The log may come from another version of Dop.",
        ) from error


Built = tuple[dict[str, bytes], dict[str, Artifact], dict[str, tuple[str, str]]]
"""Files by name, artifacts by kernel, (file, C entry or "") by kernel."""


def _build_cuda(selection: Selection, codes: Mapping[str, GeneratedLike]) -> Built:
    from dop.measure.compile_cuda import compile_cuda

    artifacts = {n: compile_cuda(code, selection.target.arch) for n, code in codes.items()}
    files = {f"{name}.cubin": artifact.binary for name, artifact in artifacts.items()}
    return files, artifacts, {name: (f"{name}.cubin", "") for name in codes}


def _build_cpu(selection: Selection, codes: Mapping[str, GeneratedLike]) -> Built:
    """One library for all kernels, so that they share one pool of threads."""
    from dop.measure.compile_cpu import link

    entries = {f"dop_{name}": code for name, code in codes.items()}
    library = link(entries, strip=True)
    artifacts = {name: pack(code, library, {}) for name, code in codes.items()}
    files = {
        CPU_LIBRARY: library,
        CPU_HEADER: _c_header(selection, artifacts).encode(),
    }
    return files, artifacts, {name: (CPU_LIBRARY, f"dop_{name}") for name in codes}


def _describe(kernel: Kernel, artifact: Artifact, place: tuple[str, str]) -> dict[str, Any]:
    file, entry = place
    return {
        "name": kernel.name,
        "workload": kernel.workload.key,
        "trace": kernel.trace_key,
        "sketch": kernel.record.sketch,
        "file": file,
        "entry": entry,
        "tile_rows": artifact.tile_rows,
        "arguments": list(artifact.arguments),
        "launches": [
            {
                "name": launch.name,
                "grid": list(launch.grid),
                "block": list(launch.block),
                "dynamic_smem_bytes": launch.dynamic_smem_bytes,
                "arguments": list(launch.arguments),
            }
            for launch in artifact.launches
        ],
        "workspaces": [
            {"name": space.name, "dtype": space.dtype, "elements": space.elements}
            for space in artifact.workspaces
        ],
        "scenarios": {
            fit.scenario_key: {"seconds": fit.seconds, "floor_s": fit.floor_s}
            for fit in kernel.fits
        },
    }


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
