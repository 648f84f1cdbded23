"""The plan kernel, its text compiled for the host and run thread by thread, against torch."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from generic_host import address, run

from dop.measure.plan import make_plan
from dop.ops.generic.plan import ANNOTATE_PARAMS, ANY_RANK, PLAN_PARAMS, shared_bytes, threads
from dop.ops.plan import TILE_SIZES, SegmentPlan, fill_by_torch, layout

GUARD = 64


def run_kernel(ids, slots, ranks=None, scales=None, scale=1.0, seed=0, block=0):
    """The plan's buffer by the kernel, with poison before and guards behind."""
    tokens = len(ids)
    size = layout(tokens, slots).size
    memory = torch.full((size + 2 * GUARD,), -77, dtype=torch.int32)
    block = block or threads(tokens, slots)
    params = PLAN_PARAMS.pack(
        ids.data_ptr(),
        address(ranks),
        address(scales),
        memory.data_ptr() + 4 * GUARD,
        ids.dtype == torch.int64,
        tokens,
        slots,
        ANY_RANK,
        scale,
    )
    values = [ctypes.create_string_buffer(params)]
    run("dop_plan", (1, 1, 1), block, shared_bytes(tokens, block), values, seed)
    assert (memory[:GUARD] == -77).all()
    assert (memory[GUARD + size :] == -77).all()
    return memory[GUARD : GUARD + size]


def expected(ids, slots, ranks=None, scales=None, scale=1.0):
    buffer = torch.zeros(layout(len(ids), slots).size, dtype=torch.int32)
    fill_by_torch(buffer, ids, slots, ranks, scales, scale)
    return buffer


def same_tables(got, want, tokens, slots):
    for name, (offset, length) in layout(tokens, slots).places.items():
        kind = torch.float32 if "scale" in name else torch.int32
        part = slice(offset, offset + length)
        assert torch.equal(got[part].view(kind), want[part].view(kind)), name


def mixed(tokens, slots, seed=0, missing=0.2, kind=torch.int32):
    random = np.random.default_rng(seed)
    ids = random.integers(0, max(1, slots), tokens)
    ids[random.random(tokens) < missing] = -1
    return torch.from_numpy(ids).to(kind)


CASES = {
    "one": (torch.tensor([3], dtype=torch.int32), 5),
    "none has an adapter": (torch.full((40,), -1, dtype=torch.int32), 7),
    "one adapter": (torch.zeros(300, dtype=torch.int64), 1),
    "last slot": (torch.full((130,), 254, dtype=torch.int32), 255),
    "two passes begin": (mixed(200, 256), 256),
    "distinct": (torch.randperm(257, dtype=torch.int64), 257),
    "out of range": (torch.tensor([9, -5, 2, 1 << 20, 3, 2**31 - 1], dtype=torch.int32), 9),
    "out of range, 64 bits": (torch.tensor([1 << 32, -(1 << 40), 0, 1]), 2),
    "warps with several chunks": (mixed(3000, 12, kind=torch.int64), 12),
    "many slots": (mixed(1500, 4096), 4096),
    "sorted already": (torch.arange(512, dtype=torch.int32) // 7, 80),
}


@pytest.mark.parametrize("name", CASES)
def test_tables_are_torchs(name):
    ids, slots = CASES[name]
    ranks = torch.arange(slots, dtype=torch.int32) % 19 if slots else None
    scales = torch.linspace(-1, 2, slots) if slots else None
    got = run_kernel(ids, slots, ranks, scales)
    same_tables(got, expected(ids, slots, ranks, scales), len(ids), slots)


def test_no_slots():
    plan = SegmentPlan(run_kernel(mixed(33, 3), 0), 33, 0)
    assert (plan.table("token_slot") == -1).all()
    assert torch.equal(plan.table("row_index"), torch.arange(33, dtype=torch.int32))
    for rows in TILE_SIZES:
        assert not plan.table("tile_rows", rows).any()


def test_without_ranks_and_scales():
    ids = mixed(77, 6)
    same_tables(run_kernel(ids, 6, scale=0.5), expected(ids, 6, scale=0.5), 77, 6)


@pytest.mark.parametrize("slots", [40, 300])
def test_more_tokens_than_shared_memory_holds(slots):
    ids = mixed(16_500, slots)
    ranks = torch.arange(slots, dtype=torch.int32) % 5
    same_tables(run_kernel(ids, slots, ranks), expected(ids, slots, ranks), 16_500, slots)


@pytest.mark.parametrize("tile_rows", TILE_SIZES)
def test_tiles_are_those_that_are_measured(tile_rows):
    ids = mixed(700, 9, seed=3)
    plan = SegmentPlan(run_kernel(ids, 9), 700, 9)
    want = make_plan(ids.numpy(), tile_rows)
    assert np.array_equal(plan.table("row_index"), want.tables["row_index"])
    for name in ("tile_slot", "tile_row0", "tile_rows"):
        table = plan.table(name, tile_rows).numpy()
        assert np.array_equal(table[: want.tiles], want.tables[name])
        assert not table[want.tiles :].any()


@pytest.mark.parametrize("block", [128, 256, 512, 1024])
def test_any_block_and_any_order_of_threads_give_the_same(block):
    ids = mixed(600, 20, seed=1)
    want = expected(ids, 20)
    for seed in range(3):
        same_tables(run_kernel(ids, 20, seed=seed, block=block), want, 600, 20)


def test_annotate_rewrites_ranks_and_scales_only():
    ids, slots = mixed(90, 11), 11
    source = expected(ids, slots, scale=2.0)
    ranks = torch.arange(slots, dtype=torch.int32)
    scales = torch.linspace(0.5, 1.5, slots)
    target = source.clone()
    params = ANNOTATE_PARAMS.pack(
        source.data_ptr(), target.data_ptr(), address(ranks), address(scales), 90, slots, 3.0
    )
    run("dop_plan_annotate", (2, 1, 1), 256, 0, [ctypes.create_string_buffer(params)])
    want = expected(ids, slots, ranks, scales * 6.0)
    exact = SimpleNamespace(got=SegmentPlan(target, 90, slots), want=SegmentPlan(want, 90, slots))
    for name in ("token_slot", "row_index", "token_rank"):
        assert torch.equal(exact.got.table(name), exact.want.table(name)), name
    torch.testing.assert_close(exact.got.table("token_scale"), exact.want.table("token_scale"))
    for rows in TILE_SIZES:
        assert torch.equal(exact.got.table("tile_rank", rows), exact.want.table("tile_rank", rows))
        torch.testing.assert_close(
            exact.got.table("tile_scale", rows), exact.want.table("tile_scale", rows)
        )
