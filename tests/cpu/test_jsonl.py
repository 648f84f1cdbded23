from __future__ import annotations

import errno
import gc
import gzip
import lzma
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_samples import json_values, record

from dop.database import jsonl, wire
from dop.database.jsonl import Log, read_log, write_log
from dop.errors import LogError

LINE = wire.dump(record())
HERE = Path(__file__).parent


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def write(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


def test_append_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "tuning.jsonl"
    made = [record(us=n + 1, timestamp=n) for n in range(5)]
    with Log.open(path) as log:
        log.append(made[0])
        log.append(*made[1:3])
        assert [e.record() for e in log.entries] == made[:3]
    with Log.open(path) as log:
        log.append(*made[3:])
        assert [e.line for e in log.entries] == [1, 2, 3, 4, 5]
    contents = read_log(path)
    assert [e.record() for e in contents.entries] == made
    assert contents.warnings() == []
    assert path.read_bytes().endswith(b"}\n")


def test_a_torn_last_line_is_dropped_and_set_aside_at_the_next_append(tmp_path: Path) -> None:
    for cut in range(1, len(LINE), 97):
        path = write(tmp_path / "log.jsonl", LINE, b"\n", LINE[:cut])
        contents = read_log(path)
        assert len(contents.entries) == 1
        assert "line 2 was cut off" in contents.warnings()[0]
        assert contents.corrupt_count == 0
        with Log.open(path) as log:
            assert path.stat().st_size == len(LINE) + 1 + cut  # opening alone changes nothing
            log.append(record(us=3))
            assert log.entries[-1].line == 2
        assert len(read_log(path).entries) == 2
        assert read_log(path).warnings() == []
        aside = tmp_path / "log.jsonl.torn"
        assert aside.read_bytes() == LINE[:cut] + b"\n"
        aside.unlink()


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", LINE, b"\n", LINE)
    with Log.open(path) as log:
        assert len(log.entries) == 2
        log.append(record(us=3))
    assert len(read_log(path).entries) == 3
    assert read_log(path).warnings() == []


def test_corrupt_lines_are_named_and_the_rest_is_used(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.jsonl",
        b"\xef\xbb\xbf" + LINE + b"\r\n",  # BOM and CRLF are no damage
        b"\x00\x00\x00\n",
        b"\n   \n",
        LINE.replace(b"uniform", b"\xff\xfe") + b"\n",
        LINE[:100] + b"\n",
        LINE + b"\n",
        b"[" * 5000 + b"\n",
    )
    contents = read_log(path)
    assert [e.line for e in contents.entries] == [1, 7]
    assert [bad.line for bad in contents.corrupt] == [2, 5, 6, 8]
    assert "4 lines are corrupt" in contents.warnings()[0]
    with Log.open(path) as log:
        log.append(record())
        assert log.entries[-1].line == 9
    assert len(read_log(path).entries) == 3


def test_newer_lines_are_counted_apart(tmp_path: Path) -> None:
    newer = LINE.replace(b'"schema":1', b'"schema":2')
    contents = read_log(write(tmp_path / "log.jsonl", LINE, b"\n", newer, b"\n"))
    assert (len(contents.entries), len(contents.newer), contents.corrupt_count) == (1, 1, 0)
    assert "newer version" in contents.warnings()[0]


def test_lines_too_long_are_skipped_and_nothing_is_glued_to_them(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", LINE, b"\n", b"x" * (10 << 20), b"\n", LINE, b"\n")
    contents = read_log(path)
    assert [e.line for e in contents.entries] == [1, 3]
    assert contents.corrupt[0].line == 2
    write(path, LINE, b"\n", b"x" * (10 << 20))
    with Log.open(path) as log:
        log.append(record())
    assert [e.line for e in read_log(path).entries] == [1, 3]


def test_what_is_no_log_is_refused_and_left_alone(tmp_path: Path) -> None:
    for content in (b"# Title\n\ntext\n", b"\x7fELF\x02\x01", b'{"a": 1}\n', b"\n\nx\n"):
        path = write(tmp_path / "other", content)
        with pytest.raises(LogError, match="not a tuning log"):
            Log.open(path)
        assert path.read_bytes() == content
        with pytest.raises(LogError, match="no record"):
            read_log(path).require_entries()


def test_an_empty_file_and_a_first_line_cut_off_are_logs(tmp_path: Path) -> None:
    for content in (b"", b"\n", LINE[:1], LINE[:50]):
        path = write(tmp_path / "log.jsonl", content)
        with Log.open(path) as log:
            log.append(record())
        assert len(read_log(path).entries) == 1
        assert read_log(path).warnings() == []


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, cause in (
        (tmp_path / "missing", "No such file"),
        (tmp_path, "directory"),
        (Path("/dev/null"), "not a file"),
        (Path("a\0b"), "null"),
    ):
        with pytest.raises(LogError, match=cause):
            read_log(path)
        if path.name != "missing":
            with pytest.raises(LogError):
                Log.open(path)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "log.jsonl", LINE + b"\n")
    real = os.open

    def refuse(name: object, flags: int, *rest: object, **more: object) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(name, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(LogError, match=r"Permission denied.*Check its permissions"):
        Log.open(path)


def test_two_writers(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Log.open(path):
        with pytest.raises(LogError, match="another run"):
            Log.open(path)
        read_log(path)
    Log.open(path).close()


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    script = (
        "import os, sys, time\n"
        "from dop.database.jsonl import Log\n"
        "log = Log.open(sys.argv[1])\n"
        "if os.fork() == 0: time.sleep(30)\n"
        "print('ready', flush=True); time.sleep(30)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, process_group=0
    ) as parent:
        assert parent.stdout is not None
        try:
            assert parent.stdout.readline() == b"ready\n"
            with pytest.raises(LogError):
                Log.open(path)
            os.kill(parent.pid, signal.SIGKILL)
            deadline = time.monotonic() + 5
            while True:
                try:
                    Log.open(path).close()
                    break
                except LogError:
                    assert time.monotonic() < deadline, "the worker holds the lock"
                    time.sleep(0.02)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from log_samples import record
from dop.database.jsonl import Log
log = Log.open(sys.argv[1])
for n in range(len(log.entries), 10**9):
    log.append(record(timestamp=n))
    sys.stdout.write(f"{n}\\n"); sys.stdout.flush()
"""


def test_kill_9_loses_no_finished_record(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    finished = -1
    for delay in (0.02, 0.11, 0.05):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(HERE)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            said = writer.stdout.readline()
            time.sleep(delay)
            writer.kill()
            said += writer.stdout.read()
        finished = max(finished, int(said[: said.rindex(b"\n")].split(b"\n")[-1]))
        contents = read_log(path)
        stamps = [entry.record().timestamp for entry in contents.entries]
        assert stamps == list(range(len(stamps)))
        assert len(stamps) >= finished + 1
        assert contents.corrupt_count == 0
    assert finished > 20


def test_a_full_disk_leaves_a_valid_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    with Log.open(path) as log:
        log.append(record(timestamp=1))
        before = path.read_bytes()
        real = os.write
        room = [len(LINE) + 40]

        def full(descriptor: int, data: bytes) -> int:
            if room[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            done = real(descriptor, bytes(data)[: room[0]])
            room[0] -= done
            return done

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(LogError, match=r"No space left on device.*Free some space"):
            log.append(record(timestamp=2), record(timestamp=3))
        assert path.read_bytes() == before
        assert len(log.entries) == 1
        monkeypatch.undo()
        log.append(record(timestamp=4))
    assert [e.timestamp for e in read_log(path).entries] == [1, 4]


def test_a_file_size_limit_of_the_system_leaves_a_valid_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = 0
    with Log.open(path) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * len(LINE), hard))
        try:
            while written < 8:
                log.append(record(timestamp=written))
                written += 1
            with pytest.raises(LogError, match="File too large"):
                log.append(*[record(timestamp=n) for n in range(8, 30)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    contents = read_log(path)
    assert len(contents.entries) == 8
    assert contents.warnings() == []


def test_ctrl_c_within_a_write_keeps_the_file_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.jsonl"
    real = os.write
    for part, kept in ((50, 0), (10**9, 1)):  # interrupted in the middle; just after the end
        with Log.open(path) as log:

            def interrupted(descriptor: int, data: bytes, part: int = part) -> int:
                real(descriptor, bytes(data)[:part])
                raise KeyboardInterrupt

            monkeypatch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                log.append(record())
            monkeypatch.undo()
        assert len(read_log(path).entries) == kept
        assert read_log(path).warnings() == []


def test_a_closed_log_says_so(tmp_path: Path) -> None:
    log = Log.open(tmp_path / "log.jsonl")
    log.close()
    log.close()
    with pytest.raises(LogError, match="closed"):
        log.append(record())


def test_a_failed_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log.open(tmp_path / "log.jsonl", sync_every=2)

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    log.append(record())
    with pytest.raises(LogError, match="Input/output error"):
        log.append(record())
    with pytest.raises(LogError):
        log.close()
    monkeypatch.undo()
    Log.open(tmp_path / "log.jsonl").close()  # the lock is gone all the same


def test_write_log_replaces_nothing_unasked_and_leaves_no_scraps(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert write_log(path, [LINE, LINE]) == 2
    with pytest.raises(LogError, match="exists already"):
        write_log(path, [LINE])
    assert lines_of(path) == [LINE, LINE]
    path.chmod(0o640)
    assert write_log(path, [LINE], force=True) == 1
    assert path.stat().st_mode & 0o777 == 0o640
    with Log.open(path), pytest.raises(LogError, match="another run"):
        write_log(path, [], force=True)
    with pytest.raises(LogError, match="directory"):
        write_log(tmp_path, [LINE], force=True)
    with pytest.raises(LogError, match="No such file"):
        write_log(tmp_path / "missing" / "out.jsonl", [LINE])
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_log_that_grew_is_not_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", LINE + b"\n")
    contents = read_log(path)
    with Log.open(path) as log:
        log.append(record())
    with pytest.raises(LogError, match="in the meantime"):
        write_log(path, [LINE], force=True, inputs=[contents])
    assert len(read_log(path).entries) == 2


def test_an_interrupted_write_log_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", LINE + b"\n")

    def lines() -> object:
        yield LINE
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(LogError, match="No space"):
        write_log(path, lines(), force=True)  # type: ignore[arg-type]
    assert path.read_bytes() == LINE + b"\n"
    assert os.listdir(tmp_path) == ["log.jsonl"]


pieces = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([LINE, LINE + b"\n", LINE[:200], LINE + b"\r\n", b"\n", b"\xef\xbb\xbf"]),
    json_values.map(lambda v: wire.orjson.dumps(str(v).encode("utf-8", "replace").decode())),
)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parts=st.lists(pieces, max_size=8))
def test_any_bytes_are_read_and_appending_loses_nothing(tmp_path: Path, parts: list[bytes]) -> None:
    path = write(tmp_path / "log.jsonl", *parts)
    before = path.read_bytes()
    contents = read_log(path)
    found = [entry.record() for entry in contents.entries]
    try:
        log = Log.open(path)
    except LogError:
        assert not found
        assert path.read_bytes() == before
        return
    with log:
        log.append(record(us=77))
    (tmp_path / "log.jsonl.torn").unlink(missing_ok=True)
    again = read_log(path)
    assert [entry.record() for entry in again.entries] == [*found, record(us=77)]
    assert again.torn is None
    assert again.entries[-1].line == log.entries[-1].line


@pytest.mark.timeout(120)
def test_the_collector_runs_again_after_reading(tmp_path: Path) -> None:
    read_log(write(tmp_path / "log.jsonl", LINE))
    assert gc.isenabled()
    assert 100 * len(LINE) < jsonl.MAX_LINE_BYTES


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("xz", lzma.compress)])
def test_a_compressed_log_reads_as_the_plain_one(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    plain, packed = tmp_path / "log.jsonl", tmp_path / f"log.jsonl.{suffix}"
    with Log.open(plain) as log:
        log.append(record(us=5.0), record(us=7.0))
    packed.write_bytes(pack(plain.read_bytes()))
    assert [e.record() for e in read_log(packed).entries] == [
        e.record() for e in read_log(plain).entries
    ]


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        ("gz", b"not gzip"),
        ("gz", gzip.compress(b"{}" * 99)[:-9]),
        ("xz", b"not xz"),
        ("xz", lzma.compress(b"{}" * 99)[:-9]),
    ],
)
def test_a_damaged_compressed_log_is_one_clear_error(
    tmp_path: Path, suffix: str, data: bytes
) -> None:
    path = tmp_path / f"log.jsonl.{suffix}"
    path.write_bytes(data)
    with pytest.raises(LogError, match="cannot be read"):
        read_log(path)
