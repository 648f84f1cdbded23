"""Packs: an exported CUDA library as one compressed file, NAME.doppack. Standard library only.

A pack is a zip file (LZMA inside) that holds what a library's folder holds: `index.json`, the
cubins, the generated CUDA sources, from which other architectures can be served by NVRTC, and the
kernels' traces (`dop.export.traces`), with which a search elsewhere may begin.
Cubins are named by their hash, so equal ones are stored once; sources are one file, of which each
kernel has a span. Opening reads the index only; a file is read, and its hash checked, when it is
first wanted.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dop.errors import ExportError
from dop.export.files import write_file
from dop.export.index import INDEX, Index, parse_index

SUFFIX = ".doppack"
SOURCES = "sources.cu"
"""All kernels' sources, one after the other."""
MAX_FILE_BYTES = 64 << 20
"""No cubin, source or index is larger; a damaged or hostile file cannot fill the memory."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Date of every member: the same log gives the same bytes."""

_BROKEN = (zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, NotImplementedError, KeyError)
"""What zipfile raises for a damaged file, besides OSError, ValueError and RuntimeError."""


def hashed_name(data: bytes, suffix: str) -> str:
    """Name of a file in a pack: equal contents have equal names."""
    return f"{hashlib.sha256(data).hexdigest()[:16]}.{suffix}"


def write_pack(path: Path, index: Mapping[str, Any], files: Mapping[str, bytes]) -> int:
    """Writes a pack, whole or not at all; the same input gives the same bytes.

    Args:
        path: the file.
        index: as `dop.export.index` reads it; its "files" are filled in here.
        files: contents by name.

    Returns:
        Size in bytes.

    Raises:
        ExportError: the file cannot be written.
    """
    digests = {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}
    text = json.dumps({**index, "files": digests}, separators=(",", ":"), allow_nan=False)
    room = io.BytesIO()
    with zipfile.ZipFile(room, "w", zipfile.ZIP_LZMA) as archive:
        for name, data in [(INDEX, text.encode()), *((n, files[n]) for n in digests)]:
            member = zipfile.ZipInfo(name, _EPOCH)
            member.compress_type = zipfile.ZIP_LZMA
            member.external_attr = 0o644 << 16
            archive.writestr(member, data)
    write_file(path, room.getvalue())
    return len(room.getvalue())


def add_file(path: Path, name: str, data: bytes) -> int:
    """Adds a file to a pack, or replaces it; everything else stays. Returns the size in bytes.

    Raises:
        ExportError: the pack is damaged, or cannot be written.
    """
    pack = PackFile(path)
    index = json.loads(pack._member(INDEX))
    return write_pack(path, index, {**{n: pack.read(n) for n in pack.index.files}, name: data})


def is_pack(path: Path) -> bool:
    """Whether a path looks like a pack rather than a library's folder."""
    return path.suffix == SUFFIX or path.is_file()


class PackFile:
    """A pack on disk.

    Attributes:
        path: where it lies.
        index: what is in it.
    """

    def __init__(self, path: Path) -> None:
        """Reads the index.

        Raises:
            ExportError: there is no such file, or it is damaged or of another version.
        """
        self.path = path
        try:
            data = json.loads(self._member(INDEX))
        except ValueError as error:
            raise _damaged(path, "its index is not JSON") from error
        self.index: Index = parse_index(data, path)

    def read(self, name: str) -> bytes:
        """A file's content, checked against the hash that the index gives.

        Raises:
            ExportError: it is not there, or not what was packed.
        """
        data = self._member(name)
        if hashlib.sha256(data).hexdigest() != self.index.files.get(name):
            raise _damaged(self.path, f"{name} is not the file that was packed")
        return data

    def _member(self, name: str) -> bytes:
        # Opened anew each time: a file that is held open would share its position with forks.
        try:
            with zipfile.ZipFile(self.path) as archive:
                member = archive.getinfo(name)
                if member.file_size > MAX_FILE_BYTES:
                    raise _damaged(self.path, f"{name} claims {member.file_size} bytes")
                with archive.open(member) as file:
                    return file.read(MAX_FILE_BYTES)
        except FileNotFoundError as error:
            raise ExportError(f"{self.path} does not exist.", "Check the path.") from error
        except OSError as error:
            raise ExportError(
                f"{self.path} cannot be read: {error.strerror or error}.", "Check the path."
            ) from error
        except (*_BROKEN, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise _damaged(self.path, reason[:200]) from error


def _damaged(path: str | os.PathLike[str], why: str) -> ExportError:
    return ExportError(f"{path} is damaged: {why}.", "Get the file again, or export it again.")
