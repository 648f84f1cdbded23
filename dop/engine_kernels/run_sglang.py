"""Runs SGLang's csgmv kernels with given options, through SGLang's launch code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch

from dop.engine_kernels.task import EngineTask
from dop.engine_kernels.timing import (
    Case,
    copies_for,
    mappings,
    measure_case,
    relative_error,
    spread,
)
from dop.errors import MissingDependencyError
from dop.measurement import Measurement
from dop.scenario import Scenario


class SglangRunner:
    """Times shrink and expand of SGLang's default LoRA backend on the current GPU.

    Args:
        l2_bytes: size of the cache that weights must not come from.

    Raises:
        MissingDependencyError: SGLang's kernels cannot be imported.
    """

    def __init__(self, l2_bytes: int) -> None:
        try:
            from sglang.kernels.ops.lora.dense import chunked_sgmv_expand, chunked_sgmv_shrink
        except ImportError as error:
            raise MissingDependencyError(
                f"SGLang's csgmv kernels cannot be imported ({error}).",
                "Install sglang on a GPU machine.",
            ) from error
        self._modules: dict[str, Any] = {
            "shrink": chunked_sgmv_shrink,
            "expand": chunked_sgmv_expand,
        }
        self._l2_bytes = l2_bytes
        self._kept: tuple[object, list[Case]] | None = None
        self.versions = {name: version(name) for name in ("sglang", "triton", "torch")}

    def measure(
        self, task: EngineTask, chosen: Mapping[str, int], scenarios: Sequence[Scenario]
    ) -> list[Measurement]:
        """One measurement per batch; a failure is a measurement."""
        key = (task.shape_key, tuple(s.key for s in scenarios))
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            stacks = self._stacks(task)
            self._kept = (key, [self._case(task, s, stacks) for s in scenarios])
        with self._options(task.kernel, chosen):
            return [measure_case(case) for case in self._kept[1]]

    @contextmanager
    def _options(self, kernel: str, chosen: Mapping[str, int]) -> Iterator[None]:
        module, name = self._modules[kernel], f"get_lora_{kernel}_config"
        stock = getattr(module, name)
        setattr(module, name, lambda *_, **__: dict(chosen))
        try:
            yield
        finally:
            setattr(module, name, stock)

    def _stacks(self, task: EngineTask) -> list[torch.Tensor]:
        """Copies of the task's weights."""
        work = task.workload
        if task.kernel == "shrink":
            shape = (task.slots, work.slices * work.rank, work.in_features)
        else:
            shape = (task.slots, work.total_out, work.rank)
        size = shape[0] * shape[1] * shape[2] * work.element_bytes
        dtype = getattr(torch, work.dtype)
        return [
            torch.randn(shape, dtype=dtype, device="cuda")
            for _ in range(copies_for(size, self._l2_bytes))
        ]

    def _case(self, task: EngineTask, scenario: Scenario, stacks: list[torch.Tensor]) -> Case:
        work, dtype = task.workload, getattr(torch, task.workload.dtype)
        maps = mappings(scenario, task.slots)
        infos = [batch_info(slots, task.slots, work.rank, task.chunk, "cuda") for slots in maps]
        width = work.in_features if task.kernel == "shrink" else work.slices * work.rank
        x = torch.randn(scenario.tokens, width, dtype=dtype, device="cuda")
        y = torch.zeros(scenario.tokens, work.total_out, dtype=dtype, device="cuda")
        run = self._launcher(task, x, y)

        want = _reference(task, x, stacks[0], maps[0])

        def check() -> float:
            y.zero_()
            return relative_error(run(stacks[0], infos[0]), want)

        pairs = spread(len(maps), len(stacks))
        return Case([_bound(run, stacks[c], infos[m]) for m, c in pairs], check)

    def _launcher(self, task: EngineTask, x: torch.Tensor, y: torch.Tensor) -> Any:
        module, work = self._modules[task.kernel], task.workload
        if task.kernel == "shrink":
            forward = module.chunked_sgmv_lora_shrink_forward
            return lambda weights, info: forward(x, weights, info, work.slices)
        forward = module.chunked_sgmv_lora_expand_forward
        bounds = torch.tensor([*work.offsets, work.total_out], dtype=torch.int32)
        offsets, widest = bounds.to("cuda"), max(work.out_features)
        return lambda weights, info: forward(x, weights, info, offsets, widest, y, bounds)


def _bound(run: Any, weights: torch.Tensor, info: Any) -> Any:
    return lambda: run(weights, info)


def batch_info(
    slots: Sequence[int], adapters: int, rank: int, chunk: int, device: str
) -> SimpleNamespace:
    """What csgmv's kernels read of a batch: rows sorted by adapter, in chunks of one adapter."""
    order = sorted(range(len(slots)), key=lambda row: slots[row])
    indptr: list[int] = [0]
    owners: list[int] = []
    for place, row in enumerate(order):
        full = place - indptr[-1] == chunk
        if owners and (full or slots[row] != owners[-1]):
            indptr.append(place)
        if not owners or indptr[-1] == place:
            owners.append(slots[row])
    indptr.append(len(slots))

    def tensor(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return SimpleNamespace(
        bs=len(slots),
        max_len=chunk,
        use_cuda_graph=False,
        num_segments=len(owners),
        seg_indptr=tensor(indptr),
        weight_indices=tensor(owners),
        lora_ranks=tensor([rank] * adapters),
        scalings=torch.ones(adapters, device=device),
        permutation=tensor(order),
    )


def _reference(
    task: EngineTask, x: torch.Tensor, weights: torch.Tensor, slots: Sequence[int]
) -> torch.Tensor:
    """The launch in float32 by torch, adapter by adapter."""
    work, index = task.workload, torch.tensor(slots, device=x.device)
    if task.kernel == "shrink":
        out = x.new_zeros(x.shape[0], weights.shape[1], dtype=torch.float32)
        for slot in sorted(set(slots)):
            out[index == slot] = x[index == slot].float() @ weights[slot].float().T
        return out
    out = x.new_zeros(x.shape[0], work.total_out, dtype=torch.float32)
    for slot in sorted(set(slots)):
        here = index == slot
        for s, (start, width) in enumerate(zip(work.offsets, work.out_features, strict=True)):
            rows = x[here, s * work.rank : (s + 1) * work.rank].float()
            out[here, start : start + width] = rows @ weights[slot, start : start + width].float().T
    return out
