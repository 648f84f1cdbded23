"""What vLLM's own LoRA kernels read about a step, filled from the host without waiting.

vLLM sorts and counts the token -> slot map on the device and waits for the results three times for
each of its two tables. The map comes from the host, so it can be sorted there; what reaches the
device is the same (tests/cpu/test_vllm_metadata.py compares with vLLM's class).
"""

from __future__ import annotations

import bisect
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


def is_known(meta: Any) -> bool:
    """Whether `meta` has exactly the fields that `fill` fills."""
    return tuple(sorted(vars(meta))) == tuple(sorted(FIELDS))


def fill(meta: Any, slots: torch.Tensor) -> None:
    """Do what `meta.prepare_tensors` does, for int32 slots [tokens] on the host.

    Args:
        meta: a LoRAKernelMeta.
        slots: slot of each token, -1 for no adapter.
    """
    size = meta.active_lora_ids.numel()
    small = torch.zeros(3 * size + 1, dtype=torch.int32)
    ids, counts, starts = small[:size], small[size : 2 * size], small[2 * size :]
    ids.fill_(-1)
    none = not bool((slots >= 0).any())
    meta.no_lora_flag_cpu[0] = none
    meta.num_active_loras_cpu[0] = 0
    if not none:
        order = torch.sort(slots, stable=True)[1].to(torch.int32)
        found, per_id = torch.unique(slots, return_counts=True)
        active = found.numel()
        ids[:active] = found
        counts[:active] = per_id
        starts[1 : active + 1] = torch.cumsum(per_id, 0)
        meta.num_active_loras_cpu[0] = _captured(meta.captured_lora_counts, active)
        to_device(meta.token_lora_mapping[: slots.numel()], slots)
        to_device(meta.token_indices_sorted_by_lora_ids[: slots.numel()], order)
    to_device(meta.active_lora_ids, ids)
    to_device(meta.num_tokens_per_lora, counts)
    to_device(meta.lora_token_start_loc, starts)


def _captured(counts: list[int], active: int) -> int:
    """`active`, rounded up to a number of adapters that CUDA graphs were captured for."""
    place = bisect.bisect_left(counts, active)
    return counts[place] if place < len(counts) else active


def to_device(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy from the host without waiting; torch keeps the pinned memory until the copy has run."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


class SlotIndex(list[Any]):
    """A list of adapter ids by slot whose `index` is a dictionary look-up.

    vLLM asks for the slot of every token of a step, prompts included.
    """

    def __init__(self, ids: list[Any]) -> None:
        super().__init__(ids)
        self.slot_of = {adapter: slot for slot, adapter in reversed(list(enumerate(ids)))}

    def index(self, adapter: Any, *_: Any) -> int:
        """First slot of an adapter.

        Raises:
            ValueError: the adapter is in no slot.
        """
        try:
            return int(self.slot_of[adapter])
        except KeyError:
            raise ValueError(f"{adapter} is not in list") from None
