"""Exported CPU libraries on the path of packs: the tuned kernels of this machine, for float32."""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, float32

from dop import packs
from dop.errors import ExportError
from dop.export.cpu_library import CpuLibrary
from dop.export.index import INDEX
from dop.export.load import load, read_index
from dop.ops.plan import SegmentPlan
from dop.ops.stacks import Stacks

_LOCK = threading.Lock()
"""A library takes one call at a time."""

_WEIGHTS: WeakKeyDictionary[Stacks, tuple[list[int], Any]] = WeakKeyDictionary()


def cpu_library(workload_key: str) -> CpuLibrary | None:
    """The first library of CPU kernels in the folders of DOP_PACK_PATH that knows a workload.

    Raises:
        ExportError: it is damaged, or was made for another machine.
    """
    return _find(os.environ.get(packs.PATH_VARIABLE, ""), workload_key)


@cache
def _find(path: str, workload_key: str) -> CpuLibrary | None:
    for part in filter(None, path.split(os.pathsep)):
        for index_file in sorted(Path(part).rglob(INDEX)):
            index = read_index(index_file.parent)
            if index.kind == "cpu" and workload_key in index.table.workloads:
                return _load(index_file.parent)
    return None


@cache
def _load(folder: Path) -> CpuLibrary | None:
    found = load(folder)
    return found if isinstance(found, CpuLibrary) else None


def run(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], stacks: Stacks, plan: SegmentPlan
) -> bool:
    """Makes the call with a library's kernel if one knows the shape; whether it did.

    Kernels of libraries know neither ranks nor scales, so the plan must be without.
    """
    if stacks.shape.dtype != float32 or not os.environ.get(packs.PATH_VARIABLE):
        return False
    try:
        library = cpu_library(stacks.shape.key)
    except ExportError:
        return False
    if library is None:
        return False
    target = y if y.is_contiguous() else y.contiguous()
    with _LOCK:
        weights = _weights(library, a, b, stacks)
        slots = plan.table("token_slot").numpy()
        library.sgmv(x.detach().contiguous().numpy(), weights, slots, target.detach().numpy())
    if target is not y:
        y.copy_(target)
    return True


def _weights(library: CpuLibrary, a: list[Tensor], b: list[Tensor], stacks: Stacks) -> Any:
    """Stacks as the library wants them; it copies slices, so they are made anew after a change."""
    tensors = (*a, *b)
    known = not any(t.is_inference() for t in tensors)
    versions = [t._version for t in tensors] if known else []
    found = _WEIGHTS.get(stacks)
    if known and found is not None and found[0] == versions:
        return found[1]
    arrays = [t.detach().reshape(t.shape[0], *t.shape[-2:]).numpy() for t in tensors]
    weights = library.weights(arrays[: len(a)], arrays[len(a) :])
    if known:
        _WEIGHTS[stacks] = (versions, weights)
    return weights


def forget() -> None:
    """Looks for libraries anew."""
    _find.cache_clear()
