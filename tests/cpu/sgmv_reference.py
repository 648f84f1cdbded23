"""SGMV in float64, row by row, and random inputs for it."""

from __future__ import annotations

import torch


def stacks(slots, rank, width, outs, kind=torch.float32, device="cpu", seed=0):
    """Random (a, b), per slice."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g).to(kind).to(device)

    a = [normal(slots, rank, width) * width**-0.5 for _ in outs]
    b = [normal(slots, out, rank) * rank**-0.5 for out in outs]
    return a, b


def rows(tokens, width, total, kind=torch.float32, device="cpu", seed=1):
    """Random (x, y)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g).to(kind).to(device)
    return x, torch.randn(tokens, total, generator=g).to(kind).to(device)


def reference(y, x, a, b, ids, ranks=None, scale=1.0):
    """What y must be, float64. scale: number or per slot."""
    slots = a[0].shape[0]
    a = [t.reshape(slots, t.shape[-2], t.shape[-1]).double() for t in a]
    b = [t.reshape(slots, t.shape[-2], t.shape[-1]).double() for t in b]
    want = y.double()
    for t, slot in enumerate(ids):
        if 0 <= slot < slots:
            rank = a[0].shape[1] if ranks is None else min(int(ranks[slot]), a[0].shape[1])
            factor = scale if isinstance(scale, (int, float)) else float(scale[slot])
            parts = [
                p[slot, :, :rank] @ (q[slot, :rank] @ x[t].double())
                for q, p in zip(a, b, strict=True)
            ]
            want[t] += factor * torch.cat(parts)
    return want
