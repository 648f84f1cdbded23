"""Runs vLLM's own LoRA kernels with given options, through vLLM's launch code.

The installed vLLM is what is measured: its metadata class, its launchers, its kernels; only the
look-up of the options is replaced while a call runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
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


class VllmRunner:
    """Times shrink and expand of vLLM on the current GPU.

    Args:
        l2_bytes: size of the cache that weights must not come from.

    Raises:
        MissingDependencyError: vLLM or its Triton kernels cannot be imported.
    """

    def __init__(self, l2_bytes: int) -> None:
        try:
            from vllm.lora.ops.triton_ops import (
                LoRAKernelMeta,
                lora_expand_op,
                lora_shrink_op,
                utils,
            )
        except ImportError as error:
            raise MissingDependencyError(
                f"vLLM's LoRA kernels cannot be imported ({error}).",
                "Install vllm on a GPU machine.",
            ) from error
        self._meta_class: Any = LoRAKernelMeta
        self._modules: dict[str, Any] = {"shrink": lora_shrink_op, "expand": lora_expand_op}
        self._addresses: tuple[Any, ...] = (utils._LORA_A_PTR_DICT, utils._LORA_B_PTR_DICT)
        self._l2_bytes = l2_bytes
        self._kept: tuple[object, list[Case]] | None = None
        self.versions = {name: version(name) for name in ("vllm", "triton", "torch")}

    def measure(
        self, task: EngineTask, chosen: Mapping[str, int], scenarios: Sequence[Scenario]
    ) -> list[Measurement]:
        """One measurement per batch; a failure is a measurement."""
        cases = self._cases(task, scenarios)
        with self._options(task.kernel, chosen):
            return [measure_case(case) for case in cases]

    def _cases(self, task: EngineTask, scenarios: Sequence[Scenario]) -> list[Case]:
        """The task's batches, kept for the next candidate."""
        key = (task.shape_key, tuple(s.key for s in scenarios))
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            for cache in self._addresses:
                cache.clear()  # vLLM keeps strides by address, and addresses are used again
            stacks = self._stacks(task)
            self._kept = (key, [self._case(task, s, stacks) for s in scenarios])
        return self._kept[1]

    @contextmanager
    def _options(self, kernel: str, chosen: Mapping[str, int]) -> Iterator[None]:
        module = self._modules[kernel]
        stock = module.get_lora_op_configs
        module.get_lora_op_configs = lambda *_, **__: dict(chosen)
        try:
            yield
        finally:
            module.get_lora_op_configs = stock

    def _stacks(self, task: EngineTask) -> list[list[torch.Tensor]]:
        """Copies of the task's weights, one tensor per slice."""
        work = task.workload
        if task.kernel == "shrink":
            shapes = [(task.slots, 1, work.rank, work.in_features)] * work.slices
        else:
            shapes = [(task.slots, 1, width, work.rank) for width in work.out_features]
        dtype = getattr(torch, work.dtype)
        size = sum(a * c * d * work.element_bytes for a, _, c, d in shapes)
        return [
            [torch.randn(shape, dtype=dtype, device="cuda") for shape in shapes]
            for _ in range(copies_for(size, self._l2_bytes))
        ]

    def _case(self, task: EngineTask, scenario: Scenario, stacks: list[list[torch.Tensor]]) -> Case:
        maps = mappings(scenario, task.slots)
        metas = [self._meta(task.slots, slots) for slots in maps]
        x, y = _tensors(task, scenario.tokens)
        launch = self._modules[task.kernel]
        run = launch._lora_shrink if task.kernel == "shrink" else launch._lora_expand
        extra: tuple[object, ...] = (1.0,) if task.kernel == "shrink" else (0, task.add_inputs)

        def call(m: int, c: int) -> Any:
            return lambda: run(x, stacks[c], y, *metas[m], *extra)

        want = _reference(task, x, stacks[0], maps[0])

        def check() -> float:
            y.zero_()
            call(0, 0)()
            return relative_error(y, want)

        return Case([call(m, c) for m, c in spread(len(maps), len(stacks))], check)

    def _meta(self, slots: int, token_slots: list[int]) -> tuple[object, ...]:
        tokens = len(token_slots)
        meta = self._meta_class.make(slots, tokens, device="cuda")
        meta.prepare_tensors(torch.tensor(token_slots, dtype=torch.int32, device="cuda"))
        arguments: tuple[object, ...] = meta.meta_args(tokens, False)
        return arguments


def _tensors(task: EngineTask, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a launch: x, v for shrink; v, y for expand."""
    work, dtype = task.workload, getattr(torch, task.workload.dtype)
    middle = torch.randn(work.slices, tokens, work.rank, device="cuda")
    if task.kernel == "shrink":
        return torch.randn(tokens, work.in_features, dtype=dtype, device="cuda"), middle
    return middle, torch.zeros(tokens, work.total_out, dtype=dtype, device="cuda")


def _reference(
    task: EngineTask, x: torch.Tensor, stack: list[torch.Tensor], slots: list[int]
) -> torch.Tensor:
    """The launch in float32 by torch, adapter by adapter; rows without adapter are 0."""
    index = torch.tensor(slots, device=x.device)
    shrink = task.kernel == "shrink"
    parts = []
    for s, weights in enumerate(stack):
        rows = (x if shrink else x[s]).float()
        if not shrink:
            rows = rows.to(weights.dtype).float()  # vLLM rounds v to the weights' type
        out = rows.new_zeros(rows.shape[0], weights.shape[2])
        for slot in sorted(set(slots) - {-1}):
            here = index == slot
            out[here] = rows[here] @ weights[slot, 0].float().T
        parts.append(out)
    return torch.stack(parts) if shrink else torch.cat(parts, dim=1)
