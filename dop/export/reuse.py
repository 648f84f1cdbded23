"""Kernels of an existing pack that need not be built again.

A kernel is the same if its workload, trace and target are, and if whatever turns a trace into a
cubin is: the files of the lowering, TVM, the compiler and its headers. All of that is one hash, the
pack's *builder*, which stands in its provenance. If it differs, nothing is reused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

import dop
from dop.errors import DopError, ExportError
from dop.export.index import KernelInfo
from dop.export.pack import PackFile
from dop.measure.artifact import Artifact

BUILDER = "builder"
"""Name of the hash in a pack's provenance."""

MIN_ARCH = "min_arch"
"""Name under which a reused artifact keeps what its source, which may be missing, would tell."""

_PARTS = (
    "lowering/**/*.py",
    "space/step.py",
    "space/stages.py",
    "space/trace.py",
    "workload.py",
    "target.py",
    "measure/artifact.py",
    "measure/compile_cuda.py",
    "measure/nvrtc_headers.py",
)
"""Files that decide how a trace becomes a cubin."""
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "tvm")


@cache
def builder() -> str:
    """Hash of everything that turns a trace into a cubin, as it is installed here."""
    from dop.measure.compile_cuda import compiler_version, cuda_includes

    found = hashlib.sha256()
    root = Path(dop.__file__).parent
    files = [file for part in _PARTS for file in sorted(root.glob(part))]
    files += [Path(folder) / "cuda_bf16.hpp" for folder in cuda_includes()]
    for file in files:
        if file.is_file():
            found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    for name in _PACKAGES:
        try:
            found.update(f"{name} {importlib.metadata.version(name)}\0".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    found.update(compiler_version().encode())
    return found.hexdigest()[:16]


class Reusable:
    """What an existing pack has to give.

    Attributes:
        note: why it gives nothing, one line; "" if it gives something.
    """

    def __init__(self, path: Path | None, target_key: str, sources: bool) -> None:
        """
        Args:
            path: the pack; None or a file that is not there gives nothing.
            target_key: that is built for.
            sources: sources are to be shipped, so those of reused kernels are needed.
        """
        self.note = ""
        self._kernels: dict[tuple[str, str], KernelInfo] = {}
        self._files: dict[str, bytes] = {}
        if path is None or not path.is_file():
            return
        try:
            self._pack = PackFile(path)
        except DopError as error:
            self.note = f"nothing is reused: {error.cause}"
            return
        index = self._pack.index
        with_sources = any(info.source for info in index.kernels.values())
        if index.provenance.get(BUILDER) != builder() or index.table.target_key != target_key:
            self.note = f"nothing of {path.name} is reused: it was built by another version of Dop"
            self.note += ", compiler or for another target"
        elif sources and not with_sources:
            self.note = f"nothing of {path.name} is reused: it has no sources"
        else:
            self._kernels = {(k.workload.key, k.trace_key): k for k in index.kernels.values()}

    def artifact(self, workload_key: str, trace_key: str) -> Artifact | None:
        """A kernel as it was built then; None if it is not there, or damaged."""
        info = self._kernels.get((workload_key, trace_key))
        if info is None:
            return None
        start, length = info.source_span
        try:
            binary = self._read(info.file)
            text = self._read(info.source)[start : start + length].decode() if info.source else ""
        except ExportError:
            return None
        return Artifact(
            "cuda",
            workload_key,
            info.tile_rows,
            info.arguments,
            info.launches,
            info.workspaces,
            binary,
            text,
            {MIN_ARCH: float(info.min_arch)},
        )

    def _read(self, name: str) -> bytes:
        if name not in self._files:
            self._files[name] = self._pack.read(name)
        return self._files[name]
