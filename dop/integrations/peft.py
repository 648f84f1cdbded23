"""PEFT: batches that mix adapters (`adapter_names=`) through the operator.

    from dop.integrations import peft
    peft.accelerate(model)                       # a PeftModel, adapters loaded
    model.generate(**inputs, adapter_names=["french", "__base__", "legal", ...])
    peft.restore(model)

PEFT's own mixed batch runs two small matmuls for every adapter of the batch in every layer; the
accelerated layers make one call, whatever the number of adapters and their ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dop.errors import ConfigError, DopError, MissingDependencyError
from dop.integrations.peft_batch import Batch, Slots
from dop.integrations.stacks import LayerStack

log = logging.getLogger("dop.peft")

DEFAULT_SLOTS = 64
_STATE = "_dop_mixed"
_VARIANT_KWARGS = ("alora_offsets",)


Weights = tuple[int, Any, Any, str]
"""Slot, the parameters A and B (None where the layer lacks the adapter), and its name."""


class _LayerState:
    """One layer's stacks and what they were filled from."""

    def __init__(self, shared: Slots) -> None:
        self.shared = shared
        self.batch: Batch | None = None
        self.reason: str | None = None
        self.stack: LayerStack | None = None
        self._filled: dict[int, tuple[Any, ...] | None] = {}
        self._weights: list[Weights] = []
        self._names: list[str] = []
        self._parameters: list[nn.Parameter] = []
        self._tracked: list[nn.Parameter] = []  # those that count their changes
        self._state: tuple[list[int], list[int], list[float]] | None = None
        self._dropout = False
        self._trains = False
        self.idle = False

    def forget(self) -> None:
        """An adapter of the layer came, went or was replaced."""
        self.batch = None
        self._filled.clear()
        self.shared.forget()

    def bind(self, layer: Any, batch: Batch) -> None:
        """Look up the batch's adapters in this layer, or why PEFT has to serve them."""
        self.batch, self.reason, self._weights = batch, None, []
        self._dropout = self._trains = False
        for name, slot in batch.slots.items():
            if name not in layer.lora_A:
                self._weights.append((slot, None, None, name))
                continue
            if name in layer.lora_variant:
                self.reason = f"{name!r} is a {type(layer.lora_variant[name]).__name__}"
                return
            if layer.lora_bias.get(name):
                self.reason = f"{name!r} has a bias in lora_B"
                return
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            self._dropout |= not isinstance(layer.lora_dropout[name], nn.Identity)
            self._trains |= a.requires_grad or b.requires_grad
            self._weights.append((slot, a, b, name))
        served = [w for w in self._weights if w[1] is not None]
        self.idle = not served
        self._names = [name for *_, name in served]
        self._parameters = [p for _, a, b, _ in served for p in (a, b)]
        self._tracked = [p for p in self._parameters if not p.is_inference()]
        self._state = None

    def refusal(self, layer: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> str | None:
        """Why PEFT has to serve this call, or None."""
        if self.reason is not None:
            return self.reason
        if any(kwargs.get(key) is not None for key in _VARIANT_KWARGS):
            return "the call carries aLoRA offsets"
        if self._dropout and layer.training:
            return "dropout in training mode"
        if torch.is_grad_enabled() and (self._trains or x.requires_grad):
            return "gradients are being recorded (use torch.no_grad or inference_mode)"
        return None

    def sync(self, layer: Any, y: torch.Tensor) -> LayerStack:
        """Stacks that hold the current weights of the batch's adapters."""
        batch, stack = self.batch, self.stack
        assert batch is not None
        shape = (batch.capacity, batch.rank, y.dtype, y.device)
        if stack is None or (stack.slots, stack.rank, stack.a.dtype, stack.a.device) != shape:
            stack = self.stack = LayerStack(
                batch.capacity, batch.rank, layer.in_features, layer.out_features, y.dtype, y.device
            )
            self._filled.clear()
            self._state = None
        names, scaling = self._names, layer.scaling
        state = (
            [p._version for p in self._tracked],
            [p.data_ptr() for p in self._parameters],
            [scaling[name] for name in names],
        )
        if state != self._state:  # the usual step ends here
            self._fill(stack, state)
            self._state = state
        return stack

    def _fill(self, stack: LayerStack, state: tuple[list[int], list[int], list[float]]) -> None:
        """Write the slots whose adapter, or its weights or scale, is not what they hold."""
        assert self.batch is not None
        versions = dict(zip(map(id, self._tracked), state[0], strict=True))
        scales = dict(zip(self._names, state[2], strict=True))
        for slot, a, b, name in self._weights:
            if a is None:
                if self._filled.get(slot, ()) is not None:
                    stack.clear(slot)
                    self._filled[slot] = None
                continue
            scale = self.batch.scales[slot]
            marks = [(p.data_ptr(), versions.get(id(p))) for p in (a, b)]
            key = (name, *marks, scales[name], scale)
            if self._filled.get(slot) != key:
                stack.write(slot, a, b, scales[name] / scale)
                self._filled[slot] = key


class _Mixed:
    """Mixed into a layer's class by `accelerate`; everything but the mixed batch is PEFT's."""

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        layer: Any = self
        state: _LayerState = layer.__dict__[_STATE]
        batch = state.shared.batch(adapter_names)
        if state.batch is not batch:
            state.bind(layer, batch)
        reason = state.refusal(layer, x, kwargs)
        if reason is None:
            plain = {k: v for k, v in kwargs.items() if k not in _VARIANT_KWARGS}
            y = layer.base_layer(x, *args, **plain)
            reason = _add(state, layer, x, y, batch)
            if reason is None:
                return y  # type: ignore[no-any-return]
        _tell(state.shared, reason)
        return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)  # type: ignore[misc,no-any-return]

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's; an adapter is added, or replaced by one of the same name."""
        self.__dict__[_STATE].forget()
        super().update_layer(*args, **kwargs)  # type: ignore[misc]

    def delete_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's; an adapter goes."""
        self.__dict__[_STATE].forget()
        super().delete_adapter(*args, **kwargs)  # type: ignore[misc]


def _add(
    state: _LayerState, layer: Any, x: torch.Tensor, y: torch.Tensor, batch: Batch
) -> str | None:
    """Add the adapters to y in place; the reason if that cannot be done (y is then unchanged)."""
    if state.idle:
        return None
    if not (y.is_contiguous() and y.is_floating_point()) or x.shape[:-1] != y.shape[:-1]:
        return "the base layer's output is no contiguous floating-point tensor"
    if torch.is_grad_enabled() and y.requires_grad:
        return "gradients are being recorded (use torch.no_grad or inference_mode)"
    from dop import ops

    rows = y.reshape(-1, y.shape[-1])
    if not rows.shape[0]:
        return None
    try:
        stack = state.sync(layer, y)
        plan = batch.plan(y.device, rows.shape[0] // len(batch.row_slots))
        ops.add_lora(rows, _rows(x, y.dtype), stack.a, stack.b, plan)
    except DopError as error:
        return str(error)
    return None


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype).contiguous()


def _tell(shared: Slots, reason: str) -> None:
    """Say a reason once per model."""
    if reason not in shared.told:
        shared.told.add(reason)
        log.warning("PEFT serves these mixed batches itself: %s.", reason)


def accelerate(model: nn.Module, *, max_slots: int = DEFAULT_SLOTS) -> nn.Module:
    """Send the mixed batches of a model's LoRA layers through the operator; returns the model.

    The layers' classes are swapped, nothing else of PEFT or of the model is touched, and calls
    without `adapter_names` stay as they are. Calling it again takes in layers that came since.
    Stacks are copies of the adapters in use, at the base layer's dtype: a batch uses at most as
    many slots as it has distinct adapters, or `max_slots` if that is more. Weights changed in
    place, replaced, loaded or deleted are noticed; writes through `.data[...]` (PEFT's hotswap)
    are not: call `refresh` after them.

    Raises:
        MissingDependencyError: PEFT is not installed.
        ConfigError: the model has no LoRA layers, or `max_slots` is no positive number.
    """
    if max_slots < 1:
        raise ConfigError(f"max_slots is {max_slots}.", "Give at least 1.")
    layers = list(_lora_layers(model))
    if not layers:
        raise ConfigError("the model has no LoRA layers.", "Load adapters with PEFT first.")
    served: list[nn.Module] = []
    refused: dict[str, int] = {}
    for layer in layers:
        reason = _unsupported(layer)
        if reason is None:
            served.append(layer)
        else:
            refused[reason] = refused.get(reason, 0) + 1
    for reason, count in refused.items():
        log.warning("%d LoRA layers stay with PEFT: %s.", count, reason)
    shared = Slots(served, max_slots)
    for layer in served:
        if _STATE not in layer.__dict__:
            layer.__class__ = _accelerated(type(layer))
        layer.__dict__[_STATE] = _LayerState(shared)
    log.info("%d LoRA layers serve mixed batches through dop.ops.", len(served))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`; returns the model."""
    for module in model.modules():
        if module.__dict__.pop(_STATE, None) is not None:
            module.__class__ = type(module).__mro__[2]
    return model


def refresh(model: nn.Module) -> None:
    """Read all adapters anew at the next batch, after writes that leave no trace."""
    for module in model.modules():
        state = module.__dict__.get(_STATE)
        if state is not None:
            state.forget()


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _accelerated(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer with `_Mixed` in front; one per PEFT class."""
    if base not in _CLASSES:
        _CLASSES[base] = type(base.__name__, (_Mixed, base), {"__module__": base.__module__})
    return _CLASSES[base]


def _lora_layers(model: nn.Module) -> Iterator[nn.Module]:
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise MissingDependencyError("PEFT is not installed.", "pip install peft") from error
    return (m for m in model.modules() if isinstance(m, LoraLayer))


def _unsupported(layer: Any) -> str | None:
    """Why a layer is not a linear one that the operator serves, or None."""
    from peft.tuners.lora import layer as lora

    other = tuple(
        getattr(lora, name)
        for name in ("Embedding", "_ConvNd", "MultiheadAttention", "ParamWrapper")
        if hasattr(lora, name)
    )
    if isinstance(layer, other):
        return f"{type(layer).__name__} layers"
    if not layer.in_features or not layer.out_features:
        return f"{type(layer.get_base_layer()).__name__} has no known widths"
    return None
