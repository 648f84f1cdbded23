"""Eager calls that come again are replayed: right whatever changes, bounded, dropped in time."""

from __future__ import annotations

import gc

import fake_driver
import pytest
import torch
from fake_driver import STREAM
from sgmv_reference import reference, rows, stacks

from dop import ops
from dop.measure.cuda_driver import CudaError
from dop.ops import eager, graphs, native
from dop.ops.plan import fill_by_torch

pytestmark = pytest.mark.skipif(not native.reads_tensors(), reason=fake_driver.NO_EXTENSION)
SLOTS, RANK, WIDTH, OUTS = 4, 8, 16, (8, 4)
IDS = [1, -1, 3, 0, 0, 2]
SEEN = 2  # calls on the short path before one is recorded, as in _launch.c
KEPT = 256


@pytest.fixture(autouse=True)
def whole_plans(monkeypatch):
    """Here the CPU stands in for a GPU, which reads the tables of tiles too."""
    monkeypatch.setattr(eager, "fill", fill_by_torch)


class Case:
    """A call site, and what the fake driver saw."""

    def __init__(self, monkeypatch, tile_rows: int = 0, early: bool = False, ids=IDS):
        fake_driver.choose_way(monkeypatch, "kept")
        sizes = (len(OUTS), RANK, WIDTH, OUTS, SLOTS)
        self.driver = fake_driver.install(monkeypatch, sizes, tile_rows, early)
        self.graphs = self.driver.graphs
        self.ids = ids
        self.a, self.b = stacks(SLOTS, RANK, WIDTH, OUTS)
        self.x, self.y = rows(len(ids), WIDTH, sum(OUTS))
        self.plan = ops.segment_plan(torch.tensor(ids, dtype=torch.int32), slots=SLOTS)
        ops.add_lora(self.y.clone(), self.x, self.a, self.b, self.plan)  # the long path

    def call(self, **given):
        """A call in place, which must be right; how many launches and replays it took."""
        before = len(self.driver.launches), len(self.graphs.replayed)
        want = reference(self.y, self.x, self.a, self.b, self.ids, **given)
        ops.add_lora(self.y, self.x, self.a, self.b, self.plan, **given)
        torch.testing.assert_close(self.y.double(), want, rtol=1e-5, atol=1e-5)
        return len(self.driver.launches) - before[0], len(self.graphs.replayed) - before[1]


@pytest.fixture(params=[(0, False), (16, False), (0, True)], ids=["rows", "tiles", "early"])
def case(request, monkeypatch):
    return Case(monkeypatch, *request.param)


def test_the_third_call_is_recorded_and_all_behind_it_are_replays(case):
    for _ in range(SEEN):
        assert case.call() == (2, 0)
    assert case.call() == (2, 1)  # recorded: the launches were not made
    for _ in range(3):
        assert case.call() == (0, 1)
    assert {stream for _, stream in case.graphs.replayed} == {STREAM}
    assert len(case.graphs.execs) == 1
    assert not case.graphs.graphs
    assert case.graphs.modes[-1] == 0  # as it was


def test_only_launches_behind_the_first_are_dependent_in_a_graph(monkeypatch):
    case = Case(monkeypatch, 0, early=True)
    for _ in range(SEEN + 2):
        case.call()
    recorded = [one for one in case.driver.launches if one[2] == case.graphs.STREAM]
    assert [(name, dependent) for name, _, _, dependent in recorded] == [
        ("shrink", False),
        ("expand", True),
    ]


def test_values_may_change_where_they_are(case):
    for _ in range(SEEN + 2):
        case.call()
    case.x.normal_()
    case.a[0].normal_()
    case.b[1].normal_()
    assert case.call() == (0, 1)


@pytest.mark.parametrize("what", ["x", "y", "a", "b", "plan"])
def test_another_address_is_another_call(case, what):
    for _ in range(SEEN + 2):
        case.call()
    kept = getattr(case, what)
    if what in "xy":
        kept.data = torch.randn_like(kept)
    elif what in "ab":
        kept[1].data = torch.randn_like(kept[1])
        ops.add_lora(case.y.clone(), case.x, case.a, case.b, case.plan)
    else:
        case.ids = [3, 3, -1, 1, 0, 1]
        case.plan = ops.segment_plan(torch.tensor(case.ids, dtype=torch.int32), slots=SLOTS)
    for _ in range(SEEN):
        assert case.call() == (2, 0)
    assert case.call() == (2, 1)
    assert case.call() == (0, 1)
    assert len(case.graphs.execs) == 2


def test_a_scale_of_the_call_has_tables_of_its_own(case):
    for scale in (0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0):
        case.call(scale=scale)
    assert case.call(scale=0.5) == case.call() == (0, 1)


@pytest.mark.parametrize("what", ["x", "y"])
def test_kept_calls_are_bounded(case, what):
    """And told apart by every address, wherever they are kept."""
    held, changing = [], getattr(case, what)
    for _ in range(KEPT + 100):
        changing.data = torch.randn_like(changing)
        held.append(changing.data)
        for _ in range(SEEN + 1):
            case.call()
    assert KEPT // 2 < len(case.graphs.execs) <= KEPT
    assert case.call() == (0, 1)
    changing.data = held[0]
    case.call()


def test_what_is_forgotten_is_dropped(case):
    for _ in range(SEEN + 1):
        case.call()
    ops.forget()
    gc.collect()
    assert not case.graphs.execs


@pytest.mark.parametrize("step", ["exchange_mode", "begin", "end", "instantiate"])
def test_a_driver_that_does_not_record_launches(case, step):
    case.graphs.refuse = step
    for _ in range(SEEN):
        case.call()
    for _ in range(3):
        launches, replays = case.call()
        assert replays == 0
        assert launches >= 2
    assert not case.graphs.execs
    assert not case.graphs.graphs
    assert case.graphs.recording is None


def test_a_launch_that_fails_while_recording_fails_as_ever(case):
    for _ in range(SEEN):
        case.call()
    case.driver.code = 1
    with pytest.raises(CudaError):
        ops.add_lora(case.y, case.x, case.a, case.b, case.plan)
    case.driver.code = 0
    assert case.call() == (2, 0)


def test_a_replay_that_fails_is_an_error(case):
    for _ in range(SEEN + 1):
        case.call()
    case.graphs.refuse = "launch"
    with pytest.raises(CudaError):
        ops.add_lora(case.y, case.x, case.a, case.b, case.plan)


def test_large_batches_are_launched(monkeypatch):
    ids = [0, 1, 2, 3] * (graphs.KEEP_TOKENS // 4) + [0]
    case = Case(monkeypatch, ids=ids)
    for _ in range(SEEN + 2):
        assert case.call() == (2, 0)


def test_a_call_takes_eight_words():
    with pytest.raises(ValueError, match="8 words"):
        native.EXTENSION.Call(1, 0, b"", (), 0, 1, 1, 1, 0, b"", b"123")


def test_the_driver_s_entries():
    class Library:
        pass

    assert graphs.entries(Library()) == ()


@pytest.mark.parametrize(("value", "on"), [(None, True), ("1", True), ("0", False)])
def test_calls_are_kept_unless_somebody_says_no(monkeypatch, value, on):
    monkeypatch.delenv("DOP_GRAPHS", raising=False)
    if value is not None:
        monkeypatch.setenv("DOP_GRAPHS", value)
    assert graphs.are_on() is on
