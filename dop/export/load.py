"""An exported library in this process: no TVM, no compiler; numpy for the CPU.

library = load("lib")                       # reads index.json, checks every binary's hash
weights = library.weights(a, b)             # once: numpy stacks per slice
library.sgmv(x, weights, token_slot, y)     # y += ..., in place
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dop.dispatch.table import Table
from dop.errors import ConfigError, ExportError, MissingDependencyError
from dop.measure.artifact import SHIFT_BYTES, Buffer, Launch, evaluate, shift_of
from dop.workload import Workload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

INDEX = "index.json"
ALIGNMENT = 64
_REFUSALS = {-2: "an argument is not 64-byte aligned", -3: "the weight stacks lie too far apart"}


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """A kernel of the index.

    Attributes:
        name: unique in the library.
        workload: what it computes.
        trace_key: as the table names it.
        file: its binary.
        entry: its C function (CPU).
        tile_rows: rows per tile of the plan it takes; 0: token_slot.
        arguments: tensors in order.
        launches: kernels in order (CUDA).
        workspaces: what the launches share (CUDA).
    """

    name: str
    workload: Workload
    trace_key: str
    file: str
    entry: str
    tile_rows: int
    arguments: tuple[str, ...]
    launches: tuple[Launch, ...]
    workspaces: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """Stacks of one workload on the CPU: per slice [slots, rank, in] and [slots, out, rank]."""

    workload: Workload
    a: tuple[Floats, ...]
    b: tuple[Floats, ...]
    slots: int


def load(folder: str | os.PathLike[str]) -> CpuLibrary | CudaLibrary:
    """The library in a folder; for a CUDA one, the current context's modules are loaded lazily.

    Raises:
        ExportError: the folder is no library, is damaged, or was made for another machine.
    """
    where = Path(folder)
    index = _read_index(where)
    try:
        table = Table.from_json(index["table"])
        kernels = {k["name"]: _kernel(k) for k in index["kernels"]}
        files = {name: _verified(where, name, digest) for name, digest in index["files"].items()}
        kind = index["kind"]
        if any(k.file not in files for k in kernels.values()):
            raise ExportError(f"{where} lacks a binary.", "Export it again.")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(
            f"{where / INDEX} is damaged ({type(error).__name__}: {error}).", "Export it again."
        ) from error
    if kind == "cpu":
        return CpuLibrary(where, table, kernels)
    return CudaLibrary(where, table, kernels, files)


def _read_index(where: Path) -> dict[str, Any]:
    try:
        index = json.loads((where / INDEX).read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(
            f"{where} is no exported library: {error.strerror}.", "Run dop export library."
        ) from error
    except ValueError as error:
        raise ExportError(f"{where / INDEX} is not JSON.", "Export it again.") from error
    if not isinstance(index, dict) or index.get("format") != "dop-library":
        raise ExportError(f"{where / INDEX} is not the index of a library.", "Export it again.")
    if index.get("version") != 1:
        raise ExportError(f"{where} has format version {index.get('version')}.", "Upgrade Dop.")
    return index


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


def _kernel(data: Mapping[str, Any]) -> KernelInfo:
    launches = tuple(
        Launch(
            str(item["name"]),
            (str(item["grid"][0]), str(item["grid"][1]), str(item["grid"][2])),
            (int(item["block"][0]), int(item["block"][1]), int(item["block"][2])),
            int(item["dynamic_smem_bytes"]),
            tuple(item["arguments"]),
        )
        for item in data["launches"]
    )
    spaces = tuple(Buffer(w["name"], w["dtype"], w["elements"]) for w in data["workspaces"])
    return KernelInfo(
        data["name"],
        Workload.parse(data["workload"]),
        data["trace"],
        data["file"],
        data["entry"],
        int(data["tile_rows"]),
        tuple(data["arguments"]),
        launches,
        spaces,
    )


class _Library:
    """What both kinds share: the index and the choice."""

    def __init__(self, where: Path, table: Table, kernels: Mapping[str, KernelInfo]) -> None:
        self.path = where
        self.table = table
        self.kernels = kernels
        self._by_trace = {(k.workload.key, k.trace_key): k for k in kernels.values()}

    @property
    def workloads(self) -> tuple[str, ...]:
        """Keys of the workloads in it."""
        return tuple(self.table.workloads)

    def choose(self, workload_key: str, tokens: int, adapters: int | None = None) -> KernelInfo:
        """The kernel for a batch; `adapters` None if that is not known.

        Raises:
            ConfigError: the workload is not in the library.
        """
        return self._by_trace[workload_key, self.table.choose(workload_key, tokens, adapters)]


class CpuLibrary(_Library):
    """Kernels of a shared library; calls are made by one thread at a time."""

    def __init__(self, where: Path, table: Table, kernels: Mapping[str, KernelInfo]) -> None:
        super().__init__(where, table, kernels)
        _check_features(table.target_key)
        names = {kernel.file for kernel in kernels.values()}
        try:
            self._libraries = {n: ctypes.CDLL(str((where / n).resolve())) for n in names}
        except OSError as error:
            raise ExportError(f"{where} does not load: {error}.", "Export it here.") from error
        for library in self._libraries.values():
            library.dop_last_error.restype = ctypes.c_char_p
        self.threads(len(os.sched_getaffinity(0)))

    def threads(self, count: int) -> None:
        """Sets the number of threads, the caller included; they are not pinned."""
        for library in self._libraries.values():
            library.dop_threads(ctypes.c_int(count), None)

    def close(self) -> None:
        """Ends the threads."""
        for library in self._libraries.values():
            library.dop_shutdown()

    def weights(self, a: Sequence[Floats], b: Sequence[Floats]) -> Weights:
        """Stacks ready for calls: aligned, and the slices side by side (copied where they are not).

        Args:
            a: per slice [slots, rank, in].
            b: per slice [slots, out, rank].

        Raises:
            ConfigError: the shapes do not fit each other, or no kernel was tuned for them.
        """
        shapes_a, shapes_b = [x.shape for x in a], [x.shape for x in b]
        try:
            slots, rank, width = shapes_a[0]
            outs = tuple(shape[1] for shape in shapes_b)
            workload = Workload("", width, outs, rank, str(a[0].dtype))
            fits = all(s == (slots, rank, width) for s in shapes_a) and shapes_b == [
                (slots, out, rank) for out in outs
            ]
        except (ValueError, IndexError) as error:
            raise ConfigError(f"stacks {shapes_a} and {shapes_b} have wrong dimensions.") from error
        if not fits or len(a) != len(b) or any(x.dtype != a[0].dtype for x in (*a, *b)):
            raise ConfigError(f"stacks {shapes_a} and {shapes_b} do not fit each other.")
        if workload.key not in self.table.workloads:
            raise ConfigError(
                f"{workload.key} is not in {self.path}.",
                f"It holds {', '.join(self.workloads)}.",
            )
        return Weights(workload, _side_by_side(a), _side_by_side(b), slots)

    def sgmv(
        self,
        x: Floats,
        weights: Weights,
        token_slot: Sequence[int] | NDArray[np.int32],
        y: Floats,
        *,
        kernel: KernelInfo | None = None,
    ) -> None:
        """y[t] += x[t] @ A[slot].T @ B[slot].T for every token with a slot.

        Args:
            x: [tokens, in].
            weights: of `weights`.
            token_slot: [tokens], -1 for no adapter.
            y: [tokens, sum of out], C-contiguous; written in place.
            kernel: another one than the table's choice.

        Raises:
            ConfigError: shapes, types or slots do not fit.
            ExportError: the kernel refused its arguments.
        """
        numpy = _numpy()
        slots = numpy.ascontiguousarray(token_slot, dtype=numpy.int32)
        workload = weights.workload
        tokens = _check_call(x, slots, y, weights)
        if tokens == 0:
            return
        used = len(numpy.unique(slots[slots >= 0]))
        if not used:
            return
        info = kernel or self.choose(workload.key, tokens, used)
        plan = _plan(slots, info.tile_rows)
        target = y if y.ctypes.data % ALIGNMENT == 0 else aligned(y)
        named = {"x": _aligned_view(x), "y_in": target, "y": target}
        named |= {name: aligned(table) for name, table in plan.items()}
        named |= {f"a{s}": stack for s, stack in enumerate(weights.a)}
        named |= {f"b{s}": stack for s, stack in enumerate(weights.b)}
        tiles = len(plan.get("tile_slot", slots))
        self._call(info, named, (tokens, tiles, weights.slots))
        if target is not y:
            y[...] = target

    def _call(self, info: KernelInfo, named: Mapping[str, Any], scalars: Sequence[int]) -> None:
        library = self._libraries[info.file]
        arrays = [named[name] for name in info.arguments]
        pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
        code = getattr(library, info.entry)(pointers, (ctypes.c_int64 * 3)(*scalars))
        if code:
            text = _REFUSALS.get(code) or (library.dop_last_error() or b"").decode(errors="replace")
            raise ExportError(f"{info.name} refused its arguments: {text[:300]}.")


class CudaLibrary(_Library):
    """Cubins, loaded into the current CUDA context when first used."""

    def __init__(
        self,
        where: Path,
        table: Table,
        kernels: Mapping[str, KernelInfo],
        files: Mapping[str, bytes],
    ) -> None:
        super().__init__(where, table, kernels)
        self._files = files
        self._loaded: dict[str, list[Any]] = {}
        self._modules: list[Any] = []

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
    ) -> None:
        """Launches the kernels of one call on a stream; nothing is allocated or waited for.

        Args:
            info: of `choose`.
            pointers: device addresses by name: x, a0.., b0.., the tables of the kernel's form,
                y_in, y and the workspaces; 16-byte aligned.
            tokens: rows of x and y.
            tiles: length of the tile tables; tokens in the row form.
            stream: CUstream as an integer.

        Raises:
            ExportError: there is no GPU driver, or a pointer is missing or misaligned.
            CudaError: the driver refused.
        """
        from dop.measure import cuda_driver

        functions = self._functions(info)
        odd = [name for name, address in pointers.items() if address % SHIFT_BYTES]
        if odd:
            raise ExportError(f"{', '.join(odd)} not {SHIFT_BYTES}-byte aligned.")
        for launch, function in zip(info.launches, functions, strict=True):
            try:
                values = [_parameter(name, pointers, tokens, tiles) for name in launch.arguments]
            except KeyError as error:
                raise ExportError(f"{info.name} wants {error.args[0]!r}.") from error
            grid = [evaluate(extent, tokens=tokens, tiles=tiles) for extent in launch.grid]
            if min(grid) < 1:
                continue
            parameters = cuda_driver.pack_parameters(values)
            function.launch(grid, launch.block, launch.dynamic_smem_bytes, stream, parameters)

    def _functions(self, info: KernelInfo) -> list[Any]:
        from dop.measure import cuda_driver

        if cuda_driver.driver() is None:
            raise ExportError(f"{self.path} needs an NVIDIA GPU and its driver.")
        if info.name not in self._loaded:
            module = cuda_driver.module(self._files[info.file])
            handle = module.__enter__()
            self._modules.append(module)
            functions = []
            for launch in info.launches:
                function = cuda_driver.Function(handle, launch.name)
                if launch.dynamic_smem_bytes > 48 << 10:
                    function.allow_dynamic_smem(launch.dynamic_smem_bytes)
                functions.append(function)
            self._loaded[info.name] = functions
        return self._loaded[info.name]

    def close(self) -> None:
        """Unloads the modules."""
        while self._modules:
            self._modules.pop().__exit__(None, None, None)
        self._loaded.clear()


def _parameter(
    name: str, pointers: Mapping[str, int], tokens: int, tiles: int
) -> ctypes.c_void_p | ctypes.c_int32 | ctypes.c_int64:
    counts = {"tokens": tokens, "tiles": tiles}
    if name in counts:
        return ctypes.c_int32(counts[name])
    stack = shift_of(name)
    if stack is not None:
        distance = pointers[stack] - pointers[f"{stack[0]}0"]
        return ctypes.c_int64(distance // SHIFT_BYTES)
    return ctypes.c_void_p(pointers[f"{name}0" if name in ("a", "b") else name])


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise MissingDependencyError("numpy is not installed.", "pip install numpy") from error
    return numpy


def aligned(array: Any) -> Any:
    """A C-contiguous copy of an array whose data is 64-byte aligned."""
    return _side_by_side([array], copy=True)[0]


def _aligned_view(array: Any) -> Any:
    """The array itself if kernels can read it as it is, else a copy."""
    return _side_by_side([array])[0]


def _side_by_side(arrays: Sequence[Any], copy: bool = False) -> tuple[Any, ...]:
    """The arrays in one allocation, 64-byte aligned each; a single fit array stays where it is."""
    numpy = _numpy()
    first = arrays[0]
    fit = first.flags.c_contiguous and first.ctypes.data % ALIGNMENT == 0
    if len(arrays) == 1 and fit and not copy:
        return (first,)
    sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
    room = numpy.empty(sum(sizes) + ALIGNMENT, numpy.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    views = []
    for array, size in zip(arrays, sizes, strict=True):
        view = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        view[...] = array
        views.append(view)
        begin += size
    return tuple(views)


def _check_call(x: Any, slots: Any, y: Any, weights: Weights) -> int:
    """Tokens of a call whose arguments fit."""
    w = weights.workload
    tokens = len(slots)
    for name, array, width in (("x", x, w.in_features), ("y", y, w.total_out)):
        if array.shape != (tokens, width) or str(array.dtype) != w.dtype:
            raise ConfigError(
                f"{name} is {array.dtype} {array.shape}.", f"It must be {w.dtype} {tokens, width}."
            )
    if not y.flags.c_contiguous or not y.flags.writeable:
        raise ConfigError("y must be contiguous and writable.")
    if tokens and (slots.min() < -1 or slots.max() >= weights.slots):
        raise ConfigError(
            f"slots {slots.min()} to {slots.max()}.", f"Use -1 to {weights.slots - 1}."
        )
    return tokens


def _plan(slots: Any, tile_rows: int) -> dict[str, Any]:
    from dop.measure.plan import make_plan

    return dict(make_plan(slots, tile_rows).tables)


def _check_features(target_key: str) -> None:
    """Refuses code for vector units that this CPU lacks: it would die of an illegal instruction.

    Raises:
        ExportError: a feature is missing.
    """
    wanted = target_key.partition("-mattr=")[2].split(" ")[0].split(",")
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    here = {flag.replace("_", "") for flag in flags.partition(":")[2].split()}
    known = ("avx", "fma", "f16c", "amx")
    names = [f.lstrip("+") for f in wanted if f.startswith("+") and f[1:].startswith(known)]
    missing = [n for n in names if n.replace("-", "").replace("_", "") not in here]
    if here and missing:
        raise ExportError(
            f"this CPU lacks {', '.join(missing)}, which the library was built for.",
            "Tune and export on this machine.",
        )
