"""The plan kernel: all tables of a batch in one launch on the device."""

from __future__ import annotations

import struct
from functools import lru_cache

from dop.errors import ConfigError
from dop.ops.generic.loader import PARAMETERS, device, launch

ANY_RANK = 1 << 30
"""Rank if nobody gave ranks: kernels cut it down to their stack's."""

MAX_TOKENS = 1 << 19
MAX_SLOTS = 65_535

PLAN_PARAMS = struct.Struct("@PPPPiiiif4x")
ANNOTATE_PARAMS = struct.Struct("@PPPPiif4x")

_SHARED_TOKENS = 16_384
"""Twin of kSharedTokens in plan.cu."""
_ANNOTATE_THREADS = 256


def threads(tokens: int, slots: int) -> int:
    """Threads of the block: a power of two from 128 to 1024, one per token and slot if possible."""
    wanted = max(tokens, slots)
    return 128 if wanted <= 128 else 256 if wanted <= 256 else 512 if wanted <= 512 else 1024


def shared_bytes(tokens: int, threads: int) -> int:
    """Dynamic shared memory: counters, a bit per token, sorted keys."""
    counters = 256 * (threads // 32 + 1) * 4
    keys = (tokens + 15) // 16 * 32 if tokens <= _SHARED_TOKENS else 0
    return counters + (tokens + 31) // 32 * 4 + keys


MOST_SHARED_BYTES = max(shared_bytes(n, 1024) for n in (_SHARED_TOKENS, MAX_TOKENS))


@lru_cache(maxsize=4096)
def _launch_shape(tokens: int, slots: int) -> tuple[int, int]:
    block = threads(tokens, slots)
    return block, shared_bytes(tokens, block)


def fill_plan(
    tables: int,
    ids: int,
    *,
    ids_are_64_bit: bool,
    tokens: int,
    slots: int,
    ordinal: int,
    stream: int,
    ranks: int = 0,
    max_rank: int = ANY_RANK,
    scales: int = 0,
    scale: float = 1.0,
) -> None:
    """Fills the tables of a plan from the tokens' adapter ids; one launch, nothing if 0 tokens.

    All addresses are device pointers as integers.

    Args:
        tables: buffer of `layout(tokens, slots).size` int32 (dop/ops/plan.py), 64-byte aligned; it
            need not be cleared.
        ids: int32 or int64 [tokens]; any value outside [0, slots) means no adapter.
        ranks: int32 [slots], or 0: every slot has rank `max_rank`.
        max_rank: the rank without `ranks`.
        scales: float32 [slots], or 0: every slot has `scale`.
        ordinal: the device.
        stream: CUstream as an integer.

    Raises:
        ConfigError: more than MAX_TOKENS tokens or MAX_SLOTS slots.
        BuildError, CudaError: the kernel could not be loaded or launched.
    """
    if tokens == 0:
        return
    if tokens > MAX_TOKENS or slots > MAX_SLOTS:
        raise ConfigError(
            f"a plan for {tokens} tokens and {slots} slots.",
            f"A plan takes up to {MAX_TOKENS} tokens and {MAX_SLOTS} slots: split the batch.",
        )
    kernel = device(ordinal).kernel("plan", "dop_plan", MOST_SHARED_BYTES)
    if slots == 0:
        ranks = scales = 0
    PLAN_PARAMS.pack_into(
        PARAMETERS.buffer,
        0,
        ids,
        ranks,
        scales,
        tables,
        ids_are_64_bit,
        tokens,
        slots,
        max_rank,
        scale,
    )
    block, shared = _launch_shape(tokens, slots)
    launch(kernel, (1, 1, 1), block, shared, stream)


def fence(ordinal: int, stream: int) -> None:
    """Launches a kernel that does nothing: `dop_plan_annotate` without tokens. As a plain launch it
    starts when everything before it in the stream is complete.

    Args:
        ordinal, stream: as in `fill_plan`.
    """
    kernel = device(ordinal).kernel("plan", "dop_plan_annotate")
    ANNOTATE_PARAMS.pack_into(PARAMETERS.buffer, 0, 0, 0, 0, 0, 0, 0, 1.0)
    launch(kernel, (1, 1, 1), 32, 0, stream)


def annotate_plan(
    source: int,
    target: int,
    *,
    tokens: int,
    slots: int,
    ordinal: int,
    stream: int,
    ranks: int = 0,
    scales: int = 0,
    scale: float = 1.0,
) -> None:
    """Ranks and scales anew: writes token_rank, token_scale, tile_rank and tile_scale of the plan
    buffer `target` from the filled buffer `source` (may be the same); one launch.

    Args:
        source, target: int32 buffers of plans for the same tokens and slots; the slot tables of
            `source` are read, no other tables of `target` are touched.
        ranks: int32 [slots] true ranks, or 0: those of `source`.
        scales: float32 [slots], multiplied to the scales of `source`, or 0.
        scale: multiplied too.
        ordinal, stream: as in `fill_plan`.
    """
    if tokens == 0:
        return
    kernel = device(ordinal).kernel("plan", "dop_plan_annotate")
    if slots == 0:
        ranks = scales = 0
    ANNOTATE_PARAMS.pack_into(
        PARAMETERS.buffer, 0, source, target, ranks, scales, tokens, slots, scale
    )
    blocks = min(-(-(tokens + min(tokens, slots)) // _ANNOTATE_THREADS), 256)
    launch(kernel, (blocks, 1, 1), _ANNOTATE_THREADS, 0, stream)
