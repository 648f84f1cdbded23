"""What vLLM's own LoRA layers read about a step, filled from the host without waiting.

vLLM sorts and counts the token -> slot map on the device and waits for the results three times for
each of its two tables, and looks up every token in Python. The map comes from the host, so it can
be sorted there; what reaches the device is the same (tests/engines/test_vllm_real.py compares with
vLLM's classes).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch

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


NO_ADAPTER_SORTS_AS = torch.iinfo(torch.int32).max


def fill(meta: Any, slots: torch.Tensor) -> None:
    """Do what `meta.prepare_tensors` does, for int32 slots [tokens] on the host.

    But rows without adapter come last, where vLLM has them first: with `specialize_active_lora`
    vLLM 0.24 takes the graph of n adapters for n adapters beside rows without, its kernels look at
    n entries of the table, and the last adapter would not be among them.

    Args:
        meta: a LoRAKernelMeta after `join`.
        slots: slot of each token, -1 for no adapter.
    """
    tables = _joined(meta)
    room = tables.numel() // 3
    small = torch.zeros(tables.numel(), dtype=torch.int32)
    size = meta.active_lora_ids.numel()
    small[:size].fill_(-1)
    none = not bool((slots >= 0).any())
    meta.no_lora_flag_cpu[0] = none
    meta.num_active_loras_cpu[0] = 0
    pairs = [(tables, small)]
    if not none:
        keys = slots.masked_fill(slots < 0, NO_ADAPTER_SORTS_AS)
        ordered, places = torch.sort(keys, stable=True)
        order = places.to(torch.int32)
        found, per_id = torch.unique_consecutive(ordered, return_counts=True)
        active = found.numel()
        small[:active] = found.masked_fill(found == NO_ADAPTER_SORTS_AS, -1)
        small[room : room + active] = per_id
        small[2 * room + 1 : 2 * room + 1 + active] = torch.cumsum(per_id, 0)
        meta.num_active_loras_cpu[0] = _captured(meta.captured_lora_counts, active)
        tokens = slots.numel()
        pairs.append((meta.token_lora_mapping[:tokens], slots))
        pairs.append((meta.token_indices_sorted_by_lora_ids[:tokens], order))
    to_device(pairs)


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
    count, sampled = tokens.numel(), samples.numel()
    by_token, by_sample = tokens.long(), samples.long()
    padded = torch.where(by_sample < 0, slots, by_sample) * sampled
    padded += torch.arange(sampled)
    embeddings = wrapper._embeddings_indices
    if (
        embeddings.dim() == 2
    ):  # 0.24 has a row of zeros for a vocabulary that adapters no longer add
        embeddings[0, :count].zero_()
        embeddings = embeddings[1]
    to_device(
        [
            (wrapper._token_lora_indices[:count], by_token),
            (embeddings[:count], by_token.clamp(min=0) * vocab_size),
            (wrapper._sampler_indices[:sampled], by_sample),
            (wrapper._sampler_indices_padded[:sampled], padded),
        ]
    )
    wrapper.indices_len[:] = [count, sampled, sampled, count]


def _captured(counts: list[int], active: int) -> int:
    """`active`, rounded up to a number of adapters that CUDA graphs were captured for."""
    place = bisect.bisect_left(counts, active)
    return counts[place] if place < len(counts) else active


def to_device(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy (target, source) from the host without waiting; all of one type. torch keeps the one
    pinned piece of memory that they go through until the copies have run."""
    if not pairs[0][0].is_cuda:
        for target, source in pairs:
            target.copy_(source)
        return
    total = sum(source.numel() for _, source in pairs)
    pinned = torch.empty(total, dtype=pairs[0][1].dtype, pin_memory=True)
    start = 0
    for target, source in pairs:
        part = pinned[start : start + source.numel()]
        part.copy_(source)
        target.copy_(part, non_blocking=True)
        start += source.numel()
