"""The generic kernels on a GPU, through the operator, against float64."""

from __future__ import annotations

import pytest
import torch

from dop import ops
from dop.ops import sources
from dop.ops.generic import kernels

DEVICE = "cuda"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {F16: 2e-3, BF16: 1.5e-2, F32: 2e-5}
FORMS = {"rows": 0, "tiles16": 16, "tiles64": 64}


@pytest.fixture(autouse=True)
def only_generic(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", [sources.from_generic])
    ops.forget()
    yield
    monkeypatch.undo()
    ops.forget()


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    rows = FORMS[request.param]
    monkeypatch.setattr(kernels, "best_tile_rows", lambda call, slots, adapters: rows)
    ops.forget()
    return request.param


class Problem:
    def __init__(self, ids, width, outs, rank, dtype, *, slots, ranks=None, seed=0):
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=DEVICE)

        self.ids = torch.as_tensor(ids, dtype=torch.int64, device=DEVICE)
        tokens = len(self.ids)
        self.x = normal(tokens, width).to(dtype)
        self.a = [(normal(slots, rank, width) / width**0.5).to(dtype) for _ in outs]
        self.b = [(normal(slots, out, rank) / rank**0.5).to(dtype) for out in outs]
        self.y = normal(tokens, sum(outs)).to(dtype)
        self.before = self.y.clone()
        self.scale = torch.linspace(0.5, 2.0, slots, device=DEVICE)
        self.slots, self.rank, self.ranks = slots, rank, ranks
        self.plan = ops.segment_plan(self.ids, slots=slots, ranks=ranks, scale=self.scale)

    def run(self):
        return ops.add_lora(self.y, self.x, self.a, self.b, self.plan)

    def expected(self):
        want = self.before.double()
        for slot in self.ids.unique().tolist():
            if 0 <= slot < self.slots:
                rows = self.ids == slot
                rank = self.rank if self.ranks is None else self.ranks[slot]
                pairs = zip(self.a, self.b, strict=True)
                x = self.x[rows].double()
                update = [
                    x @ a[slot, :rank].double().T @ b[slot, :, :rank].double().T for a, b in pairs
                ]
                want[rows] += self.scale[slot].double() * torch.cat(update, 1)
        return want

    def check(self):
        self.y.copy_(self.before)
        self.run()
        first = self.y.clone()
        want = self.expected()
        error = float((first.double() - want).abs().max() / want.abs().max())
        assert error < TOLERANCE[self.x.dtype], error
        bare = (self.ids < 0) | (self.ids >= self.slots)
        assert torch.equal(first[bare].view(torch.uint8), self.before[bare].view(torch.uint8))
        self.y.copy_(self.before)
        self.run()
        assert torch.equal(first.view(torch.uint8), self.y.view(torch.uint8)), "two runs differ"


def mixed(tokens, slots, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, slots, (tokens,), generator=generator)
    ids[: tokens // 3] = slots // 2
    return ids


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("rank", [1, 2, 3, 7, 8, 12, 13, 16, 24, 31, 33, 48, 64, 72, 100, 128, 129])
def test_ranks(form, dtype, rank):
    Problem(mixed(75, 6), 1024, [512, 128, 128], rank, dtype, slots=6).check()


@pytest.mark.parametrize("rank", [1, 5, 16, 64, 129])
def test_float32(rank):
    Problem(mixed(75, 6), 515, [300, 77], rank, F32, slots=6).check()


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(
    ("width", "outs"),
    [(1, [1]), (7, [3, 5]), (129, [67, 5, 30]), (1000, [1001]), (4095, [33]), (72, [4097, 9]),
     (14336, [4096]), (4096, [4096, 1024, 1024])],
)  # fmt: skip
def test_widths(form, dtype, width, outs):
    Problem(mixed(40, 4), width, outs, 16, dtype, slots=4).check()


def test_ranks_of_their_own(form):
    problem = Problem(mixed(90, 5), 520, [264], 64, BF16, slots=5, ranks=[8, 64, 1, 33, 16])
    for a, b in zip(problem.a, problem.b, strict=True):
        for slot, rank in enumerate(problem.ranks):
            a[slot, rank:] = float("nan")
            b[slot, :, -(-rank // 8) * 8 :] = float("nan")
    problem.check()


@pytest.mark.parametrize(
    ("name", "ids", "slots"),
    [
        ("none", [-1] * 33, 3),
        ("one row", [2], 3),
        ("out of range", [5, 99, 0, -7, 1 << 30], 3),
        ("one adapter 4096 times", [1] * 4096, 2),
        ("1024 slots", list(range(1024)), 1024),
        ("few of 1024 slots", [1023, 0, 512] * 30, 1024),
    ],
)
def test_compositions(form, name, ids, slots):
    Problem(ids, 264, [136], 16, BF16, slots=slots).check()


def test_no_tokens():
    Problem([], 64, [32], 8, F16, slots=2).run()


def test_strided_x_and_y(form):
    problem = Problem(mixed(48, 4), 256, [128], 16, F16, slots=4)
    x = torch.randn(48, 3 * 256, device=DEVICE).to(F16)
    y = torch.randn(48, 2 * 128, device=DEVICE).to(F16)
    problem.x, problem.y = x[:, 256:512], y[:, 128:]
    problem.before = problem.y.clone()
    left = y[:, :128].clone()
    problem.check()
    assert torch.equal(y[:, :128], left)


@pytest.mark.parametrize("tokens", [1, 16, 64, 512, 2048])
@pytest.mark.parametrize("adapters", [1, 4, None])
def test_the_form_that_is_chosen(tokens, adapters):
    problem = Problem(mixed(tokens, 4), 1024, [1024], 64, BF16, slots=4)
    hint = ops.segment_plan(problem.ids, slots=4, scale=problem.scale, adapters=adapters)
    problem.plan = hint
    problem.check()


def test_a_captured_graph_serves_other_compositions(form):
    problem = Problem(mixed(64, 8), 512, [256], 16, BF16, slots=8)
    ids = problem.ids.clone()
    plan = problem.plan

    def call():
        ops.segment_plan(ids, slots=8, scale=problem.scale, out=plan)
        problem.run()

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for seed in range(10):
        ids.copy_(mixed(64, 8, seed).to(DEVICE))
        problem.ids = ids.clone()
        problem.y.copy_(problem.before)
        graph.replay()
        replayed = problem.y.clone()
        want = problem.expected()
        assert float((replayed.double() - want).abs().max() / want.abs().max()) < 1.5e-2
        problem.y.copy_(problem.before)
        call()
        assert torch.equal(replayed.view(torch.uint8), problem.y.view(torch.uint8))


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_shrink_and_expand_alone(dtype):
    problem = Problem(mixed(50, 5), 200, [120, 40], 20, dtype, slots=5)
    v = ops.sgmv_shrink(problem.x, problem.a, problem.plan)
    assert v.shape == (2, 50, 20)
    bare = problem.ids < 0
    assert not v[:, bare].any()
    slot = int(problem.ids[0])
    want = problem.x[0].double() @ problem.a[1][slot].double().T
    torch.testing.assert_close(v[1, 0].double(), want, rtol=1e-4, atol=1e-4)
    ops.sgmv_expand(problem.y, v, problem.b, problem.plan)
    want = problem.expected()
    error = float((problem.y.double() - want).abs().max() / want.abs().max())
    assert error < TOLERANCE[dtype]
