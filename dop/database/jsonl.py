"""The tuning log as a file: appended to by one writer, read by anybody, never executed.

One record is one line, and one append is one write of whole lines, so a writer that is killed
leaves at worst a last line without an end. docs/log.md says what happens to such a line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import gzip
import lzma
import os
import stat
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from dop.database import wire
from dop.database.record import Record
from dop.database.wire import Entry, NewerSchemaError
from dop.errors import LogError

MAX_LINE_BYTES = 4 << 20
"""Longest line that is read: a trace of 512 steps takes about 20 kB."""
MAX_NAMED = 10_000
"""Corrupt lines named one by one; beyond it they are only counted."""
SYNC_EVERY = 16
"""Records between two fsyncs: what a power cut may cost. A killed process costs nothing."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is not used, and why."""

    line: int
    cause: str


@dataclass(slots=True)
class LogContents:
    """What a log holds.

    Attributes:
        path: the file.
        entries: the records in file order.
        corrupt: the lines that are not records, at most MAX_NAMED.
        corrupt_count: how many there are.
        newer: lines of a newer schema with their bytes, kept by merge and prune.
        torn: the last line, if a writer was stopped within it.
        size: bytes that were read.
        lines: lines in the file, blank and torn ones included.
        complete_bytes: where the last whole line ends, in bytes from the start.
        open_end: whether the last record lacks its line end.
    """

    path: Path
    entries: list[Entry] = field(default_factory=list)
    corrupt: list[BadLine] = field(default_factory=list)
    corrupt_count: int = 0
    newer: list[tuple[int, bytes]] = field(default_factory=list)
    torn: BadLine | None = None
    size: int = 0
    lines: int = 0
    complete_bytes: int = 0
    open_end: bool = False

    def warnings(self) -> list[str]:
        """What a person should know before using the log, one line each."""
        found = []
        if self.torn:
            found.append(
                f"{self.path}: line {self.torn.line} was cut off and is dropped; "
                "a writer was stopped there."
            )
        if self.corrupt_count:
            named = ", ".join(str(bad.line) for bad in self.corrupt[:5])
            more = ", ..." if self.corrupt_count > 5 else ""
            noun = "line is" if self.corrupt_count == 1 else "lines are"
            found.append(
                f"{self.path}: {self.corrupt_count} {noun} corrupt and not used: {named}{more} "
                f"(line {self.corrupt[0].line}: {self.corrupt[0].cause})."
            )
        if self.newer:
            noun = "line was" if len(self.newer) == 1 else "lines were"
            found.append(
                f"{self.path}: {len(self.newer)} {noun} written by a newer version of Dop and "
                "not used; upgrade Dop to use them."
            )
        return found

    def require_entries(self) -> LogContents:
        """These contents, if there is a record in them.

        Raises:
            LogError: there is none; the cause says what the file holds instead.
        """
        if self.entries:
            return self
        if self.newer:
            raise LogError(self.warnings()[-1])
        if self.corrupt_count or self.torn:
            bad = self.corrupt[0] if self.corrupt else self.torn
            assert bad is not None
            raise LogError(
                f"{self.path} holds no record; line {bad.line}: {bad.cause}.",
                "Check that it is a tuning log.",
            )
        raise LogError(f"{self.path} is empty.", "Run dop tune to fill it.")


def read_log(path: str | os.PathLike[str]) -> LogContents:
    """The contents of a log; lines that cannot be used are counted and named in it.

    A name that ends in .gz or .xz is unpacked: long logs that are only kept shrink to a tenth
    (gzip) or a twentieth.

    Raises:
        LogError: the file cannot be read at all.
    """
    where = Path(path)
    try:
        mode = where.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise LogError(f"{where} is not a file.", "Give the path of a tuning log.")
        if where.suffix == ".gz":
            with gzip.open(where, "rb") as unzipped:
                return _read(where, unzipped)  # type: ignore[arg-type]
        if where.suffix == ".xz":
            with lzma.open(where, "rb") as unpacked:
                return _read(where, unpacked)  # type: ignore[arg-type]
        with where.open("rb") as file:
            return _read(where, file)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise _os_error(where, "read", error) from error


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keeps the cycle collector off while a log is read: it would cost a third of the time.

    Reading makes many objects and no cycles.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@without_collector()
def _read(path: Path, file: BinaryIO) -> LogContents:
    contents = LogContents(path)
    shared = wire.Shared()
    for number, (line, size, ended) in enumerate(_lines(file), start=1):
        contents.lines = number
        contents.size += size
        if line is not None and number == 1:
            line = line.removeprefix(_BOM)
        used = _read_line(contents, line, number, ended, shared)
        if ended or used:
            contents.complete_bytes += size
            contents.open_end = not ended
    return contents


def _lines(file: BinaryIO) -> Iterator[tuple[bytes | None, int, bool]]:
    """Every line, its size in the file and whether it has its end; None is a line too long."""
    while line := file.readline(MAX_LINE_BYTES):
        size, ended = len(line), line.endswith(b"\n")
        if ended or size < MAX_LINE_BYTES:
            yield line, size, ended
            continue
        while not ended and (rest := file.readline(MAX_LINE_BYTES)):
            size += len(rest)
            ended = rest.endswith(b"\n")
        yield None, size, ended


def _read_line(
    contents: LogContents,
    line: bytes | None,
    number: int,
    ended: bool,
    shared: wire.Shared,
) -> bool:
    """Files one line where it belongs; false if it is a torn one."""
    if line is None:
        _count_corrupt(contents, BadLine(number, f"longer than {MAX_LINE_BYTES} bytes"))
        return True
    if not line.strip():
        return True
    try:
        contents.entries.append(wire.parse_entry(line, number, shared))
    except NewerSchemaError:
        contents.newer.append((number, line.strip()))
    except LogError as error:
        if not ended:
            contents.torn = BadLine(number, error.cause)
            return False
        _count_corrupt(contents, BadLine(number, error.cause))
    return True


def _count_corrupt(contents: LogContents, bad: BadLine) -> None:
    contents.corrupt_count += 1
    if len(contents.corrupt) < MAX_NAMED:
        contents.corrupt.append(bad)


class Log:
    """A log opened for appending; use it as a context manager.

    The file stays locked while it is open, so that two tuning runs cannot mix their lines.
    """

    def __init__(self, path: Path, descriptor: int, contents: LogContents, sync_every: int) -> None:
        self.path = path
        self.contents = contents
        self._descriptor = descriptor
        self._sync_every = sync_every
        self._unsynced = 0
        self._shared = wire.Shared()
        _OPEN.add(self)

    @staticmethod
    def open(path: str | os.PathLike[str], *, sync_every: int = SYNC_EVERY) -> Log:
        """The log at `path` with what it holds; a new one if there is none.

        Raises:
            LogError: it cannot be written, another process writes it, or it is no tuning log.
        """
        where = Path(path)
        descriptor = -1
        try:
            where.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open_locked(where)
            with os.fdopen(os.dup(descriptor), "rb") as file:
                contents = _read(where, file)
            _require_log(contents)
            return Log(where, descriptor, contents, sync_every)
        except (OSError, ValueError) as error:
            _close_quietly(descriptor)
            raise _os_error(where, "opened for writing", error) from error
        except LogError:
            _close_quietly(descriptor)
            raise

    @property
    def entries(self) -> list[Entry]:
        """The records in the file, those appended since included."""
        return self.contents.entries

    def append(self, *records: Record) -> None:
        """Writes the records as whole lines: all of them, or none and the file as it was.

        Raises:
            LogError: a record cannot be written, or the file cannot grow.
        """
        if self._descriptor < 0:
            raise LogError(f"{self.path} is closed.", "Open it again.")
        lines = [wire.dump(record) for record in records]
        if not lines:
            return
        try:
            self._end_last_line()
            self._write(b"".join(line + b"\n" for line in lines))
            self._unsynced += len(lines)
            for line in lines:
                self.contents.lines += 1
                entry = wire.parse_entry(line, self.contents.lines, self._shared)
                self.contents.entries.append(entry)
            if self._unsynced >= self._sync_every:
                self.sync()
        except OSError as error:
            raise _os_error(self.path, "written", error) from error

    def sync(self) -> None:
        """Makes the system put everything appended so far on the disk.

        Raises:
            LogError: the disk refused.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise _os_error(self.path, "written", error) from error
        self._unsynced = 0

    def close(self) -> None:
        """Syncs and unlocks; may be called twice.

        Raises:
            LogError: the disk refused the sync; the file is closed all the same.
        """
        if self._descriptor < 0:
            return
        try:
            if self._unsynced:
                self.sync()
        finally:
            descriptor, self._descriptor = self._descriptor, -1
            _close_quietly(descriptor)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        start = os.fstat(self._descriptor).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except BaseException:
            # Also on Ctrl-C: a part of a line must not stay. A write that did finish is kept.
            if os.fstat(self._descriptor).st_size < start + len(data):
                os.ftruncate(self._descriptor, start)
            raise
        self.contents.complete_bytes = start + len(data)

    def _end_last_line(self) -> None:
        """Puts the file's end at the start of a line before anything is appended."""
        if self.contents.torn:
            self._set_torn_aside()
        elif self.contents.open_end:
            self._write(b"\n")
            self.contents.open_end = False

    def _set_torn_aside(self) -> None:
        """Moves the torn last line to FILE.torn; its bytes are copied before they are cut off."""
        keep = self.contents.complete_bytes
        size = os.fstat(self._descriptor).st_size
        tail = os.pread(self._descriptor, size - keep, keep)
        aside = self.path.with_name(self.path.name + ".torn")
        with aside.open("ab") as file:
            file.write(tail + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.ftruncate(self._descriptor, keep)
        self.contents.torn = None
        self.contents.lines -= 1


_OPEN: weakref.WeakSet[Log] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A forked worker would keep the lock of a killed parent alive, and the log unusable.
    for log in list(_OPEN):
        descriptor, log._descriptor = log._descriptor, -1
        _close_quietly(descriptor)


os.register_at_fork(after_in_child=_forget_in_child)


def _open_locked(path: Path) -> int:
    """Descriptor of the file, locked; opened anew if it was replaced while waiting for the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise LogError(f"{path} is not a file.", "Give the path of a tuning log.")
            _lock(path, descriptor)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            _close_quietly(descriptor)
            raise
        _close_quietly(descriptor)


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LogError(
            f"{path} is being written by another run.", "Wait for it, or use another log file."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise  # a file system without locks is used without them


def _require_log(contents: LogContents) -> None:
    """Refuses to append to a file that was never a log, whatever its owner meant by naming it."""
    if contents.entries or contents.newer:
        return
    torn_record = contents.torn is not None and contents.lines == 1 and _starts_record(contents)
    if contents.corrupt_count or (contents.torn and not torn_record):
        raise LogError(
            f"{contents.path} is not a tuning log, nothing was written to it.",
            "Give another file, or move this one away.",
        )


def _starts_record(contents: LogContents) -> bool:
    with contents.path.open("rb") as file:
        start = file.read(6).removeprefix(_BOM)
    return b'{"i":['.startswith(start)


def write_log(
    path: str | os.PathLike[str],
    lines: Iterable[bytes],
    *,
    force: bool = False,
    inputs: Iterable[LogContents] = (),
) -> int:
    """Writes a whole log at once: complete under its name, or not there at all.

    Args:
        path: the file to make.
        lines: records without line ends.
        force: replace a file that is there.
        inputs: logs that the lines come from; one that has grown since is not replaced.

    Returns:
        Number of lines.

    Raises:
        LogError: the file is there and `force` is not given, it is in use, or it cannot be written.
    """
    where = Path(os.path.realpath(path))
    temporary = None
    try:
        if where.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        if where.exists() and not force:
            raise _exists(where)
        with contextlib.ExitStack() as stack:
            if where.exists():
                descriptor = _open_locked(where)
                stack.callback(_close_quietly, descriptor)
                _require_unchanged(where, descriptor, inputs)
            descriptor, temporary = tempfile.mkstemp(dir=where.parent, prefix=f".{where.name}.")
            with os.fdopen(descriptor, "wb") as file:
                count = _write_lines(file, lines)
                os.fchmod(file.fileno(), _mode(where))
            _rename(temporary, where, force)
            temporary = None
        return count
    except (OSError, ValueError) as error:
        raise _os_error(where, "written", error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _require_unchanged(path: Path, descriptor: int, inputs: Iterable[LogContents]) -> None:
    for contents in inputs:
        same = Path(os.path.realpath(contents.path)) == path
        if same and os.fstat(descriptor).st_size != contents.size:
            raise LogError(f"{path} was written to in the meantime.", "Run the command again.")


def _write_lines(file: BinaryIO, lines: Iterable[bytes]) -> int:
    count = 0
    for line in lines:
        file.write(line + b"\n")
        count += 1
    file.flush()
    os.fsync(file.fileno())
    return count


def _mode(path: Path) -> int:
    with contextlib.suppress(OSError):
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _rename(temporary: str, path: Path, force: bool) -> None:
    if force:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # unlike a rename it refuses to replace
    except FileExistsError as error:
        raise _exists(path) from error
    os.unlink(temporary)


def _exists(path: Path) -> LogError:
    return LogError(f"{path} exists already.", "Give another name, or --force to replace it.")


def _close_quietly(descriptor: int) -> None:
    if descriptor >= 0:
        with contextlib.suppress(OSError):
            os.close(descriptor)


_ADVICE = {
    errno.ENOSPC: "Free some space and run the same command again; what was written is intact.",
    errno.EDQUOT: "Free some of your quota and run the same command again; the rest is intact.",
    errno.EFBIG: "Raise the file size limit (ulimit -f), or use another log; the rest is intact.",
    errno.EACCES: "Check its permissions, or give another path.",
    errno.EPERM: "Check its permissions, or give another path.",
    errno.EROFS: "Give a path on a file system that can be written.",
    errno.ENOENT: "Check the path.",
    errno.EISDIR: "Give the path of a file.",
}


def _os_error(path: Path, verb: str, error: Exception) -> LogError:
    number = error.errno if isinstance(error, OSError) else None
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    advice = _ADVICE.get(number or 0, "Check the path and the disk, then try again.")
    return LogError(f"{path} cannot be {verb}: {reason}.", advice)
