"""Plan tables against the numpy ones that kernels are tuned and tested with."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dop import ops
from dop.measure.plan import SlotFacts, make_plan
from dop.ops.plan import (
    ANY_RANK,
    TILE_SIZES,
    TILE_TABLES,
    SegmentPlan,
    buffer_size,
    fill_by_torch,
    layout,
    table_words,
    tile_count,
)


@st.composite
def batches(draw):
    slots = draw(st.integers(1, 40))
    tokens = draw(st.integers(0, 300))
    kind = draw(st.sampled_from([torch.int32, torch.int64]))
    few = draw(st.integers(1, slots))
    seed = draw(st.integers(0, 1 << 16))
    ids = np.random.default_rng(seed).integers(-2, few + 1, tokens)
    return slots, torch.from_numpy(ids).to(kind), draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(batches())
def test_tables_are_those_of_the_tuner(batch):
    slots, ids, with_facts = batch
    random = np.random.default_rng(7)
    ranks = random.integers(1, 65, slots).astype(np.int32)
    scales = random.random(slots).astype(np.float32)
    options = {}
    if with_facts:
        options = {"ranks": torch.from_numpy(ranks), "scale": torch.from_numpy(scales)}
    plan = ops.segment_plan(ids, slots=slots, **options)
    known = np.where((ids.numpy() >= 0) & (ids.numpy() < slots), ids.numpy(), -1).astype(np.int32)
    whole = SegmentPlan(torch.empty_like(plan.buffer), len(ids), slots)
    fill_by_torch(whole.buffer, ids, slots, options.get("ranks"), options.get("scale"), 1.0)
    assert torch.equal(whole.table("row_index"), plan.table("row_index"))
    facts = SlotFacts(ranks, scales) if with_facts else None
    rows = make_plan(known, 0, facts=facts).tables
    used = known >= 0
    np.testing.assert_array_equal(plan.table("token_slot"), known)
    for name in ("token_rank", "token_scale"):
        np.testing.assert_array_equal(plan.table(name)[used], rows[name][used])
    for size in TILE_SIZES:
        want = make_plan(known, size, facts=facts)
        tiles = tile_count(len(ids), size, slots)
        assert want.tiles <= tiles
        for name in TILE_TABLES:
            got = whole.table(name, size).numpy()
            assert len(got) == tiles
            np.testing.assert_array_equal(got[: want.tiles], want.tables[name])
        assert not whole.table("tile_rows", size)[want.tiles :].any()
        assert not whole.table("tile_slot", size)[want.tiles :].any()
        assert not whole.table("tile_row0", size)[want.tiles :].any()
        np.testing.assert_array_equal(plan.table("row_index"), want.tables["row_index"])


@given(st.integers(0, 5000), st.integers(1, 2000))
def test_layout(tokens, slots):
    places = layout(tokens, slots).places
    ends = sorted((offset, offset + length) for offset, length in places.values())
    assert all(before[1] <= after[0] for before, after in pairwise(ends))
    assert all(offset % 16 == 0 for offset, _ in ends)
    assert ends[-1][1] <= layout(tokens, slots).size == buffer_size(tokens, slots)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.sampled_from(TILE_SIZES))
def test_the_bound_holds_for_every_composition(segments, size):
    needed = sum(-(-rows // size) for rows in segments)
    assert needed <= tile_count(sum(segments), size, len(segments))


def test_refilling_in_place_keeps_addresses_and_counts():
    ids = torch.tensor([0, 1, 1, -1])
    plan = ops.segment_plan(ids, slots=3, adapters=2)
    address, words, batch = plan.buffer.data_ptr(), table_words(plan, 16), plan.batch
    again = ops.segment_plan(ids.flip(0), slots=3, ranks=[1, 2, 3], scale=0.5, out=plan, adapters=2)
    assert again is plan
    assert plan.buffer.data_ptr() == address
    assert table_words(plan, 16) == words
    assert plan.version == 2
    assert plan.batch == batch
    assert plan.table("token_slot").tolist() == [-1, 1, 1, 0]
    assert plan.table("token_rank")[1:].tolist() == [2, 2, 1]
    assert plan.table("token_scale")[1:].tolist() == [0.5] * 3
    ops.segment_plan(ids, slots=3, out=plan)
    assert plan.adapters is None
    assert plan.batch != batch


def test_rank_zero_is_an_adapter_that_adds_nothing():
    plan = ops.segment_plan(torch.tensor([0, 1]), slots=2, ranks=[0, 3], scale=2.0)
    assert plan.table("token_rank").tolist() == [1, 3]
    assert plan.table("token_scale").tolist() == [0.0, 2.0]
    fill_by_torch(plan.buffer, torch.tensor([0, 1]), 2, torch.tensor([0, 3]), None, 2.0)
    assert plan.table("tile_scale", 8)[:2].tolist() == [0.0, 2.0]
    unranked = ops.segment_plan(torch.tensor([0, 1]), slots=2)
    assert unranked.table("token_rank").tolist() == [ANY_RANK] * 2


def test_a_host_sequence_is_uploaded_once():
    ids = torch.tensor([0, 1])
    one = ops.segment_plan(ids, slots=2, ranks=[4, 8], scale=[1.0, 2.0])
    from dop.ops.plan import _UPLOADED

    before = len(_UPLOADED)
    ops.segment_plan(ids, slots=2, ranks=[4, 8], scale=[1.0, 2.0], out=one)
    assert len(_UPLOADED) == before


@pytest.mark.parametrize("size", [0, 16])
def test_words_lead_to_the_tables(size):
    plan = ops.segment_plan(torch.tensor([0, 1, 1]), slots=2)
    words = np.frombuffer(table_words(plan, size), np.uint64)
    names = ("token_slot", "token_rank", "token_scale")
    if size:
        names = (*TILE_TABLES, "row_index")
    assert words.tolist() == [plan.table(name, size).data_ptr() for name in names]
