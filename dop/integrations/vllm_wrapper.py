"""The LoRA wrapper that vLLM's layers call: linears through dop.ops, the rest as vLLM has it.

Importing this module patches vLLM in a few more places (`install`), so it is imported only when
vLLM asks for the wrapper class:

- vLLM 0.24 sends packed projections (qkv, gate_up) to the kernels for fully sharded LoRA even
  where nothing is sharded, around `add_lora_linear`; they go to `add_lora_linear`.
- Whenever an adapter enters a slot its true rank is noted, and the step's tables count as stale
  even if the tokens' adapters are those of the step before: the adapter may be in another slot.
- Unless DOP_VLLM_BESIDE=0, in CUDA graphs of few tokens (`pays_beside`) a layer's shrink runs on a
  second stream beside the base layer's matmul, and expand adds to its output behind both. Matmul
  and LoRA are then one opaque op: compilers reorder what they see, and put shrink's start behind
  the matmul. The op finds its layer by the address of its stacks; layers are noted when vLLM gives
  them the wrapper, as code that was compiled before is not traced. With
  VLLM_LORA_ENABLE_DUAL_STREAM vLLM runs all of LoRA on a second stream into zeros that it then
  adds; here that changes nothing.
- Unless DOP_VLLM_SPLIT=0, sizes of CUDA graphs above 32 rows are captured twice, for steps of few
  adapters and of many (vllm_graphs.py).
- Adapters of a step that are in their slots are marked as used without vLLM's copies of its list
  of adapters (vllm_adapters.py).
- The hash of LoRA's configuration differs from stock: vLLM loads compiled models from disk by
  hashes of configurations, and one that was compiled without Dop would never call it.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import vllm
from torch.library import Library
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import base, base_linear, column_parallel_linear
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.utils.torch_utils import direct_register_custom_op

from dop import ops
from dop.errors import DopError
from dop.integrations import vllm_adapters, vllm_graphs, vllm_metadata
from dop.integrations.step_plan import SMALL_TOKENS, StepPlans, capturing, slots_of
from dop.integrations.vllm import LOG, allowed
from dop.ops.beside import Beside, Pending

_LIBRARY = Library("dop_vllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_WRAPPERS: weakref.WeakValueDictionary[int, DopPunicaWrapper] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()
_MAX_SLICES = 3
_DTYPES = (torch.float16, torch.bfloat16)

BESIDE_TOKENS = 128
"""Most rows of a batch whose shrink runs beside the base layer's matmul."""
UNTUNED_TOKENS = 32
"""Likewise, if the kernels were tuned for one stream."""

EMBEDDINGS_ONLY = getattr(vllm, "__version__", "").startswith("0.24.")
"""Of the tables of single tokens, vLLM 0.24 reads on a GPU that of embeddings alone (the others are
what its own `update_metadata` sorts)."""


class Linears:
    """This process's LoRA layers on dop, found by where their first stack of B is: compiled code
    that is cached on disk knows no layer."""

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._at: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __contains__(self, layer: Any) -> bool:
        return layer in self._layers

    def note(self, layer: Any) -> None:
        """A layer that calls a wrapper of dop's from now on."""
        self._layers.add(layer)

    def forget(self, layer: Any) -> None:
        """A layer that calls another wrapper from now on."""
        self._layers.discard(layer)

    def of(self, stack: torch.Tensor) -> Any:
        """The layer whose first stack of B this is.

        Raises:
            DopError: none of the layers that were noted.
        """
        address = stack.data_ptr()
        layer = self._at.get(address)
        if layer not in self._layers or _address_of(layer) != address:
            # Stacks may be made, or made again, after the layer was noted.
            self._at = weakref.WeakValueDictionary(
                {at: each for each in self._layers if (at := _address_of(each)) is not None}
            )
            layer = self._at.get(address)
        if layer is None:
            raise DopError(
                f"None of the {len(self._layers)} LoRA layers that vLLM gave dop (set_mapping) "
                f"has the stack {tuple(stack.shape)} that its compiled model calls.",
                "Set DOP_VLLM_BESIDE=0, and report this with the version of vLLM.",
            )
        return layer


_LINEARS = Linears()


class DopPunicaWrapper(PunicaWrapperGPU):  # type: ignore[misc]
    """PunicaWrapperGPU whose `add_lora_linear` runs on dop.ops where dop covers the layer."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        captured = captured_tokens()
        self._plans = StepPlans(
            -(-max_num_batched_tokens // 64) * 64,
            self.max_loras,
            self.lora_config.max_lora_rank,
            device,
            small=captured,
            hint_small=not captured or self.lora_config.specialize_active_lora,
            few=partial(vllm_graphs.captured_few, slots=self.max_loras),
        )
        metas = (self.token_mapping_meta, self.prompt_mapping_meta)
        self._known_meta = vllm_metadata.is_known_base(self) and all(
            map(vllm_metadata.is_known, metas)
        )
        if self._known_meta:
            for meta in metas:
                vllm_metadata.join(meta)
        self._no_adapter = True
        # By address of a layer's first stack: why it stays with vLLM's kernels, or "".
        self._layers: dict[int, str] = {}
        self._said: set[str] = set()
        # Slots whose adapter is known to have no weights for the output head.
        self._headless: set[int] = set()
        self._sampled: set[int] = set()
        self._head_unread = False
        handle = next(_HANDLES)
        # A tensor, not a number: compiled code that is cached on disk would keep the number.
        self._handle = torch.tensor([handle], dtype=torch.int64)
        _WRAPPERS[handle] = self
        self._beside = Beside(_second_stream(device)) if beside_wanted() else None
        # Layers, by address of their first stack, batch sizes and hints whose kernels are loaded.
        self._warm: set[tuple[int, int, int | None]] = set()

    def update_metadata(
        self,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Once per step, outside of CUDA graphs: fills every table that kernels read."""
        slot_of = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter}
        tokens = slots_of(mapping.index_mapping, slot_of)
        samples = slots_of(mapping.prompt_mapping, slot_of)
        self._sampled = set(samples.tolist()) - {-1}
        if self._known_meta:
            self.is_prefill = mapping.is_prefill
            pairs = vllm_metadata.base_pairs(
                self, tokens, samples, vocab_size, max_loras - 1, embeddings_only=EMBEDDINGS_ONLY
            )
            pairs += vllm_metadata.pairs_of(self.token_mapping_meta, tokens)
            vllm_metadata.to_device(pairs + self._head_pairs(samples))
        else:
            super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        used = set(tokens.tolist()) - {-1}
        self._no_adapter = not used
        self._plans.update(tokens, len(used))

    def _head_pairs(self, samples: torch.Tensor) -> list[vllm_metadata.Pair]:
        """The table that only the output head reads; one that says "none" is not filled again."""
        unread, before = self._sampled <= self._headless, self._head_unread
        self._head_unread = unread
        if unread and before:
            return []
        heads = torch.full_like(samples, -1) if unread else samples
        return vllm_metadata.pairs_of(self.prompt_mapping_meta, heads)

    def note_adapter(self, slot: int, rank: int, has_head: bool) -> None:
        """An adapter entered a slot: its true rank, and whether it changes the output head."""
        self._plans.set_rank(slot, rank, again=True)
        (self._headless.discard if has_head else self._headless.add)(slot)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y += x A^T B^T per row's adapter, in place; traced by torch.compile as one opaque op."""
        torch.ops.dop_vllm.add_lora_linear(
            y,
            x,
            list(lora_a_stacked),
            list(lora_b_stacked),
            self._handle,
            scale,
            kwargs.get("add_inputs", True),
        )

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """vLLM's own, left out if no adapter of the step has weights for the output head.

        vLLM reads the head's zeros for every active adapter: 4 MB each for 128k tokens at rank 16.
        """
        fixed = torch.compiler.is_compiling() or capturing(self._plans.device)
        if not fixed and self._sampled <= self._headless:
            return
        super().add_lora_logits(
            y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **kwargs
        )

    def launch(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a: list[torch.Tensor],
        b: list[torch.Tensor],
        scale: float,
        add_inputs: bool,
    ) -> None:
        """What the opaque op does: dop.ops, or vLLM's kernels for a layer dop does not cover."""
        if self._no_adapter:
            return
        if x.shape[0] < self._plans.tokens:
            # Not the step's rows, e.g. a pooled head's: vLLM reads the first rows' adapters there.
            self._launch_stock(y, x, a, b, scale, add_inputs)
            return
        layer = b[0].data_ptr()
        known = self._layers.get(layer)
        reason = uncovered(y, x, a, b) if known is None else known
        if not reason:
            try:
                # Without add_inputs the caller gives zeros: rows without adapter keep them.
                ops.add_lora(y, x, a, b, self._plans.plan(x.shape[0]), scale=scale)
            except DopError as error:
                reason = " ".join(str(error).split())
        if reason != known:
            self._layers[layer] = reason
            self._say(reason, a, b)
        if reason:
            self._launch_stock(y, x, a, b, scale, add_inputs)

    def linear(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        a: list[torch.Tensor],
        b: list[torch.Tensor],
    ) -> torch.Tensor:
        """What the opaque op of a layer does: the base layer's matmul, and LoRA added to it."""
        rows = x.flatten(0, 1) if x.ndim == 3 else x
        pending = self._begin(rows, a, b)
        y: torch.Tensor = layer._get_quant_method().apply(layer.base_layer, x, bias)
        target = y.flatten(0, 1) if y.ndim == 3 else y
        if pending is None:
            self.launch(target, rows, a, b, 1.0, True)
        else:
            assert self._beside is not None
            self._beside.finish(pending, target)
        return y if target is y else target.view(y.shape)

    def _begin(
        self,
        x: torch.Tensor,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
    ) -> Pending | None:
        """In front of a layer's matmul: from here on its shrink may run, if that pays.

        Not in the first call of a layer: that finds out whether Dop covers it. Only while a graph
        is captured: replayed, a fork and a join cost the host nothing. Before, in the engine's
        own runs of each size, kernels are loaded.
        """
        if self._beside is None or self._layers.get(b[0].data_ptr()) != "":
            return None
        if self._no_adapter or x.shape[0] < self._plans.tokens:
            return None
        tokens = x.shape[0]
        if not pays_beside(tokens, tuned=True):
            return None
        with contextlib.suppress(DopError):  # launch meets it again, and says so
            plan = self._plans.plan(tokens)
            if capturing(self._plans.device):
                pending = self._beside.begin(x, a, b, plan)
                return pending if pays_beside(tokens, pending.tuned) else None
            call = (b[0].data_ptr(), tokens, plan.adapters)
            if call not in self._warm:
                self._warm.add(call)
                self._beside.warm(x, a, b, plan)
        return None

    def _launch_stock(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a: list[torch.Tensor],
        b: list[torch.Tensor],
        scale: float,
        add_inputs: bool,
    ) -> None:
        slices = tuple(part.shape[-2] for part in b)
        super().add_lora_linear(y, x, tuple(a), tuple(b), scale, slices, add_inputs=add_inputs)

    def _say(self, reason: str, a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
        """Log once per shape who serves it."""
        widths = "+".join(str(part.shape[-2]) for part in b)
        shape = f"{a[0].shape[-1]}->{widths}, rank {a[0].shape[-2]}, {a[0].dtype}"
        if (text := f"{shape}: {reason}") in self._said:
            return
        self._said.add(text)
        if reason:
            LOG.warning("dop: %s LoRA of such layers runs on vLLM's own kernels.", text)
        else:
            LOG.info("dop: serves LoRA of %s", shape)


def pays_beside(tokens: int, tuned: bool) -> bool:
    """Whether shrink beside the base layer's matmul saves more than a fork and a join take.

    A matmul of few rows leaves some multiprocessors idle, and waits for memory on the others; that
    of a prefill leaves none. Kernels that were tuned for one stream lose at rank 64 from 64 rows on
    (docs/performance.md 34).
    """
    return tokens <= (BESIDE_TOKENS if tuned else UNTUNED_TOKENS)


def beside_wanted() -> bool:
    """Whether there is a second stream (DOP_VLLM_BESIDE)."""
    return allowed("DOP_VLLM_BESIDE")


def _second_stream(device: Any) -> torch.cuda.Stream | None:
    """None without a GPU: shrink stays where it is."""
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _address_of(layer: Any) -> int | None:
    """Where a layer's first stack of B is; None before it has any."""
    stacks = getattr(layer, "lora_b_stacked", ())
    return int(stacks[0].data_ptr()) if stacks else None


def captured_tokens() -> int:
    """Most tokens of a CUDA graph of the engine being built; 0 if it captures none."""
    try:
        from vllm.config import get_current_vllm_config

        compilation = get_current_vllm_config().compilation_config
        if "NONE" in str(compilation.cudagraph_mode):
            return 0
        return int(compilation.max_cudagraph_capture_size or 0)
    except (ImportError, AttributeError, AssertionError, TypeError):
        return SMALL_TOKENS


def uncovered(
    y: torch.Tensor, x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor]
) -> str:
    """Why dop.ops does not serve a layer, as a sentence; empty if it does."""
    if not 1 <= len(a) <= _MAX_SLICES:
        return f"{len(a)} packed projections, dop has kernels for up to {_MAX_SLICES}."
    kinds = {x.dtype, y.dtype, *(part.dtype for part in (*a, *b))}
    if len(kinds) != 1 or x.dtype not in _DTYPES:
        return f"mixed or unsupported types {sorted(map(str, kinds))}."
    if any(left.shape[-2] != right.shape[-1] for left, right in zip(a, b, strict=True)):
        return "fully sharded LoRA: A and B of a layer have different ranks."
    if x.dim() != 2 or not (x.is_contiguous() and y.is_contiguous()):
        return "activations that are not contiguous rows."
    return ""


def _add_lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    handle: torch.Tensor,
    scale: float,
    add_inputs: bool,
) -> None:
    _WRAPPERS[int(handle.item())].launch(y, x, a, b, scale, add_inputs)


def _linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
) -> torch.Tensor:
    # No handle: a tensor of the CPU among the arguments, and Inductor takes the result for one
    # whose address is no multiple of 16, so that what reads it does so by single elements.
    layer = _LINEARS.of(b[0])
    y: torch.Tensor = layer.punica_wrapper.linear(layer, x, bias, a, b)
    return y


def _linear_fake(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], sum(part.shape[-2] for part in b)))


def _nothing(*arguments: Any) -> None:
    """The fake of what changes y in place."""


def install() -> None:
    """Patch linears, `set_mapping`, adapters, graphs and the hash (module docstring)."""
    if hasattr(LoRAModelManager.activate_adapter, "stock"):
        return
    direct_register_custom_op(
        op_name="add_lora_linear",
        op_func=_add_lora_linear,
        mutates_args=["y"],
        fake_impl=_nothing,
        target_lib=_LIBRARY,
    )
    direct_register_custom_op(
        op_name="linear",
        op_func=_linear,
        mutates_args=[],
        fake_impl=_linear_fake,
        target_lib=_LIBRARY,
    )
    LoRAModelManager.activate_adapter = _activation(LoRAModelManager.activate_adapter)
    LoRAConfig.compute_hash = _own_hash(LoRAConfig.compute_hash)
    base.BaseLayerWithLoRA.set_mapping = _mapping(base.BaseLayerWithLoRA.set_mapping)
    linear = base_linear.BaseLinearLayerWithLoRA
    for name in ("_apply_sync", "_apply_async_impl"):
        if hasattr(linear, name):
            setattr(linear, name, _apply_beside(getattr(linear, name)))
    vllm_graphs.install()
    vllm_adapters.install()
    packed = getattr(column_parallel_linear, "_mcp_apply", None)
    if packed is not None:
        column_parallel_linear._mcp_apply = _packed_apply(packed)


def _own_hash(stock: Any) -> Any:
    def compute_hash(config: Any) -> str:
        return f"{stock(config)}-dop{'-layer' * beside_wanted()}"

    return compute_hash


def _mapping(stock: Any) -> Any:
    def set_mapping(layer: Any, punica_wrapper: Any) -> None:
        stock(layer, punica_wrapper)
        if not isinstance(layer, base_linear.BaseLinearLayerWithLoRA):
            return
        if isinstance(punica_wrapper, DopPunicaWrapper):
            _LINEARS.note(layer)
        else:
            _LINEARS.forget(layer)

    return set_mapping


def _apply_beside(stock: Any) -> Any:
    """vLLM's `_apply_sync` or `_apply_async_impl`: one op with two streams, else LoRA behind."""

    def apply(layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        wrapper = layer.punica_wrapper
        if not isinstance(wrapper, DopPunicaWrapper):
            return stock(layer, x, bias)  # type: ignore[no-any-return]
        if wrapper._beside is None or not is_plain(layer):
            output = layer._get_quant_method().apply(layer.base_layer, x, bias)
            return layer._apply_lora_to_output(x, output)  # type: ignore[no-any-return]
        return torch.ops.dop_vllm.linear(  # type: ignore[no-any-return]
            x, bias, list(layer.lora_a_stacked), list(layer.lora_b_stacked)
        )

    return apply


def is_plain(layer: Any) -> bool:
    """Whether a layer's base is a matmul without quantization. Others stay visible to vLLM's
    compiler, which fuses quantization with what is in front of it."""
    return isinstance(layer._get_quant_method(), UnquantizedLinearMethod)


def _packed_apply(stock: Any) -> Any:
    def _mcp_apply(x: Any, bias: Any, layer: Any) -> Any:
        if layer.lora_config.fully_sharded_loras or not isinstance(
            layer.punica_wrapper, DopPunicaWrapper
        ):
            return stock(x, bias, layer)
        return base_linear.BaseLinearLayerWithLoRA.apply(layer, x, bias)

    return _mcp_apply


def _activation(stock: Any) -> Any:
    def activate_adapter(manager: Any, lora_id: int) -> bool:
        fresh = bool(stock(manager, lora_id))
        if fresh:
            note_activation(manager, lora_id)
        return fresh

    activate_adapter.stock = stock  # type: ignore[attr-defined]
    return activate_adapter


def note_activation(manager: Any, lora_id: int) -> None:
    """Tell the wrappers of a LoRA manager which adapter is in which slot now."""
    manager._last_mapping = None
    slot = manager.lora_index_to_id.index(lora_id)
    try:
        rank, has_head = describe(manager, lora_id)
    except (AttributeError, TypeError, KeyError, IndexError):  # another version's structures
        rank, has_head = manager.lora_config.max_lora_rank, True
    for wrapper in manager.punica_wrapper_mapping.values():
        if isinstance(wrapper, DopPunicaWrapper):
            wrapper.note_adapter(slot, rank, has_head)


def describe(manager: Any, lora_id: int) -> tuple[int, bool]:
    """Largest rank among an adapter's linears, and whether it has weights for the output head."""
    model = manager._registered_adapters[lora_id]
    rank, has_head = 0, False
    for name, module in manager.modules.items():
        weights = manager._get_lora_layer_weights(model, name)
        if not weights:
            continue
        if isinstance(module, LogitsProcessorWithLoRA):
            has_head = True
        elif isinstance(module, base_linear.BaseLinearLayerWithLoRA):
            parts = weights.lora_a if isinstance(weights.lora_a, list) else [weights.lora_a]
            rank = max([rank, *(part.shape[0] for part in parts if part is not None)])
    return rank, has_head


install()
