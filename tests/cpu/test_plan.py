"""Segment plans: every row with an adapter is in exactly one tile of its own adapter."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dop.errors import ConfigError
from dop.measure.inputs import (
    awkward,
    copies,
    mixed_facts,
    stack_slots,
    turns,
    window_slots,
    windows,
)
from dop.measure.plan import ANY_RANK, PLAN_ADAPTERS, SlotFacts, make_plan, tile_bound
from dop.scenario import Scenario, named
from dop.workload import Workload

SLOTS = st.lists(st.integers(-1, 9), min_size=1, max_size=80)


@given(SLOTS, st.integers(1, 17), st.booleans())
def test_tiles_cover_every_adapter_row_once(slots, tile_rows, padded):
    plan = make_plan(slots, tile_rows, max_adapters=10 if padded else None)
    t = plan.tables
    assert sorted(t["row_index"].tolist()) == list(range(len(slots)))
    seen = []
    for slot, row0, rows in zip(t["tile_slot"], t["tile_row0"], t["tile_rows"], strict=True):
        assert 0 <= rows <= tile_rows
        members = t["row_index"][row0 : row0 + rows].tolist()
        assert len(members) == rows
        assert all(slots[row] == slot for row in members)
        seen += members
    assert sorted(seen) == [row for row, slot in enumerate(slots) if slot >= 0]
    floats = {name for name, table in t.items() if table.dtype == np.float32}
    assert floats == {"tile_scale"}
    assert all(table.dtype == np.int32 for name, table in t.items() if name not in floats)


@given(SLOTS, st.integers(1, 17))
def test_padded_plan_has_the_bound_and_empty_tiles_last(slots, tile_rows):
    plan = make_plan(slots, tile_rows, max_adapters=10)
    assert plan.tiles == len(plan.tables["tile_rows"]) == tile_bound(len(slots), tile_rows, 10)
    full = plan.tables["tile_rows"] > 0
    assert not np.any(full[1:] & ~full[:-1])


@given(SLOTS, st.integers(1, 17))
def test_exact_plan_has_no_empty_tile(slots, tile_rows):
    plan = make_plan(slots, tile_rows)
    assert (plan.tables["tile_rows"] > 0).all()
    assert plan.tiles == sum(-(-slots.count(slot) // tile_rows) for slot in set(slots) if slot >= 0)


def test_row_form_keeps_the_slots():
    plan = make_plan([3, -1, 0], 0, max_adapters=PLAN_ADAPTERS)
    assert plan.tiles == plan.tokens == 3
    assert plan.tables["token_slot"].tolist() == [3, -1, 0]


def test_batch_without_adapters_has_no_tiles():
    assert make_plan([-1, -1], 4).tiles == 0
    padded = make_plan([-1, -1], 4, max_adapters=2)
    assert padded.tiles == 2
    assert not padded.tables["tile_rows"].any()


def test_tiles_depend_on_the_token_count_only():
    sizes = {
        make_plan(window_slots(named(mix, 32), 64, 1)[0], 8, max_adapters=64).tiles
        for mix in ("distinct", "uniform", "skewed", "identical")
    }
    assert sizes == {tile_bound(32, 8, 64)}


def test_too_many_adapters_are_refused():
    with pytest.raises(ConfigError, match="4 adapters"):
        make_plan([0, 1, 2, 3], 2, max_adapters=1)


def test_windows_are_disjoint_and_larger_than_the_cache():
    workload = Workload("q", 256, (128, 64), 8, "float32")
    scenario = named("uniform", 16)
    cache = 1 << 20
    count = windows(workload, scenario, cache, 1000)
    slots = stack_slots(workload, [scenario], cache, 1000)
    rows = window_slots(scenario, slots, count)
    used = [set(r.tolist()) for r in rows]
    assert all(len(s) == scenario.adapters for s in used)
    assert len(set().union(*used)) == count * scenario.adapters
    assert count * workload.min_bytes(0, scenario.adapters) >= 2 * cache


GATE_UP = Workload("gate_up", 4096, (14336, 14336), 16, "bfloat16")
L2 = 50 << 20


@pytest.mark.parametrize(
    ("tokens", "wanted"), [(1, 32), (32, 32), (128, 13), (512, 4), (2048, 2), (1 << 16, 2)]
)
def test_copies_of_a_cold_batch_are_larger_than_the_cache_or_one_per_call(tokens, wanted):
    warm = named("identical", tokens)
    cold = replace(warm, cold=True)
    assert copies(GATE_UP, warm, L2, 32) == 1
    assert copies(GATE_UP, cold, L2, 32) == wanted
    size = wanted * tokens * (4096 + 2 * 14336) * 2
    assert size >= 2 * L2 or wanted == 32
    assert windows(GATE_UP, cold, L2, 32) == windows(GATE_UP, warm, L2, 32)


@pytest.mark.parametrize(("weights", "calls"), [(32, 32), (32, 7), (3, 6), (1, 4), (2, 4)])
def test_calls_of_a_warm_batch_take_each_window_in_turn(weights, calls):
    assert turns(weights, 1, calls) == [(n, 0) for n in range(min(weights, calls))]


def test_calls_of_a_cold_batch_take_each_window_and_each_copy_in_turn():
    assert turns(3, 2, 20) == [(0, 0), (1, 1), (2, 0), (0, 1), (1, 0), (2, 1)]
    assert turns(4, 2, 20) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert turns(1, 4, 4) == [(0, n) for n in range(4)]
    assert turns(32, 13, 32) == [(n, n % 13) for n in range(32)]
    assert turns(32, 32, 5) == [(n, n) for n in range(5)]


def test_windows_keep_bare_rows_and_segment_lengths():
    scenario = Scenario("recorded", (5, 2, 1), 3)
    for rows in window_slots(scenario, 20, 4):
        assert (rows == -1).sum() == 3
        counts = np.unique(rows[rows >= 0], return_counts=True)[1]
        assert sorted(counts.tolist(), reverse=True) == [5, 2, 1]


def runs(ids: Sequence[int]) -> int:
    """Runs of rows with the same adapter."""
    return 1 + sum(a != b for a, b in itertools.pairwise(ids))


def test_rows_of_prompts_lie_together_and_those_that_decode_do_not():
    for scenario in (named("uniform", 2048), Scenario("recorded", (900, 100, 7), 50)):
        ids = scenario.token_to_adapter(3)
        assert runs(ids) == scenario.adapters + (scenario.bare_rows > 0)
        assert sorted(ids.count(a) for a in set(ids) - {-1}) == sorted(scenario.segments)
        assert ids.count(-1) == scenario.bare_rows
        assert ids != scenario.token_to_adapter(4)
    for scenario in (named("uniform", 256), awkward(128)):
        assert runs(scenario.token_to_adapter(3)) > 2 * scenario.adapters
    assert awkward(128).tokens > 256  # in any order all the same: a tile's rows lie apart


@pytest.mark.parametrize("tile_rows", [0, 1, 4, 16, 64])
def test_awkward_batch_has_odd_segments_full_tiles_and_bare_rows(tile_rows):
    scenario = awkward(tile_rows)
    assert all(rows % 2 for rows in scenario.segments)
    assert scenario.bare_rows
    assert max(scenario.segments) > 2 * tile_rows
    if tile_rows == 0:
        assert scenario.tokens == 37


@given(SLOTS, st.integers(0, 17))
def test_ranks_and_scales_stand_beside_their_slot(slots, tile_rows):
    facts = SlotFacts(np.arange(1, 11, dtype=np.int32), np.arange(10, dtype=np.float32) / 4)
    plan = make_plan(slots, tile_rows, max_adapters=10, facts=facts)
    kind = "tile" if tile_rows else "token"
    ranks, scales = plan.tables[f"{kind}_rank"], plan.tables[f"{kind}_scale"]
    slot = plan.tables[f"{kind}_slot"]
    used = plan.tables["tile_rows"] > 0 if tile_rows else slot >= 0
    assert (ranks[used] == facts.ranks[slot[used]]).all()
    assert (scales[used] == facts.scales[slot[used]]).all()
    assert (ranks[~used] == ANY_RANK).all()
    assert (scales[~used] == 1).all()


def test_mixed_ranks_keep_the_update_at_order_one():
    """The gate's limit is relative to the update: a small one makes rounding y look wrong."""
    facts = mixed_facts(Workload("w", 64, (64,), 64, "bfloat16"), 100)
    assert facts.ranks.min() == 1
    assert facts.ranks.max() == 64
    assert (facts.scales < 0).any()
    np.testing.assert_allclose(facts.scales**2 * facts.ranks, 64, rtol=1e-5)
