"""An exported library or pack in this process: no TVM, no compiler; standard library only.

library = load("lib")              # a folder of `dop export library`, or a pack
info = library.choose(workload_key, tokens, adapters)
library.launch(info, pointers, tokens=, tiles=, stream=)           # CUDA
library.sgmv(x, weights, token_slot, y)                            # CPU, see cpu_library.py
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dop.errors import ExportError
from dop.export.choice import Library
from dop.export.cpu_library import CpuLibrary
from dop.export.index import INDEX, Index, KernelInfo, parse_index
from dop.export.pack import PackFile, is_pack
from dop.measure import tensor_map
from dop.measure.artifact import SHIFT_BYTES, evaluate, shift_of
from dop.measure.cuda_driver import Parameter

MOST_SLOTS = 1 << 20
"""Slots of a stack where nobody says how many there are."""


def load(path: str | os.PathLike[str]) -> CpuLibrary | CudaLibrary:
    """The library in a folder or a pack.

    A folder's files are checked now, a pack's when they are first used. The modules of a CUDA
    library are loaded into the current context when they are first launched.

    Raises:
        ExportError: it is no library, is damaged, or was made for another machine.
    """
    where = Path(path)
    if not is_pack(where):
        index = read_index(where)
        for name, digest in index.files.items():
            _verified(where, name, digest)
        if index.kind == "cpu":
            return CpuLibrary(where, index)
    return load_cuda(where)


def load_cuda(path: Path) -> CudaLibrary:
    """The CUDA library in a folder or a pack; every file is checked when it is first wanted.

    Raises:
        ExportError: it is no library of CUDA kernels, or its index is damaged.
    """
    read: Callable[[str], bytes]
    if is_pack(path):
        pack = PackFile(path)
        index, read = pack.index, pack.read
    else:
        index = read_index(path)
        files = index.files

        def read(name: str) -> bytes:
            return _verified(path, name, files[name])

    if index.kind != "cuda":
        raise ExportError(f"{path} holds no CUDA kernels.", "Use dop export library for a CPU.")
    return CudaLibrary(path, index, read)


def read_index(path: Path) -> Index:
    """The index of a folder or a pack.

    Raises:
        ExportError: it is no library, or its index is damaged.
    """
    if is_pack(path):
        return PackFile(path).index
    try:
        data = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(
            f"{path} is no exported library: {error.strerror}.", "Run dop export library."
        ) from error
    except ValueError as error:
        raise ExportError(f"{path / INDEX} is not JSON.", "Export it again.") from error
    return parse_index(data, path / INDEX)


def _verified(where: Path, name: str, digest: str) -> bytes:
    if Path(name).name != name:
        raise ExportError(f"{name!r} is not a file of {where}.", "Export it again.")
    try:
        data = (where / name).read_bytes()
    except OSError as error:
        raise ExportError(
            f"{where / name} cannot be read: {error.strerror}.", "Export it again."
        ) from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise ExportError(f"{where / name} is not the file that was exported.", "Export it again.")
    return data


class CudaLibrary(Library):
    """Cubins, read when first wanted and loaded into the current CUDA context when first used."""

    def __init__(self, where: Path, index: Index, read: Callable[[str], bytes]) -> None:
        super().__init__(where, index)
        self._read = read
        self._loaded: dict[str, list[Any]] = {}
        self._modules: list[Any] = []

    def binary(self, info: KernelInfo) -> bytes:
        """The cubin of a kernel, checked.

        Raises:
            ExportError: the file is damaged.
        """
        return self._read(info.file)

    def source(self, info: KernelInfo) -> str | None:
        """The generated CUDA C++ of a kernel, checked; None if it is not shipped."""
        if not info.source:
            return None
        offset, length = info.source_span
        return self._read(info.source)[offset : offset + length].decode()

    def workspace_bytes(self, info: KernelInfo, tokens: int, tiles: int) -> dict[str, int]:
        """Bytes of each workspace, by name."""
        sizes = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}
        return {
            w.name: sizes[w.dtype] * evaluate(w.elements, tokens=tokens, tiles=tiles)
            for w in info.workspaces
        }

    def launch(
        self,
        info: KernelInfo,
        pointers: Mapping[str, int],
        *,
        tokens: int,
        tiles: int,
        stream: int,
        slots: int = MOST_SLOTS,
    ) -> None:
        """Launches the kernels of one call on a stream; nothing is allocated or waited for.

        Args:
            info: of `choose`.
            pointers: device addresses by name: x, a0.., b0.., the tables of the kernel's form,
                y_in, y and the workspaces; 16-byte aligned.
            tokens: rows of x and y.
            tiles: length of the tile tables; tokens in the row form.
            stream: CUstream as an integer.
            slots: adapters of the stacks; only tensor maps need it, and only as a bound.

        Raises:
            ExportError: there is no GPU driver, it is older than CUDA 12 and the kernel takes
                tensor maps, or a pointer is missing or misaligned.
            CudaError: the driver refused.
        """
        from dop.measure import cuda_driver

        functions = self._functions(info)
        odd = [name for name, address in pointers.items() if address % SHIFT_BYTES]
        if odd:
            raise ExportError(f"{', '.join(odd)} not {SHIFT_BYTES}-byte aligned.")
        counts = {"tokens": tokens, "tiles": tiles, "slots": slots}
        for launch, function in zip(info.launches, functions, strict=True):
            grid = [evaluate(extent, tokens=tokens, tiles=tiles) for extent in launch.grid]
            if min(grid) < 1:
                continue
            try:
                values = [_parameter(name, pointers, counts, info) for name in launch.arguments]
            except KeyError as error:
                raise ExportError(f"{info.name} wants {error.args[0]!r}.") from error
            parameters = cuda_driver.pack_parameters(values)
            function.launch(grid, launch.block, launch.dynamic_smem_bytes, stream, parameters)

    def _functions(self, info: KernelInfo) -> list[Any]:
        from dop.measure import cuda_driver

        if cuda_driver.driver() is None:
            raise ExportError(f"{self.path} needs an NVIDIA GPU and its driver.")
        if info.name not in self._loaded:
            maps = any(tensor_map.wanted(launch.arguments) for launch in info.launches)
            if maps and tensor_map.encoder() is None:
                raise tensor_map.no_encoder(f"{info.name} of {self.path}")
            module = cuda_driver.module(self.binary(info))
            handle = module.__enter__()
            self._modules.append(module)
            functions = []
            for launch in info.launches:
                function = cuda_driver.Function(handle, launch.name)
                if launch.dynamic_smem_bytes > 48 << 10:
                    function.allow_dynamic_smem(launch.dynamic_smem_bytes)
                if tensor_map.wanted(launch.arguments):  # only such kernels have them
                    function.allow_large_clusters()
                functions.append(function)
            self._loaded[info.name] = functions
        return self._loaded[info.name]

    def close(self) -> None:
        """Unloads the modules."""
        while self._modules:
            self._modules.pop().__exit__(None, None, None)
        self._loaded.clear()


def _parameter(
    name: str, pointers: Mapping[str, int], counts: Mapping[str, int], info: KernelInfo
) -> Parameter:
    """A kernel's parameter.

    Raises:
        KeyError: there is no such pointer.
        CudaError: the driver refused a tensor map.
    """
    if name in ("tokens", "tiles"):
        return ctypes.c_int32(counts[name])
    found = tensor_map.parse(name)
    if found is not None:
        sizes = {"tokens": counts["tokens"], "slots": counts["slots"]}
        what = tensor_map.of_workload(name, info.workload, **sizes)
        return tensor_map.encode(
            what, pointers[f"{found[0]}0" if found[0] in ("a", "b") else found[0]]
        )
    stack = shift_of(name)
    if stack is not None:
        distance = pointers[stack] - pointers[f"{stack[0]}0"]
        return ctypes.c_int64(distance // SHIFT_BYTES)
    return ctypes.c_void_p(pointers[f"{name}0" if name in ("a", "b") else name])
