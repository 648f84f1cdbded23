"""Worker processes that may hang, crash or be killed, and are replaced when they do."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from dop.errors import DopError
from dop.measure.worker import Start

START_TIMEOUT_S = 180.0
"""A worker imports TVM or torch in 4 to 40 s of CPU time; several start at once."""
MAX_FAILED_STARTS = 3
KILL_TIMEOUT_S = 30.0

Kind = Literal["item", "end", "error", "died", "timeout"]


@dataclass(frozen=True)
class Event:
    """What became of a task.

    Attributes:
        task: its id.
        kind: "item" (value: what the handler gave), "end", "error" (the handler raised), "died"
            (the worker ended by itself), "timeout" (killed for taking too long).
        value: the item, or for error, died and timeout what is known, one line of text.
        signal: number of the signal that ended the worker ("died"), else 0.
    """

    task: int
    kind: Kind
    value: Any = None
    signal: int = 0


class WorkerError(DopError):
    """Worker processes do not start."""


@dataclass
class _Task:
    id: int
    payload: bytes
    first_timeout_s: float
    timeout_s: float


class _Worker:
    """One process and what it is doing."""

    def __init__(self, start: Start) -> None:
        ours, theirs = socket.socketpair()
        self.output = tempfile.TemporaryFile(prefix="dop-worker-")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dop.measure.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in start.path if p)},
        )
        theirs.close()
        self.pipe = Connection(ours.detach())
        self.up = False
        self.task: _Task | None = None
        self.begun = time.monotonic()
        self.deadline = self.begun + START_TIMEOUT_S
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(start)

    def kill(self) -> None:
        """Ends the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=KILL_TIMEOUT_S)  # a GPU driver may take its time
        self.pipe.close()

    def last_words(self) -> str:
        """End of what the process wrote, on one line."""
        self.output.seek(0, os.SEEK_END)
        self.output.seek(max(0, self.output.tell() - 2000))
        return " ".join(self.output.read().decode(errors="replace").split())[-200:]

    def close(self) -> None:
        self.kill()
        self.output.close()


class WorkerPool:
    """Runs tasks in up to `size` processes; `step` says what happened.

    Workers start with the first task and stay warm. A task's time limit counts from its start in
    a worker, and anew from each item that it yields.
    """

    def __init__(self, handler: str, config: object, size: int, *, nice: int = 0) -> None:
        self._start = Start(list(sys.path), handler, pickle.dumps(config), nice)
        self._size = size
        self._workers: list[_Worker] = []
        self._queue: deque[_Task] = deque()
        self._failed_starts = 0

    def submit(
        self, task: int, payload: object, timeout_s: float, first_timeout_s: float | None = None
    ) -> None:
        """Queues a task; `task` names it in events.

        Args:
            timeout_s: longest time between two items, and between the last and the end.
            first_timeout_s: longest time before the first item, if it differs.
        """
        first = timeout_s if first_timeout_s is None else first_timeout_s
        self._queue.append(_Task(task, pickle.dumps(payload), first, timeout_s))

    @property
    def busy(self) -> bool:
        """Whether a task is queued or running."""
        return self.backlog > 0

    @property
    def backlog(self) -> int:
        """Tasks that are queued or running."""
        return len(self._queue) + sum(w.task is not None for w in self._workers)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [w.process.pid for w in self._workers]

    def connections(self) -> list[Connection]:
        """What to wait on besides a timeout."""
        return [w.pipe for w in self._workers]

    def warm_up(self) -> None:
        """Starts all workers now, so that imports overlap with other work."""
        while len(self._workers) < self._size:
            self._workers.append(_Worker(self._start))

    def step(self, timeout_s: float) -> list[Event]:
        """Starts what can start, waits up to `timeout_s` for news and returns it.

        Raises:
            WorkerError: workers failed to start several times in a row.
        """
        self.dispatch()
        return self.collect(wait_any([self], timeout_s))

    def collect(self, ready: Iterable[object]) -> list[Event]:
        """Events of the connections that are ready, and of deadlines that have passed."""
        events: list[Event] = []
        ready_ids = {id(pipe) for pipe in ready}
        for worker in list(self._workers):
            if id(worker.pipe) in ready_ids:
                events += self._read(worker)
            elif time.monotonic() > worker.deadline:
                events += self._overdue(worker)
        self.dispatch()
        return events

    def next_deadline(self) -> float:
        """Monotonic time of the next deadline."""
        return min((w.deadline for w in self._workers), default=float("inf"))

    def dispatch(self) -> None:
        """Gives queued tasks to idle workers and starts workers that are wanted."""
        for worker in list(self._workers):
            if worker.up and worker.task is None and worker.process.poll() is not None:
                self._remove(worker)  # it died while idle: no task is lost
            elif self._queue and worker.up and worker.task is None:
                task = self._queue.popleft()
                worker.task = task
                worker.begun = time.monotonic()
                worker.deadline = worker.begun + task.first_timeout_s
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    worker.pipe.send(task.payload)
        waiting = sum(not w.up for w in self._workers)
        while len(self._queue) > waiting and len(self._workers) < self._size:
            self._workers.append(_Worker(self._start))
            waiting += 1

    def _read(self, worker: _Worker) -> list[Event]:
        events: list[Event] = []
        try:
            while worker in self._workers and worker.pipe.poll():
                kind, value = worker.pipe.recv()
                events += self._message(worker, kind, value)
        except (EOFError, OSError, pickle.UnpicklingError):
            events += self._lost(worker)
        return events

    def _message(self, worker: _Worker, kind: str, value: Any) -> list[Event]:
        task = worker.task
        if task is None:
            if kind == "up":
                worker.up, worker.deadline = True, float("inf")
                self._failed_starts = 0
            else:
                self._remove(worker)
                self._start_failed(str(value))
            return []
        if kind == "item":
            worker.begun = time.monotonic()
            worker.deadline = worker.begun + task.timeout_s
            return [Event(task.id, "item", value)]
        worker.task, worker.deadline = None, float("inf")
        return [Event(task.id, "end" if kind == "end" else "error", value)]

    def _lost(self, worker: _Worker) -> list[Event]:
        try:
            code = worker.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        words = worker.last_words()
        self._remove(worker)
        if worker.task is None:
            if not worker.up:
                self._start_failed(words)
            return []
        number = -code if code < 0 else 0
        how = f"signal {signal_name(number)}" if number else f"exit code {code}"
        return [Event(worker.task.id, "died", f"{how} {words}".strip(), number)]

    def _overdue(self, worker: _Worker) -> list[Event]:
        self._remove(worker)
        if worker.task is None:
            self._start_failed(f"it did not start within {START_TIMEOUT_S:.0f} s")
            return []
        seconds = time.monotonic() - worker.begun
        return [Event(worker.task.id, "timeout", f"stopped after {seconds:.1f} s")]

    def _start_failed(self, why: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise WorkerError(
                f"worker processes do not start: {why}.", "Run `python -m dop.collect_env`."
            )

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.close()

    def cancel(self) -> None:
        """Drops queued tasks and ends the workers that are busy."""
        self._queue.clear()
        for worker in [w for w in self._workers if w.task]:
            self._remove(worker)

    def rss_bytes(self) -> int:
        """Resident memory of the workers."""
        return sum(_rss(pid) for pid in self.pids)

    def close(self) -> None:
        """Ends all workers; queued and running tasks are dropped."""
        self._queue.clear()
        for worker in self._workers:
            worker.close()
        self._workers.clear()


def _rss(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def signal_name(number: int) -> str:
    """Name of a signal, e.g. SIGSEGV."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def wait_any(pools: Sequence[WorkerPool], timeout_s: float) -> list[object]:
    """Connections of any pool with news, waiting until the next deadline at most."""
    connections = [c for pool in pools for c in pool.connections()]
    left = min(pool.next_deadline() for pool in pools) - time.monotonic()
    timeout = max(0.0, min(timeout_s, left))
    if not connections:
        if timeout:
            time.sleep(min(timeout, 0.01))
        return []
    return list(wait(connections, timeout))
