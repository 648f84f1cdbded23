"""The cache of binaries built at run time: one file per source, architecture, options and compiler.

The folder is DOP_CACHE_DIR, else XDG_CACHE_HOME/dop, else ~/.cache/dop. Files are written beside
their place and renamed, so a reader sees a whole file or none; a lock (fcntl) lets one process
build while others wait. A damaged file is built again. Where the folder cannot be written, nothing
is kept and every process builds for itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

VARIABLE = "DOP_CACHE_DIR"
_MAGIC = b"dop-cache-1\n"
_DIGEST_BYTES = 32


def folder() -> Path:
    """Where binaries are kept."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dop"


def key_of(*parts: str) -> str:
    """Name of what these texts determine; parts are kept apart."""
    digest = sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def get_or_build(key: str, build: Callable[[], bytes]) -> bytes:
    """The binary of a key, built if it is not in the cache.

    Args:
        key: of `key_of`.
        build: makes the binary; what it raises passes through, and nothing is kept.
    """
    path = folder() / f"{key}.bin"
    found = _read(path)
    if found is not None:
        return found
    with _locked(path.with_suffix(".lock")):
        found = _read(path)  # another process may have built it meanwhile
        if found is None:
            found = build()
            _write(path, found)
        return found


def _read(path: Path) -> bytes | None:
    """Content of a cached file; None if it is not there, cannot be read or is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + _DIGEST_BYTES
    body = data[start:]
    if data[: len(_MAGIC)] != _MAGIC or sha256(body).digest() != data[len(_MAGIC) : start]:
        return None
    return body


def _write(path: Path, body: bytes) -> None:
    """Puts a file in its place at once; a folder that cannot be written is left as it is."""
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:16]}-")
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + sha256(body).digest() + body)
        os.replace(name, path)
    except OSError:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock file of a key; without one where the folder cannot be written. The lock goes
    with the process, so one that was killed blocks nobody."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks: build twice at worst
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
