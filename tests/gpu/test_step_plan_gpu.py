"""Step plans on a GPU: prefixes of the plan kernel's tables, and one graph for many steps."""

from __future__ import annotations

import pytest
import torch

from dop import ops
from dop.integrations.step_plan import NO_ADAPTER, StepPlans, narrow
from dop.ops.plan import TILE_SIZES, TILE_TABLES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SLOTS = 9


def random_slots(tokens, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-1, SLOTS, (tokens,), generator=rng, dtype=torch.int32)


@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
@pytest.mark.parametrize("real", [1, 7, 60, 1000])
def test_a_prefix_is_what_a_plan_of_fewer_tokens_holds(tokens, real):
    if real > tokens:
        pytest.skip("more real tokens than rows")
    ids = torch.full((4096,), NO_ADAPTER, dtype=torch.int32, device="cuda")
    ids[:real] = random_slots(real).cuda()
    whole = ops.segment_plan(ids, slots=SLOTS)
    small = ops.segment_plan(ids[:tokens].clone(), slots=SLOTS)
    view = narrow(whole, tokens)
    used = int((ids >= 0).sum())
    assert torch.equal(view.table("token_slot"), small.table("token_slot"))
    assert torch.equal(view.table("row_index")[:used], small.table("row_index")[:used])
    for rows in TILE_SIZES:
        tiles = small.table("tile_rows", rows)
        assert torch.equal(view.table("tile_rows", rows), tiles)
        for name in TILE_TABLES:
            mine, other = view.table(name, rows), small.table(name, rows)
            assert torch.equal(mine[tiles > 0], other[tiles > 0])


@pytest.mark.parametrize("rows", [8, 64, 300])
def test_one_graph_serves_every_step_of_its_size(rows):
    rank, width, out = 16, 256, 512
    a = torch.randn(SLOTS, 1, rank, width, device="cuda").bfloat16() / 16
    b = torch.randn(SLOTS, 1, out, rank, device="cuda").bfloat16() / 4
    x = torch.randn(rows, width, device="cuda").bfloat16()
    y = torch.zeros(rows, out, device="cuda").bfloat16()
    plans = StepPlans(1024, SLOTS, rank, "cuda", small=64)
    plans.update(random_slots(rows, 99))
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ops.add_lora(y, x, [a], [b], plans.plan(rows))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            ops.add_lora(y, x, [a], [b], plans.plan(rows))
        for step, tokens in enumerate((rows, 1, rows // 2, rows - 1, 3)):
            slots = random_slots(tokens, step)
            for slot in range(SLOTS):
                plans.set_rank(slot, 1 + (slot + step) % rank)
            plans.update(slots)
            y.zero_()
            graph.replay()
            want = torch.zeros(rows, out, device="cuda")
            for row, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    r = plans.rank_list[slot]
                    want[row] = b[slot, 0, :, :r].float() @ (
                        a[slot, 0, :r].float() @ x[row].float()
                    )
            torch.testing.assert_close(
                y.float(), want, rtol=3e-2, atol=3e-2 * float(want.abs().max())
            )
            assert (y[tokens:] == 0).all()
