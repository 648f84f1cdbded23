"""SGLang plugin (entry point of the group `sglang.srt.plugins`): csgmv's LoRA through dop.ops.

The names of LoRA backends are fixed in SGLang, so `register` replaces the factory of "csgmv", its
default. What dop serves: layers with one projection (o_proj, down_proj, ...), where SGLang's
stacks are laid out as dop's operator reads them. Packed projections (qkv, gate_up) pack an
adapter's rows by its own rank, and the output head has a batch of its own: they stay with SGLang's
kernels. See docs/sglang.md.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from dop.errors import DopError
from dop.integrations.step_plan import NO_ADAPTER, StepPlans

LOG = logging.getLogger(__name__)

ANY_RANK = 1 << 16
"""More than the rank of any stack."""

FIRST_TOKENS = 8192
"""Capacity that the plans begin with; they grow with the largest prefill."""

_DTYPES = (torch.float16, torch.bfloat16)


def register() -> None:
    """Make SGLang's csgmv backend use dop; does nothing if DOP_SGLANG=0 or if done before."""
    if os.environ.get("DOP_SGLANG", "1").strip().lower() in ("0", "no", "off", "false"):
        return
    from sglang.srt.lora.backend.lora_registry import LORA_SUPPORTED_BACKENDS

    stock = LORA_SUPPORTED_BACKENDS["csgmv"]
    if not getattr(stock, "is_dop", False):
        LORA_SUPPORTED_BACKENDS["csgmv"] = factory(stock)


def factory(stock: Callable[[], type]) -> Callable[[], type]:
    """A backend factory over SGLang's own; the class is made when SGLang first asks for it."""
    made: list[type] = []

    def backend_class() -> type:
        if not made:
            made.append(make_backend(stock()))
        return made[0]

    backend_class.is_dop = True  # type: ignore[attr-defined]
    return backend_class


class Shrunk(NamedTuple):
    """What shrink returns for a layer that dop serves: its operands, for expand to use at once."""

    x: torch.Tensor
    a: torch.Tensor


def make_backend(stock: Any) -> type:
    """A subclass of SGLang's ChunkedSgmvLoRABackend whose plain layers run on dop.ops."""

    class DopCsgmvBackend(stock):  # type: ignore[misc]
        """csgmv with one fused call per layer of one projection."""

        def __init__(self, max_loras_per_batch: int, device: Any, *rest: Any, **more: Any) -> None:
            super().__init__(max_loras_per_batch, device, *rest, **more)
            self._state = BatchState(max_loras_per_batch, device)

        def prepare_lora_batch(
            self,
            forward_batch: Any,
            weight_indices: list[int],
            lora_ranks: list[int],
            scalings: list[float],
            *rest: Any,
            **more: Any,
        ) -> None:
            """SGLang's own, and the plan of the step."""
            super().prepare_lora_batch(
                forward_batch, weight_indices, lora_ranks, scalings, *rest, **more
            )
            lengths = sequence_lengths(forward_batch)
            self._state.update(weight_indices, lengths, lora_ranks, scalings)

        def run_lora_a_sgemm(
            self,
            x: torch.Tensor,
            weights: torch.Tensor,
            pruned_batch_info: Any = None,
            stack_num: int = 1,
            *rest: Any,
            **more: Any,
        ) -> Any:
            """Shrink; put off for layers that dop serves whole."""
            if pruned_batch_info is None and stack_num == 1 and serves(x, weights):
                return Shrunk(x, weights)
            return super().run_lora_a_sgemm(x, weights, pruned_batch_info, stack_num, *rest, **more)

        def run_lora_b_sgemm(
            self,
            x: Any,
            weights: torch.Tensor,
            output_offset: torch.Tensor,
            base_output: torch.Tensor | None = None,
            pruned_batch_info: Any = None,
            *rest: Any,
            **more: Any,
        ) -> torch.Tensor:
            """Expand; the whole layer where shrink was put off."""
            if isinstance(x, Shrunk):
                done = self._state.launch(x.x, x.a, weights, base_output)
                if done is not None:
                    return done
                x = super().run_lora_a_sgemm(x.x, x.a)
            out: torch.Tensor = super().run_lora_b_sgemm(
                x, weights, output_offset, base_output, pruned_batch_info, *rest, **more
            )
            return out

    return DopCsgmvBackend


def sequence_lengths(forward_batch: Any) -> torch.Tensor:
    """Tokens of each request of a step, on the host."""
    from sglang.srt.lora.utils import generate_sequence_lengths

    lengths: torch.Tensor = generate_sequence_lengths(forward_batch, device="cpu")
    return lengths


def serves(x: torch.Tensor, a: torch.Tensor) -> bool:
    """Whether a layer's types and layout are such that dop may be asked."""
    return x.dim() == 2 and a.dim() == 3 and x.dtype == a.dtype and x.dtype in _DTYPES


class BatchState:
    """The plans of a backend, and the shapes that stay with SGLang.

    Args:
        slots: adapters in SGLang's stacks.
        device: where they are.
    """

    def __init__(self, slots: int, device: Any) -> None:
        self._plans = StepPlans(FIRST_TOKENS, slots, ANY_RANK, device)
        self._scales = torch.ones(slots, dtype=torch.float32, device=device)
        self._plans.use_scales(self._scales)
        self._refused: dict[tuple[int, ...], str] = {}

    def update(
        self,
        weight_indices: Sequence[int],
        lengths: torch.Tensor,
        ranks: Sequence[int],
        scalings: Sequence[float],
    ) -> None:
        """Take in a step: slot and tokens of each request, rank and scaling of each slot.

        A slot of rank 0 holds no adapter (SGLang sends requests without one there).
        """
        for slot, rank in enumerate(ranks):
            self._plans.set_rank(slot, rank)
        host = torch.tensor(list(scalings), dtype=torch.float32)
        self._scales.copy_(host.pin_memory() if self._scales.is_cuda else host, non_blocking=True)
        slots = [slot if ranks[slot] > 0 else NO_ADAPTER for slot in weight_indices]
        tokens = torch.repeat_interleave(torch.tensor(slots, dtype=torch.int32), lengths.long())
        self._plans.update(tokens)

    def launch(
        self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor | None
    ) -> torch.Tensor | None:
        """y += x A^T B^T with each slot's scaling; None if dop has no kernel for the layer."""
        from dop import ops

        layer = (*a.shape, *b.shape)
        if layer in self._refused:
            return None
        if y is None:
            y = x.new_zeros(x.shape[0], b.shape[1])
        try:
            return ops.add_lora(y, x, a, b, self._plans.plan(x.shape[0]))
        except (DopError, ValueError) as error:
            self._refused[layer] = " ".join(str(error).split())
            LOG.warning(
                "dop: layers %d->%d of rank %d stay with SGLang's csgmv: %s",
                a.shape[2], b.shape[1], a.shape[1], self._refused[layer],
            )  # fmt: skip
            return None
