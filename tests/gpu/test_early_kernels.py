"""Kernels that read their tables and A before they wait (PR dependent_launch 3), through dop.ops:
the same bits as plain launches, however closely writes of plans and weights stand before them."""

from __future__ import annotations

from functools import cache

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm")

from dop import ops  # noqa: E402
from dop.lowering.codegen import generate  # noqa: E402
from dop.measure.compile_cuda import compile_cuda  # noqa: E402
from dop.ops import launch, sources  # noqa: E402
from dop.ops.launch import DeviceKernel  # noqa: E402
from dop.ops.sources import Choice  # noqa: E402
from dop.ops.stacks import STACKS  # noqa: E402
from dop.space.generate import build_space  # noqa: E402
from dop.target import SM_90  # noqa: E402
from dop.workload import Workload  # noqa: E402

SLOTS, CALLS = 16, 200
FORMS = {
    "rows/wide_columns": (Workload("o", 4096, (4096,), 16, "bfloat16"), {}),
    "rows/early_lanes": (Workload("qkv", 4096, (4096, 1024, 1024), 64, "float16"), {}),
    "row_tiles/wide_columns": (Workload("o", 4096, (4096,), 16, "bfloat16"), {}),
    "small_tiles": (
        Workload("qkv", 4096, (4096, 1024, 1024), 32, "bfloat16"),
        {"tokens.tile_rows": 16, "expand.row_tiles": 1, "shrink.row_warps": 1},
    ),
}


@cache
def kernels(form: str) -> tuple[DeviceKernel, DeviceKernel]:
    """The same trace with early kernels and with plain launches."""
    workload, changes = FORMS[form]
    sketch = next(s for s in build_space(workload, SM_90).sketches if s.name.startswith(form))
    found = []
    for value in (3, 0):
        trace = sketch.bind({**sketch.default(), **changes, "expand.dependent": value})
        made = compile_cuda(generate(workload, trace, SM_90), "sm_90a")
        image = made.binary
        found.append(
            DeviceKernel(
                f"{form} {value}",
                "test",
                "",
                made.tile_rows,
                made.launches,
                made.workspaces,
                lambda image=image: image,
            )
        )
    assert [one.early for one in found[0].launches] == [True, False]
    return found[0], found[1]


class Case:
    """A layer whose calls are served by one of the two kernels."""

    def __init__(self, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("the kernels are for sm_90a")
        torch.manual_seed(0)
        self.patch = monkeypatch
        self.workload, _ = FORMS[form]
        self.early, self.plain = kernels(form)
        kind = getattr(torch, self.workload.dtype)
        w = self.workload

        def some(*size: int) -> torch.Tensor:
            return (torch.randn(*size, device="cuda") * size[-1] ** -0.5).to(kind)

        self.a = [some(SLOTS, w.rank, w.in_features) for _ in w.out_features]
        self.b = [some(SLOTS, out, w.rank) for out in w.out_features]
        self.others = [[some(*t.shape) for t in self.a] for _ in range(3)]
        self.tokens = 24
        self.x = some(self.tokens, w.in_features) * w.in_features**0.5
        self.y = some(self.tokens, w.total_out)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(-1, SLOTS, (CALLS, self.tokens), generator=generator)
        self.ids = ids.to(torch.int32).cuda()

    def use(self, kernel: DeviceKernel) -> None:
        torch.cuda.synchronize()
        launch.forget()
        STACKS.clear()
        choice = Choice("key", "cuda", self.tokens, None, kernel, "")
        self.patch.setattr(sources, "choose", lambda *_: choice)

    def plan(self, i: int, out=None):
        return ops.segment_plan(self.ids[i], slots=SLOTS, out=out)

    def same_bits(self, run) -> None:
        """run(y of each call) gives the same with both kernels; y of a call is its own."""
        results = []
        state = [t.clone() for t in self.a]
        for kernel in (self.early, self.plain):
            for stack, was in zip(self.a, state, strict=True):
                stack.copy_(was)
            self.use(kernel)
            ys = self.y.repeat(CALLS, 1, 1)
            run(ys)
            torch.cuda.synchronize()
            results.append(ys.view(torch.int16).cpu())
        early, plain = results
        assert not torch.equal(plain[0], self.y.view(torch.int16).cpu())
        wrong = (early != plain).flatten(1).any(1).nonzero().flatten().tolist()
        assert not wrong, f"calls {wrong[:10]} of {CALLS} differ"


@pytest.fixture(params=FORMS)
def case(request, monkeypatch):
    with torch.no_grad():
        yield Case(request.param, monkeypatch)
    launch.forget()


def test_calls_behind_each_other(case):
    def run(ys):
        plan = case.plan(0)
        for i in range(CALLS):
            ops.add_lora(ys[i], case.x, case.a, case.b, plan)

    case.same_bits(run)


def test_a_call_directly_behind_its_plan(case):
    def run(ys):
        plan = None
        for i in range(CALLS):
            plan = case.plan(i, plan)
            ops.add_lora(ys[i], case.x, case.a, case.b, plan)

    case.same_bits(run)


@pytest.mark.parametrize("replanned", [False, True])
def test_weights_rewritten_directly_before_a_call(case, replanned):
    def run(ys):
        plan = case.plan(0)
        for i in range(CALLS):
            if replanned:
                plan = case.plan(i, plan)
            if i % 3:
                for stack, other in zip(case.a, case.others[i % 3], strict=True):
                    stack.copy_(other)
            ops.add_lora(ys[i], case.x, case.a, case.b, plan)

    case.same_bits(run)


def test_ranks_of_the_call(case):
    ranks = [torch.randint(1, case.workload.rank + 1, (SLOTS,)).int().cuda() for _ in range(CALLS)]

    def run(ys):
        plan = case.plan(0)
        for i in range(CALLS):
            ops.add_lora(ys[i], case.x, case.a, case.b, plan, ranks=ranks[i])

    case.same_bits(run)


def test_graphs_of_plans_weights_and_calls(case):
    def run(ys):
        ids = case.ids[0].clone()
        plan = ops.segment_plan(ids, slots=SLOTS)
        ops.add_lora(ys[0].clone(), case.x, case.a, case.b, plan)
        y = case.y.clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.segment_plan(ids, slots=SLOTS, out=plan)
            for _ in range(5):
                ops.add_lora(y, case.x, case.a, case.b, plan)
            for stack in case.a:
                stack.mul_(-1)
            for _ in range(5):
                ops.add_lora(y, case.x, case.a, case.b, plan)
        for i in range(CALLS):
            ids.copy_(case.ids[i])
            y.copy_(case.y)
            if i % 3 == 0:
                case.a[0].copy_(case.others[i // 3 % 3][0])
            graph.replay()
            ys[i] = y

    case.same_bits(run)


def test_right_at_all(case):
    """Against float64, so that two equal mistakes are seen."""
    case.use(case.early)
    plan = case.plan(3)
    for _ in range(2):
        y = ops.add_lora(case.y.clone(), case.x, case.a, case.b, plan)
    ids = case.ids[3].long()
    want = case.y.double()
    offset = 0
    for a, b in zip(case.a, case.b, strict=True):
        v = torch.einsum("tk,trk->tr", case.x.double(), a.double()[ids.clamp(min=0)])
        update = torch.einsum("tr,tnr->tn", v, b.double()[ids.clamp(min=0)])
        want[:, offset : offset + b.shape[1]] += update * (ids >= 0)[:, None]
        offset += b.shape[1]
    error = float((y.double() - want).abs().max() / (want - case.y.double()).abs().max())
    assert error < 1e-2, error
