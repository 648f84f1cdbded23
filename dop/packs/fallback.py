"""What serves a batch that no pack covers, and what would have to be done to be covered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dop.export.index import arch_number, runs_on
from dop.packs import folders, known_packs
from dop.workload import Workload

if TYPE_CHECKING:
    from dop.packs.answer import Answer, Batch

GENERIC_FROM = 80
"""Least compute capability times ten of the generic kernels."""


def without_pack(batch: Batch, passed: Sequence[str] = ()) -> Answer:
    """The answer for a shape that no pack serves.

    Args:
        batch: what is asked.
        passed: packs that were looked into, and why they do not serve.
    """
    from dop.packs.answer import Answer

    searched = ", ".join(str(folder) for folder in folders())
    reasons = [*passed] or [f"no pack holds {batch.workload.key} (searched {searched})"]
    reasons += _near(batch)
    number, _ = arch_number(batch.arch)
    if batch.workload.dtype == "float32":
        reasons.append("float32 is served on the CPU, by an exported library or by torch")
        return Answer(batch, "torch", reasons=tuple(reasons))
    if number < GENERIC_FROM:
        reasons.append(f"the generic kernels need sm_{GENERIC_FROM} or newer")
        return Answer(batch, "nothing", reasons=tuple(reasons))
    reasons.append(
        "the generic kernels serve every shape, rank and GPU from sm_80 on; they are right, and "
        "not tuned for this shape"
    )
    return Answer(batch, "generic", reasons=tuple(reasons))


def _near(batch: Batch) -> list[str]:
    """What the packs hold instead: other ranks of the layer, other layers of the rank."""
    mine = batch.workload
    keys = {
        key
        for entry in known_packs()
        if runs_on(entry.arch, batch.arch) or entry.sources
        for key in entry.workloads
    }
    there = [Workload.parse(key) for key in sorted(keys)]
    ranks = sorted({w.rank for w in there if _shape(w) == _shape(mine)})
    if ranks:
        return [_rank_advice(mine, ranks)]
    same_dtype = [w for w in there if w.dtype == mine.dtype]
    if not same_dtype:
        return [f"no pack for this GPU holds anything in {mine.dtype}: tune it with dop tune"]
    return [
        f"no pack for this GPU holds a layer of {mine.in_features} -> "
        f"{'+'.join(map(str, mine.out_features))}: tune it with dop tune, then dop export pack"
    ]


def _shape(workload: Workload) -> tuple[int, tuple[int, ...], str]:
    return workload.in_features, workload.out_features, workload.dtype


def _rank_advice(mine: Workload, ranks: Sequence[int]) -> str:
    """A tuned kernel's strides are its rank: it cannot read a stack of another rank."""
    listed = ", ".join(map(str, ranks))
    text = (
        f"packs hold this layer for ranks {listed}, and a kernel reads stacks of exactly the rank "
        f"it was built for (their strides are constants in it), so none can read a stack of rank "
        f"{mine.rank}"
    )
    larger = [rank for rank in ranks if rank > mine.rank]
    if not larger:
        return f"{text}; none of these is larger, so tune rank {mine.rank} with dop tune"
    rank = larger[0]
    return (
        f"{text}; to be served by a tuned kernel, allocate the stacks for rank {rank} (their "
        f"memory grows by {rank / mine.rank - 1:.0%}) and give ranks={mine.rank}: the kernel then "
        f"moves the bytes of rank {-(-mine.rank // 8) * 8}, not of {rank}; or tune rank {mine.rank}"
    )
