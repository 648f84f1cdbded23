"""What the packs that are installed know, for a search to begin with.

They are looked for where serving looks for them: in the folders of DOP_PACK_PATH, then among those
shipped with Dop, whatever device they are of. Only their indexes and traces are read. For tuning:
serving does not import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from heapq import nsmallest
from operator import itemgetter
from pathlib import Path

from dop import packs
from dop.database.jsonl import without_collector
from dop.dispatch.table import Fit
from dop.errors import DopError, ExportError
from dop.export.files import sha256_hex
from dop.export.index import INDEX, Index
from dop.export.load import read_index
from dop.export.pack import SUFFIX, PackFile, is_pack
from dop.export.traces import TRACES, parse
from dop.export.transfer import TWINS
from dop.packs import folders
from dop.packs.catalog import is_library
from dop.prior import EACH, Prior
from dop.scenario import Scenario
from dop.workload import Workload


def known_kernels(kind: str, dtype: str, warn: Callable[[str], None]) -> list[Prior]:
    """The kernels of every installed pack, and what was fastest for each batch that it knows.

    Kernels that were tuned in one 16-bit type count for the other.

    Args:
        kind: "cuda" or "cpu".
        dtype: element type in which they are wanted.
        warn: is told of packs that cannot be read, one line each; the others are used.

    Returns:
        In the order in which serving prefers them: folder by folder, the newer packs first.
    """
    found: list[tuple[int, str, list[Prior]]] = []
    with without_collector():
        for place, path, origin in _installed(kind, warn):
            try:
                found.append((place, *_of(path, origin, kind, dtype)))
            except (DopError, OSError) as error:
                cause = error.cause if isinstance(error, DopError) else error
                warn(f"warning: {origin} is passed over: {cause}")
    found.sort(key=itemgetter(1), reverse=True)
    found.sort(key=itemgetter(0))
    return [prior for _, _, priors in found for prior in priors]


def _installed(kind: str, warn: Callable[[str], None]) -> Iterator[tuple[int, Path, str]]:
    """Packs and libraries, each once: place of their folder, path, and a name for people.

    Packs hold CUDA kernels only.
    """
    seen: set[Path] = set()
    for place, folder in enumerate(folders()):
        if not folder.is_dir():
            warn(f"warning: {folder} is no folder; check DOP_PACK_PATH.")
            continue
        shipped = folder == packs.SHIPPED
        paths = list(folder.rglob(f"*{SUFFIX}")) if kind == "cuda" else []
        if not shipped:
            paths += [path.parent for path in folder.rglob(INDEX) if is_library(path)]
        for path in sorted(paths):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield place, path, path.relative_to(folder).as_posix() if shipped else str(path)


def _of(path: Path, origin: str, kind: str, dtype: str) -> tuple[str, list[Prior]]:
    """Date of a pack's or library's newest record in ISO order, and its kernels in the wanted type;
    none if it is of another kind.

    Raises:
        DopError: it is damaged, or carries no traces.
    """
    index, read = _opened(path)
    newest = str(index.provenance.get("newest_record", ""))
    wanted = _wanted(index, dtype) if index.kind == kind else {}
    if not wanted:
        return newest, []
    if TRACES not in index.files:
        raise ExportError(
            "it carries no traces, as those of older versions.",
            "Add them: dop export traces FILE --log LOG.",
        )
    known = parse(read(TRACES), path, dtype)
    found = []
    for key, workload in wanted.items():
        for fit in index.table.workloads[key].fits:
            scenario = _scenario(fit.scenario_key)
            for trace_key, seconds in _fastest(fit):
                if trace_key in known:
                    sketch, trace = known[trace_key].sketch, known[trace_key].trace
                    device = index.table.device_name
                    found.append(Prior(workload, scenario, device, sketch, trace, seconds, origin))
    return newest, found


def _wanted(index: Index, dtype: str) -> dict[str, Workload]:
    """Keys of workloads that count for a type, each in that type: what was tuned rather than what
    was transferred from it."""
    moved = {k.workload.key: k.transferred_from for k in index.kernels.values()}
    found: dict[str, Workload] = {}
    for key in index.table.workloads:
        tuned = Workload.parse(key)
        kin = tuned.dtype in (dtype, TWINS.get(dtype))
        if kin and moved.get(key, "") not in index.table.workloads:
            found[key] = replace(tuned, dtype=dtype)
    return found


def _fastest(fit: Fit) -> list[tuple[str, float]]:
    """Trace keys and seconds of what was fastest in a batch."""
    times = {**fit.others, fit.best_trace_key: fit.best_s}
    if fit.seconds is not None:
        times[fit.trace_key] = fit.seconds
    return nsmallest(EACH, times.items(), key=itemgetter(1))


@lru_cache(maxsize=1024)
def _scenario(key: str) -> Scenario:
    """The scenario of a key: every pack has the same ones."""
    return Scenario.parse(key)


def _opened(path: Path) -> tuple[Index, Callable[[str], bytes]]:
    if is_pack(path):
        pack = PackFile(path)
        return pack.index, pack.read
    index = read_index(path)

    def read(name: str) -> bytes:
        data = (path / name).read_bytes()
        if sha256_hex(data) != index.files[name]:
            raise ExportError(f"{path / name} is not the file that was exported.")
        return data

    return index, read
