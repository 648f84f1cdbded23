"""Ranks and scales that a call gives, on top of those of its plan.

Kernels read a rank and a scale per token or tile. A call with ranks or a scale of its own needs
tables of its own; they are made on the device and kept with the plan, so that the layers of one
forward pass share them.

Under CUDA graphs a plan's tables change between replays without any call, so tables that were made
outside of a capture are made again inside it, and the other way round.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from typing import Any

import torch
from torch import Tensor

from dop.measure import cuda_driver
from dop.ops.plan import SegmentPlan, fence, plain_words, table_words

LIMIT = 256
"""Derived tables of one plan; beyond that those that no graph reads are dropped."""

NO_CAPTURE = 0


class Stamp:
    """A tensor's identity and content version, to know whether it changed since."""

    def __init__(self, tensor: Tensor | None) -> None:
        self._tensor = None if tensor is None else weakref.ref(tensor)
        self._version = None if tensor is None or tensor.is_inference() else tensor._version

    def holds(self, tensor: Tensor | None) -> bool:
        """It is the same tensor with the same content; False if that cannot be known, as for
        inference tensors, which have no version."""
        if self._tensor is None or tensor is None:
            return self._tensor is None and tensor is None
        if self._tensor() is not tensor or self._version is None:
            return False
        return bool(tensor._version == self._version)


class Derived:
    """Tables of one call: ranks and scales of tokens or tiles.

    Attributes:
        buffer: int32 [2, entries]: ranks, and the bits of scales.
        captured: a graph reads and writes them.
        words: addresses as launches take them.
    """

    __slots__ = ("buffer", "capture", "captured", "ranks", "scales", "version", "words")

    def __init__(self, plan: SegmentPlan, tile_rows: int) -> None:
        kind = "tile" if tile_rows else "token"
        entries = plan.table(f"{kind}_slot", tile_rows).shape[0]
        padded = max(16, -(-entries // 16) * 16)
        self.buffer = torch.empty((2, padded), dtype=torch.int32, device=plan.buffer.device)
        words = list(struct.unpack(f"={6 if tile_rows else 3}Q", table_words(plan, tile_rows)))
        at = 3 if tile_rows else 1
        words[at] = self.buffer.data_ptr()
        words[at + 1] = self.buffer.data_ptr() + 4 * padded
        self.words = struct.pack(f"={len(words)}Q", *words)
        self.version = -1
        self.capture = NO_CAPTURE
        self.captured = False
        self.ranks = self.scales = Stamp(None)

    def fits(self, plan: SegmentPlan, capture: int, ranks: Tensor | None, scales: Any) -> bool:
        """The content is what these arguments make of the plan as it is now."""
        if self.version != plan.version or self.capture != capture:
            return False
        if plan.in_graph and capture == NO_CAPTURE:
            return False
        return self.ranks.holds(ranks) and self.scales.holds(scales)


def derived_words(
    plan: SegmentPlan,
    tile_rows: int,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> bytes:
    """Addresses of a plan's tables, those of rank and scale replaced by the call's own.

    Args:
        plan: a filled plan.
        tile_rows: rows per tile, 0 for the row form.
        ranks: int32 [slots], or None for the plan's.
        scales: [slots], by which the plan's scale is multiplied, or None.
        scale: a further factor.
    """
    if ranks is None and scales is None and scale == 1.0:
        return plain_words(plan, tile_rows)
    stream, capture = current_capture(plan.buffer)
    # By stream: one stream must not read what another has yet to write.
    key = (tile_rows, id(ranks), id(scales), scale, stream)
    found = plan.derived.get(key)
    if found is not None and found.fits(plan, capture, ranks, scales):
        return bytes(found.words)
    if found is None:
        if len(plan.derived) >= LIMIT:
            kept = {k: d for k, d in plan.derived.items() if d.captured}
            plan.derived.clear()
            plan.derived.update(kept)
        found = plan.derived[key] = Derived(plan, tile_rows)
    _gather(plan, tile_rows, found.buffer, ranks, scales, scale)
    found.version, found.capture = plan.version, capture
    found.captured = found.captured or capture != NO_CAPTURE
    found.ranks, found.scales = Stamp(ranks), Stamp(scales)
    return bytes(found.words)


def _gather(
    plan: SegmentPlan,
    tile_rows: int,
    buffer: Tensor,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> None:
    """Fills and settles derived tables on the device. Without an adapter any entry will do."""
    kind = "tile" if tile_rows else "token"
    slot = plan.table(f"{kind}_slot", tile_rows)
    own_rank, own_scale = buffer[0, : slot.shape[0]], buffer[1, : slot.shape[0]]
    factor = plan.table(f"{kind}_scale", tile_rows) * scale
    slot = slot.clamp(min=0)
    if ranks is None:
        own_rank.copy_(plan.table(f"{kind}_rank", tile_rows))
    else:
        true = ranks.index_select(0, slot)
        own_rank.copy_(true.clamp(min=1))
        factor = factor * (true > 0)
    if scales is not None:
        factor = factor * scales.index_select(0, slot)
    own_scale.view(torch.float32).copy_(factor)
    fence(buffer)


def current_capture(tensor: Tensor) -> tuple[int, int]:
    """(current stream, number of the capture that records it); NO_CAPTURE if none does."""
    if not tensor.is_cuda:
        return 0, NO_CAPTURE
    stream = torch._C._cuda_getCurrentRawStream(tensor.device.index)
    if not stream or not torch.cuda.is_current_stream_capturing():
        return stream, NO_CAPTURE
    library: Any = cuda_driver.driver()
    status, number = ctypes.c_int(), ctypes.c_ulonglong()
    ask = getattr(library, "cuStreamGetCaptureInfo_v2", None)
    nothing: tuple[Any, ...] = (None, None, None)
    if ask is None:
        ask = library.cuStreamGetCaptureInfo_v3
        nothing = (*nothing, None)
    code = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), *nothing)
    cuda_driver.check("cuStreamGetCaptureInfo", code)
    return stream, number.value
