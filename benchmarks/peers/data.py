"""Tensors of a case: many sets of weights and activations, carved from flat random buffers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.peers.cases import Case
from dop.errors import ConfigError

SPREAD = {"a": 1 / 64, "b": 1 / 8, "x": 1.0, "y": 1.0}
"""Standard deviations: products stay near 1, so that 16-bit types neither overflow nor vanish."""
LIMIT_BYTES = {
    "cuda": {"a": 3 << 30, "b": 6 << 30, "x": 2 << 30, "y": 4 << 30},
    "cpu": {"a": 64 << 20, "b": 64 << 20, "x": 32 << 20, "y": 32 << 20},
}
"""A buffer is not made larger than this for the sake of more sets."""
ALIGN = 256
"""Sets begin at multiples of so many elements: 512 bytes or more."""
CHECK_ROWS = 1024


def _padded(elements: int) -> int:
    return -(-elements // ALIGN) * ALIGN


class Pools:
    """Flat random buffers for the tensors of every case of a run, one after the other."""

    def __init__(self, cases: Iterable[Case], device: str, dtype: torch.dtype, sets: int = 0):
        """Allocates for the largest case; at most `sets` sets of each (0: as the case asks)."""
        need = dict.fromkeys(SPREAD, 0)
        for case in cases:
            wanted = min(case.calls, sets or case.calls)
            for name, elements in case.sizes.items():
                one = _padded(elements)
                most = LIMIT_BYTES[device][name] // dtype.itemsize // one * one
                need[name] = max(need[name], one, min(one * wanted, most))
        self.dtype = dtype
        self.buffers = {name: _random(n, name, device, dtype) for name, n in need.items()}

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.buffers["x"].device

    def sets(self, case: Case) -> int:
        """Sets of a case that fit.

        Raises:
            ConfigError: not even one does.
        """
        fit = min(self.buffers[n].numel() // _padded(e) for n, e in case.sizes.items())
        if fit < 1:
            raise ConfigError(f"{case.key} is larger than the buffers.", "Plan for it as well.")
        return min(fit, case.calls)

    def view(self, name: str, start: int, *shape: int) -> Tensor:
        """Contiguous view of a buffer from an element on."""
        return self.buffers[name][start : start + math.prod(shape)].view(shape)


def _random(elements: int, name: str, device: str, dtype: torch.dtype) -> Tensor:
    buffer = torch.empty(elements, dtype=dtype, device=device)
    for start in range(0, elements, 1 << 27):
        buffer[start : start + (1 << 27)].normal_(0.0, SPREAD[name])
    return buffer


@dataclass
class Data:
    """The sets of one case.

    Attributes:
        x: [tokens, in], per set.
        y: [tokens, total out], per set; every call adds into it.
        slots: int64 [tokens], slot of each row, on the host.
        sliced: (a, b) per set: one stack per slice, [slots, rank, in] and [slots, out, rank].
        joined: (a, b) per set: [slots, slices * rank, in] and [slots, total out, rank]. The same
            bytes as `sliced`, cut another way: other weights unless there is one slice.
    """

    case: Case
    x: list[Tensor]
    y: list[Tensor]
    slots: Tensor
    sliced: list[tuple[list[Tensor], list[Tensor]]]
    joined: list[tuple[Tensor, Tensor]]
    _updates: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def carve(case: Case, pools: Pools) -> Data:
        """Sets of a case out of the buffers; y gets new random values."""
        w, count = case.workload, pools.sets(case)
        start = {name: _padded(elements) for name, elements in case.sizes.items()}
        sliced, joined = [], []
        for i in range(count):
            a0, b0 = i * start["a"], i * start["b"]
            wide_a = pools.view("a", a0, case.slots, w.slices * w.rank, w.in_features)
            joined.append((wide_a, pools.view("b", b0, case.slots, w.total_out, w.rank)))
            stacks: tuple[list[Tensor], list[Tensor]] = ([], [])
            for out in w.out_features:
                stacks[0].append(pools.view("a", a0, case.slots, w.rank, w.in_features))
                stacks[1].append(pools.view("b", b0, case.slots, out, w.rank))
                a0 += stacks[0][-1].numel()
                b0 += stacks[1][-1].numel()
            sliced.append(stacks)
        x = [pools.view("x", i * start["x"], case.tokens, w.in_features) for i in range(count)]
        y = [pools.view("y", i * start["y"], case.tokens, w.total_out) for i in range(count)]
        for rows in y:
            rows.normal_()
        slots = torch.tensor(case.token_slots, dtype=torch.int64)
        return Data(case, x, y, slots, sliced, joined)

    @property
    def sets(self) -> int:
        """Number of sets."""
        return len(self.x)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.x[0].device

    @property
    def groups(self) -> list[tuple[int, Tensor]]:
        """Adapters in use with their rows (int64, on the device)."""
        used = sorted(set(self.case.token_slots))
        return [(s, (self.slots == s).nonzero().flatten().to(self.device)) for s in used]

    def update(self, layout: str) -> Tensor:
        """What one call adds to the last set's y: float32 [tokens, out], computed in float64."""
        if self.case.workload.slices == 1:
            layout = "joined"  # the same weights
        if layout not in self._updates:
            self._updates[layout] = self._exact(layout)
        return self._updates[layout]

    def _exact(self, layout: str) -> Tensor:
        w, x = self.case.workload, self.x[-1]
        found = torch.zeros((len(x), w.total_out), dtype=torch.float32, device=self.device)
        for slot, rows in self.groups:
            for first in range(0, len(rows), CHECK_ROWS):
                part = rows[first : first + CHECK_ROWS]
                wide = x[part].double()
                for s, (start, out) in enumerate(zip(w.offsets, w.out_features, strict=True)):
                    if layout == "joined":
                        a = self.joined[-1][0][slot, s * w.rank : (s + 1) * w.rank]
                        b = self.joined[-1][1][slot, start : start + out]
                    else:
                        a, b = (stacks[s][slot] for stacks in self.sliced[-1])
                    v = wide @ a.double().T
                    found[part, start : start + out] = (v @ b.double().T).float()
        return found


def relative_error(y: Tensor, before: Tensor, update: Tensor, times: int) -> float:
    """|y - before - times * update| / |times * update| in the Euclidean norm; NaN for no update."""
    off = size = 0.0
    for start in range(0, len(y), CHECK_ROWS):
        part = slice(start, start + CHECK_ROWS)
        wanted = update[part].double() * times
        off += float((y[part].double() - before[part].double() - wanted).square().sum())
        size += float(wanted.square().sum())
    return math.sqrt(off / size) if size > 0 else float("nan")
