"""A call in two pieces: on which stream each is launched, and what waits for what."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import fake_driver
import pytest
import torch
from sgmv_reference import reference, rows, stacks

from benchmarks.peers import dop_ops
from dop import ops
from dop.errors import DopError
from dop.measure import side_stream
from dop.measure.cuda_driver import CudaError
from dop.ops import beside, eager, sources
from dop.ops.beside import Beside
from dop.ops.plan import fill_by_torch
from dop.ops.sources import Choice

SLOTS, RANK, WIDTH, OUTS = 4, 8, 16, (8, 4)
IDS = [1, -1, 3, 0, 0, 2]
SIDE = 99


class Case:
    """A fake driver, and streams and events that note what is done to them."""

    def __init__(self, monkeypatch, tile_rows: int = 0, early: bool = False) -> None:
        sizes = (len(OUTS), RANK, WIDTH, OUTS, SLOTS)
        monkeypatch.setattr(eager, "fill", fill_by_torch)  # tables of tiles, too
        self.driver = fake_driver.install(monkeypatch, sizes, tile_rows, early)
        self.done: list[tuple[str, ...]] = []
        count = iter(("fork", "join"))
        monkeypatch.setattr(side_stream, "_new_event", lambda: Event(self, next(count)))
        monkeypatch.setattr(side_stream, "_current_stream", lambda: Stream(self, "main", 0))
        names = {(3, SIDE): "side", (-1, fake_driver.STREAM): "main"}
        monkeypatch.setattr(
            beside, "pause", lambda *where: self.done.append(("pause", names[where]))
        )
        launch = self.driver.launch

        def noted(config, function, parameters, extra):
            if code := launch(config, function, parameters, extra):
                self.done.append(("refused",))
                return code
            name, _, stream, dependent = self.driver.launches[-1]
            self.done.append((name, {SIDE: "side", fake_driver.STREAM: "main"}[stream]))
            assert not dependent
            return 0

        monkeypatch.setattr(self.driver, "launch", noted)
        self.side = Stream(self, "side", SIDE)
        self.a, self.b = stacks(SLOTS, RANK, WIDTH, OUTS)
        self.x, self.y = rows(len(IDS), WIDTH, sum(OUTS))
        self.plan = ops.segment_plan(torch.tensor(IDS, dtype=torch.int32), slots=SLOTS)


class Stream:
    def __init__(self, case, name, number) -> None:
        self.case, self.name, self.cuda_stream = case, name, number
        self.device = SimpleNamespace(index=3)

    def wait_event(self, event) -> None:
        self.case.done.append(("wait", event.name, self.name))


class Event:
    def __init__(self, case, name) -> None:
        self.case, self.name = case, name

    def record(self, stream) -> None:
        self.case.done.append(("record", self.name, stream.name))


BEGUN = [("record", "fork", "main")]
FORKED = [("wait", "fork", "side"), ("pause", "side"), ("shrink", "side")]
JOINED = [("record", "join", "side"), ("wait", "join", "main")]
FINISHED = [*FORKED, *JOINED, ("expand", "main")]


@pytest.mark.parametrize("way", fake_driver.WAYS)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("tile_rows", [0, 16])
def test_shrink_runs_beside_and_expand_behind_both(monkeypatch, way, early, tile_rows):
    fake_driver.choose_way(monkeypatch, way)
    case = Case(monkeypatch, tile_rows, early)
    both = Beside(case.side)
    for scale in (1.0, 0.5, 1.0):
        case.done.clear()
        pending = both.begin(case.x, case.a, case.b, case.plan, scale=scale)
        assert case.done == BEGUN
        y = case.y.clone()  # made meanwhile
        assert both.finish(pending, y) is y
        assert case.done == BEGUN + FINISHED
        want = reference(case.y, case.x, case.a, case.b, IDS, scale=scale)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", fake_driver.WAYS)
def test_the_peers_benchmark_times_the_halves_of_the_chosen_kernel(monkeypatch, way):
    """benchmarks/peers/dop_ops.py: each on the stream of the moment, expand behind a shrink that
    ran on another one."""
    fake_driver.choose_way(monkeypatch, way)
    case = Case(monkeypatch)
    stream = [Stream(case, "main", fake_driver.STREAM)]
    cuda = SimpleNamespace(current_stream=lambda: stream[0])
    y = case.y.clone()
    first, last, is_pair = dop_ops._halves(
        SimpleNamespace(cuda=cuda), [case.x], [y], [case.a], [case.b], case.plan
    )
    assert is_pair
    block = first(0)
    stream[0] = case.side
    last(0, block)
    assert case.done == [("shrink", "main"), ("expand", "side")]
    want = reference(case.y, case.x, case.a, case.b, IDS)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def test_strided_rows(monkeypatch):
    case = Case(monkeypatch)
    both = Beside(case.side)
    wide_x, wide_y = torch.zeros(len(IDS), 2 * WIDTH), torch.zeros(len(IDS), 2 * sum(OUTS))
    x, y = wide_x[:, :WIDTH], wide_y[:, : sum(OUTS)]
    x.copy_(case.x)
    y.copy_(case.y)
    both.finish(both.begin(x, case.a, case.b, case.plan), y)
    want = reference(case.y, case.x, case.a, case.b, IDS)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_split_is_done_at_the_end(monkeypatch):
    case = Case(monkeypatch)
    whole = fake_driver.kernel(0, len(OUTS))
    first, last = whole.launches
    reading = replace(whole, launches=(first, replace(last, arguments=(*last.arguments, "x"))))
    choice = Choice("key", "fake", 0, None, reading, "")
    monkeypatch.setattr(sources, "choose", lambda *_: choice)
    both = Beside(case.side)
    pending = both.begin(case.x, case.a, case.b, case.plan)
    assert not pending.tuned
    assert case.done == []
    seen = []
    monkeypatch.setattr(eager, "add_lora", lambda *call: seen.append(call))
    both.finish(pending, case.y)
    assert seen == [(case.y, case.x, case.a, case.b, case.plan, 1.0, None)]


def test_without_a_second_stream_or_a_gpu_it_is_add_lora():
    a, b = stacks(SLOTS, RANK, WIDTH, OUTS)
    x, y = rows(len(IDS), WIDTH, sum(OUTS))
    plan = ops.segment_plan(torch.tensor(IDS, dtype=torch.int32), slots=SLOTS)
    want = reference(y, x, a, b, IDS)
    both = Beside(None)
    both.finish(both.begin(x, a, b, plan), y)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def test_refusals_name_the_argument_and_launch_nothing(monkeypatch):
    case = Case(monkeypatch)
    both = Beside(case.side)
    with pytest.raises(DopError, match="x"):
        both.begin(case.x[:, 1:], case.a, case.b, case.plan)
    with pytest.raises(DopError, match="no gradient"):
        both.begin(case.x.clone().requires_grad_(), case.a, case.b, case.plan)
    assert case.done == []
    pending = both.begin(case.x, case.a, case.b, case.plan)
    with pytest.raises(DopError, match="y has shape"):
        both.finish(pending, case.y[:, 1:])
    with pytest.raises(DopError, match="no gradient"):
        both.finish(pending, case.y.clone().requires_grad_())
    assert case.done == BEGUN
    before = case.y.clone()
    both.finish(pending, case.y)
    assert case.done == BEGUN + FINISHED
    want = reference(before, case.x, case.a, case.b, IDS)
    torch.testing.assert_close(case.y.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", fake_driver.WAYS)
def test_a_shrink_that_fails_is_joined_all_the_same(monkeypatch, way):
    """A capture that is left unjoined cannot end."""
    fake_driver.choose_way(monkeypatch, way)
    case = Case(monkeypatch)
    both = Beside(case.side)
    pending = both.begin(case.x, case.a, case.b, case.plan)
    case.driver.code = 700
    before = case.y.clone()
    with pytest.raises(CudaError):
        both.finish(pending, case.y)
    assert case.done == [*BEGUN, *FORKED[:2], ("refused",), *JOINED]
    assert torch.equal(case.y, before)


def test_warming_loads_what_the_call_in_two_pieces_needs_and_launches_nothing(monkeypatch):
    case = Case(monkeypatch)
    asked = []
    real = eager.block_for

    def block_for(shape, plan, beside=False):
        asked.append(beside)
        return real(shape, plan, beside)

    monkeypatch.setattr(eager, "block_for", block_for)
    Beside(case.side).warm(case.x, case.a, case.b, case.plan)
    assert asked == [True]
    Beside(None).warm(case.x, case.a, case.b, case.plan)
    assert asked == [True]
    assert case.done == [("pause", "main")]  # its code is loaded by a launch
