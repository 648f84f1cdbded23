"""Which generic kernels serve a call, and how they are launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from dop.measure.artifact import Buffer, Launch
from dop.ops.generic.loader import binary_for, device, read_binary
from dop.ops.launch import DeviceKernel

if TYPE_CHECKING:
    from dop.ops.checks import Shape
    from dop.ops.sources import Search

SUFFIX = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
ELEMENT_BYTES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}

OVERLAPPING = ("sm_90", "sm_100", "sm_120")
"""Binaries whose expand waits for shrink itself, see common.cuh."""

ROW_THREADS = 128
RANKS = 8
COLUMNS = 8
BLOCKS_PER_MULTIPROCESSOR = 4

SHRINK_ROWS = (
    *("x", "a", "a1_shift", "a2_shift", "token_slot", "token_rank", "v"),
    *("in_features", "rank", "slices", "x_stride", "indirect", "fill"),
)
EXPAND_ROWS = (
    *("v", "b", "b1_shift", "b2_shift", "token_slot", "token_rank", "token_scale", "y_in", "y"),
    *("rank", "slices", "splits", "out0", "out1", "out2", "y_stride", "lanes_log2", "indirect"),
)
SHRINK_TILES = (
    *("x", "a", "a1_shift", "a2_shift", "tile_slot", "tile_row0", "tile_rows", "tile_rank"),
    *("row_index", "v", "tokens", "in_features", "rank", "slices", "x_stride", "indirect"),
)
EXPAND_TILES = (
    *("v", "b", "b1_shift", "b2_shift", "tile_slot", "tile_row0", "tile_rows", "tile_rank"),
    *("tile_scale", "row_index", "y_in", "y", "tokens", "rank", "slices", "splits"),
    *("out0", "out1", "out2", "y_stride", "run", "indirect"),
)
"""Parameters of the kernels, in order; see generic.cu."""

TILE_THREADS = 128
TILE_HEIGHTS = (64, 16)
DEPTH = 64
ROW_BYTES = 2 * DEPTH
BLOCK_RANKS = 64
BLOCK_COLUMNS = 64
SHRINK_STAGES = 4
EXPAND_STAGES = 3
"""Twins of the constants in tiles.cuh."""

MAX_SMEM_BYTES = 99 << 10
"""Shared memory of a block on every GPU from sm_80 on."""
MANY_TOKENS = 512
MANY_PRODUCTS = 2048
"""Rows of an adapter x rank from which tensor cores are worth their longer chain of loads."""


@dataclass(frozen=True)
class Call:
    """What a launch depends on.

    Attributes:
        in_features, outs, rank, dtype: as in `Shape`.
        tokens: rows of the batch.
        multiprocessors: of the GPU.
        overlap: the binary has dependent launches, so expand may start before shrink has ended.
    """

    in_features: int
    outs: tuple[int, ...]
    rank: int
    dtype: torch.dtype
    tokens: int
    multiprocessors: int
    overlap: bool = False

    @property
    def slices(self) -> int:
        """Stacks per side."""
        return len(self.outs)

    @property
    def pack(self) -> int:
        """Elements in 16 bytes."""
        return 16 // ELEMENT_BYTES[self.dtype]


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def row_splits(call: Call) -> int:
    """Parts into which shrink cuts the sum over in_features: enough blocks to fill the GPU, and at
    least two groups of loads for each block."""
    blocks = call.tokens * call.slices * ceil_div(call.rank, RANKS)
    wanted = BLOCKS_PER_MULTIPROCESSOR * call.multiprocessors // max(1, blocks)
    groups = ceil_div(call.in_features, ROW_THREADS * call.pack)
    return max(1, min(wanted, ceil_div(groups, 2)))


def lanes_log2(rank: int, pack: int) -> int:
    """How many lanes share a column of B in expand, as a power of two: a pack of ranks each, at
    most eight."""
    packs = ceil_div(rank, pack)
    return 0 if packs == 1 else 1 if packs == 2 else 2 if packs <= 4 else 3


def constants(
    call: Call, *, splits: int, fill: bool = False, indirect: bool = False
) -> dict[str, int]:
    """The integer parameters of all kernels by name."""
    outs = (*call.outs, 0, 0)[:3]
    return {
        "in_features": call.in_features,
        "rank": call.rank,
        "slices": call.slices,
        "splits": splits,
        **{f"out{s}": out for s, out in enumerate(outs)},
        "x_stride": call.in_features,
        "y_stride": sum(call.outs),
        "lanes_log2": lanes_log2(call.rank, call.pack),
        "indirect": int(indirect),
        "fill": int(fill),
    }


def shrink_rows(call: Call, splits: int, v: str = "v") -> Launch:
    """Launch of the row form's shrink into the argument `v`."""
    grid = ("tokens", str(call.slices * ceil_div(call.rank, RANKS)), str(splits))
    arguments = tuple(v if name == "v" else name for name in SHRINK_ROWS)
    name = f"dop_shrink_rows_{SUFFIX[call.dtype]}"
    return Launch(name, grid, (ROW_THREADS, 1, 1), 0, arguments)


def expand_rows(call: Call, v: str = "v") -> Launch:
    """Launch of the row form's expand from the argument `v`."""
    per_block = (ROW_THREADS * COLUMNS) >> lanes_log2(call.rank, call.pack)
    grid = ("tokens", str(sum(ceil_div(out, per_block) for out in call.outs)), "1")
    arguments = tuple(v if name == "v" else name for name in EXPAND_ROWS)
    name = f"dop_expand_rows_{SUFFIX[call.dtype]}"
    smem = 4 * (call.rank + 8 * call.pack)
    dependent = call.overlap and v == "v"
    return Launch(name, grid, (ROW_THREADS, 1, 1), smem, arguments, dependent)


def tile_splits(call: Call, tile_rows: int, tiles: int) -> int:
    """As `row_splits`, for tiles: a block has a step of 64 elements at least four times."""
    blocks = tiles * call.slices * ceil_div(call.rank, BLOCK_RANKS)
    wanted = BLOCKS_PER_MULTIPROCESSOR * call.multiprocessors // max(1, blocks)
    return max(1, min(wanted, call.in_features // (4 * DEPTH)))


def shrink_tiles(call: Call, tile_rows: int, splits: int) -> Launch:
    """Launch of the tile form's shrink."""
    ranks = min(BLOCK_RANKS, ceil_div(call.rank, 16) * 16)
    smem = SHRINK_STAGES * (tile_rows + ranks) * ROW_BYTES
    grid = ("tiles", str(call.slices * ceil_div(call.rank, BLOCK_RANKS)), str(splits))
    name = f"dop_shrink_tiles{tile_rows}_{SUFFIX[call.dtype]}"
    return Launch(name, grid, (TILE_THREADS, 1, 1), smem, SHRINK_TILES)


def expand_smem_bytes(rank: int, tile_rows: int) -> int:
    """Dynamic shared memory of the tile form's expand."""
    v = 2 * tile_rows * (ceil_div(rank, 16) * 32 + 16)
    return v + EXPAND_STAGES * BLOCK_COLUMNS * ROW_BYTES + tile_rows * (BLOCK_COLUMNS + 4) * 4


def column_run(call: Call, tiles: int) -> int:
    """Columns that a block of expand walks through, a multiple of 64: few blocks of long runs if
    there are tiles enough, since each block adds up the parts of v anew."""
    columns = ceil_div(sum(call.outs), BLOCK_COLUMNS)
    blocks = max(1, ceil_div(BLOCKS_PER_MULTIPROCESSOR * call.multiprocessors, max(1, tiles)))
    return BLOCK_COLUMNS * max(1, min(16, columns // blocks))


def expand_tiles(call: Call, tile_rows: int, run: int) -> Launch:
    """Launch of the tile form's expand."""
    grid = ("tiles", str(sum(ceil_div(out, run) for out in call.outs)), "1")
    name = f"dop_expand_tiles{tile_rows}_{SUFFIX[call.dtype]}"
    smem = expand_smem_bytes(call.rank, tile_rows)
    return Launch(name, grid, (TILE_THREADS, 1, 1), smem, EXPAND_TILES, call.overlap)


def best_tile_rows(call: Call, slots: int, adapters: int | None) -> int:
    """Rows per tile for a batch, or 0 for the row form.

    Tensor cores pay where an adapter has several rows: the row form reads an adapter's weights for
    each of them, from the L2 cache at best. At rank 16 it won up to 64 rows of one adapter, at rank
    64 it lost by a factor of three (docs/performance.md, experiment 2).
    """
    if call.dtype not in (torch.float16, torch.bfloat16) or call.tokens < 16:
        return 0
    rows = call.tokens / max(1, min(call.tokens, slots, adapters or call.tokens))
    many = call.tokens >= MANY_TOKENS and rows >= 2
    if not many and (rows < 4 or rows * call.rank < MANY_PRODUCTS):
        return 0
    fitting = [
        height for height in TILE_HEIGHTS if expand_smem_bytes(call.rank, height) <= MAX_SMEM_BYTES
    ]
    if rows < 32:
        fitting = [height for height in fitting if height == TILE_HEIGHTS[-1]]
    return fitting[0] if fitting else 0


Parts = tuple[tuple[Launch, ...], int, dict[str, int]]


def row_kernel(call: Call, *, indirect: bool = False) -> Parts:
    """The row form: launches, splits and constants."""
    splits = row_splits(call)
    numbers = constants(call, splits=splits, indirect=indirect)
    return (shrink_rows(call, splits), expand_rows(call)), splits, numbers


def tile_kernel(call: Call, tile_rows: int, slots: int, *, indirect: bool = False) -> Parts:
    """The tile form for tiles of 16 or 64 rows: launches, splits and constants."""
    # Most of the tiles that a plan has room for are empty; the full ones decide.
    tiles = max(1, call.tokens // tile_rows)
    splits, run = tile_splits(call, tile_rows, tiles), column_run(call, tiles)
    numbers = constants(call, splits=splits, indirect=indirect) | {"run": run}
    launches = shrink_tiles(call, tile_rows, splits), expand_tiles(call, tile_rows, run)
    return launches, splits, numbers


@lru_cache(maxsize=4096)
def _kernel(call: Call, ordinal: int, slots: int, tile_rows: int, indirect: bool) -> DeviceKernel:
    if tile_rows:
        parts = tile_kernel(call, tile_rows, slots, indirect=indirect)
        text = f"tiles of {tile_rows} rows on tensor cores"
        return _device_kernel(call, ordinal, f"tiles{tile_rows}", tile_rows, *parts, text)
    parts = row_kernel(call, indirect=indirect)
    return _device_kernel(call, ordinal, "rows", 0, *parts, "one row at a time on plain cores")


def _device_kernel(
    call: Call,
    ordinal: int,
    form: str,
    tile_rows: int,
    launches: tuple[Launch, ...],
    splits: int,
    numbers: Mapping[str, int],
    reason: str,
) -> DeviceKernel:
    capability = device(ordinal).capability
    needs_v = any("v" in launch.arguments for launch in launches)
    size = f"{splits * call.slices * call.rank} * tokens"
    return DeviceKernel(
        f"generic_{form}_{SUFFIX[call.dtype]}",
        "generic",
        f"serves every shape: {reason}, {splits} parts",
        tile_rows,
        launches,
        (Buffer("v", "float32", size),) if needs_v else (),
        lambda: read_binary("generic", binary_for(capability)),
        numbers,
    )


def _call(shape: Shape, tokens: int) -> Call:
    gpu = device(shape.device)
    # PTX for older GPUs does not wait, so it must not be launched as if it did.
    overlap = binary_for(gpu.capability) in OVERLAPPING
    return Call(
        shape.in_features,
        shape.outs,
        shape.rank,
        shape.dtype,
        tokens,
        gpu.multiprocessors,
        overlap,
    )


def kernel(search: Search, *, indirect: bool = False) -> DeviceKernel:
    """The generic kernel for a call on a GPU.

    Args:
        search: shapes and batch.
        indirect: the stacks are arrays of device pointers, one [rank, in] or [out, rank] per slot.

    Raises:
        MissingDependencyError: the GPU is older than sm_80.
        BuildError: the binaries are missing.
    """
    call = _call(search.shape, search.tokens)
    tile_rows = best_tile_rows(call, search.slots, search.adapters)
    return _kernel(call, search.shape.device, search.slots, tile_rows, indirect)


def shrink_kernel(search: Search) -> DeviceKernel:
    """Shrink alone: "y" is v, float32 [slices, tokens, rank]; zero where there is no adapter or no
    rank. Arguments b and out widths are not looked at."""
    call = _call(search.shape, search.tokens)
    numbers = constants(call, splits=1, fill=True)
    launches = (shrink_rows(call, 1, v="y"),)
    return _device_kernel(
        call, search.shape.device, "shrink", 0, launches, 1, numbers, "shrink alone"
    )


def expand_kernel(search: Search) -> DeviceKernel:
    """Expand alone: "x" is v, float32 [slices, tokens, rank]. Argument a and in_features are not
    looked at."""
    call = _call(search.shape, search.tokens)
    numbers = constants(call, splits=1)
    launches = (expand_rows(call, v="x"),)
    return _device_kernel(
        call, search.shape.device, "expand", 0, launches, 1, numbers, "expand alone"
    )
