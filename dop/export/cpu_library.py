"""An exported CPU library in this process: numpy in, numpy out.

library = load("lib")                       # reads index.json, checks every binary's hash
weights = library.weights(a, b)             # once: numpy stacks per slice
library.sgmv(x, weights, token_slot, y)     # y += ..., in place
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dop.errors import ConfigError, ExportError, MissingDependencyError
from dop.export.choice import Library
from dop.export.index import Index, KernelInfo
from dop.workload import Workload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

ALIGNMENT = 64
_REFUSALS = {-2: "an argument is not 64-byte aligned", -3: "the weight stacks lie too far apart"}


@dataclass(frozen=True, slots=True)
class Weights:
    """Stacks of one workload on the CPU: per slice [slots, rank, in] and [slots, out, rank]."""

    workload: Workload
    a: tuple[Floats, ...]
    b: tuple[Floats, ...]
    slots: int


class CpuLibrary(Library):
    """Kernels of a shared library; calls are made by one thread at a time."""

    def __init__(self, where: Path, index: Index) -> None:
        super().__init__(where, index)
        _check_features(index.table.target_key)
        names = {kernel.file for kernel in index.kernels.values()}
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
