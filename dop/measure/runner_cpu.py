"""The CPU runner: loads a library by ctypes, checks it, times it; runs in a worker process."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from dop.errors import Failure
from dop.measure.accuracy import judge
from dop.measure.artifact import Artifact
from dop.measure.compile_cpu import adopt_runtime, runtime_library
from dop.measure.inputs import awkward
from dop.measure.runner import PREPARED, FirstLook, RunConfig, RunTask, fail_all
from dop.measure.tensors_cpu import Batch, TensorCache, Weights, aligned, pointers
from dop.measure.timer import time_calls
from dop.measure.worker import Handler
from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.workload import Workload

COPY_BYTES = 64 << 20
Pointers: TypeAlias = "ctypes.Array[ctypes.c_void_p]"


class Library:
    """A candidate's shared library in this process.

    Raises:
        OSError: the library does not load.
    """

    def __init__(self, binary: bytes, cores: list[int]) -> None:
        with tempfile.NamedTemporaryFile(prefix="dop-", suffix=".so") as file:
            file.write(binary)
            file.flush()
            self.lib = ctypes.CDLL(file.name, mode=os.RTLD_NOW | os.RTLD_LOCAL)
        self.lib.dop_last_error.restype = ctypes.c_char_p
        for name in ("dop_time", "dop_launch_floor", "dop_bandwidth"):
            getattr(self.lib, name).restype = ctypes.c_double
        pins = (ctypes.c_int * len(cores))(*cores)
        self.threads = int(self.lib.dop_threads(len(cores), pins))

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.dop_shutdown()
        _ctypes.dlclose(self.lib._handle)

    def error(self, code: int) -> str:
        """What a return code of `dop_run` means."""
        if code == -2:
            return "an argument is not 64-byte aligned"
        if code == -3:
            return "the weight stacks lie too far apart"
        return (self.lib.dop_last_error() or b"").decode(errors="replace")[:300]


def create(config: RunConfig) -> Handler:
    """Handler of a CPU runner worker: yields PREPARED, then (position, Measurement) in order."""
    if config.runtime:
        adopt_runtime(config.runtime)
    return CpuRunner(config).run


class CpuRunner:
    """Checks and times artifacts on pinned threads."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._tensors = TensorCache(config.target)
        available = sorted(os.sched_getaffinity(0))
        threads = max(1, config.target.units)
        self._cores = [available[i] if i < len(available) else -1 for i in range(threads)]
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._bandwidth, self._launch_s = self._measure_floor()

    def _measure_floor(self) -> tuple[float, float]:
        """Bandwidth (bytes per second) and seconds of an empty launch.

        The bandwidth is the better of a copy's and a read's: SGMV mostly reads. Each is the best
        of five, because whatever else the machine does can only worsen them.
        """
        source, target = aligned((COPY_BYTES,), np.uint8), aligned((COPY_BYTES,), np.uint8)
        source[:], target[:] = 1, 2
        with Library(runtime_library(), self._cores) as library:
            call, size = library.lib.dop_bandwidth, ctypes.c_int64(COPY_BYTES)
            to, start = (ctypes.c_void_p(array.ctypes.data) for array in (target, source))
            rates = [call(to, start, size) for _ in range(5)]
            rates += [call(None, start, size) for _ in range(5)]
            launches = [library.lib.dop_launch_floor(ctypes.c_int64(2000)) for _ in range(5)]
        return max(rates), min(launches)

    def floor_s(self, workload: Workload, scenario: Scenario) -> float:
        """Least time of one call: its bytes at the bandwidth, at least one empty launch."""
        moved = workload.min_bytes(scenario.tokens, scenario.adapters)
        return max(moved / self._bandwidth, self._launch_s)

    def run(self, task: RunTask) -> Iterator[object]:
        """Yields PREPARED once inputs exist, then (position, Measurement) per scenario."""
        if task.workload.dtype == "bfloat16":
            yield from fail_all(task, Failure.CONSTRAINT, "no bfloat16 on the CPU")
            return
        odd = awkward(task.artifact.tile_rows)
        weights = self._tensors.weights(task.workload, task.scenarios, odd.adapters)
        odd_batch = self._tensors.batch(task.workload, odd, timed=False)
        batches = [self._tensors.batch(task.workload, s, timed=True) for s in task.scenarios]
        yield PREPARED
        try:
            library = Library(task.artifact.binary, self._cores)
        except OSError as error:
            yield from fail_all(task, Failure.LAUNCH, f"does not load: {error}")
            return
        with library:
            calls = Calls(library, task.artifact, weights)
            failure, message, accuracy = calls.check(odd_batch, task.workload.dtype)
            if failure is not Failure.NONE:
                yield from fail_all(task, failure, f"awkward batch: {message}", accuracy)
                return
            first = []
            for position, batch in enumerate(batches):
                first.append(self._one(calls, batch, task, position))
                yield FirstLook(position, first[-1])
            for position, batch in enumerate(batches):
                yield position, self._second_look(calls, batch, first[position])

    def _second_look(self, calls: Calls, batch: Batch, first: Measurement) -> Measurement:
        """The faster of two timings that lie all scenarios apart.

        Shared hosts slow down for longer than one timing takes: one and the same kernel was seen
        to need 1.0 to 2.2 ms from second to second, so a single look ranks the host's moods.
        """
        if not first.ok or first.median_s > self._config.timer.budget_s / 2:
            return first
        begin = time.perf_counter()
        seconds = time_calls(calls.prepare(batch), self._config.timer, first.median_s)
        cost_s = first.cost_s + time.perf_counter() - begin
        faster = min(first.seconds, seconds, key=statistics.median)
        return replace(first, seconds=faster, cost_s=cost_s)

    def _one(self, calls: Calls, batch: Batch, task: RunTask, position: int) -> Measurement:
        begin = time.perf_counter()
        failure, message, accuracy = calls.check(batch, task.workload.dtype)
        if failure is not Failure.NONE:
            return _failed(failure, message, accuracy, time.perf_counter() - begin)
        seconds = time_calls(calls.prepare(batch), self._config.timer, task.best_of(position))
        return Measurement(
            seconds,
            accuracy=accuracy,
            floor_s=self.floor_s(task.workload, batch.scenario),
            resources=dict(task.artifact.resources),
            cost_s=time.perf_counter() - begin,
        )


class Calls:
    """Calls of one library with prepared arguments."""

    def __init__(self, library: Library, artifact: Artifact, weights: Weights) -> None:
        self._library, self._artifact, self._weights = library, artifact, weights

    def _arguments(self, batch: Batch, window: int) -> Pointers:
        tables = batch.plans_for(self._artifact.tile_rows)[window].tables
        named = {"x": batch.x, "y_in": batch.y, "y": batch.y, **tables}
        named |= {f"a{s}": array for s, array in enumerate(self._weights.a)}
        named |= {f"b{s}": array for s, array in enumerate(self._weights.b)}
        return pointers([named[name] for name in self._artifact.arguments])

    def _scalars(self, batch: Batch) -> ctypes.Array[ctypes.c_int64]:
        plan = batch.plans_for(self._artifact.tile_rows)[0]
        return (ctypes.c_int64 * 3)(plan.tokens, plan.tiles, self._weights.slots)

    def check(self, batch: Batch, dtype: str) -> tuple[Failure, str, float | None]:
        """One call on poisoned workspaces against the reference."""
        lib = self._library.lib
        batch.reset()
        lib.dop_poison(1)
        code = lib.dop_run(self._arguments(batch, 0), self._scalars(batch))
        lib.dop_poison(0)
        if code:
            return Failure.LAUNCH, f"the entry failed: {self._library.error(code)}", None
        accuracy, message = judge(batch.errors(), dtype)
        return (Failure.CORRECTNESS if message else Failure.NONE), message, accuracy

    def prepare(self, batch: Batch) -> _Timed:
        """A function that runs n calls, each on the next window, and gives their time."""
        arrays = [self._arguments(batch, window) for window in range(len(batch.rows))]
        return _Timed(self._library, arrays, self._scalars(batch))


class _Timed:
    """Runs n calls of a batch; the position in the windows goes on from call to call."""

    def __init__(
        self, library: Library, arrays: list[Pointers], scalars: ctypes.Array[ctypes.c_int64]
    ) -> None:
        self._lib = library.lib
        self._arrays = arrays
        self._sets = (ctypes.c_void_p * len(self._arrays))(
            *(ctypes.addressof(array) for array in self._arrays)
        )
        self._scalars = scalars
        self._next = 0

    def __call__(self, count: int) -> float:
        seconds = float(
            self._lib.dop_time(
                self._lib.dop_run,
                self._sets,
                len(self._arrays),
                self._scalars,
                ctypes.c_int64(count),
                ctypes.c_int64(self._next),
            )
        )
        self._next += count
        if seconds < 0:
            raise RuntimeError("a call failed while it was timed")
        return max(seconds, 1e-9)


def _failed(
    failure: Failure, message: str, accuracy: float | None, cost_s: float = 0.0
) -> Measurement:
    return Measurement((), failure, message, accuracy=accuracy, cost_s=cost_s)
