"""Early kernels: launched as dependent ones only behind a plain launch that is known of."""

from __future__ import annotations

import fake_driver
import pytest
import torch
from sgmv_reference import reference, rows, stacks

from dop import ops
from dop.integrations.stacks import LayerStack
from dop.integrations.step_plan import StepPlans, narrow
from dop.measure.cuda_driver import CudaError
from dop.ops import api, derived, eager, settled
from dop.ops import plan as plans
from dop.ops.plan import SegmentPlan
from dop.ops.stacks import STACKS

SLOTS, RANK, WIDTH, OUTS = 4, 8, 16, (8, 4)
IDS = [1, -1, 3, 0, 0, 2]


class Case:
    """Stacks, a plan, and whether the first kernel of a call overlapped."""

    def __init__(self, monkeypatch) -> None:
        self.patch = monkeypatch
        self.driver = fake_driver.install(
            monkeypatch, (len(OUTS), RANK, WIDTH, OUTS, SLOTS), 0, early=True
        )
        self.a, self.b = stacks(SLOTS, RANK, WIDTH, OUTS)
        self.x, self.y = rows(len(IDS), WIDTH, sum(OUTS))
        self.plan = ops.segment_plan(torch.tensor(IDS, dtype=torch.int32), slots=SLOTS)

    def call(self, plan=None, **options) -> bool:
        y = self.y.clone()
        want = reference(y, self.x, self.a, self.b, IDS)
        before = len(self.driver.launches)
        ops.add_lora(y, self.x, self.a, self.b, plan or self.plan, **options)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
        first, second = self.driver.launches[before:]
        assert second[3]  # expand depends on shrink, however that was launched
        return first[3]

    def around(self, **facts) -> None:
        fake_driver.set_surroundings(self.patch, **facts)


# A replay has no launches to look at.
@pytest.fixture(params=[way for way in fake_driver.WAYS if way != "kept"])
def case(request, monkeypatch):
    fake_driver.choose_way(monkeypatch, request.param)
    return Case(monkeypatch)


def only_short(monkeypatch):
    def refuse(*_):
        raise AssertionError("the long path")

    monkeypatch.setattr(eager, "add_lora", refuse)


def test_the_first_call_is_plain_and_later_ones_overlap(case, monkeypatch):
    assert not case.call()
    only_short(monkeypatch)
    assert case.call()
    assert case.call()


CHANGES = {
    "all": lambda t: t.copy_(torch.randn_like(t)),
    "a slot": lambda t: t[2].normal_(),
    "rows of a slot": lambda t: t.detach()[1, :3].mul_(2.0),
}


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("one", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_change_of_a_makes_one_call_plain(case, monkeypatch, change, side, one, inference):
    case.call()
    only_short(monkeypatch)
    with torch.inference_mode(inference):
        CHANGES[change]((case.a, case.b)[side][one])
    # B is read by expand, behind the wait of shrink.
    assert case.call() is (side == 1)
    assert case.call()


def test_another_stream_is_plain_once(case):
    case.call()
    for stream in (78, 79, 78):
        case.around(stream=stream)
        assert not case.call()
        assert case.call()


def test_what_torch_does_not_count_is_plain(case):
    with torch.inference_mode():
        case.a[1] = torch.randn_like(case.a[1])
    for _ in range(3):
        assert not case.call()


def test_a_plan_made_by_hand_is_plain(case):
    case.call()
    own = SegmentPlan(case.plan.buffer.clone(), len(IDS), SLOTS)
    for _ in range(2):
        assert not case.call(own)
    assert case.call()
    ops.segment_plan(torch.tensor(IDS, dtype=torch.int32), slots=SLOTS, out=own)
    assert case.call(own)


def test_views_of_a_plan_are_as_settled_as_it_is(case):
    assert narrow(case.plan, 3).settled
    assert not narrow(SegmentPlan(case.plan.buffer, len(IDS), SLOTS), 3).settled
    steps = StepPlans(16, SLOTS, RANK, "cpu")
    steps.update(torch.tensor(IDS, dtype=torch.int32))
    assert steps.plan(8).settled


def test_a_capture_takes_an_eager_note_but_leaves_none(case, monkeypatch):
    case.call()
    case.around(capturing=True, stream=99)
    monkeypatch.setattr(settled, "seen", {"overlapped": 0, "plain": 0})
    assert case.call()  # a graph starts when all of this is complete
    case.a[0].mul_(1.0)  # captured, too
    assert not case.call()
    assert settled.seen == {"overlapped": 1, "plain": 1}
    assert case.call()
    case.around(capturing=True, stream=98)
    assert not case.call()
    case.around()
    assert not case.call()  # the captured launches may never have run
    assert case.call()
    case.around(stream=99)
    assert not case.call()


def test_a_refused_launch_is_no_plain_launch(case):
    case.call()
    case.a[0].mul_(1.0)
    case.driver.code = 700
    with pytest.raises(CudaError):
        ops.add_lora(case.y.clone(), case.x, case.a, case.b, case.plan)
    case.driver.code = 0
    assert not case.call()
    assert case.call()


@pytest.mark.parametrize("one", [0, 1])
def test_what_takes_the_place_of_a_dead_stack_is_new(case, one):
    """It may lie where the dead one lay and have changed as often."""
    case.call()
    for _ in range(3):
        case.a[one] = None
        assert id(case.a[0]) not in STACKS
        case.a[one] = torch.randn(SLOTS, RANK, WIDTH)
        assert not case.call()
        assert case.call()


def test_tables_of_a_call_are_settled_when_they_are_made(case, monkeypatch):
    order = []
    gather = torch.Tensor.copy_
    monkeypatch.setattr(derived, "fence", lambda buffer: order.append("fence"))
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda *args, **more: order.append("write") or gather(*args, **more)
    )
    ranks = torch.full((SLOTS,), RANK, dtype=torch.int32)
    case.call(ranks=ranks)
    assert order[-1] == "fence"
    assert order.count("fence") == 1
    case.call(ranks=ranks)
    assert order.count("fence") == 1


def test_a_plan_is_fenced_behind_the_kernel_that_fills_it(monkeypatch):
    order = []

    class Kernels:
        def fill_plan(self, *_, **__):
            order.append("fill")

        def fence(self, *_):
            order.append("fence")

    class Buffer:
        is_cuda = True
        device = torch.device("cuda", 0)

        def data_ptr(self):
            return 0

    monkeypatch.setattr(plans, "_plan_kernels", Kernels)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    plans.fill(Buffer(), torch.tensor(IDS), SLOTS, None, None, 1.0)
    assert order == ["fill", "fence"]


def test_traced_calls_overlap_if_the_plan_was_made_outside(case, monkeypatch):
    seen = []
    monkeypatch.setattr(
        eager, "add_lora", lambda y, x, a, b, plan, *_: seen.append(plan.settled) or y
    )
    monkeypatch.setattr(api, "_short_path", lambda *_: False)
    ids = torch.tensor(IDS, dtype=torch.int32)

    def outside(y, x, plan):
        return ops.add_lora(y, x, case.a, case.b, plan)

    def inside(y, x, ids):
        return ops.add_lora(y, x, case.a, case.b, ops.segment_plan(ids, slots=SLOTS))

    torch.compile(outside, backend="eager", fullgraph=True)(case.y.clone(), case.x, case.plan)
    torch.compile(inside, backend="eager", fullgraph=True)(case.y.clone(), case.x, ids)
    assert seen == [True, False]


def test_stacks_of_integrations_are_counted_wherever_they_are_made():
    with torch.inference_mode():
        stack = LayerStack(2, RANK, WIDTH, 4, torch.float32, torch.device("cpu"))
        before = settled.stamp(5, [stack.a])
        stack.write(1, torch.ones(RANK, WIDTH), torch.ones(4, RANK))
    assert before is not None
    assert settled.stamp(5, [stack.a]) != before


def test_a_stamp_is_stream_and_counts():
    a = [torch.zeros(2), torch.zeros(2)]
    first = settled.stamp(5, a)
    a[1].add_(1)
    assert settled.stamp(5, a) != first
    assert settled.stamp(6, a)[8:] == settled.stamp(5, a)[8:]
