"""The generic SGMV kernels, compiled for the host and run thread by thread, against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from generic_host import run

from dop.measure.artifact import evaluate
from dop.ops.generic import kernels
from dop.ops.plan import SegmentPlan, fill_by_torch, layout, tile_count

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {F16: 2e-3, BF16: 1.5e-2, F32: 1e-5}
GUARD = 32


def near(tensors):
    """Copies in one allocation, 16-byte aligned, and their distances as the kernels take them."""
    sizes = [-(-t.numel() // 16) * 16 for t in tensors]
    memory = torch.zeros(sum(sizes) + 16, dtype=tensors[0].dtype)
    at = (-memory.data_ptr() % 32) // memory.element_size()
    views = []
    for tensor, size in zip(tensors, sizes, strict=True):
        view = memory[at : at + tensor.numel()].view(tensor.shape)
        views.append(view.copy_(tensor))
        at += size
    shifts = [(v.data_ptr() - views[0].data_ptr()) // 16 for v in views[1:]]
    return views, [*shifts, 0, 0][:2]


class Problem:
    def __init__(self, ids, width, outs, rank, dtype, *, slots=4, ranks=None, seed=0):
        torch.manual_seed(seed)
        self.ids = torch.tensor(ids, dtype=torch.int32)
        tokens = len(ids)
        self.call = kernels.Call(width, tuple(outs), rank, dtype, tokens, 8)
        self.x = torch.randn(tokens, width).to(dtype)
        a = [torch.randn(slots, rank, width).to(dtype) / width**0.5 for _ in outs]
        b = [torch.randn(slots, out, rank).to(dtype) / rank**0.5 for out in outs]
        (self.a, self.a_shifts), (self.b, self.b_shifts) = near(a), near(b)
        self.whole = torch.randn(tokens * sum(outs) + 2 * GUARD).to(dtype)
        self.before = self.whole.clone()
        self.ranks = ranks
        table = None if ranks is None else torch.tensor(ranks, dtype=torch.int32)
        self.scales = torch.linspace(0.5, 2.0, slots)
        self.slots = slots
        buffer = torch.zeros(layout(tokens, slots).size, dtype=torch.int32)
        fill_by_torch(buffer, self.ids, slots, table, self.scales, 1.0)
        self.plan = SegmentPlan(buffer, tokens, slots)

    @property
    def y(self):
        return self.whole[GUARD:-GUARD].view(len(self.ids), -1)

    def expected(self):
        y = self.before[GUARD:-GUARD].view(len(self.ids), -1).double().clone()
        for t, slot in enumerate(self.ids.tolist()):
            if 0 <= slot < self.slots:
                rank = self.call.rank if self.ranks is None else self.ranks[slot]
                update = [
                    self.x[t].double() @ a[slot, :rank].double().T @ b[slot, :, :rank].double().T
                    for a, b in zip(self.a, self.b, strict=True)
                ]
                y[t] += self.scales[slot].double() * torch.cat(update)
        return y

    def launch(self, launches, numbers, splits, tile_rows=0, seed=0, stacks=None, v=None):
        tokens = len(self.ids)
        tiles = tile_count(tokens, tile_rows, self.slots) if tile_rows else tokens
        call = self.call
        size = splits * call.slices * call.rank * tokens
        v = torch.full((size + 2 * GUARD,), float("nan")) if v is None else v
        a, b = stacks or (self.a[0], self.b[0])
        tensors = {"x": self.x, "a": a, "b": b, "y_in": self.y, "y": self.y, "v": v[GUARD:]}
        for name in ("token_slot", "token_rank", "token_scale", "row_index"):
            tensors[name] = self.plan.table(name)
        for name in ("tile_slot", "tile_row0", "tile_rows", "tile_rank", "tile_scale"):
            if tile_rows:
                tensors[name] = self.plan.table(name, tile_rows)
        values = {name: ctypes.c_int64(t.data_ptr()) for name, t in tensors.items()}
        shifts = zip(("a1", "a2", "b1", "b2"), (*self.a_shifts, *self.b_shifts), strict=True)
        values |= {f"{name}_shift": ctypes.c_int64(shift) for name, shift in shifts}
        numbers = {**numbers, "tokens": tokens, "tiles": tiles}
        values |= {name: ctypes.c_int64(number) for name, number in numbers.items()}
        for one in launches:
            grid = [evaluate(extent, tokens=tokens, tiles=tiles) for extent in one.grid]
            arguments = [values[name] for name in one.arguments]
            threads, smem = one.block[0], one.dynamic_smem_bytes
            run(one.name, grid, threads, smem, arguments, seed)
        assert v[:GUARD].isnan().all()
        assert v[GUARD + size :].isnan().all()
        return v[GUARD : GUARD + size]

    def check(self):
        assert torch.equal(self.whole[:GUARD], self.before[:GUARD])
        assert torch.equal(self.whole[-GUARD:], self.before[-GUARD:])
        want = self.expected()
        error = (self.y.double() - want).abs().max() / want.abs().max()
        assert error < TOLERANCE[self.call.dtype], float(error)
        before = self.before[GUARD:-GUARD].view(len(self.ids), -1)
        for t, slot in enumerate(self.ids.tolist()):
            if not 0 <= slot < self.slots:
                assert torch.equal(self.y[t].view(torch.uint8), before[t].view(torch.uint8))


MIXED = [2, -1, 0, 2, 3, 9, 2]
ROW_CASES = [
    (F16, 16, 2048 + 64, [520]),
    (BF16, 16, 64, [96, 40, 24]),
    (F32, 8, 48, [33]),
    (BF16, 1, 70, [9]),
    (F16, 13, 129, [67, 5]),
    (BF16, 24, 200, [130]),
    (F32, 33, 65, [31, 17, 70]),
    (BF16, 64, 1200, [140]),
    (F16, 129, 61, [37]),
    (BF16, 128, 256, [72]),
]


@pytest.mark.parametrize(("dtype", "rank", "width", "outs"), ROW_CASES)
def test_row_form(dtype, rank, width, outs):
    problem = Problem(MIXED, width, outs, rank, dtype)
    launches, splits, numbers = kernels.row_kernel(problem.call)
    problem.launch(launches, numbers, splits)
    problem.check()


def test_row_form_with_ranks_of_its_own_reads_nothing_behind_them():
    problem = Problem(MIXED, 96, [50], 24, BF16, ranks=[3, 24, 16, 9])
    for a, b in zip(problem.a, problem.b, strict=True):
        for slot, rank in enumerate(problem.ranks):
            a[slot, rank:] = float("nan")
            b[slot, :, -(-rank // 8) * 8 :] = float("nan")
    launches, splits, numbers = kernels.row_kernel(problem.call)
    problem.launch(launches, numbers, splits)
    problem.check()


def test_splits_are_summed():
    problem = Problem([1], 8192 + 8, [20], 8, F16)
    launches, splits, numbers = kernels.row_kernel(problem.call)
    assert splits > 2
    problem.launch(launches, numbers, splits)
    problem.check()


def test_order_of_threads_changes_nothing():
    results = []
    for seed in range(3):
        problem = Problem(MIXED, 300, [100], 16, BF16)
        launches, splits, numbers = kernels.row_kernel(problem.call)
        problem.launch(launches, numbers, splits, seed=seed)
        results.append(problem.whole.clone())
    assert all(torch.equal(one, results[0]) for one in results)


def test_arrays_of_pointers():
    problem = Problem(MIXED, 80, [40], 8, F16)
    a = torch.tensor([slot.data_ptr() for slot in problem.a[0]])
    b = torch.tensor([slot.data_ptr() for slot in problem.b[0]])
    launches, splits, numbers = kernels.row_kernel(problem.call, indirect=True)
    problem.launch(launches, numbers, splits, stacks=(a, b))
    problem.check()


def test_shrink_alone_is_zero_where_nothing_is_to_be_added():
    problem = Problem(MIXED, 80, [40, 8], 12, BF16, ranks=[12, 5, 7, 0])
    numbers = kernels.constants(problem.call, splits=1, fill=True)
    v = problem.launch([kernels.shrink_rows(problem.call, 1)], numbers, 1).view(2, 7, 12)
    for t, slot in enumerate(MIXED):
        rank = max(1, problem.ranks[slot]) if 0 <= slot < 4 else 0
        assert not v[:, t, rank:].any()
        for s in range(2):
            if rank:
                want = problem.x[t].double() @ problem.a[s][slot, :rank].double().T
                torch.testing.assert_close(v[s, t, :rank].double(), want, rtol=1e-5, atol=1e-5)


TILE_CASES = [
    (BF16, 16, 16, 128, [64]),
    (F16, 64, 16, 256, [96, 40]),
    (BF16, 16, 13, 129, [67, 5, 30]),
    (F16, 16, 64, 2048, [136]),
    (BF16, 64, 72, 320, [200]),
    (F16, 64, 1, 40, [8]),
    (BF16, 16, 129, 72, [70, 70]),
    (F16, 16, 24, 4096 + 8, [64]),
]
CROWD = [2, -1, 0, 2, 3, 9, 2] + [1] * 70 + [0] * 17 + [2] * 5


@pytest.mark.parametrize(("dtype", "tile_rows", "rank", "width", "outs"), TILE_CASES)
def test_tile_form(dtype, tile_rows, rank, width, outs):
    problem = Problem(CROWD, width, outs, rank, dtype)
    launches, splits, numbers = kernels.tile_kernel(problem.call, tile_rows, problem.slots)
    problem.launch(launches, numbers, splits, tile_rows)
    problem.check()


@pytest.mark.parametrize("tile_rows", [16, 64])
def test_tile_form_with_ranks_of_its_own_reads_nothing_behind_them(tile_rows):
    problem = Problem(CROWD, 96, [50], 40, BF16, ranks=[3, 40, 16, 9])
    for a, b in zip(problem.a, problem.b, strict=True):
        for slot, rank in enumerate(problem.ranks):
            a[slot, rank:] = float("nan")
            b[slot, :, rank:] = float("nan")
    launches, splits, numbers = kernels.tile_kernel(problem.call, tile_rows, problem.slots)
    problem.launch(launches, numbers, splits, tile_rows)
    problem.check()


def test_tile_form_sums_splits_and_runs_of_columns():
    problem = Problem(CROWD[:40], 2048, [300], 16, F16)
    for splits, width in ((3, 64), (2, 192)):
        problem.whole.copy_(problem.before)
        numbers = kernels.constants(problem.call, splits=splits) | {"run": width}
        launches = [
            kernels.shrink_tiles(problem.call, 16, splits),
            kernels.expand_tiles(problem.call, 16, width),
        ]
        problem.launch(launches, numbers, splits, 16)
        problem.check()


def test_tile_form_is_the_same_in_any_order_of_threads():
    results = []
    for seed in range(3):
        problem = Problem(CROWD, 300, [100], 16, BF16)
        launches, splits, numbers = kernels.tile_kernel(problem.call, 64, problem.slots)
        problem.launch(launches, numbers, splits, 64, seed=seed)
        results.append(problem.whole.clone())
    assert all(torch.equal(one, results[0]) for one in results)


def test_tile_form_takes_arrays_of_pointers():
    problem = Problem(CROWD, 80, [40], 8, F16)
    a = torch.tensor([slot.data_ptr() for slot in problem.a[0]])
    b = torch.tensor([slot.data_ptr() for slot in problem.b[0]])
    launches, splits, numbers = kernels.tile_kernel(problem.call, 16, 4, indirect=True)
    problem.launch(launches, numbers, splits, 16, stacks=(a, b))
    problem.check()


def test_tensor_cores_keep_more_of_v_than_one_operand_holds():
    """v goes to the tensor cores as two parts: the error is that of y's own rounding."""
    problem = Problem([0] * 20, 64, [64], 16, BF16)
    problem.before.zero_()
    problem.whole.zero_()
    launches, splits, numbers = kernels.tile_kernel(problem.call, 16, problem.slots)
    problem.launch(launches, numbers, splits, 16)
    want = problem.expected()
    rounded = want.to(BF16).double()
    error, least = (problem.y.double() - want).norm(), (rounded - want).norm()
    assert error < 1.02 * least


@pytest.mark.parametrize(
    ("tokens", "adapters", "rank", "dtype", "want"),
    [
        (1, 1, 16, F16, 0),
        (64, 64, 16, BF16, 0),
        (64, 1, 16, BF16, 0),
        (64, 1, 64, BF16, 64),
        (64, 8, 64, BF16, 0),
        (128, 8, 128, F16, 16),
        (64, None, 64, BF16, 0),
        (2048, 4, 16, BF16, 64),
        (2048, None, 16, BF16, 64),
        (2048, 1, 512, BF16, 16),
        (2048, 1, 4096, BF16, 0),
        (2048, 4, 16, F32, 0),
    ],
)
def test_choice_of_the_form(tokens, adapters, rank, dtype, want):
    call = kernels.Call(4096, (4096,), rank, dtype, tokens, 132)
    assert kernels.best_tile_rows(call, 16 if tokens > 64 else 64, adapters) == want


@pytest.mark.parametrize("overlap", [False, True])
def test_only_the_expand_of_a_pair_is_dependent(overlap):
    call = kernels.Call(4096, (4096,), 64, BF16, 64, 132, overlap)
    for launches, _, _ in (kernels.row_kernel(call), kernels.tile_kernel(call, 16, 4)):
        assert [launch.dependent for launch in launches] == [False, overlap]
    assert not kernels.expand_rows(call, v="x").dependent
