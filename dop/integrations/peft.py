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
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dop.errors import ConfigError, DopError, MissingDependencyError
from dop.integrations.stacks import LayerStack, stack_rank

log = logging.getLogger("dop.peft")

BASE = "__base__"
"""PEFT's name for a row without an adapter."""
DEFAULT_SLOTS = 64
_STATE = "_dop_mixed"
_VARIANT_KWARGS = ("alora_offsets",)


@dataclass(frozen=True)
class Batch:
    """What the rows of one batch ask for; made once per list of names, shared by all layers.

    Attributes:
        names: adapter of each row, as PEFT passes it.
        slots: distinct adapter -> its slot in every layer's stacks.
        row_slots: slot of each row, -1 for none.
        scales: scale of each slot.
        ranks: rank of each slot.
        capacity, rank: shape of the stacks that the slots belong to.
    """

    names: list[str]
    slots: dict[str, int]
    row_slots: list[int]
    scales: list[float]
    ranks: list[int]
    capacity: int
    rank: int
    plans: dict[tuple[torch.device, int], Any] = field(default_factory=dict)

    def plan(self, device: torch.device, tokens_per_row: int) -> Any:
        """The segment plan of the batch, made at the first layer that asks."""
        key = (device, tokens_per_row)
        found = self.plans.get(key)
        if found is None:
            if len(self.plans) >= 8:  # a prompt's length and 1, on a few devices
                self.plans.clear()
            found = self.plans[key] = self._make(device, tokens_per_row)
        return found

    def _make(self, device: torch.device, tokens_per_row: int) -> Any:
        from dop import ops

        rows = torch.tensor(self.row_slots, dtype=torch.int32, device=device)
        if tokens_per_row != 1:
            rows = rows.repeat_interleave(tokens_per_row)
        return ops.segment_plan(
            rows,
            slots=self.capacity,
            ranks=torch.tensor(self.ranks, dtype=torch.int32, device=device),
            scale=torch.tensor(self.scales, dtype=torch.float32, device=device),
            adapters=len(self.slots),
        )


class Slots:
    """Names to slots, for all layers of a model: least recently used goes first."""

    def __init__(self, layers: Sequence[nn.Module], max_slots: int) -> None:
        self._layers: weakref.WeakSet[Any] = weakref.WeakSet(layers)
        self._max_slots = max_slots
        self._slot: dict[str, int] = {}  # in order of use, oldest first
        self._capacity = 0
        self._rank = 0
        self._last: Batch | None = None
        self.told: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Slots:
        return self  # a copied model is accelerated anew; its layers may share this one

    def forget(self) -> None:
        """Drop what is known about the last batch: an adapter came, went or changed."""
        self._last = None

    def batch(self, names: list[str]) -> Batch:
        """The batch of these names; the same object as long as the names stay the same."""
        last = self._last
        if last is None or last.names != names:
            last = self._last = self._make(names)
        return last

    def _make(self, names: list[str]) -> Batch:
        distinct = [n for n in dict.fromkeys(names) if n != BASE]
        ranks = {n: self._rank_of(n) for n in distinct}
        self._grow(len(distinct), max(ranks.values(), default=1))
        for name in distinct:
            self._touch(name, set(distinct))
        slots = {n: self._slot[n] for n in distinct}
        slot_ranks, scales = [1] * self._capacity, [1.0] * self._capacity
        for name, slot in slots.items():
            slot_ranks[slot], scales[slot] = max(1, ranks[name]), self._scale_of(name)
        row_slots = [slots.get(n, -1) for n in names]
        return Batch(list(names), slots, row_slots, scales, slot_ranks, self._capacity, self._rank)

    def _grow(self, adapters: int, rank: int) -> None:
        known = max(adapters, min(len(self._slot) + adapters, self._max_slots))
        capacity = max(self._capacity, 1 << max(0, known - 1).bit_length())
        rank = max(self._rank, stack_rank(rank))
        if (capacity, rank) != (self._capacity, self._rank):
            self._capacity, self._rank = capacity, rank

    def _touch(self, name: str, needed: set[str]) -> None:
        slot = self._slot.pop(name, None)
        if slot is None:
            used = set(self._slot.values())
            free = next((s for s in range(self._capacity) if s not in used), None)
            if free is None:
                oldest = next(n for n in self._slot if n not in needed)
                free = self._slot.pop(oldest)
            slot = free
        self._slot[name] = slot

    def _rank_of(self, name: str) -> int:
        return max((layer.r.get(name, 0) for layer in self._layers), default=0)

    def _scale_of(self, name: str) -> float:
        for layer in self._layers:
            scale = float(layer.scaling.get(name, 0.0))
            if scale:
                return scale
        return 1.0


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
        self.idle = all(a is None for _, a, _, _ in self._weights)

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
        scaling = layer.scaling
        for slot, a, b, name in self._weights:
            if a is None:
                key: tuple[Any, ...] | None = None
            else:
                key = (name, a.data_ptr(), a._version, b.data_ptr(), b._version, scaling[name])
            if self._filled.get(slot, ()) != key:
                if key is None:
                    stack.clear(slot)
                else:
                    stack.write(slot, a, b, scaling[name] / batch.scales[slot])
                self._filled[slot] = key
        return stack


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
