"""A stand-in for what of vLLM the plugin touches, with the same data and the same order of calls.

The metadata follows vLLM 0.24's documented content (a mapping [1,1,-1,2,2,2,1] sorts to
[2,0,1,6,3,4,5] with counts [1,3,3,0,0]); the stock kernels are plain torch, and read what vLLM's
read: sorted indices, counts and ids, never the mapping of padded rows.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


@dataclass
class Mapping:
    index_mapping: tuple[int, ...]
    prompt_mapping: tuple[int, ...]
    is_prefill: bool = True


class KernelMeta:
    """Fields and meaning of vLLM's LoRAKernelMeta."""

    def __init__(self, max_loras: int, max_tokens: int, captured: list[int]) -> None:
        self.token_lora_mapping = torch.full((max_tokens,), 77, dtype=torch.int32)
        self.token_indices_sorted_by_lora_ids = torch.full((max_tokens,), 77, dtype=torch.int32)
        self.active_lora_ids = torch.full((max_loras + 1,), -1, dtype=torch.int32)
        self.num_tokens_per_lora = torch.zeros(max_loras + 1, dtype=torch.int32)
        self.lora_token_start_loc = torch.zeros(max_loras + 2, dtype=torch.int32)
        self.no_lora_flag_cpu = torch.tensor([False])
        self.num_active_loras_cpu = torch.tensor([0], dtype=torch.int32)
        self.default_num_active_loras_cpu = torch.tensor([max_loras + 1], dtype=torch.int32)
        self.captured_lora_counts = sorted(captured)

    def prepare_tensors(self, slots: torch.Tensor) -> None:
        self.active_lora_ids[:] = -1
        self.num_tokens_per_lora[:] = 0
        self.lora_token_start_loc[:] = 0
        self.num_active_loras_cpu[0] = 0
        self.no_lora_flag_cpu[0] = bool((slots == -1).all())
        if self.no_lora_flag_cpu[0]:
            return
        found = sorted(set(slots.tolist()))
        counts = [slots.tolist().count(slot) for slot in found]
        order = sorted(range(len(slots)), key=lambda row: int(slots[row]))
        self.token_lora_mapping[: len(slots)] = slots
        self.token_indices_sorted_by_lora_ids[: len(slots)] = torch.tensor(order)
        self.active_lora_ids[: len(found)] = torch.tensor(found)
        self.num_tokens_per_lora[: len(found)] = torch.tensor(counts)
        start = 0
        for i, count in enumerate(counts):
            start += count
            self.lora_token_start_loc[i + 1] = start
        above = [count for count in self.captured_lora_counts if count >= len(found)]
        self.num_active_loras_cpu[0] = above[0] if above else len(found)


class UnquantizedLinearMethod:
    """vLLM's way to multiply by a weight as it is."""

    def __init__(self, apply: Any) -> None:
        self.apply = apply


class PunicaWrapperGPU:
    """vLLM's wrapper; `stock_calls` counts the launches of its own kernels."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any):
        self.lora_config = kwargs["lora_config"]
        self.max_loras = self.lora_config.max_loras
        counts = [self.max_loras + 1]
        if self.lora_config.specialize_active_lora:
            counts += [1 << i for i in range(8) if 1 << i <= self.max_loras]
        self.token_mapping_meta = KernelMeta(self.max_loras, max_num_batched_tokens, counts)
        self.prompt_mapping_meta = KernelMeta(self.max_loras, max_num_batched_tokens, counts)
        self._token_lora_indices = torch.empty(max_num_batched_tokens, dtype=torch.long)
        self._sampler_indices = torch.empty(max_num_batched_tokens, dtype=torch.long)
        self._sampler_indices_padded = torch.empty(max_num_batched_tokens, dtype=torch.long)
        self._embeddings_indices = torch.empty(max_num_batched_tokens, dtype=torch.long)
        self.indices_len: list[int | None] = [None] * 4
        self.is_prefill = False
        self.stock_calls = 0
        self.logits_calls = 0

    def _update_base_metadata(
        self, mapping: Mapping, ids: list[int | None], max_loras: int, vocab_size: int
    ) -> None:
        slots = [ids.index(x) if x > 0 else -1 for x in mapping.index_mapping]
        self._token_lora_indices[: len(slots)] = torch.tensor(slots)
        self.indices_len[0] = len(slots)

    def update_metadata(
        self, mapping: Mapping, ids: list[int | None], max_loras: int, vocab_size: int
    ) -> None:
        self._update_base_metadata(mapping, ids, max_loras, vocab_size)
        for meta, values in (
            (self.token_mapping_meta, mapping.index_mapping),
            (self.prompt_mapping_meta, mapping.prompt_mapping),
        ):
            slots = [ids.index(x) if x > 0 else -1 for x in values]
            meta.prepare_tensors(torch.tensor(slots, dtype=torch.int32))

    def add_lora_linear(
        self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, **kwargs
    ) -> None:
        self.stock_calls += 1
        meta = self.token_mapping_meta
        if meta.no_lora_flag_cpu.item():
            return
        for i, slot in enumerate(meta.active_lora_ids.tolist()):
            start = int(meta.lora_token_start_loc[i])
            count = int(meta.num_tokens_per_lora[i])
            rows = meta.token_indices_sorted_by_lora_ids[start : start + count].long()
            if slot < 0 or count == 0:
                continue
            column = 0
            for a, b in zip(lora_a_stacked, lora_b_stacked, strict=True):
                width = b.shape[2]
                v = x[rows].float() @ a[slot, 0].float().T
                add = (v @ b[slot, 0].float().T * scale).to(y.dtype)
                y[rows, column : column + width] += add
                column += width

    def add_lora_logits(self, y, x, a, b, scale, *, buffer=None, **kwargs) -> None:
        self.logits_calls += 1


class BaseLayerWithLoRA:
    """Any layer; the manager gives it its wrapper."""

    def set_mapping(self, punica_wrapper: Any) -> None:
        self.punica_wrapper = punica_wrapper


class BaseLinearLayerWithLoRA(BaseLayerWithLoRA):
    """What a layer holds: stacks per slice, a wrapper, and `apply`."""

    def __init__(self, config: Any, widths: tuple[int, ...], hidden: int) -> None:
        self.lora_config, self.output_slices = config, widths
        self.create_lora_weights(hidden)

    def create_lora_weights(self, hidden: int) -> None:
        config, widths = self.lora_config, self.output_slices
        slots, rank = config.max_loras, config.max_lora_rank
        kind = config.lora_dtype
        self.lora_a_stacked = tuple(torch.zeros(slots, 1, rank, hidden, dtype=kind) for _ in widths)
        self.lora_b_stacked = tuple(torch.zeros(slots, 1, w, rank, dtype=kind) for w in widths)

    def set_lora(self, slot: int, a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
        self.reset_lora(slot)
        for stack, part in zip(self.lora_a_stacked, a, strict=True):
            stack[slot, 0, : part.shape[0]] = part
        for stack, part in zip(self.lora_b_stacked, b, strict=True):
            stack[slot, 0, :, : part.shape[1]] = part

    def reset_lora(self, slot: int) -> None:
        for stack in (*self.lora_a_stacked, *self.lora_b_stacked):
            stack[slot] = 0

    def apply(self, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        y = torch.zeros(x.shape[0], sum(self.output_slices), dtype=x.dtype)
        self.punica_wrapper.add_lora_linear(
            y, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices
        )
        return y

    base_layer = None

    def _get_quant_method(self) -> Any:
        def apply(layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
            total = sum(self.output_slices)
            y = x.sum(-1, keepdim=True).expand(*x.shape[:-1], total).contiguous()
            return y if bias is None else y + bias

        return UnquantizedLinearMethod(apply)

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        shape = output.shape
        output, x = output.reshape(-1, shape[-1]), x.reshape(-1, x.shape[-1])
        self.punica_wrapper.add_lora_linear(
            output, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices
        )
        return output.reshape(shape)

    def _apply_sync(self, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return torch.full((*x.shape[:-1], sum(self.output_slices)), 12345.0)

    # What VLLM_LORA_ENABLE_DUAL_STREAM takes instead.
    _apply_async_impl = _apply_sync


class LogitsProcessorWithLoRA(BaseLayerWithLoRA):
    """The output head."""

    def set_lora(self, slot: int, a: Any, b: Any) -> None:
        pass

    def reset_lora(self, slot: int) -> None:
        pass


class LoRAModelManager:
    """Slots and their adapters, as vLLM 0.24 keeps them."""

    def __init__(self, wrapper: Any, modules: dict[str, Any], config: Any) -> None:
        self.punica_wrapper_mapping = {"language_model": wrapper}
        self.modules, self.lora_config = modules, config
        self.lora_index_to_id: list[int | None] = [None] * config.max_loras
        self._registered_adapters: dict[int, Any] = {}
        self._active_adapters: dict[int, None] = {}
        self._last_mapping: Any = None
        for module in modules.values():
            module.set_mapping(wrapper)

    def _get_lora_layer_weights(self, model: Any, name: str) -> Any:
        return model.get(name)

    def activate_adapter(self, lora_id: int) -> bool:
        if lora_id in self._active_adapters:
            return False
        slot = self.lora_index_to_id.index(None)
        self._active_adapters[lora_id] = None
        self.lora_index_to_id[slot] = lora_id
        for name, module in self.modules.items():
            weights = self._get_lora_layer_weights(self._registered_adapters[lora_id], name)
            if weights:
                module.set_lora(slot, weights.lora_a, weights.lora_b)
            else:
                module.reset_lora(slot)
        return True

    def remove_adapter(self, lora_id: int) -> None:
        self._active_adapters.pop(lora_id)
        self._registered_adapters.pop(lora_id)
        self.lora_index_to_id[self.lora_index_to_id.index(lora_id)] = None

    def set_adapter_mapping(self, mapping: Mapping) -> None:
        if self._last_mapping != mapping:
            for wrapper in self.punica_wrapper_mapping.values():
                wrapper.update_metadata(mapping, self.lora_index_to_id, 5, 100)
            self._last_mapping = mapping


def _mcp_apply(x: Any, bias: Any, layer: Any) -> Any:
    """vLLM 0.24's way for packed projections: the kernels for fully sharded LoRA."""
    return "sharded"


class Platform:
    """vLLM's CUDA platform."""

    def is_cuda(self) -> bool:
        return True

    @classmethod
    def has_device_capability(cls, capability: int) -> bool:
        return True

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"


def direct_register_custom_op(
    op_name, op_func, mutates_args=None, fake_impl=None, target_lib=None, **_
) -> None:
    schema = torch.library.infer_schema(op_func, mutates_args=mutates_args or [])
    target_lib.define(op_name + schema)
    target_lib.impl(op_name, op_func, dispatch_key="CPU")
    target_lib._register_fake(op_name, fake_impl)


def config(**changes: Any) -> SimpleNamespace:
    facts = {
        "max_loras": 4, "max_lora_rank": 8, "specialize_active_lora": False,
        "fully_sharded_loras": False, "lora_dtype": torch.float16,
    }  # fmt: skip
    return SimpleNamespace(**{**facts, **changes})


class LoRAConfig:
    """What vLLM hashes to find compiled models on disk."""

    def compute_hash(self) -> str:
        return "stock"


def modules() -> dict[str, ModuleType]:
    """Everything under the names that the plugin imports."""

    def module(name: str, **content: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(content)
        return made

    linears = "vllm.model_executor.layers.linear"
    base = module("vllm.lora.layers.base", BaseLayerWithLoRA=BaseLayerWithLoRA)
    linear = module("vllm.lora.layers.base_linear", BaseLinearLayerWithLoRA=BaseLinearLayerWithLoRA)
    column = module("vllm.lora.layers.column_parallel_linear", _mcp_apply=_mcp_apply)
    layers = module(
        "vllm.lora.layers", base=base, base_linear=linear, column_parallel_linear=column
    )
    logits = "vllm.lora.layers.logits_processor"
    punica = "vllm.lora.punica_wrapper.punica_gpu"
    manager = "vllm.lora.model_manager"
    utils = "vllm.utils.torch_utils"
    made = [
        module("vllm"), module("vllm.lora"), module("vllm.lora.punica_wrapper"),
        module("vllm.config"), module("vllm.config.lora", LoRAConfig=LoRAConfig),
        module("vllm.utils"), base, linear, column, layers,
        module(logits, LogitsProcessorWithLoRA=LogitsProcessorWithLoRA),
        module(punica, PunicaWrapperGPU=PunicaWrapperGPU),
        module(manager, LoRAModelManager=LoRAModelManager),
        module(utils, direct_register_custom_op=direct_register_custom_op),
        module("vllm.platforms", current_platform=Platform()),
        module("vllm.model_executor"), module("vllm.model_executor.layers"),
        module(linears, UnquantizedLinearMethod=UnquantizedLinearMethod),
    ]  # fmt: skip
    return {m.__name__: m for m in made}


def install() -> None:
    """Put the stand-in into sys.modules; real vLLM must not be there."""
    assert "vllm" not in sys.modules, "real vLLM is loaded"
    sys.modules.update(modules())
