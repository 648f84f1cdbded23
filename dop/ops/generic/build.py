"""Builds the binaries of the generic kernels: `python -m dop.ops.generic.build` (needs nvcc).

Each translation unit becomes a cubin per compute capability and PTX for what comes later, packed
with xz. index.json beside them names the sources' hashes, so that a test can tell whether the
committed binaries belong to the committed sources.
"""

from __future__ import annotations

import json
import lzma
import re
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from dop.errors import DopError, MissingDependencyError
from dop.measure.compile_cuda import find_nvcc
from dop.ops.generic.loader import CUBINS, FOLDER, INDEX, PTX, SOURCES, source_hash

FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


class CompileFailed(DopError):
    """nvcc refused a source or warned."""


def build(folder: Path = FOLDER) -> dict[str, Any]:
    """Writes all binaries and the index into a folder; returns the index.

    Raises:
        MissingDependencyError: there is no nvcc.
        CompileFailed: nvcc refused a source, warned about it, or spilled registers.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise MissingDependencyError("there is no nvcc.", "Install the CUDA toolkit.")
    files: dict[str, Any] = {}
    for unit in SOURCES:
        for name in [f"sm_{c}" for c in CUBINS] + [PTX]:
            image = _compile(nvcc, unit, name)
            packed = lzma.compress(image, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
            file = f"{unit}-{name}.bin"
            (folder / file).write_bytes(packed)
            digest = sha256(packed).hexdigest()
            files[file] = {"sha256": digest, "bytes": len(packed), "unpacked_bytes": len(image)}
    written = {
        "nvcc": _version(nvcc),
        "flags": FLAGS,
        "sources": {unit: source_hash(unit) for unit in SOURCES},
        "files": files,
    }
    (folder / INDEX).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return written


def _compile(nvcc: str, unit: str, name: str) -> bytes:
    kind = "-ptx" if name == PTX else "-cubin"
    with tempfile.TemporaryDirectory(prefix="dop-generic-") as folder:
        out = Path(folder) / "out"
        command = [nvcc, *FLAGS, kind, f"-arch={name}", "-Xptxas", "-v", "-o", str(out)]
        command.append(str(FOLDER / f"{unit}.cu"))
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise CompileFailed(f"nvcc refused {unit}.cu for {name}: {done.stderr.strip()}")
        spilled = [pair for pair in _SPILL.findall(done.stderr) if pair != ("0", "0")]
        if spilled:
            raise CompileFailed(f"{unit}.cu spills registers on {name}: {spilled}.")
        return out.read_bytes()


def _version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found.group(1) if found else "unknown"


def main() -> int:
    """Builds and prints the sizes."""
    try:
        index = build()
    except DopError as error:
        print(error, file=sys.stderr)
        return 1
    for file, facts in index["files"].items():
        print(f"{file:28} {facts['bytes']:8} bytes ({facts['unpacked_bytes']} unpacked)")
    print(f"{'total':28} {sum(f['bytes'] for f in index['files'].values()):8} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
