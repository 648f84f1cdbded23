"""The adapters of one linear layer as the stacks the operator reads, filled slot by slot."""

from __future__ import annotations

import torch

from dop.errors import ConfigError

SMALLEST_RANK = 8


def stack_rank(rank: int) -> int:
    """Rank of the stacks for adapters of at most `rank`: the next power of two, at least 8.

    Few distinct ranks mean that tuned kernels cover them; an adapter still costs its own rank.
    """
    return max(SMALLEST_RANK, 1 << max(0, rank - 1).bit_length())


class LayerStack:
    """A [slots, rank, in_features] and B [slots, out_features, rank] of one layer, zero-padded.

    A slot that nobody wrote holds zeros: a token of an adapter without weights for this layer
    changes nothing.
    """

    def __init__(
        self,
        slots: int,
        rank: int,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        with torch.inference_mode(False):  # torch counts the changes of such tensors only
            self.a = torch.zeros(slots, rank, in_features, dtype=dtype, device=device)
            self.b = torch.zeros(slots, out_features, rank, dtype=dtype, device=device)

    @property
    def slots(self) -> int:
        """Number of adapters that fit."""
        return self.a.shape[0]

    @property
    def rank(self) -> int:
        """Largest rank that fits."""
        return self.a.shape[1]

    @torch.no_grad()
    def write(self, slot: int, a: torch.Tensor, b: torch.Tensor, factor: float = 1.0) -> None:
        """Put an adapter into a slot: a [rank, in_features], b [out_features, rank].

        Args:
            slot: which one; what it held is gone.
            a: any dtype and device; converted.
            b: likewise, multiplied by `factor`.
            factor: what the operator's scale of the slot leaves out.

        Raises:
            ConfigError: the shapes do not fit the layer.
        """
        rank = a.shape[0]
        fits = rank <= self.rank and b.shape[1] == rank
        if not fits or a.shape[1] != self.a.shape[2] or b.shape[0] != self.b.shape[1]:
            raise ConfigError(
                f"lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit a layer of "
                f"{self.a.shape[2]} inputs and {self.b.shape[1]} outputs at rank {self.rank}.",
                "Use adapters trained for this model.",
            )
        self.a[slot, :rank].copy_(a)
        self.a[slot, rank:].zero_()
        self.b[slot, :, :rank].copy_(b if factor == 1.0 else b * factor)
        self.b[slot, :, rank:].zero_()

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.a[slot].zero_()
        self.b[slot].zero_()
