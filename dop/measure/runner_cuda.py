"""The CUDA runner: loads a cubin through the driver, checks it, times it with graph replay; runs in
a worker process, which ends itself when a candidate has made its CUDA context unusable."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dop.errors import ExportError, Failure, MissingDependencyError
from dop.measure import cuda_driver as cuda
from dop.measure import tensor_map
from dop.measure.accuracy import judge
from dop.measure.artifact import Artifact, Launch, evaluate, is_pair, shift_of
from dop.measure.base_layer import BaseLayers
from dop.measure.inputs import awkward, turns
from dop.measure.runner import PREPARED, RunConfig, RunTask, fail_all
from dop.measure.tensors_cuda import DEVICE, Batch, TensorCache, Weights
from dop.measure.timer import collect
from dop.measure.worker import Handler
from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.workload import Workload

FLUSH_FACTOR = 4
"""Bytes read before each replay, in units of the L2 cache. It takes the GPU longer than the host
needs to queue the graph behind it, so that the first event is not waited for."""
HOPELESS = 8
HOPELESS_S = 100e-6
"""A candidate whose first, cold call is this many times slower than the best known, and so much
more, is not timed: plain cores under a large prefill would otherwise take most of a tuning run."""
HOPELESS_CALLS = 4
"""Cold calls that must all be so slow. Builders keep the host busy, and a call whose launches were
interrupted is slow by chance: with two, 9 of 2,200 measurements that were made again had been."""
GRAPH_S = 1e-3
"""A graph holds no more calls than take about this long, by the first, cold call: 32 calls of a
large prefill took 60 ms a candidate and said no more than eight."""
MIN_CALLS = 4
"""Calls of a graph at least. A candidate whose first call takes so long that this many would use
up the timer's budget is not timed further."""
COPY_BYTES = 1 << 30
EMPTY_LAUNCHES = 64
EMPTY_PTX = b".version 7.0\n.target sm_75\n.address_size 64\n.visible .entry empty() { ret; }\n\0"
EXIT_POISONED = 3
WORKSPACE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "float64": 8}


@dataclass
class _Kernel:
    """A kernel ready to be launched for one batch and window."""

    function: cuda.Function
    grid: tuple[int, int, int]
    launch: Launch
    parameters: ctypes.Array[ctypes.c_void_p]


class _Refused(Exception):
    """A candidate that cannot run here; not a fault of the machine."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


def create(config: RunConfig) -> Handler:
    """Handler of a CUDA runner worker.

    Raises:
        MissingDependencyError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise MissingDependencyError("torch sees no CUDA device.", "Use --device cpu.")
    return CudaRunner(config).run


class CudaRunner:
    """Checks and times artifacts on the current GPU."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        torch.manual_seed(0)
        self._torch_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._torch_stream)
        self.stream = int(self._torch_stream.cuda_stream)
        torch.zeros(1, device=DEVICE)  # makes torch's context the current one
        self._begin, self._end = cuda.Event(), cuda.Event()
        l2_bytes = config.target.l2_bytes
        self._tensors = TensorCache(l2_bytes)
        self._empty = cuda.Function(cuda.load(EMPTY_PTX), "empty")
        self._base = BaseLayers(l2_bytes, self._pause)
        self._flush = torch.zeros(FLUSH_FACTOR * l2_bytes // 4, device=DEVICE)
        self._sum = torch.zeros((), device=DEVICE)
        self.bandwidth = self._measure_bandwidth()
        self.launch_s = self._measure_launch()

    def _measure_bandwidth(self) -> float:
        """Bytes read and written per second by a copy: the best of ten."""
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
        target = torch.zeros_like(source)
        best = float("inf")
        for _ in range(10):
            self._begin.record(self.stream)
            target.copy_(source)
            self._end.record(self.stream)
            best = min(best, self._end.seconds_since(self._begin))
        return 2 * COPY_BYTES / best

    def _pause(self, stream: int) -> None:
        """Launches a kernel that does nothing."""
        self._empty.launch((1, 1, 1), (32, 1, 1), 0, stream, cuda.pack_parameters([]))

    def _measure_launch(self) -> float:
        """Seconds of one empty kernel in a graph of many."""
        graph = cuda.Graph()
        # Once outside the graph: what is loaded lazily cannot be loaded while capturing.
        self._pause(self.stream)
        cuda.synchronize(self.stream)
        with graph.capture(self.stream):
            for _ in range(EMPTY_LAUNCHES):
                self._pause(self.stream)
        samples = [self._replay(graph) for _ in range(20)]
        graph.close()
        return min(samples) / EMPTY_LAUNCHES

    def floor_s(self, workload: Workload, scenario: Scenario) -> float:
        """Least time of one call: its bytes at copy bandwidth, at least one empty launch."""
        moved = workload.min_bytes(scenario.tokens, scenario.adapters)
        return max(moved / self.bandwidth, self.launch_s)

    def _replay(self, graph: cuda.Graph) -> float:
        """Seconds of one replay on a flushed cache."""
        torch.sum(self._flush, dim=0, out=self._sum)
        self._begin.record(self.stream)
        graph.replay(self.stream)
        self._end.record(self.stream)
        return self._end.seconds_since(self._begin)

    def run(self, task: RunTask) -> Iterator[object]:
        """Yields PREPARED once inputs exist, then (position, Measurement) per scenario.

        Ends the process after a failure that made the context unusable.
        """
        odd = awkward(task.artifact.tile_rows)
        weights = self._tensors.weights(task.workload, task.scenarios, odd.adapters)
        odd_batch = self._tensors.batch(task.workload, odd, timed=False)
        batches = [self._tensors.batch(task.workload, s, timed=True) for s in task.scenarios]
        for batch in (odd_batch, *batches):
            batch.plans_for(task.artifact.tile_rows)
        torch.cuda.synchronize()
        yield PREPARED
        position = 0
        try:
            with cuda.module(task.artifact.binary) as module:
                loaded = Loaded(task.artifact, module, weights, self._config.target.max_smem_bytes)
                wrong, accuracy, _ = self._check(loaded, odd_batch, task.workload.dtype)
                if wrong:
                    message = f"awkward batch: {wrong}"
                    yield from fail_all(task, Failure.CORRECTNESS, message, accuracy)
                    return
                for batch in batches:
                    yield position, self._one(loaded, batch, task, position)
                    position += 1
        except _Refused as error:
            yield from list(fail_all(task, error.failure, str(error)))[position:]
        except (cuda.CudaError, RuntimeError) as error:
            poisoned = _is_poisoned(self.stream)
            if not (poisoned or isinstance(error, cuda.CudaError)):
                raise
            yield from list(fail_all(task, Failure.LAUNCH, poisoned or str(error)))[position:]
            if poisoned:
                os._exit(EXIT_POISONED)

    def _check(self, loaded: Loaded, batch: Batch, dtype: str) -> tuple[str, float, float]:
        """One call on poisoned workspaces against the reference: what is wrong, the accuracy,
        and the seconds that this first, cold call took."""
        batch.reset()
        with loaded.workspaces(batch) as spaces:
            for space in spaces.values():
                space.fill_(0xFF)
            (kernels,) = loaded.calls(batch, [(0, 0)], spaces)
            self._begin.record(self.stream)
            _launch(kernels, self.stream)
            self._end.record(self.stream)
            cold_s = self._end.seconds_since(self._begin)
        accuracy, message = judge(batch.errors(), dtype)
        return message, accuracy, cold_s

    def _one(self, loaded: Loaded, batch: Batch, task: RunTask, position: int) -> Measurement:
        begin = time.perf_counter()
        wrong, accuracy, cold_s = self._check(loaded, batch, task.workload.dtype)
        if wrong:
            spent = time.perf_counter() - begin
            return Measurement((), Failure.CORRECTNESS, wrong, accuracy=accuracy, cost_s=spent)
        best_s = task.best_of(position)
        hopeless = math.inf if best_s is None else HOPELESS * best_s + HOPELESS_S
        for _ in range(1, HOPELESS_CALLS):
            if cold_s <= hopeless:
                break
            cold_s = min(cold_s, self._check(loaded, batch, task.workload.dtype)[2])
        if cold_s > hopeless or cold_s > self._config.timer.budget_s / MIN_CALLS:
            seconds: tuple[float, ...] = (cold_s,)
        else:
            seconds = (
                self._time_beside(loaded, batch, task.workload, best_s)
                if task.workload.beside
                else self._time(loaded, batch, best_s, cold_s)
            )
        return Measurement(
            seconds,
            accuracy=accuracy,
            floor_s=self.floor_s(task.workload, batch.scenario),
            resources={**task.artifact.resources, **loaded.resources(batch)},
            cost_s=time.perf_counter() - begin,
        )

    def _time(
        self, loaded: Loaded, batch: Batch, best_s: float | None, cold_s: float
    ) -> tuple[float, ...]:
        """Seconds per call: a graph of back-to-back calls, see `_time_graph`."""
        calls = calls_of(len(batch.rows), cold_s)

        def launch(call: int, kernels: list[_Kernel]) -> None:
            _launch(kernels, self.stream)

        return self._time_graph(loaded, batch, calls, launch, self._replay, best_s)

    def _time_beside(
        self, loaded: Loaded, batch: Batch, workload: Workload, best_s: float | None
    ) -> tuple[float, ...]:
        """Seconds that a call adds to the base layer's matmul, shrink beside it."""
        if batch.matmuls is None:
            batch.matmuls = self._base.matmuls(workload, batch.x, batch.y)
        matmuls = batch.matmuls
        self._base.prepare(matmuls, self.stream, self._replay)

        def launch(call: int, kernels: list[_Kernel]) -> None:
            matmuls.feed()
            self._launch_beside(partial(matmuls.launch, call), kernels)
            matmuls.read()

        added_s = partial(matmuls.added_s, replay=self._replay, least_s=self.launch_s)
        return self._time_graph(loaded, batch, matmuls.calls, launch, added_s, best_s)

    def _time_graph(
        self,
        loaded: Loaded,
        batch: Batch,
        calls: int,
        launch: Callable[[int, list[_Kernel]], None],
        sample: Callable[[cuda.Graph], float],
        best_s: float | None,
    ) -> tuple[float, ...]:
        """Seconds per call of a graph of `calls`, each on the next window of weights and, in a cold
        batch, the next copy of x and y.

        Args:
            launch: one call, given its number and its kernels.
            sample: seconds that count of one replay.
        """
        order = turns(len(batch.rows), batch.copies, calls)
        graph = cuda.Graph()
        with loaded.workspaces(batch) as spaces:
            prepared = loaded.calls(batch, order, spaces)
            with graph.capture(self.stream):
                for call in range(calls):
                    launch(call, prepared[call % len(order)])
            try:
                self._warm_up(graph)
                return collect(partial(sample, graph), calls, self._config.timer, best_s)
            finally:
                graph.close()

    def _launch_beside(self, matmul: Callable[[], None], kernels: list[_Kernel]) -> None:
        """A call that cannot be split follows the matmul, as `Beside` has it."""
        if not is_pair([kernel.launch for kernel in kernels]):
            matmul()
            _launch(kernels, self.stream)
            return
        shrink = partial(_launch, kernels[:-1], plainly=True)
        expand = partial(_launch, kernels[-1:], self.stream, plainly=True)
        self._base.beside(matmul, shrink, expand)

    def _warm_up(self, graph: cuda.Graph) -> None:
        begin = time.perf_counter()
        self._replay(graph)
        while time.perf_counter() - begin < self._config.timer.warm_up_s:
            self._replay(graph)


def calls_of(windows: int, cold_s: float) -> int:
    """Calls of a graph: one per window, or whole rounds of them if there are few; fewer windows
    where a call takes long."""
    enough = max(MIN_CALLS, math.ceil(GRAPH_S / max(cold_s, 1e-9)))
    return enough if enough < windows else windows * -(-MIN_CALLS // windows)


def _is_poisoned(stream: int) -> str:
    """What made the context unusable, or "" if it still works."""
    try:
        cuda.synchronize(stream)
    except cuda.CudaError as error:
        return error.cause
    return ""


def _launch(kernels: list[_Kernel], stream: int, plainly: bool = False) -> None:
    for k in kernels:
        if 0 not in k.grid:
            # Weights and tables were made, and waited for, before the candidate's first launch.
            smem, may = k.launch.dynamic_smem_bytes, k.launch.dependent or k.launch.early
            dependent = may and not plainly
            k.function.launch(k.grid, k.launch.block, smem, stream, k.parameters, dependent)


class _Spaces:
    """Workspaces of one batch; held while kernels may use them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __enter__(self) -> dict[str, torch.Tensor]:
        return self._tensors

    def __exit__(self, *_: object) -> None:
        self._tensors = {}


class Loaded:
    """A module's kernels with their limits checked and raised."""

    def __init__(
        self, artifact: Artifact, module: ctypes.c_void_p, weights: Weights, max_smem_bytes: int
    ) -> None:
        self.artifact, self._weights = artifact, weights
        self._functions: list[cuda.Function] = []
        self._resources = dict.fromkeys(("registers", "smem_bytes", "spill_bytes", "threads"), 0.0)
        self._resources["kernels"] = float(len(artifact.launches))
        for launch in artifact.launches:
            function = cuda.Function(module, launch.name)
            self._functions.append(function)
            static = function.attribute(cuda.SHARED_SIZE_BYTES)
            smem = static + launch.dynamic_smem_bytes
            most = function.attribute(cuda.MAX_THREADS_PER_BLOCK)
            if smem > max_smem_bytes:
                why = f"{smem} bytes of shared memory, at most {max_smem_bytes}"
                raise _Refused(Failure.CONSTRAINT, f"{launch.name}: {why}")
            if launch.threads > most:
                why = f"{launch.threads} threads per block; its registers allow {most}"
                raise _Refused(Failure.CONSTRAINT, f"{launch.name}: {why}")
            if launch.dynamic_smem_bytes > 48 << 10:
                function.allow_dynamic_smem(launch.dynamic_smem_bytes)
            if tensor_map.wanted(launch.arguments):  # only such kernels have them
                function.allow_large_clusters()
            self._most("registers", function.attribute(cuda.NUM_REGS))
            self._most("spill_bytes", function.attribute(cuda.LOCAL_SIZE_BYTES))
            self._most("smem_bytes", smem)
            self._most("threads", launch.threads)

    def _most(self, name: str, value: float) -> None:
        self._resources[name] = max(self._resources[name], float(value))

    def _grids(self, batch: Batch) -> list[tuple[int, int, int]]:
        plan = batch.plans_for(self.artifact.tile_rows).plan
        sizes = {"tokens": plan.tokens, "tiles": plan.tiles}
        grids = []
        for launch in self.artifact.launches:
            x, y, z = (evaluate(extent, **sizes) for extent in launch.grid)
            grids.append((x, y, z))
        return grids

    def resources(self, batch: Batch) -> dict[str, float]:
        """Largest registers, spill_bytes, smem_bytes, threads of the kernels; their number, and
        the blocks of all launches."""
        blocks = sum(x * y * z for x, y, z in self._grids(batch))
        return {**self._resources, "blocks": float(blocks)}

    def workspaces(self, batch: Batch) -> _Spaces:
        """The buffers that the launches share, as bytes."""
        plan = batch.plans_for(self.artifact.tile_rows).plan
        tensors = {}
        for w in self.artifact.workspaces:
            elements = evaluate(w.elements, tokens=plan.tokens, tiles=plan.tiles)
            size = max(1, elements) * WORKSPACE_BYTES[w.dtype]
            tensors[w.name] = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        return _Spaces(tensors)

    def calls(
        self, batch: Batch, order: Sequence[tuple[int, int]], spaces: dict[str, torch.Tensor]
    ) -> list[list[_Kernel]]:
        """The launches of calls, each on a window of weights and a copy of x and y.

        Windows differ in their tables only; all else is worked out once for each copy.
        """
        tables = batch.plans_for(self.artifact.tile_rows)
        stacks, steps = self._weights.pointers(), tables.steps()
        pointers = {**stacks, "a": stacks["a0"], "b": stacks["b0"], **tables.pointers()}
        pointers |= {name: space.data_ptr() for name, space in spaces.items()}
        counts = {"tokens": tables.plan.tokens, "tiles": tables.plan.tiles}
        counts["slots"] = self._weights.slots
        launches, workload = self.artifact.launches, Workload.parse(self.artifact.workload_key)

        def values_of(copy: int) -> list[list[cuda.Parameter]]:
            mine = pointers | batch.pointers(copy)
            return [
                [_value(name, mine, counts, workload) for name in launch.arguments]
                for launch in launches
            ]

        fixed = {copy: values_of(copy) for copy in dict.fromkeys(copy for _, copy in order)}
        grids = self._grids(batch)

        def kernel(position: int, window: int, copy: int) -> _Kernel:
            launch = launches[position]
            values = [
                ctypes.c_void_p(pointers[name] + window * steps[name]) if name in steps else value
                for name, value in zip(launch.arguments, fixed[copy][position], strict=True)
            ]
            parameters = cuda.pack_parameters(values)
            return _Kernel(self._functions[position], grids[position], launch, parameters)

        return [[kernel(k, window, copy) for k in range(len(launches))] for window, copy in order]


def _value(
    name: str, pointers: dict[str, int], counts: dict[str, int], workload: Workload
) -> cuda.Parameter:
    """A kernel's parameter; `counts` are those of the whole stacks, whose slots every window's
    tables name.

    Raises:
        _Refused: nobody can give it.
        CudaError: the driver refused a tensor map.
    """
    found = tensor_map.parse(name)
    if found is not None:
        sizes = {"tokens": counts["tokens"], "slots": counts["slots"]}
        try:
            what = tensor_map.of_workload(name, workload, **sizes)
            return tensor_map.encode(what, pointers[found[0]])
        except ExportError as error:
            raise _Refused(Failure.CONSTRAINT, str(error)) from error
    stack = shift_of(name)
    if stack in pointers:
        distance = pointers[stack] - pointers[f"{stack[0]}0"]
        return ctypes.c_int64(distance // 16)
    if name in pointers:
        return ctypes.c_void_p(pointers[name])
    if name in counts:
        return ctypes.c_int32(counts[name])
    raise _Refused(Failure.BUILD, f"a kernel wants {name!r}, which no caller provides")
