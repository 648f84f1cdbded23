"""Batches whose x and y come from memory, from `dop tune --cold` to what the runner launches."""

from __future__ import annotations

import ctypes
import itertools
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import fake_codegen
import pytest
import synthetic
import torch
from export_logs import CPU, SM_90
from fake_measurer import FakeMeasurer

from dop.cli.request import Request
from dop.database.jsonl import Log, read_log
from dop.dispatch.cover import build_table
from dop.errors import ConfigError
from dop.family import Family
from dop.measure import runner_cuda, tensors_cuda
from dop.measure.accuracy import judge
from dop.measure.artifact import Launch
from dop.measure.base import Job
from dop.measure.inputs import windows
from dop.measure.local import LocalMeasurer
from dop.measure.plan import PLAN_ADAPTERS, tile_bound
from dop.measure.runner_cuda import CudaRunner, Loaded
from dop.measure.tensors_cuda import GUARD, WINDOW_LIMIT, TensorCache
from dop.measure.timer import TimerSettings
from dop.scenario import named
from dop.tune import tune
from dop.workload import Workload

WORKLOAD = Workload("o", 64, (96,), 16, "bfloat16")
WARM = named("identical", 24)
COLD = replace(WARM, cold=True)
CACHE = 10_000
"""Bytes of the cache: 4 windows of weights and 3 copies of x and y are twice as much or more."""


# ------------------------------------------------------------------------- what is asked for


def test_each_batch_gets_a_cold_twin_of_its_weight(tmp_path):
    request = Request("Llama-3.2-1B", tokens="1,512", mix="uniform,identical")
    warm = request.scenarios(SM_90)
    assert not any(s.cold for s in warm)
    (family, *_) = replace(request, cold=True).families(SM_90)
    assert family.scenarios == (*warm, *(replace(s, cold=True) for s in warm))
    assert [s.key for s in family.scenarios][-1] == "T512/identical/1/cold"


def test_twins_of_a_traffic_file_keep_its_counts(tmp_path):
    file = tmp_path / "traffic.json"
    file.write_text('{"version": 1, "batches": [{"segments": [300, 3], "count": 7}]}')
    found = Request("Llama-3.2-1B", traffic=file, cold=True).scenarios(SM_90)
    assert [(s.key, s.weight) for s in found] == [
        ("T303/recorded/300,3/0", 7),
        ("T303/recorded/300,3/0/cold", 7),
    ]


def test_where_x_and_y_cannot_come_from_memory_it_is_refused():
    request = Request("Llama-3.2-1B", cold=True)
    with pytest.raises(ConfigError, match=r"--cold.*on a CPU"):
        request.families(CPU)
    with pytest.raises(ConfigError, match=r"--cold.*beside a matmul"):
        replace(request, beside=True).families(SM_90)


def test_the_measurer_refuses_it_too_and_goes_on():
    workload = Workload("kv", 96, (40, 24), 4, "float32")
    warm = Job(fake_codegen.trace("tile_rows", 0), workload, (WARM,))
    timer = TimerSettings(repeats=1, min_sample_s=1e-4)
    target = replace(CPU, arch="generic", features="")
    options = {"generate": "fake_codegen:generate", "builders": 1, "timer": timer}
    with LocalMeasurer(target, **options) as measurer:
        with pytest.raises(ConfigError, match=r"T24/identical/1/cold.*GPU"):
            list(measurer.measure([warm, replace(warm, scenarios=(WARM, COLD))]))
        assert [m.ok for _, _, m in measurer.measure([warm])] == [True]
        measurer._overlap = True
        beside = replace(warm, workload=replace(workload, beside=True), scenarios=(COLD,))
        with pytest.raises(ConfigError, match="beside"):
            list(measurer.measure([beside]))
        measurer._overlap = False


def test_a_search_measures_both_and_the_table_serves_both(tmp_path):
    space, path = synthetic.space(), tmp_path / "log.jsonl"
    batch = named("uniform", 32)
    both = (batch, replace(batch, cold=True))
    family = Family(synthetic.WORKLOAD, SM_90, both)

    def search():
        with FakeMeasurer(space) as measurer, Log.open(path) as log:
            build = {"build": lambda workload, target: space}
            return tune([family], measurer=measurer, log=log, trials=12, budget_s=60, **build)

    assert [task.best is not None for task in search().tasks] == [True, True]
    entries = read_log(path).entries
    measured = {s.key: {e.trace_key for e in entries if e.scenario_key == s.key} for s in both}
    assert measured[both[0].key] == measured[both[1].key]
    resumed = search()
    assert resumed.progress.resumed == len(entries)
    device = {"device": SM_90.device_name, "target_key": SM_90.key}
    table = build_table(read_log(path).entries, **device).table.workloads[family.workload.key]
    assert {fit.scenario_key for fit in table.fits} == {s.key for s in both}
    assert len({fit.trace_key for fit in table.fits}) == 1


# ------------------------------------------------------------------- what the CUDA runner does


class Function:
    """A kernel that notes its parameters' values."""

    launched: list[list[object]]

    def __init__(self, module, name):
        self.launched = module

    def attribute(self, number):
        return 1024 if number == runner_cuda.cuda.MAX_THREADS_PER_BLOCK else 16

    def allow_large_clusters(self):
        pass

    def launch(self, grid, block, smem, stream, parameters, dependent):
        self.launched.append([v if isinstance(v, Map) else v.value for v in parameters.values])


class Map(ctypes.c_uint64):
    """Stands for a tensor map: the address that it was made of."""


class Graph:
    @contextmanager
    def capture(self, stream):
        yield

    def close(self):
        pass


ARGUMENTS = ("x", "y_in", "y", "a", "b", "token_slot", "x_box16", "y_box16", "b_box64", "tokens")


@pytest.fixture
def timed(monkeypatch):
    """Launches that the graph of a batch holds, and the batch; tensors lie in this memory."""
    monkeypatch.setattr(tensors_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(runner_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(runner_cuda.cuda, "Function", Function)
    monkeypatch.setattr(runner_cuda.cuda, "Graph", Graph)
    monkeypatch.setattr(runner_cuda.tensor_map, "encode", lambda what, address: Map(address))
    runner = CudaRunner.__new__(CudaRunner)
    runner.stream = 5
    runner._config = SimpleNamespace(timer=TimerSettings(repeats=1, min_sample_s=0.0))
    runner._warm_up = lambda graph: None
    runner._replay = lambda graph: 1e-3
    launch = Launch("k", ("tokens", "1", "1"), (32, 1, 1), 0, ARGUMENTS)
    artifact = SimpleNamespace(
        launches=(launch,), workspaces=(), tile_rows=0, workload_key=WORKLOAD.key
    )
    cache = TensorCache(CACHE)

    def of(scenario, cold_s=1e-6):
        weights = cache.weights(WORKLOAD, (scenario,), 1)
        batch, launched = cache.batch(WORKLOAD, scenario, timed=True), []
        loaded = Loaded(artifact, launched, weights, 1 << 16)
        runner._time(loaded, batch, None, cold_s)
        return [dict(zip(ARGUMENTS, values, strict=True)) for values in launched], batch, weights

    return of


def test_calls_of_a_cold_batch_go_round_over_copies_of_x_and_y(timed):
    calls, batch, weights = timed(COLD)
    tables = batch.plans_for(0)
    slots = tables.tables["token_slot"]
    xs = [batch.x, *(x for x, _ in batch.others)]
    ys = [y[GUARD:-GUARD] for y in (batch.guarded, *(y for _, y in batch.others))]
    assert (len(batch.rows), batch.copies, len(calls)) == (4, 3, 4)
    for i, call in enumerate(calls):
        assert call["x"] == call["x_box16"].value == xs[i % 3].data_ptr()
        assert call["y_in"] == call["y"] == call["y_box16"].value == ys[i % 3].data_ptr()
        assert call["token_slot"] == slots[i].data_ptr()
        assert (call["a"], call["b"]) == (weights.a[0].data_ptr(), weights.b[0].data_ptr())
        assert call["b_box64"].value == call["b"]
        assert call["tokens"] == 24
    spans = sorted((t.data_ptr(), t.numel() * t.element_size()) for t in (*xs, *ys))
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(spans))
    assert sum(size for _, size in spans) >= 2 * CACHE
    assert all(torch.equal(x, batch.x) for x in xs)
    assert weights.nbytes >= sum(size for _, size in spans)


def test_calls_of_a_warm_batch_share_one_x_and_one_y(timed):
    calls, batch, _ = timed(WARM)
    slots = batch.plans_for(0).tables["token_slot"]
    assert (len(batch.rows), batch.copies, len(calls)) == (4, 1, 4)
    y = batch.guarded[GUARD:-GUARD].data_ptr()
    for i, call in enumerate(calls):
        assert (call["x"], call["y"], call["y_in"]) == (batch.x.data_ptr(), y, y)
        assert call["token_slot"] == slots[i].data_ptr()


def test_a_cold_batch_is_checked_as_its_twin_is(timed):
    (_, cold, _), (_, warm, _) = timed(COLD), timed(WARM)
    assert len(cold.rows) == len(warm.rows) == windows(WORKLOAD, COLD, CACHE, WINDOW_LIMIT)
    assert cold.pointers(0)["x"] == cold.x.data_ptr()
    for batch in (cold, warm):
        batch.reset()
        batch.y.copy_(batch.want)
        assert judge(batch.errors(), WORKLOAD.dtype)[1] == ""


def test_a_cold_batch_has_no_tiles_beyond_those_of_its_adapters(timed):
    (_, cold, _), (_, warm, _) = timed(COLD), timed(WARM)
    for height in (8, 16):
        assert cold.plans_for(height).plan.tiles == tile_bound(24, height, COLD.adapters)
        assert warm.plans_for(height).plan.tiles == tile_bound(24, height, PLAN_ADAPTERS)
        assert warm.plans_for(height).plan.tiles > cold.plans_for(height).plan.tiles
