"""Plans of an engine's steps: prefixes, padding, levels, captured graphs."""

from __future__ import annotations

import pytest
import torch

from dop import ops
from dop.integrations import step_plan
from dop.integrations.step_plan import NO_ADAPTER, StepPlans, narrow, slots_of
from dop.ops.plan import ROW_TABLES, TILE_SIZES, TILE_TABLES

SLOTS = 5


def random_slots(tokens, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-1, SLOTS, (tokens,), generator=rng, dtype=torch.int32)


@pytest.mark.parametrize("tokens", [1, 7, 33, 200])
@pytest.mark.parametrize("real", [0, 1, 7, 30])
def test_a_prefix_is_what_a_plan_of_fewer_tokens_holds(tokens, real):
    if real > tokens:
        pytest.skip("more real tokens than rows")
    ids = torch.full((256,), NO_ADAPTER, dtype=torch.int32)
    ids[:real] = random_slots(real)
    ranks = torch.tensor([1, 2, 4, 8, 16], dtype=torch.int32)
    whole = ops.segment_plan(ids, slots=SLOTS, ranks=ranks, scale=2.0)
    small = ops.segment_plan(ids[:tokens], slots=SLOTS, ranks=ranks, scale=2.0)
    view = narrow(whole, tokens)
    used = int((ids >= 0).sum())
    assert torch.equal(view.table("token_slot"), small.table("token_slot"))
    assert torch.equal(view.table("row_index")[:used], small.table("row_index")[:used])
    for rows in TILE_SIZES:
        tiles = small.table("tile_rows", rows)
        assert torch.equal(view.table("tile_rows", rows), tiles)
        for name in TILE_TABLES:
            mine, other = view.table(name, rows), small.table(name, rows)
            assert mine.shape == other.shape
            assert torch.equal(mine[tiles > 0], other[tiles > 0])
    assert {view.table(name).shape for name in ROW_TABLES} == {(tokens,)}


def run(plans, rows, slots):
    """y of a call over `rows` rows, and what it should be."""
    rng = torch.Generator().manual_seed(1)
    a = torch.randn(SLOTS, 8, 16, generator=rng)
    b = torch.randn(SLOTS, 24, 8, generator=rng)
    x = torch.randn(rows, 16, generator=rng)
    y = torch.zeros(rows, 24)
    ops.add_lora(y, x, a, b, plans.plan(rows))
    want = torch.zeros_like(y)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            rank = plans.rank_list[slot]
            want[row] = b[slot, :, :rank] @ (a[slot, :rank] @ x[row])
    return y, want


def test_levels_take_turns():
    plans = StepPlans(256, SLOTS, 8, "cpu", small=32)
    plans.set_rank(2, 3)
    for step, (tokens, rows) in enumerate([(5, 8), (100, 100), (32, 32), (1, 256), (300, 301)]):
        slots = random_slots(tokens, step)
        plans.update(slots)
        got, want = run(plans, rows, slots)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert plans.capacity == 512


def test_fewer_rows_than_tokens_are_refused():
    plans = StepPlans(64, SLOTS, 8, "cpu", small=16)
    plans.update(random_slots(10))
    with pytest.raises(ValueError, match="9 rows"):
        plans.plan(9)


def test_captured_levels_are_filled_in_every_step_that_they_may_serve(monkeypatch):
    plans = StepPlans(64, SLOTS, 8, "cpu", small=16)
    plans.update(random_slots(10, 0))
    state = {"capturing": True}
    monkeypatch.setattr(step_plan, "capturing", lambda _: state["capturing"])
    small, large = plans.plan(12), plans.plan(40)  # the large level was not filled by `update`
    for view in (small, large):
        assert torch.equal(view.table("token_slot")[:10], random_slots(10, 0))
    state["capturing"] = False
    for seed in (1, 2):
        slots = random_slots(6, seed)
        plans.update(slots)  # a replay makes no call
        for view in (small, large):
            table = view.table("token_slot")
            assert torch.equal(table[:6], slots)
            assert (table[6:] == NO_ADAPTER).all()


def test_the_tables_stay_where_they_are():
    plans = StepPlans(64, SLOTS, 8, "cpu", small=16)
    plans.update(random_slots(10, 0))
    first = plans.plan(16).buffer.data_ptr()
    plans.update(random_slots(3, 1))
    assert plans.plan(16).buffer.data_ptr() == first


def test_hints_are_rounded_and_left_out_where_a_graph_serves_every_mix():
    plans = StepPlans(64, SLOTS, 8, "cpu", small=16)
    plans.update(torch.tensor([0, 1, 2, -1], dtype=torch.int32))
    assert plans.plan(16).adapters is None
    assert plans.plan(20).adapters == 4
    hinted = StepPlans(64, SLOTS, 8, "cpu", small=16, hint_small=True)
    hinted.update(torch.tensor([0, 1, 2, -1], dtype=torch.int32))
    assert hinted.plan(16).adapters == 4


def test_scales_and_ranks_are_read_anew():
    plans = StepPlans(64, SLOTS, 8, "cpu")
    scales = torch.ones(SLOTS)
    plans.use_scales(scales)
    slots = torch.tensor([0, 1], dtype=torch.int32)
    plans.update(slots)
    scales[1] = 3.0
    plans.set_rank(0, 2)
    plans.set_rank(1, 99)  # clamped to the stack's
    plans.update(slots)
    table = plans.plan(2)
    assert table.table("token_scale").tolist() == [1.0, 3.0]
    assert table.table("token_rank").tolist() == [2, 8]


def test_slots_of():
    ids = (5, 5, 0, 9, 9, 9, 0, 5)
    assert slots_of(ids, {5: 1, 9: 0}).tolist() == [1, 1, -1, 0, 0, 0, -1, 1]
    assert slots_of((), {}).numel() == 0
    with pytest.raises(KeyError):
        slots_of((4,), {5: 1})


def test_ranks_are_written_again_for_an_adapter_that_enters():
    plans = StepPlans(16, 3, 8, "cpu")
    plans.set_rank(0, 4)
    plans.update(torch.tensor([0], dtype=torch.int32))
    plans._ranks.zero_()  # as after a deep sleep
    plans.set_rank(0, 4, again=True)
    plans.update(torch.tensor([0], dtype=torch.int32))
    assert plans.plan(1).table("token_rank").tolist() == [4]
