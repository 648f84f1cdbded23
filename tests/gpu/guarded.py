"""Kernels run between guard zones: what they write beside their tensors, or read there, shows.

Every tensor of a call (x, y, weights, tables, workspaces) lies between two zones of POISON: a NaN
in every floating-point type, and a slot or row number far out of range as int32. A write into a
zone is found afterwards; a value read there turns the result into NaN or stops the kernel.
Workspaces are full of poison as well, so a sum that was never started shows too. It finds less than
compute-sanitizer's memcheck, but needs nothing and costs nothing; `sanitize_packs.py` runs the same
calls under compute-sanitizer, without zones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from unittest.mock import patch

import torch

from dop import ops, packs
from dop.export.index import runs_on
from dop.export.load import CudaLibrary
from dop.ops import launch, sources
from dop.ops.generic import kernels as generic
from dop.ops.plan import SegmentPlan, buffer_size
from dop.packs.catalog import PackEntry
from dop.workload import Workload

POISON = 0x7FFF
ZONE_BYTES = 64 << 10
SLOTS = 6
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""Largest error over the largest result, as in test_packs.py."""


@dataclass
class Arena:
    """Memory with a guard zone on each side of every tensor.

    Attributes:
        zone: bytes of each zone, even; 0 if compute-sanitizer watches instead.
        device: where.
        held: name, whole buffer and bytes of the tensor in it.
    """

    zone: int = ZONE_BYTES
    device: str = "cuda"
    held: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)

    def room(self, name: str, size: int) -> torch.Tensor:
        """Poisoned uint8 [size], even."""
        # Filled on the host: under compute-sanitizer no kernel but Dop's is to run.
        host = torch.full(((size + 2 * self.zone) // 2,), POISON, dtype=torch.int16)
        whole = host.to(self.device).view(torch.uint8)
        self.held.append((name, whole, size))
        return whole[self.zone : self.zone + size]

    def put(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A contiguous CPU tensor, copied to the device."""
        room = self.room(name, value.numel() * value.element_size())
        mine = room.view(value.dtype).view(value.shape)
        mine.copy_(value)
        return mine

    def damaged(self) -> list[str]:
        """Names of the tensors whose zones were written to."""
        found = []
        for name, whole, size in self.held:
            zones = (whole[: self.zone], whole[self.zone + size :])
            if any(bool((z.cpu().view(torch.int16) != POISON).any()) for z in zones):
                found.append(name)
        return found


@dataclass(frozen=True)
class Batch:
    """A composition, on the CPU.

    Attributes:
        ids: int32 [tokens], -1 for no adapter.
        mixed: true ranks and scales of their own per slot.
    """

    name: str
    ids: torch.Tensor
    mixed: bool

    def ranks(self, rank: int) -> list[int] | None:
        """True rank per slot: 1, odd ones, full ones."""
        return (
            [rank, 1, min(3, rank), max(1, rank - 1), rank, rank // 2 + 1] if self.mixed else None
        )

    @property
    def scales(self) -> list[float]:
        """Scale per slot."""
        return [1.0, 0.5, 2.0, -0.25, 1.0, 3.0] if self.mixed else [1.0] * SLOTS


def _composition(rows: Sequence[int], bare: int) -> torch.Tensor:
    """Token ids, shuffled: rows[slot] rows of each slot and `bare` without adapter."""
    ids = [slot for slot, count in enumerate(rows) for _ in range(count)] + [-1] * bare
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(5))
    return torch.tensor(ids, dtype=torch.int32)[order]


BATCHES = {
    "mixed": Batch("mixed", _composition((17, 9, 0, 31, 0, 1), 9), True),
    "one": Batch("one", torch.tensor([4], dtype=torch.int32), False),
    "long": Batch("long", _composition((0, 65, 0, 0, 64, 0), 0), False),
    "bare": Batch("bare", _composition((0,) * SLOTS, 5), True),
}


@dataclass(frozen=True)
class Inputs:
    """Tensors of a workload on the CPU."""

    a: list[torch.Tensor]
    b: list[torch.Tensor]
    x: torch.Tensor
    y: torch.Tensor


@lru_cache(maxsize=4)
def _weights(workload: Workload) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(11)
    kind = getattr(torch, workload.dtype)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=draw)

    width, rank = workload.in_features, workload.rank
    a = [(normal(SLOTS, rank, width) * width**-0.5).to(kind) for _ in workload.out_features]
    b = [normal(SLOTS, out, rank).to(kind) for out in workload.out_features]
    return a, b


def inputs_of(workload: Workload, batch: Batch) -> Inputs:
    """Tensors of a call; large and finite behind each slot's true rank."""
    a, b = _weights(workload)
    ranks = batch.ranks(workload.rank)
    if ranks is not None:
        a, b = [part.clone() for part in a], [part.clone() for part in b]
        for slot, rank in enumerate(ranks):
            for part_a, part_b in zip(a, b, strict=True):
                part_a[slot, rank:] = 3.0
                part_b[slot, :, rank:] = 100.0
    draw = torch.Generator().manual_seed(12)
    kind, tokens = getattr(torch, workload.dtype), len(batch.ids)
    x = torch.randn(tokens, workload.in_features, generator=draw).to(kind)
    return Inputs(a, b, x, torch.randn(tokens, workload.total_out, generator=draw).to(kind))


def reference(workload: Workload, batch: Batch, given: Inputs) -> torch.Tensor:
    """float64 [tokens, total_out]."""
    want, ranks = given.y.double(), batch.ranks(workload.rank)
    for slot in sorted(set(batch.ids.tolist()) - {-1}):
        rows = batch.ids == slot
        rank = ranks[slot] if ranks else workload.rank
        x = given.x[rows].double()
        parts = [
            (x @ a[slot, :rank].double().T) @ b[slot, :, :rank].double().T
            for a, b in zip(given.a, given.b, strict=True)
        ]
        want[rows] += batch.scales[slot] * torch.cat(parts, dim=1)
    return want


def plan_of(arena: Arena, batch: Batch, rank: int) -> SegmentPlan:
    """The batch's plan, made by the plan kernel between guard zones."""
    tokens = len(batch.ids)
    buffer = arena.room("plan", 4 * buffer_size(tokens, SLOTS)).view(torch.int32)
    empty = SegmentPlan(buffer, tokens, SLOTS)
    ranks = batch.ranks(rank)
    return ops.segment_plan(
        arena.put("ids", batch.ids),
        slots=SLOTS,
        ranks=None if ranks is None else arena.put("ranks", torch.tensor(ranks, dtype=torch.int32)),
        scale=arena.put("scales", torch.tensor(batch.scales)) if batch.mixed else 1.0,
        out=empty,
    )


@contextmanager
def served_by(source: sources.Source, arena: Arena) -> Iterator[None]:
    """Every call is served by one source, with workspaces between guard zones."""

    def guarded(self: launch.Room, size: int, device: torch.device) -> torch.Tensor | None:
        del self, device
        return arena.room("workspace", size) if size else None

    with (
        patch.object(sources, "SOURCES", [source]),
        patch.object(launch.Room, "at_least", guarded),
    ):
        _forget()
        try:
            yield
            if arena.device != "cpu":
                torch.cuda.synchronize()
        finally:
            _forget()


def _forget() -> None:
    launch.forget()
    with sources._LOCK:
        sources._CHOICES.clear()


def pack_source(library: CudaLibrary, name: str) -> sources.Source:
    """Every call is served by this kernel of a pack."""
    return lambda search: sources.pack_kernel(library, library.kernels[name], search)


def generic_source(tile_rows: int) -> sources.Source:
    """Every call is served by the generic kernel of a form: 0 for rows, 16 or 64 for tiles."""

    def source(search: sources.Search) -> launch.DeviceKernel:
        shape = search.shape
        call = generic._call(shape, search.tokens)
        return generic._kernel(call, shape.device, search.slots, tile_rows, False)

    return source


def run(
    workload: Workload, batch: Batch, source: sources.Source, arena: Arena | None = None
) -> list[str]:
    """One call of add_lora; what was wrong with it, nothing if it was right.

    Args:
        workload: shapes.
        batch: composition.
        source: gives the kernel.
        arena: memory; with guard zones if it is not given.
    """
    arena, given = arena or Arena(), inputs_of(workload, batch)
    a = [arena.put(f"a{s}", part) for s, part in enumerate(given.a)]
    b = [arena.put(f"b{s}", part) for s, part in enumerate(given.b)]
    x, y = arena.put("x", given.x), arena.put("y", given.y)
    with torch.no_grad(), served_by(source, arena):
        ops.add_lora(y, x, a, b, plan_of(arena, batch, workload.rank))
    return [*verdict(workload, batch, given, y.cpu()), *outside(arena)]


def outside(arena: Arena) -> list[str]:
    """What was written to guard zones, one line per tensor."""
    return [f"wrote outside of {name}" for name in arena.damaged()]


def verdict(workload: Workload, batch: Batch, given: Inputs, y: torch.Tensor) -> list[str]:
    """What is wrong with a result."""
    found = []
    bare = batch.ids < 0
    if not torch.equal(y[bare].view(torch.uint8), given.y[bare].view(torch.uint8)):
        found.append("changed rows without adapter")
    want = reference(workload, batch, given)
    error = float((y.double() - want).abs().max() / want.abs().max())
    if not error <= TOLERANCE[y.dtype]:  # NaN as well
        found.append(f"relative error {error:.2e}")
    return found


def packs_here() -> list[PackEntry]:
    """Shipped packs whose binaries run on this GPU."""
    major, minor = torch.cuda.get_device_capability()
    return [e for e in packs.shipped() if runs_on(e.arch, f"sm_{major}{minor}")]
