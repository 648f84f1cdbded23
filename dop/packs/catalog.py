"""What packs there are: one line per pack, so that a lookup opens none. Standard library only.

The folder of shipped packs has such a catalog in a file (`catalog.json`, made by `dop export
catalog`); for the folders of DOP_PACK_PATH it is made by reading every pack's index once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dop.errors import ExportError
from dop.export.files import write_file
from dop.export.index import DAMAGED, INDEX, Index, arch_number
from dop.export.index import FORMAT as LIBRARY
from dop.export.load import read_index

CATALOG = "catalog.json"
FORMAT = "dop-pack-catalog"
VERSION = 1
SUFFIX = ".doppack"


@dataclass(frozen=True, slots=True)
class PackEntry:
    """A pack (or an exported CUDA library) as the catalog knows it.

    Attributes:
        path: file or folder.
        device_name: where its times were taken.
        arch: architecture of its binaries, e.g. "sm_90a".
        newest: date of its newest record, ISO order.
        workloads: keys that it serves.
        transferred: those of them that were tuned in another dtype.
        sources: whether it carries CUDA sources, of some kernels at least.
        size_bytes: of the file; 0 for a folder.
        shipped: whether it came with Dop.
    """

    path: Path
    device_name: str
    arch: str
    newest: str
    workloads: frozenset[str]
    transferred: frozenset[str]
    sources: bool
    size_bytes: int
    shipped: bool = False


def read_catalog(folder: Path) -> tuple[PackEntry, ...]:
    """The entries of a folder's catalog file; none if there is no such file.

    Raises:
        ExportError: the file is damaged.
    """
    path = folder / CATALOG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    try:
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ValueError(f"format {data['format']!r} {data['version']}")
        return tuple(_entry(folder, item) for item in data["packs"])
    except DAMAGED as error:
        raise _damaged(path, error) from error


def scan(folder: Path) -> tuple[PackEntry, ...]:
    """The entries of a folder and the folders in it, by opening every pack.

    Raises:
        ExportError: the folder does not exist, or a pack in it is damaged.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder} is no folder.", "Check DOP_PACK_PATH.")
    libraries = [path.parent for path in folder.rglob(INDEX) if is_library(path)]
    found = sorted([*folder.rglob(f"*{SUFFIX}"), *libraries])
    entries = (entry_of(path, read_index(path)) for path in found)
    return tuple(entry for entry in entries if entry is not None)


def is_library(path: Path) -> bool:
    """Whether an index.json is a library's: other programs have files of that name."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("format") == LIBRARY


def entry_of(path: Path, index: Index) -> PackEntry | None:
    """The line of a pack; None for a library of CPU kernels."""
    arch = index.table.target_key.partition("-arch=")[2]
    if index.kind != "cuda":
        return None
    arch_number(arch)
    kernels = index.kernels.values()
    return PackEntry(
        path,
        index.table.device_name,
        arch,
        str(index.provenance.get("newest_record", "")),
        frozenset(index.table.workloads),
        frozenset(k.workload.key for k in kernels if k.transferred_from),
        any(kernel.source for kernel in kernels),
        path.stat().st_size if path.is_file() else 0,
    )


def write_catalog(folder: Path) -> tuple[PackEntry, ...]:
    """Writes the catalog of all packs in a folder and the folders in it; returns its entries.

    Raises:
        ExportError: a pack is damaged, or the file cannot be written.
    """
    entries = scan(folder)
    data = {
        "format": FORMAT,
        "version": VERSION,
        "packs": [_to_json(folder, entry) for entry in entries],
    }
    write_file(folder / CATALOG, (json.dumps(data, indent=1) + "\n").encode())
    return entries


def _to_json(folder: Path, entry: PackEntry) -> dict[str, object]:
    return {
        "file": entry.path.relative_to(folder).as_posix(),
        "device": entry.device_name,
        "arch": entry.arch,
        "newest_record": entry.newest,
        "bytes": entry.size_bytes,
        "sources": entry.sources,
        "workloads": sorted(entry.workloads),
        "transferred": sorted(entry.transferred),
    }


def _entry(folder: Path, item: Mapping[str, Any]) -> PackEntry:
    parts = str(item["file"]).split("/")
    if ".." in parts or os.path.isabs(item["file"]):
        raise ValueError(f"{item['file']!r} leads out of the folder")
    return PackEntry(
        folder.joinpath(*parts),
        str(item["device"]),
        str(item["arch"]),
        str(item["newest_record"]),
        frozenset(_texts(item["workloads"])),
        frozenset(_texts(item["transferred"])),
        bool(item["sources"]),
        int(item["bytes"]),
    )


def _texts(items: Iterable[object]) -> list[str]:
    return [str(item) for item in items]


def _damaged(path: Path, error: Exception) -> ExportError:
    return ExportError(
        f"{path} is damaged ({type(error).__name__}: {error}).", "Reinstall Dop, or rebuild it."
    )
