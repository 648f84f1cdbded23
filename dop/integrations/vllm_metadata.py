"""What vLLM's own LoRA layers read about a step, filled from the host without waiting.

vLLM sorts and counts the token -> slot map on the device and waits for the results three times for
each of its two tables, and looks up every token in Python. The map comes from the host, so it can
be sorted there; what reaches the device is the same (tests/engines/test_vllm_real.py compares with
vLLM's classes).

All of this runs before a step that waits for it, often after a pause in which other programs had
the caches: few calls count more than few bytes. So numpy computes, and what changes together goes
through one piece of pinned memory.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Pair = tuple[torch.Tensor, "np.ndarray[Any, Any]"]
"""A tensor and what it shall hold."""

FIELDS = (
    "token_lora_mapping",
    "token_indices_sorted_by_lora_ids",
    "active_lora_ids",
    "num_tokens_per_lora",
    "lora_token_start_loc",
    "no_lora_flag_cpu",
    "num_active_loras_cpu",
    "default_num_active_loras_cpu",
    "captured_lora_counts",
)
"""Fields of vLLM's LoRAKernelMeta that `fill` knows; with others it must not be used."""

BASE_FIELDS = (
    "_token_lora_indices",
    "_sampler_indices",
    "_sampler_indices_padded",
    "_embeddings_indices",
    "indices_len",
)
"""Fields of a wrapper that `fill_base` fills."""

ALIGN = 16
"""Tables begin at multiples of 64 bytes, as those of vLLM do: Triton compiles for alignment."""


def is_known(meta: Any) -> bool:
    """Whether `meta` has exactly the fields that `fill` fills."""
    return tuple(sorted(vars(meta))) == tuple(sorted(FIELDS))


def is_known_base(wrapper: Any) -> bool:
    """Whether a wrapper has the fields that `fill_base` fills."""
    return all(hasattr(wrapper, name) for name in BASE_FIELDS)


def join(meta: Any) -> None:
    """Put the three tables per adapter side by side, so that one copy fills them."""
    room = -(-meta.lora_token_start_loc.numel() // ALIGN) * ALIGN
    tables = torch.zeros(3 * room, dtype=torch.int32, device=meta.active_lora_ids.device)
    size = meta.active_lora_ids.numel()
    meta.active_lora_ids = tables[:size]
    meta.num_tokens_per_lora = tables[room : room + size]
    meta.lora_token_start_loc = tables[2 * room : 2 * room + size + 1]


NO_ADAPTER_SORTS_AS = np.iinfo(np.int32).max


def fill(meta: Any, slots: torch.Tensor) -> None:
    """Do what `meta.prepare_tensors` does, for int32 slots [tokens] on the host.

    But rows without adapter come last, where vLLM has them first: with `specialize_active_lora`
    vLLM 0.24 takes the graph of n adapters for n adapters beside rows without, its kernels look at
    n entries of the table, and the last adapter would not be among them.

    Args:
        meta: a LoRAKernelMeta after `join`.
        slots: slot of each token, -1 for no adapter.
    """
    to_device(pairs_of(meta, slots))


def pairs_of(meta: Any, slots: torch.Tensor) -> list[Pair]:
    """What `fill` copies to the device; flags and counts that stay on the host are set at once."""
    tables = _joined(meta)
    room = tables.numel() // 3
    small = np.zeros(tables.numel(), np.int32)
    small[: meta.active_lora_ids.numel()] = -1
    keys = slots.numpy().copy()
    keys[keys < 0] = NO_ADAPTER_SORTS_AS
    order = np.argsort(keys, kind="stable").astype(np.int32)
    ordered = keys[order]
    none = not len(keys) or ordered[0] == NO_ADAPTER_SORTS_AS
    meta.no_lora_flag_cpu[0] = bool(none)
    meta.num_active_loras_cpu[0] = 0
    if none:
        return [(tables, small)]
    inner = (np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist()
    starts, ends = [0, *inner], [*inner, len(keys)]
    active = len(starts)
    small[:active] = ordered[starts]
    if ordered[-1] == NO_ADAPTER_SORTS_AS:
        small[active - 1] = -1
    small[room : room + active] = np.subtract(ends, starts)
    small[2 * room + 1 : 2 * room + 1 + active] = ends
    meta.num_active_loras_cpu[0] = _captured(meta.captured_lora_counts, active)
    return [
        (tables, small),
        (meta.token_lora_mapping[: len(keys)], slots.numpy()),
        (meta.token_indices_sorted_by_lora_ids[: len(keys)], order),
    ]


def _joined(meta: Any) -> torch.Tensor:
    """The memory of the three tables that `join` put side by side."""
    ids = meta.active_lora_ids
    room = meta.num_tokens_per_lora.storage_offset() - ids.storage_offset()
    whole: torch.Tensor = ids.as_strided((3 * room,), (1,))
    return whole


def fill_base(
    wrapper: Any, tokens: torch.Tensor, samples: torch.Tensor, vocab_size: int, slots: int
) -> None:
    """Do what `wrapper._update_base_metadata` does.

    Args:
        wrapper: vLLM's.
        tokens: int32 slot of each token on the host, -1 for no adapter.
        samples: the same of each sampled token.
        vocab_size: rows of an adapter's A for embeddings.
        slots: adapters in a stack.
    """
    to_device(base_pairs(wrapper, tokens, samples, vocab_size, slots))


def base_pairs(
    wrapper: Any,
    tokens: torch.Tensor,
    samples: torch.Tensor,
    vocab_size: int,
    slots: int,
    *,
    embeddings_only: bool = False,
) -> list[Pair]:
    """What `fill_base` copies to the device; of the tables only that of embeddings if so asked."""
    count, sampled = tokens.numel(), samples.numel()
    wrapper.indices_len[:] = [count, sampled, sampled, count]
    by_token = tokens.numpy().astype(np.int64)
    starts = np.maximum(by_token, 0) * vocab_size
    table = wrapper._embeddings_indices
    rows = table[1] if table.dim() == 2 else table  # 0.24 has a row of zeros for added vocabulary
    if embeddings_only:
        return [(rows[:count], starts)]
    if table.dim() == 2:
        table[0, :count].zero_()
    by_sample = samples.numpy().astype(np.int64)
    padded = np.where(by_sample < 0, slots, by_sample) * sampled + np.arange(sampled)
    return [
        (rows[:count], starts),
        (wrapper._token_lora_indices[:count], by_token),
        (wrapper._sampler_indices[:sampled], by_sample),
        (wrapper._sampler_indices_padded[:sampled], padded),
    ]


def _captured(counts: list[int], active: int) -> int:
    """`active`, rounded up to a number of adapters that CUDA graphs were captured for."""
    place = bisect.bisect_left(counts, active)
    return counts[place] if place < len(counts) else active


def to_device(pairs: Sequence[Pair]) -> None:
    """Copy arrays of the targets' types from the host without waiting. torch keeps the one pinned
    piece of memory that they go through until the copies have run."""
    size = sum(source.nbytes for _, source in pairs)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=pairs[0][0].is_cuda)
    host, start = pinned.numpy(), 0
    for target, source in sorted(pairs, key=lambda pair: -pair[1].itemsize):  # keeps all aligned
        end = start + source.nbytes
        host[start:end] = source.view(np.uint8)
        target.copy_(pinned[start:end].view(target.dtype), non_blocking=True)
        start = end
