"""Segment plans: the integer tables by which a kernel finds the adapter of each row.

A plan is made once per batch. The row form names a slot per token. The tile form sorts the
tokens by slot and cuts each segment into tiles of at most `tile_rows` rows, so that the rows of
a tile share one adapter. Rows without an adapter are in no tile; in the row form they carry -1.
Beside the slot stand the adapter's rank and scale, so that a kernel's loads do not wait for one
another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dop.errors import ConfigError
from dop.measure.artifact import ROW_TABLES, TILE_TABLES
from dop.scenario import NO_ADAPTER, Scenario

Table = NDArray[np.int32] | NDArray[np.float32]

ANY_RANK = 1 << 30
"""Rank of an adapter that fills its stack, whatever the stack's rank."""
PLAN_ADAPTERS = 64
"""Slots of a serving engine that has many; see `most_adapters`."""


@dataclass(frozen=True)
class Plan:
    """Tables of one batch.

    Attributes:
        tile_rows: rows per tile; 0 for the row form.
        tokens: rows of x and y.
        tiles: tiles launched; equal to tokens in the row form.
        tables: by name, int32 but for the scales (float32). Row form: token_slot, token_rank,
            token_scale [tokens]. Tile form: tile_slot, tile_row0, tile_rows, tile_rank,
            tile_scale [tiles] and row_index [tokens].
    """

    tile_rows: int
    tokens: int
    tiles: int
    tables: dict[str, Table]


def tile_bound(tokens: int, tile_rows: int, adapters: int) -> int:
    """Most tiles that a batch of `tokens` rows and at most `adapters` adapters can need.

    It does not depend on how the rows are spread, so that a CUDA graph captured for a number
    of tokens is right for every batch of that size.
    """
    return min(tokens, -(-tokens // tile_rows) + min(tokens, adapters))


def most_adapters(scenario: Scenario) -> int:
    """Adapters a batch may hold at most, which bounds the tiles launched on a GPU (`tile_bound`).

    As many as an engine with many slots has; in a cold batch no more than are there, as in an
    engine whose slots are all in use. So a batch and its cold twin are the ends of what there is.
    """
    return scenario.adapters if scenario.cold else max(scenario.adapters, PLAN_ADAPTERS)


@dataclass(frozen=True)
class SlotFacts:
    """What is known of each slot.

    Attributes:
        ranks: int32 [slots], rank of the adapter in each slot, at most the stack's.
        scales: float32 [slots], by which its update is multiplied.
    """

    ranks: NDArray[np.int32]
    scales: NDArray[np.float32]


def make_plan(
    token_slot: Sequence[int] | NDArray[np.int32],
    tile_rows: int,
    *,
    max_adapters: int | None = None,
    facts: SlotFacts | None = None,
) -> Plan:
    """Plan of a batch.

    Args:
        token_slot: slot of each row's adapter, -1 for none.
        tile_rows: rows per tile, 0 for the row form.
        max_adapters: None for exactly the tiles that are needed (CPU); else the number of tiles
            is `tile_bound` and the tiles behind the needed ones are empty (CUDA).
        facts: ranks and scales; None for full ranks and scale 1.

    Raises:
        ConfigError: the batch holds more adapters than `max_adapters`.
    """
    slots = np.ascontiguousarray(token_slot, dtype=np.int32)
    tokens = len(slots)
    if tile_rows == 0:
        return Plan(0, tokens, tokens, _with_facts({"token_slot": slots}, facts, slots >= 0))
    order = np.argsort(np.where(slots == NO_ADAPTER, np.iinfo(np.int32).max, slots), kind="stable")
    used, counts = np.unique(slots[slots != NO_ADAPTER], return_counts=True)
    per_segment = -(-counts // tile_rows)
    needed = int(per_segment.sum())
    tiles = needed if max_adapters is None else tile_bound(tokens, tile_rows, max_adapters)
    if tiles < needed:
        raise ConfigError(
            f"a batch with {len(used)} adapters in a plan for {max_adapters}.",
            "Raise the number of adapters a batch may hold.",
        )
    tables: dict[str, Table] = {name: np.zeros(tiles, np.int32) for name in TILE_TABLES[:3]}
    nth = np.arange(needed) - np.repeat(np.cumsum(per_segment) - per_segment, per_segment)
    starts = np.repeat(np.cumsum(counts) - counts, per_segment)
    tables["tile_slot"][:needed] = np.repeat(used, per_segment)
    tables["tile_row0"][:needed] = starts + nth * tile_rows
    left = np.repeat(counts, per_segment) - nth * tile_rows
    tables["tile_rows"][:needed] = np.minimum(left, tile_rows)
    tables["row_index"] = order.astype(np.int32)
    return Plan(tile_rows, tokens, tiles, _with_facts(tables, facts, tables["tile_rows"] > 0))


def _with_facts(
    tables: dict[str, Table], facts: SlotFacts | None, used: NDArray[np.bool_]
) -> dict[str, Table]:
    """The tables with those of ranks and scales, in the kernels' order."""
    slot_name = next(iter(tables))
    kind, slots = slot_name.partition("_")[0], tables[slot_name]
    ranks = np.full(len(slots), ANY_RANK, np.int32)
    scales = np.ones(len(slots), np.float32)
    if facts is not None:
        ranks[used] = facts.ranks[slots[used]]
        scales[used] = facts.scales[slots[used]]
    found = {**tables, f"{kind}_rank": ranks, f"{kind}_scale": scales}
    return {name: found[name] for name in (ROW_TABLES if kind == "token" else TILE_TABLES)}
