"""Which batches a candidate is checked and timed with; numbers only, no tensors.

Weights of one workload lie in one stack per slice with more slots than any batch uses. Each
timed call takes the next *window* of slots, disjoint from the last, until the windows together
are larger than the last-level cache: as in a model with many layers, weights come from memory,
while x, y and the small tables stay in the cache, as they do behind the layer before. In a cold
batch x and y come from memory too: each call takes the next of several *copies* of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dop.measure.plan import SlotFacts
from dop.scenario import NO_ADAPTER, Scenario, Shuffled
from dop.workload import Workload

CACHE_FACTOR = 2
"""Bytes of weights, and of x and y, that rotate, in units of the last-level cache."""
MIN_COPIES = 2
MIN_SLOTS = 16
AWKWARD_SHORT = (7, 5, 3, 1, 1)
AWKWARD_BARE = 7


def adapter_bytes(workload: Workload) -> int:
    """Bytes of one adapter's weights, all slices."""
    return replace(workload, beside=False).min_bytes(0, 1)


def windows(workload: Workload, scenario: Scenario, cache_bytes: int, limit: int) -> int:
    """Disjoint sets of slots over which calls rotate."""
    one_call = max(1, scenario.adapters) * adapter_bytes(workload)
    return _turns_beyond(cache_bytes, one_call, 1, limit)


def copies(workload: Workload, scenario: Scenario, cache_bytes: int, limit: int) -> int:
    """Copies of x and y over which calls rotate; 1 if they are to stay in the cache."""
    if not scenario.cold:
        return 1
    widths = workload.in_features + workload.total_out
    one_call = scenario.tokens * widths * workload.element_bytes
    return _turns_beyond(cache_bytes, one_call, MIN_COPIES, limit)


def _turns_beyond(cache_bytes: int, one_call: int, least: int, limit: int) -> int:
    """How many calls' bytes together are CACHE_FACTOR times the cache, within bounds."""
    return min(max(least, -(-CACHE_FACTOR * cache_bytes // one_call)), limit)


def turns(windows: int, copies: int, calls: int) -> list[tuple[int, int]]:
    """Window of weights and copy of x and y of each call, of `calls` at most: behind the last the
    first follows."""
    count = min(math.lcm(windows, copies), calls)
    return [(call % windows, call % copies) for call in range(count)]


def stack_slots(
    workload: Workload, scenarios: Sequence[Scenario], cache_bytes: int, limit: int
) -> int:
    """Slots of the weight stacks: enough for every scenario's windows."""
    needs = (windows(workload, s, cache_bytes, limit) * s.adapters for s in scenarios)
    return max(MIN_SLOTS, *needs)


def window_slots(
    scenario: Scenario, slots: int, count: int, seed: int = 0
) -> list[NDArray[np.int32]]:
    """Slot of each row, [tokens], for each of `count` windows.

    Adapters lie scattered over the stack and requests are shuffled, both by `seed`. Windows are
    disjoint as long as the stack has room, and wrap around behind it.
    """
    order = np.random.default_rng(seed).permutation(slots).astype(np.int32)
    adapters = np.array(scenario.token_to_adapter(seed), np.int32)
    bare = adapters == NO_ADAPTER
    found = []
    for window in range(count):
        rows = order[(window * scenario.adapters + adapters) % slots]
        rows[bare] = NO_ADAPTER
        found.append(rows)
    return found


def awkward(tile_rows: int) -> Scenario:
    """The composition every candidate must survive: odd lengths, a segment of two full tiles and
    one row, single rows, and rows without adapter, in any order. 37 rows in the row form."""
    longest = 13 if tile_rows <= 6 else 2 * tile_rows + 1
    return Shuffled("recorded", (longest, *AWKWARD_SHORT), AWKWARD_BARE)


def mixed_facts(workload: Workload, slots: int) -> SlotFacts:
    """Ranks from 1 to the stack's and scales of both signs, by which candidates are checked.

    A lower rank has a larger scale, so that every update is of order 1 like y: if it were much
    smaller, rounding y alone would look like an error of the update.
    """
    slot = np.arange(slots)
    ranks = (workload.rank - slot * 5 % workload.rank).astype(np.int32)
    scales = np.where(slot % 3 == 1, -1.0, 1.0) * np.sqrt(workload.rank / ranks)
    return SlotFacts(ranks, scales.astype(np.float32))
