"""Segment plans: made once per forward pass, on the device, shared by all layers.

All tables of a plan lie in one int32 buffer, so that a plan can be refilled in place between
replays of a CUDA graph. Where each table lies depends on the numbers of tokens and slots only.

    token_slot, token_rank, token_scale [tokens]     the row form: slot of each token, or -1
    row_index [tokens]                               tokens sorted by slot, those without one last
    tile_slot, tile_row0, tile_rows, tile_rank, tile_scale [tiles]   for each of TILE_SIZES
    scratch                                          of the plan kernel

Tiles are runs of at most so many rows of one adapter, row_index[tile_row0:tile_row0+tile_rows];
the number of tiles is a bound that holds for every composition (`tile_count`), and the tiles that
a batch does not need have 0 rows. Scales are float32, stored by their bits. On a CPU, where nothing
reads them, the tables of tiles are zero.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from dop.errors import ConfigError, DopError, ShapeError

TILE_SIZES = (8, 16, 32, 48, 64, 80, 128)
"""Rows per tile for which a plan holds tables."""

ANY_RANK = 1 << 30
"""Rank in a plan for which nobody gave ranks: no stack is as high."""

ALIGN = 16
"""Tables begin at multiples of 64 bytes."""

SCRATCH_TABLES = 2
"""Room behind the tables, in tables of tokens."""

ROW_TABLES = ("token_slot", "token_rank", "token_scale")
TILE_TABLES = ("tile_slot", "tile_row0", "tile_rows", "tile_rank", "tile_scale")
SCALES = ("token_scale", "tile_scale")


def tile_count(tokens: int, tile_rows: int, slots: int) -> int:
    """Tiles that are enough for every batch of so many tokens and slots."""
    return tokens // tile_rows + min(tokens, slots)


@dataclass(frozen=True)
class Layout:
    """Where the tables of a plan lie.

    Attributes:
        tokens: rows of the batch.
        slots: adapters in a weight stack.
        places: (offset, length) of each table in elements; a table of tiles is named with its
            tile size, e.g. "tile_slot/16".
        size: length of the buffer.
    """

    tokens: int
    slots: int
    places: dict[str, tuple[int, int]]
    size: int


@lru_cache(maxsize=16384)
def layout(tokens: int, slots: int) -> Layout:
    """Layout of the plans for so many tokens and slots."""
    lengths = dict.fromkeys((*ROW_TABLES, "row_index"), tokens)
    for rows in TILE_SIZES:
        tiles = tile_count(tokens, rows, slots)
        lengths |= {f"{name}/{rows}": tiles for name in TILE_TABLES}
    places, offset = {}, 0
    for name, length in lengths.items():
        places[name] = (offset, length)
        offset += -(-length // ALIGN) * ALIGN
    return Layout(tokens, slots, places, buffer_size(tokens, slots))


def buffer_size(tokens: Any, slots: int) -> Any:
    """Length of a plan's buffer; tokens may be symbolic."""

    def padded(length: Any) -> Any:
        return (length + ALIGN - 1) // ALIGN * ALIGN

    used = torch.sym_min(tokens, slots)  # type: ignore[no-untyped-call]
    tiles = sum(len(TILE_TABLES) * padded(tokens // rows + used) for rows in TILE_SIZES)
    return (len(ROW_TABLES) + 1 + SCRATCH_TABLES) * padded(tokens) + tiles


UNNUMBERED = -1
_BATCHES: dict[Any, int] = {}


def batch_number(tokens: int, slots: int, adapters: int | None) -> int:
    """A small number for what a launch depends on."""
    key = (tokens, slots, adapters)
    found = _BATCHES.get(key)
    return _BATCHES.setdefault(key, len(_BATCHES)) if found is None else found


class SegmentPlan:
    """Which adapter each row uses, in the forms that kernels read. Made by `segment_plan`.

    Attributes:
        buffer: int32 [layout.size], all tables.
        tokens: rows of x and y.
        slots: adapters in the weight stacks.
        adapters: distinct adapters of the batch if the caller knew it, else None; a hint.
        has_ranks: true ranks were given; without them every adapter has its stack's rank.
        is_plain: neither ranks nor scales were given.
        version: counts the fillings.
        batch: a small number; plans for the same tokens, slots and adapters share it.
        words: addresses of the tables as launches take them, by tile rows.
        derived: tables of calls with ranks or scales of their own, see derived.py.
        segments: the rows of each adapter, for CPU tensors, see cpu.py.
        in_graph: it was last filled while a CUDA graph was captured, so its content may change
            without a call.
        settled: a plain launch stands behind those that wrote the tables, see settled.py.
    """

    def __init__(
        self,
        buffer: Tensor,
        tokens: int,
        slots: int,
        adapters: int | None = None,
        has_ranks: bool = False,
        in_graph: bool = False,
        settled: bool = False,
    ) -> None:
        self.buffer = buffer
        self.tokens = tokens
        self.slots = slots
        self.adapters = adapters
        self.has_ranks = has_ranks
        self.is_plain = False
        self.in_graph = in_graph
        self.settled = settled
        self.version = 0
        # A traced plan is never launched itself, and its numbers may be symbols.
        traced = torch.compiler.is_dynamo_compiling() or type(tokens) is not int
        self.batch = UNNUMBERED if traced else batch_number(tokens, slots, adapters)
        self.words: dict[int, bytes] = {}
        self.derived: dict[Any, Any] = {}
        self.segments: Any = None

    def refilled(
        self, adapters: int | None, has_ranks: bool, *, is_plain: bool, in_graph: bool
    ) -> None:
        """Notes that the tables are new."""
        if adapters != self.adapters:
            self.adapters = adapters
            self.batch = batch_number(self.tokens, self.slots, adapters)
        self.has_ranks = has_ranks
        self.is_plain = is_plain
        self.in_graph = in_graph
        self.settled = True
        self.version += 1

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.buffer.device

    @property
    def layout(self) -> Layout:
        """Where each table lies in the buffer."""
        return layout(self.tokens, self.slots)

    def table(self, name: str, tile_rows: int = 0) -> Tensor:
        """View of a table by name: int32, or float32 for scales.

        Args:
            name: e.g. "token_slot" or "tile_rows".
            tile_rows: one of TILE_SIZES for tables of tiles.
        """
        key = f"{name}/{tile_rows}" if name in TILE_TABLES else name
        offset, length = self.layout.places[key]
        part = self.buffer[offset : offset + length]
        return part.view(torch.float32) if name in SCALES else part

    def __repr__(self) -> str:
        hint = "" if self.adapters is None else f", adapters={self.adapters}"
        ranks = ", ranks" if self.has_ranks else ""
        return f"SegmentPlan(tokens={self.tokens}, slots={self.slots}{hint}{ranks}, {self.device})"


def table_words(plan: SegmentPlan, tile_rows: int) -> bytes:
    """Addresses of the plan's tables in the order that launches hold them: ROW_TABLES, or
    TILE_TABLES and row_index."""
    base = plan.buffer.data_ptr()
    places = plan.layout.places
    if tile_rows:
        keys = [*(f"{name}/{tile_rows}" for name in TILE_TABLES), "row_index"]
    else:
        keys = list(ROW_TABLES)
    return struct.pack(f"={len(keys)}Q", *(base + 4 * places[key][0] for key in keys))


def plain_words(plan: SegmentPlan, tile_rows: int) -> bytes:
    """`table_words`, remembered."""
    words = plan.words.get(tile_rows)
    if words is None:
        words = plan.words[tile_rows] = table_words(plan, tile_rows)
    return words


def check_capacity(plan: SegmentPlan, tokens: int, slots: int, device: torch.device) -> None:
    """Refuses to refill a plan that was made for another size.

    Raises:
        ShapeError: the plan holds another number of tokens or slots, or is on another device.
    """
    if (plan.tokens, plan.slots) != (tokens, slots) or plan.buffer.device != device:
        raise ShapeError(
            f"out is a plan of {plan.tokens} tokens and {plan.slots} slots on {plan.device}; "
            f"given {tokens} tokens and {slots} slots on {device}.",
            "Refill a plan of the same size (pad token_to_adapter with -1), or make a new one.",
        )


def fill(
    buffer: Tensor,
    token_to_adapter: Tensor,
    slots: int,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> None:
    """Fills a plan's buffer on its device, without waiting for it, and settles it.

    Args:
        buffer: int32 [layout.size].
        token_to_adapter: int32 or int64 [tokens]; what is outside 0..slots-1 is no adapter.
        slots: adapters in the weight stacks.
        ranks: int32 [slots] true ranks, or None.
        scales: float32 [slots], or None for `scale` everywhere.
        scale: the scale without `scales`.
    """
    if not buffer.is_cuda:
        buffer.zero_()
    else:
        kernels = _plan_kernels()
        if kernels is not None:
            ids = token_to_adapter.contiguous()
            kernels.fill_plan(
                buffer.data_ptr(),
                ids.data_ptr(),
                ids_are_64_bit=ids.dtype == torch.int64,
                tokens=ids.shape[0],
                slots=slots,
                ordinal=buffer.device.index,
                stream=torch._C._cuda_getCurrentRawStream(buffer.device.index),
                ranks=0 if ranks is None else ranks.data_ptr(),
                max_rank=ANY_RANK,
                scales=0 if scales is None else scales.data_ptr(),
                scale=scale,
            )
            fence(buffer)
            return
    fill_by_torch(buffer, token_to_adapter, slots, ranks, scales, scale, with_tiles=buffer.is_cuda)
    fence(buffer)


def fence(written: Tensor) -> None:
    """A plain launch behind the kernels that wrote tables: what comes behind it may read them
    before it waits for anything, see settled.py. Nothing on a CPU."""
    if not written.is_cuda:
        return
    index = written.device.index
    if not pause(index, torch._C._cuda_getCurrentRawStream(index)):
        torch.empty(1, device=written.device).fill_(1.0)  # a kernel of torch's; zeros are none


def pause(device: int, stream: int) -> bool:
    """Launches a kernel that does nothing; False where the shipped binaries are missing."""
    kernels = _plan_kernels()
    if kernels is not None:
        kernels.fence(device, stream)
    return kernels is not None


@cache
def _plan_kernels() -> Any:
    """The module of the plan kernels; None in an installation without the shipped binaries."""
    try:
        from dop.ops.generic import loader, plan

        loader.index()
    except (ImportError, DopError):
        return None
    return plan


def fill_by_torch(
    buffer: Tensor,
    token_to_adapter: Tensor,
    slots: int,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
    *,
    with_tiles: bool = True,
) -> None:
    """`fill` by torch's own operators: for CPUs, which read no tables of tiles, and what plan
    kernels are tested against."""
    tokens = token_to_adapter.shape[0]
    plan = SegmentPlan(buffer, tokens, slots)
    ids = token_to_adapter.to(torch.int64)
    known = (ids >= 0) & (ids < slots)
    token_slot = torch.where(known, ids, -1)
    ordered, order = torch.sort(torch.where(known, ids, slots), stable=True)
    plan.table("token_slot").copy_(token_slot)
    plan.table("row_index").copy_(order)
    _put(plan, "token", 0, token_slot.clamp(min=0), ranks, scales, scale)
    if not with_tiles:
        return
    start = torch.searchsorted(ordered, torch.arange(slots + 1, device=buffer.device))
    counts = start[1:] - start[:-1]
    for rows in TILE_SIZES:
        per_slot = (counts + rows - 1) // rows
        end = torch.cumsum(per_slot, 0)
        tile = torch.arange(tile_count(tokens, rows, slots), device=buffer.device)
        owner = torch.searchsorted(end, tile, right=True)
        used = owner < slots
        slot = torch.where(used, owner, 0)
        nth = tile - (end - per_slot)[slot]
        left = torch.where(used, counts[slot] - nth * rows, 0)
        row0 = torch.where(used, start[slot] + nth * rows, 0)
        plan.table("tile_slot", rows).copy_(slot)
        plan.table("tile_row0", rows).copy_(row0)
        plan.table("tile_rows", rows).copy_(left.clamp(max=rows))
        _put(plan, "tile", rows, slot, ranks, scales, scale)


def _put(
    plan: SegmentPlan,
    kind: str,
    tile_rows: int,
    slot: Tensor,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> None:
    """Rank and scale of each token or tile. An adapter of rank 0 becomes one of rank 1 whose
    scale is 0: kernels rely on a rank of at least 1."""
    rank_table = plan.table(f"{kind}_rank", tile_rows)
    scale_table = plan.table(f"{kind}_scale", tile_rows)
    if ranks is None:
        rank_table.fill_(ANY_RANK)
    else:
        true = ranks[slot]
        rank_table.copy_(true.clamp(min=1))
    if scales is None:
        scale_table.fill_(scale)
    else:
        scale_table.copy_(scales[slot])
    if ranks is not None:
        scale_table.mul_(true > 0)


_UPLOADED: dict[Any, Tensor] = {}
_UPLOAD_LIMIT = 4096
"""Sequences that are kept; they stay, since CUDA graphs may read them."""


def upload(values: Sequence[int] | Sequence[float], kind: torch.dtype, where: Any) -> Tensor:
    """Device tensor of a short host sequence, kept, so that a sequence is copied once only. The
    copy is made from pinned memory and is not waited for.

    Raises:
        ConfigError: a sequence is seen for the first time while a CUDA graph is captured.
    """
    key = (tuple(values), kind, where)
    found = _UPLOADED.get(key)
    if found is None:
        if where.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise ConfigError(
                    "ranks or scales given as a host sequence that no call before the capture of "
                    "this CUDA graph gave.",
                    "Give a tensor on the device, or make the call once before capturing.",
                )
            host = torch.tensor(key[0], dtype=kind).pin_memory()
            found = host.to(where, non_blocking=True)
        else:
            found = torch.tensor(key[0], dtype=kind, device=where)
        if len(_UPLOADED) < _UPLOAD_LIMIT:
            _UPLOADED[key] = found
    return found
