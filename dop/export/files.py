"""Writing exports: whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dop.errors import ExportError


def sha256_hex(data: bytes) -> str:
    """Hash by which an export names or checks a file."""
    return hashlib.sha256(data).hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file's content in one step; after a failure the old content is still there.

    Raises:
        ExportError: the file cannot be written.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise _refused(path, error) from error
        raise


def write_folder(path: Path, files: Mapping[str, bytes], *, marker: str) -> None:
    """Puts a folder with exactly these files in place of `path` in one step.

    Args:
        path: the folder; it may be absent, empty, or an earlier export.
        files: content by name.
        marker: name of the file by which an earlier export is recognised.

    Raises:
        ExportError: the folder holds something else, or cannot be written.
    """
    temporary = ""
    try:
        if (
            path.exists()
            and (not path.is_dir() or any(path.iterdir()))
            and not (path / marker).is_file()
        ):
            raise ExportError(
                f"{path} holds something that is not an export.", "Give a new or empty folder."
            )
        parent = path.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=parent, prefix=f".{path.name}.")
        os.chmod(temporary, 0o777 & ~_umask())
        for name, data in files.items():
            write_file(Path(temporary) / name, data)
        _swap(Path(temporary), path)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Renames `new` to `path`; an old folder steps aside first and comes back if that fails."""
    if not path.exists():
        os.rename(new, path)
        return
    aside = Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=f".{path.name}.old."))
    try:
        os.rename(path, aside / "old")
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(aside / "old", path)
            raise
    except BaseException:
        with contextlib.suppress(OSError):
            aside.rmdir()  # if the old folder could not come back, it stays in there
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _refused(path: Path, error: OSError) -> ExportError:
    reason = error.strerror or str(error)
    return ExportError(
        f"{path} cannot be written: {reason}.", "Check the path, its permissions and free space."
    )
