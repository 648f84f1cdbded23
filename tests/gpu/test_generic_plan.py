"""The plan kernel on a GPU, against torch and the numpy plan that measurements use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dop.measure.plan import make_plan
from dop.ops.generic.plan import annotate_plan, fill_plan
from dop.ops.plan import ANY_RANK, TILE_SIZES, SegmentPlan, fill_by_torch, layout

DEVICE = "cuda"


def by_kernel(ids, slots, ranks=None, scales=None, scale=1.0):
    buffer = torch.full((layout(len(ids), slots).size + 64,), -77, dtype=torch.int32, device=DEVICE)
    fill_plan(
        buffer.data_ptr(),
        ids.data_ptr(),
        ids_are_64_bit=ids.dtype == torch.int64,
        tokens=len(ids),
        slots=slots,
        ordinal=torch.cuda.current_device(),
        stream=torch.cuda.current_stream().cuda_stream,
        ranks=0 if ranks is None else ranks.data_ptr(),
        max_rank=ANY_RANK,
        scales=0 if scales is None else scales.data_ptr(),
        scale=scale,
    )
    torch.cuda.synchronize()
    assert (buffer[-64:] == -77).all()
    return buffer[:-64]


def same_tables(got, want, tokens, slots):
    for name, (offset, length) in layout(tokens, slots).places.items():
        kind = torch.float32 if "scale" in name else torch.int32
        part = slice(offset, offset + length)
        assert torch.equal(got[part].view(kind), want[part].view(kind)), name


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("slots", [1, 8, 255, 256, 1024, 4096])
@pytest.mark.parametrize("tokens", [1, 31, 64, 257, 1024, 8192, 20000, 65536])
def test_tables_are_torchs(tokens, slots, kind):
    generator = torch.Generator().manual_seed(tokens + slots)
    ids = torch.randint(-1, slots + 1, (tokens,), generator=generator).to(kind).to(DEVICE)
    ranks = (torch.arange(slots, dtype=torch.int32) % 19).to(DEVICE)
    scales = torch.linspace(-1, 2, slots).to(DEVICE)
    want = torch.zeros(layout(tokens, slots).size, dtype=torch.int32, device=DEVICE)
    fill_by_torch(want, ids, slots, ranks, scales, 1.0)
    got = by_kernel(ids, slots, ranks, scales)
    same_tables(got, want, tokens, slots)
    same_tables(by_kernel(ids, slots, ranks, scales), got, tokens, slots)


@pytest.mark.parametrize("tile_rows", TILE_SIZES)
def test_tiles_are_those_that_are_measured(tile_rows):
    ids = torch.randint(-1, 9, (700,), dtype=torch.int32)
    plan = SegmentPlan(by_kernel(ids.to(DEVICE), 9).cpu(), 700, 9)
    want = make_plan(ids.numpy(), tile_rows)
    assert np.array_equal(plan.table("row_index"), want.tables["row_index"])
    for name in ("tile_slot", "tile_row0", "tile_rows"):
        table = plan.table(name, tile_rows).numpy()
        assert np.array_equal(table[: want.tiles], want.tables[name])
        assert not table[want.tiles :].any()


def test_annotate():
    ids = torch.randint(-1, 40, (300,), dtype=torch.int32, device=DEVICE)
    source = by_kernel(ids, 40, scale=2.0)
    ranks = torch.arange(40, dtype=torch.int32, device=DEVICE)
    scales = torch.linspace(0.5, 1.5, 40, device=DEVICE)
    target = source.clone()
    annotate_plan(
        source.data_ptr(),
        target.data_ptr(),
        tokens=300,
        slots=40,
        ordinal=torch.cuda.current_device(),
        stream=torch.cuda.current_stream().cuda_stream,
        ranks=ranks.data_ptr(),
        scales=scales.data_ptr(),
    )
    want = by_kernel(ids, 40, ranks, scales * 2.0)
    same_tables(target, want, 300, 40)


@pytest.mark.timed
def test_time(capsys):
    """Predicted: 64 tokens at most 6 us, 8,192 at most 25 us (graph replay, launch included)."""
    for tokens, slots, limit in ((64, 64, 6.0), (64, 4096, 12.0), (8192, 64, 25.0)):
        ids = torch.randint(0, slots, (tokens,), dtype=torch.int32, device=DEVICE)
        by_kernel(ids, slots)
        graph, calls = torch.cuda.CUDAGraph(), 50
        buffer = torch.zeros(layout(tokens, slots).size, dtype=torch.int32, device=DEVICE)
        with torch.cuda.graph(graph):
            for _ in range(calls):
                fill_plan(
                    buffer.data_ptr(),
                    ids.data_ptr(),
                    ids_are_64_bit=False,
                    tokens=tokens,
                    slots=slots,
                    ordinal=torch.cuda.current_device(),
                    stream=torch.cuda.current_stream().cuda_stream,
                )
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        time_us = begin.elapsed_time(end) * 1e3 / calls
        with capsys.disabled():
            print(f"plan of {tokens} tokens, {slots} slots: {time_us:.2f} us")
        assert time_us < 2 * limit
