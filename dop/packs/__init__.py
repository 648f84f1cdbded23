"""Tuned kernels that serve: packs in the folders of DOP_PACK_PATH, then those shipped with Dop.

    for match in find("NVIDIA H100 80GB HBM3", "sm_90", workload_key):    # best first
        library = match.library()
        info = library.choose(workload_key, tokens, adapters)             # KernelInfo
        cubin = library.binary(info)         # if match.how is not Match.SOURCE, else
        text = library.source(info)          # CUDA C++ for NVRTC, if info.min_arch allows

A lookup reads the catalog of shipped packs (once) and opens no pack; neither torch nor a GPU is
needed. Standard library only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

from dop.export.index import arch_number, runs_on
from dop.export.load import CudaLibrary, load_cuda
from dop.packs.catalog import PackEntry, read_catalog, scan
from dop.workload import BESIDE

__all__ = ["PATH_VARIABLE", "Match", "find", "folders", "known_packs", "refresh", "shipped"]

PATH_VARIABLE = "DOP_PACK_PATH"
"""Folders separated as in PATH; what lies there comes before what is shipped."""

SHIPPED = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Match:
    """A pack that can serve a workload on a device.

    Attributes:
        entry: the pack.
        how: DEVICE, ARCH or SOURCE.
        note: what a person should know; "" for a pack tuned in this type on this device.
    """

    DEVICE: ClassVar[str] = "device"
    """Tuned on this very device."""
    ARCH: ClassVar[str] = "arch"
    """Tuned on another device; its binaries run here."""
    SOURCE: ClassVar[str] = "source"
    """Its binaries do not run here; its CUDA sources may build, see `KernelInfo.min_arch`."""

    entry: PackEntry
    how: str
    note: str

    def library(self) -> CudaLibrary:
        """The pack, opened once per process.

        Raises:
            ExportError: it is damaged or gone.
        """
        return _open(self.entry.path)


def find(device_name: str, arch: str, workload_key: str) -> tuple[Match, ...]:
    """The packs that serve a workload on a device, best first.

    Binaries come before sources; then the folders of DOP_PACK_PATH, in their order, before what
    is shipped; then packs of this device before those of others; then the newer before the older.

    Args:
        device_name: as the driver reports it, e.g. "NVIDIA H200".
        arch: "sm_90" or the like, of the device.
        workload_key: `Workload.key`.

    Raises:
        ExportError: `arch` is no architecture; a folder of DOP_PACK_PATH is missing; a catalog
            or a pack is damaged.
    """
    arch_number(arch)
    found: list[tuple[tuple[int, int, int], Match]] = []
    for place, folder in enumerate(_groups()):
        for entry in folder:
            match = _match(entry, device_name, arch, workload_key)
            if match is not None:
                rank = (match.how == Match.SOURCE, place, match.how != Match.DEVICE)
                found.append(((int(rank[0]), rank[1], int(rank[2])), match))
    found.sort(key=lambda item: item[1].entry.newest, reverse=True)
    found.sort(key=lambda item: item[0])
    return tuple(match for _, match in found)


def find_call(device_name: str, arch: str, workload_key: str) -> tuple[tuple[str, Match], ...]:
    """As `find`, with the key that each pack's table has the call under: for a call in two pieces,
    packs that were tuned so come before those that hold the call alone."""
    keys = dict.fromkeys((workload_key, workload_key.removesuffix(BESIDE)))
    return tuple((key, match) for key in keys for match in find(device_name, arch, key))


def _match(entry: PackEntry, device_name: str, arch: str, workload_key: str) -> Match | None:
    if workload_key not in entry.workloads:
        return None
    note = []
    if runs_on(entry.arch, arch):
        how = Match.DEVICE if entry.device_name == device_name else Match.ARCH
        if how == Match.ARCH:
            note.append(
                f"tuned on {entry.device_name}, not on {device_name}: right, and its binaries run "
                f"({entry.arch}), but another kernel may be faster here"
            )
    elif entry.sources:
        how = Match.SOURCE
        note.append(
            f"tuned on {entry.device_name}; its binaries ({entry.arch}) do not run on {arch}, its "
            "CUDA sources are built by NVRTC"
        )
    else:
        return None
    if workload_key in entry.transferred:
        note.append("tuned in the other 16-bit type, built in this one")
    return Match(entry, how, "; ".join(note))


def folders() -> tuple[Path, ...]:
    """Where packs are looked for, first to last."""
    named = [Path(part) for part in _path().split(os.pathsep) if part]
    return (*named, SHIPPED)


def known_packs() -> tuple[PackEntry, ...]:
    """Every pack that a lookup considers, in the order of `folders`; raises as `find`."""
    return tuple(entry for group in _groups() for entry in group)


def shipped() -> tuple[PackEntry, ...]:
    """The packs that came with Dop.

    Raises:
        ExportError: their catalog is damaged.
    """
    return tuple(replace(entry, shipped=True) for entry in read_catalog(SHIPPED))


def refresh() -> None:
    """Forgets what was looked up, e.g. after a pack was added to a folder."""
    _scan_all.cache_clear()
    _open.cache_clear()


def _path() -> str:
    return os.environ.get(PATH_VARIABLE, "")


def _groups() -> tuple[tuple[PackEntry, ...], ...]:
    return _scan_all(_path())


@cache
def _scan_all(path: str) -> tuple[tuple[PackEntry, ...], ...]:
    """Entries by folder; read once per value of DOP_PACK_PATH."""
    named = [scan(Path(part)) for part in path.split(os.pathsep) if part]
    return (*named, shipped())


@cache
def _open(path: Path) -> CudaLibrary:
    return load_cuda(path)
