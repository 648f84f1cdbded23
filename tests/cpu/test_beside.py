"""Calls in two pieces beside the base layer's matmul, from their key to the kernel that serves."""

from __future__ import annotations

import itertools
import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from export_logs import CPU, SM_90, defaults, records_of, write_log
from pack_samples import H200, TIMES, TRACES, WORKLOAD, pack_at

from dop import packs
from dop.cli.main import main
from dop.cli.request import Request
from dop.errors import ConfigError
from dop.export.load import load_cuda
from dop.export.select import workload_name
from dop.measure import base_layer, runner_cuda
from dop.measure.artifact import Launch, is_pair
from dop.measure.base_layer import BaseLayers, Matmuls
from dop.measure.inputs import windows
from dop.measure.runner_cuda import CudaRunner
from dop.measure.timer import TimerSettings
from dop.ops import sources
from dop.ops.shapes import shape_of
from dop.packs.__main__ import main as packs_main
from dop.packs.answer import Batch, explain
from dop.packs.catalog import write_catalog
from dop.scenario import named
from dop.workload import Workload

BESIDE = replace(WORKLOAD, beside=True)
FASTER = {key: {"a": 9.0, "b": 1.0, "c": 8.0} for key in TIMES}
"""Beside the matmul b is the fastest everywhere, which it is not alone."""


def log_of_both(path):
    alone = records_of(WORKLOAD, TRACES, TIMES, target=H200)
    return write_log(path, [*alone, *records_of(BESIDE, TRACES, FASTER, target=H200)])


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(packs.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(sources, "gpu", lambda device: ("NVIDIA H200", "sm_90"))
    monkeypatch.setattr(sources, "_KERNELS", {})
    sources.forget()
    yield tmp_path / "shipped" / "h200"
    packs.refresh()
    sources.forget()


def ship(folder, monkeypatch, both):
    folder.mkdir(parents=True)
    if both:
        log_of_both(folder / "p.jsonl")
    path = pack_at(folder / "p.doppack", monkeypatch).path
    write_catalog(folder.parent)
    packs.refresh()
    return path


def test_the_key_says_it_and_is_read_again():
    assert BESIDE.key == WORKLOAD.key + "/beside"
    assert Workload.parse(BESIDE.key, BESIDE.name) == BESIDE
    assert workload_name(BESIDE) == workload_name(WORKLOAD) + "_beside"
    for broken in (WORKLOAD.key + "/behind", WORKLOAD.key + "/beside/beside", "/beside"):
        with pytest.raises(ConfigError, match="workload key"):
            Workload.parse(broken)


def test_what_the_matmul_hides_is_no_floor_but_still_rotates():
    width, rank = WORKLOAD.in_features, WORKLOAD.rank
    hidden = 2 * (3 * rank * width * WORKLOAD.slices + 5 * width)
    assert WORKLOAD.min_bytes(5, 3) - BESIDE.min_bytes(5, 3) == hidden
    scenario = named("distinct", 4)
    assert windows(BESIDE, scenario, 1 << 16, 99) == windows(WORKLOAD, scenario, 1 << 16, 99) > 1


@pytest.mark.parametrize(
    ("arguments", "pair"),
    [
        ([("x", "a", "v"), ("v", "b", "y_in", "y")], True),
        ([("x", "a", "v"), ("v", "w"), ("w", "b", "y")], True),
        ([("x", "a", "b", "y")], False),
        ([("x", "a", "v"), ("v", "x", "y")], False),
        ([("x", "y", "v"), ("v", "y")], False),
    ],
)
def test_what_can_be_launched_apart(arguments, pair):
    grid = ("1", "1", "1")
    assert is_pair([Launch("k", grid, (1, 1, 1), 0, names) for names in arguments]) is pair


def test_dop_tune_beside_asks_for_the_same_layers_in_two_pieces():
    alone = Request("Llama-3.2-1B", ranks="16").families(SM_90)
    beside = Request("Llama-3.2-1B", ranks="16", beside=True).families(SM_90)
    assert [replace(f.workload, beside=False) for f in beside] == [f.workload for f in alone]
    assert all(f.workload.beside for f in beside)
    with pytest.raises(ConfigError, match="CPU"):
        Request("Llama-3.2-1B", beside=True).families(CPU)


def test_a_pack_ships_them_and_they_decide_where_they_are_there(shipped, monkeypatch):
    path = ship(shipped, monkeypatch, both=True)
    library = load_cuda(path)
    assert library.table.choose(WORKLOAD.key, 8, 8, None) == TRACES["a"].key
    assert library.table.choose(BESIDE.key, 8, 8, None) == TRACES["b"].key
    assert replace(BESIDE, dtype="float16").key in library.workloads
    shape = shape_of(64, (64, 32), 16, torch.bfloat16, 0)
    alone, beside = (sources.choose(shape, 8, 64, 8, two) for two in (False, True))
    assert TRACES["a"].key in alone.name
    assert TRACES["b"].key in beside.name
    assert (alone.kernel.beside, beside.kernel.beside) == (False, True)
    assert sources.choose(shape, 8, 64, 8) is alone
    assert sources.choose(shape, 8, 64, 8, beside=True) is beside
    answer = explain(Batch(BESIDE, 8, 8, "NVIDIA H200", "sm_90"))
    assert (answer.served_by, answer.trace) == ("pack", TRACES["b"].key)


def test_where_no_pack_has_them_what_serves_alone_serves(shipped, monkeypatch):
    ship(shipped, monkeypatch, both=False)
    shape = shape_of(64, (64, 32), 16, torch.bfloat16, 0)
    beside = sources.choose(shape, 8, 64, 8, beside=True)
    assert beside.kernel is sources.choose(shape, 8, 64, 8).kernel
    answer = explain(Batch(BESIDE, 8, 8, "NVIDIA H200", "sm_90"))
    assert (answer.served_by, answer.trace) == ("pack", TRACES["a"].key)
    assert any(BESIDE.key in reason for reason in answer.reasons)


def test_headers_and_libraries_leave_them_out(tmp_path, capsys):
    traces = {"a": defaults(WORKLOAD)[0].trace}
    times = {"T8/distinct/8": {"a": 10.0}}
    log = write_log(
        tmp_path / "log.jsonl",
        [r for w in (WORKLOAD, BESIDE) for r in records_of(w, traces, times)],
    )
    header = tmp_path / "sgmv.cuh"
    assert main(["export", "cuh", "--log", str(log), "-o", str(header), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["worst_regret"]) == [WORKLOAD.key]
    only = write_log(tmp_path / "only.jsonl", records_of(BESIDE, traces, times))
    for verb in ("cuh", "library"):
        assert main(["export", verb, "--log", str(only), "-o", str(tmp_path / verb)]) == 2
        assert not (tmp_path / verb).exists()


MORE = ([], ["--beside"])


def test_explain_asks_for_them(shipped, monkeypatch, capsys):
    ship(shipped, monkeypatch, both=True)
    asked = ["explain", "--workload", WORKLOAD.key, "--tokens", "8", "--adapters", "8"]
    asked += ["--device-name", "NVIDIA H200", "--arch", "sm_90", "--json"]
    found = []
    for ask, more in itertools.product((main, lambda words: packs_main(words[1:])), MORE):
        assert ask([*asked, *more]) == 0
        (answer,) = json.loads(capsys.readouterr().out)
        found.append(answer["trace"])
    assert found == [TRACES["a"].key, TRACES["b"].key] * 2


def test_a_call_costs_what_it_adds_to_the_matmuls():
    matmuls = Matmuls(torch.ones(2, 3), torch.empty(2, 4), [torch.ones(4, 3), 2 * torch.ones(4, 3)])
    matmuls.launch(0)
    assert (matmuls.y == 3).all()
    matmuls.launch(3)
    assert (matmuls.y == 6).all()
    matmuls.x.zero_()
    matmuls.feed()
    matmuls.launch(0)
    matmuls.read()
    assert (matmuls.y == 3).all()
    assert (matmuls._seen == 3).all()
    matmuls.calls, matmuls.graph = 10, "alone"
    times = {"alone": 41e-6, "together": 61e-6, "by chance": 30e-6}
    replayed: list[str] = []

    def replay(graph):
        replayed.append(graph)
        return times[graph]

    assert matmuls.added_s("together", replay, 1e-7) == pytest.approx(20e-6)
    assert matmuls.added_s("by chance", replay, 1e-7) == pytest.approx(10 * 1e-7)
    assert replayed == ["together", "alone", "by chance", "alone"]


class Point:
    """A stream or an event that notes what is done to it."""

    def __init__(self, name, done) -> None:
        self.name, self.done, self.cuda_stream = name, done, name

    def record(self, stream) -> None:
        self.done.append(f"record {self.name} on {stream.name}")

    def wait_event(self, event) -> None:
        self.done.append(f"{self.name} waits for {event.name}")


def test_shrink_is_launched_behind_the_matmul_and_waits_for_what_is_before_it(monkeypatch):
    done: list[str] = []
    events = iter(("fork", "join", "ready", "end"))
    fake = SimpleNamespace(
        Stream=lambda: Point(7, done),
        Event=lambda: Point(next(events), done),
        current_stream=lambda: Point("main", done),
    )
    monkeypatch.setattr(base_layer.torch, "cuda", fake)
    note = done.append
    BaseLayers(1, lambda stream: note(f"nothing on {stream}")).beside(
        lambda: note("matmul"), lambda s: note(f"shrink on {s}"), lambda: note("expand")
    )
    assert done == [
        "record fork on main",
        "matmul",
        "7 waits for fork",
        "nothing on 7",
        "shrink on 7",
        "record join on 7",
        "main waits for join",
        "expand",
    ]


class FakeGraph:
    """Notes what is captured; replays are looked up."""

    made: ClassVar[list[FakeGraph]] = []

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.open = False
        FakeGraph.made.append(self)

    @contextmanager
    def capture(self, stream):
        self.open = True
        yield
        self.open = False

    def close(self) -> None:
        self.closed = True


def note(what: str) -> None:
    (graph,) = [g for g in FakeGraph.made if g.open]
    graph.launched.append(what)


@pytest.mark.parametrize("pair", [True, False])
def test_the_runner_times_a_call_beside_the_matmuls_and_takes_them_off(monkeypatch, pair):
    """Without a GPU: which launches a graph holds, and what is made of its replays."""
    monkeypatch.setattr(FakeGraph, "made", [])
    monkeypatch.setattr(runner_cuda.cuda, "Graph", FakeGraph)
    runner = CudaRunner.__new__(CudaRunner)
    runner.stream, runner.launch_s, alone = 5, 1e-6, FakeGraph()
    matmuls = Matmuls(torch.ones(1), torch.ones(1), [], 3, alone)
    monkeypatch.setattr(matmuls, "launch", lambda call: note(f"matmul {call}"), raising=False)
    monkeypatch.setattr(matmuls, "feed", lambda: note("write x"), raising=False)
    monkeypatch.setattr(matmuls, "read", lambda: note("read y"), raising=False)

    class Base:
        def matmuls(self, workload, x, y):
            return matmuls

        def prepare(self, matmuls, stream, replay):
            assert stream == 5

        def beside(self, matmul, shrink, expand):
            matmul()
            shrink(9)
            expand()

    runner._base = Base()
    runner._config = SimpleNamespace(timer=TimerSettings(repeats=3, min_sample_s=0.0))
    runner._warm_up = lambda graph: None
    runner._replay = lambda graph: 30e-6 if graph is alone else 48e-6
    grid = ("1", "1", "1")
    arguments = [("x", "v"), ("v", "y")] if pair else [("x", "y")]
    launches = [Launch(f"k{i}", grid, (1, 1, 1), 0, a, True) for i, a in enumerate(arguments)]

    def function(name, window):
        def launch(grid, block, smem, stream, parameters, dependent):
            note(f"{name} of {window} on {stream}{' early' * dependent}")

        return SimpleNamespace(launch=launch)

    def calls(batch, order, spaces):
        return [
            [runner_cuda._Kernel(function(k.name, w), (1, 1, 1), k, None) for k in launches]
            for w, _ in order
        ]

    loaded = SimpleNamespace(workspaces=lambda batch: nullcontext({}), calls=calls)
    batch = SimpleNamespace(matmuls=None, x=None, y=None, rows=[0, 1], copies=1)
    seconds = runner._time_beside(loaded, batch, BESIDE, None)
    assert seconds == pytest.approx((6e-6,) * 3)
    assert batch.matmuls is matmuls
    graph = FakeGraph.made[-1]
    assert graph.closed
    of = [0, 1, 0]  # two windows, three calls
    if pair:
        want = [(f"matmul {i}", f"k0 of {w} on 9", f"k1 of {w} on 5") for i, w in enumerate(of)]
    else:
        want = [(f"matmul {i}", f"k0 of {w} on 5 early") for i, w in enumerate(of)]
    assert graph.launched == [line for call in want for line in ("write x", *call, "read y")]
