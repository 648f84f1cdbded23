"""What a call must look like: shapes, types, devices. Each error says what was given and wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dop.errors import AdapterIdError, ConfigError, DeviceError, DtypeError, ShapeError
from dop.ops.shapes import ALIGN_BYTES, DTYPES, device_name, shape_of, three_axes
from dop.ops.shapes import Shape as Shape
from dop.workload import MAX_SLICES

if TYPE_CHECKING:
    from dop.ops.stacks import Stacks

PLACES = ("cpu", "cuda")
INDEX_TYPES = (torch.int32, torch.int64)


def as_list(value: Any, name: str) -> list[Tensor]:
    """A stack or a sequence of stacks as a list.

    Raises:
        ShapeError: there are none or too many, or it holds something else.
    """
    tensors = [value] if isinstance(value, Tensor) else list(value)
    if not 1 <= len(tensors) <= MAX_SLICES or not all(isinstance(t, Tensor) for t in tensors):
        kinds = ", ".join(type(t).__name__ for t in tensors)
        raise ShapeError(
            f"{name} holds {len(tensors)} entries ({kinds}).",
            f"Give one weight stack per slice, 1 to {MAX_SLICES} tensors.",
        )
    return tensors


def check_storage(tensors: Sequence[Tensor], name: str, like: Tensor) -> None:
    """Type, device, contiguity and alignment of weight stacks.

    Raises:
        DtypeError, DeviceError, ShapeError: kernels cannot read them.
    """
    for s, tensor in enumerate(tensors):
        if tensor.dtype not in DTYPES:
            raise DtypeError(
                f"{name}[{s}] is {tensor.dtype}.", "Give float16, bfloat16 or float32."
            )
        if tensor.dtype != like.dtype:
            raise DtypeError(
                f"{name}[{s}] is {tensor.dtype}, a[0] is {like.dtype}.", "Give one type."
            )
        if tensor.device.type not in PLACES:
            raise DeviceError(f"{name}[{s}] is on {tensor.device}.", "Use cuda or cpu.")
        if tensor.device != like.device:
            raise DeviceError(
                f"{name}[{s}] is on {tensor.device}, a[0] is on {like.device}.",
                "Put all weights on one device.",
            )
        if not tensor.is_contiguous():
            raise ShapeError(
                f"{name}[{s}] is not contiguous (shape {list(tensor.shape)}, strides "
                f"{list(tensor.stride())}).",
                "Call .contiguous() on it once, when the weights are loaded.",
            )
        if tensor.is_cuda and tensor.data_ptr() % ALIGN_BYTES:
            raise ShapeError(
                f"{name}[{s}] begins at an address that is no multiple of {ALIGN_BYTES} bytes.",
                "Give it memory of its own, for instance by .clone().",
            )


def check_rows(name: str, tensor: Any, tokens: int, width: int, like: Shape) -> None:
    """Shape, type and device of x or y.

    Raises:
        ShapeError, DtypeError, DeviceError: it does not fit the plan and the weights.
    """
    if not isinstance(tensor, Tensor):
        raise DtypeError(f"{name} is a {type(tensor).__name__}.", "Give a tensor.")
    if tuple(tensor.shape) != (tokens, width):
        raise ShapeError(
            f"{name} has shape {list(tensor.shape)}.",
            f"The plan's tokens and the weights want {[tokens, width]}.",
        )
    if tensor.dtype != like.dtype:
        raise DtypeError(f"{name} is {tensor.dtype}, the weights are {like.dtype}.", "Cast it.")
    if tensor.get_device() != like.device or tensor.device.type not in PLACES:
        raise DeviceError(
            f"{name} is on {tensor.device}, the weights are on {device_name(like.device)}.",
            "Put them on one device.",
        )


def check_plan(plan: Any, stacks: Stacks) -> None:
    """The plan is on the weights' device and for no more slots than they have.

    Raises:
        DtypeError, DeviceError, ShapeError: it is not.
    """
    if not hasattr(plan, "buffer"):
        raise DtypeError(f"plan is a {type(plan).__name__}.", "Give what segment_plan returned.")
    if plan.buffer.get_device() != stacks.shape.device:
        raise DeviceError(
            f"the plan is on {plan.device}, the weights are on {device_name(stacks.shape.device)}.",
            "Make the plan from ids on the weights' device.",
        )
    if plan.slots > stacks.slots:
        raise ShapeError(
            f"the plan is for {plan.slots} slots, the stacks hold {stacks.slots}.",
            "Give segment_plan the number of slots that the stacks have.",
        )


def check_no_gradient(name: str, *tensors: Tensor) -> None:
    """The operator has no backward.

    Raises:
        ConfigError: gradients are on and a tensor requires them.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ConfigError(
            f"{name} has no gradient, and a tensor that it was given requires one.",
            "Call it under torch.no_grad() or torch.inference_mode().",
        )


def check_side(stacks: list[Tensor], name: str, plan: Any) -> tuple[int, int]:
    """Rank and width of the stacks of one side: in of `a`, the sum of out of `b`.

    Raises:
        ShapeError, DtypeError, DeviceError: they do not fit each other or the plan.
    """
    if not hasattr(plan, "buffer"):
        raise DtypeError(f"plan is a {type(plan).__name__}.", "Give what segment_plan returned.")
    check_storage(stacks, name, stacks[0])
    sizes = [three_axes(stack, f"{name}[{s}]") for s, stack in enumerate(stacks)]
    rank_axis, width_axis = (1, 2) if name == "a" else (2, 1)
    rank = sizes[0][rank_axis]
    for s, size in enumerate(sizes):
        odd_width = name == "a" and size != sizes[0]
        if size[0] != sizes[0][0] or size[rank_axis] != rank or odd_width:
            raise ShapeError(
                f"{name}[{s}] has shape {list(stacks[s].shape)}.",
                f"It does not fit {name}[0] of shape {list(stacks[0].shape)}.",
            )
    if plan.slots > sizes[0][0] or plan.buffer.get_device() != stacks[0].get_device():
        raise ShapeError(
            f"{plan} does not fit stacks of {sizes[0][0]} slots on {stacks[0].device}.",
            "Make the plan on their device, for the number of slots that they have.",
        )
    widths = [size[width_axis] for size in sizes]
    return rank, widths[0] if name == "a" else sum(widths)


def side_shape(stack: Tensor) -> Shape:
    """Type and device of a stack, for `check_rows`."""
    return shape_of(0, (), 0, stack.dtype, stack.get_device())


def check_v(v: Tensor, size: tuple[int, int, int], y: Tensor) -> None:
    """What the shrink gave.

    Raises:
        ShapeError, DtypeError, DeviceError: it does not fit.
    """
    if tuple(v.shape) != size:
        raise ShapeError(f"v has shape {list(v.shape)}.", f"It must be {list(size)}.")
    if v.dtype != torch.float32:
        raise DtypeError(f"v is {v.dtype}.", "It must be float32, as sgmv_shrink returns it.")
    if v.device != y.device:
        raise DeviceError(f"v is on {v.device}, y on {y.device}.", "Put them on one device.")


def check_ids(token_to_adapter: Any) -> None:
    """Type and shape of the ids.

    Raises:
        DtypeError, ShapeError: they are no vector of int32 or int64.
    """
    if not isinstance(token_to_adapter, Tensor):
        raise DtypeError(
            f"token_to_adapter is a {type(token_to_adapter).__name__}.",
            "Give an int32 or int64 tensor on the device of x.",
        )
    if token_to_adapter.dtype not in INDEX_TYPES:
        raise DtypeError(f"token_to_adapter is {token_to_adapter.dtype}.", "Give int32 or int64.")
    if token_to_adapter.ndim != 1:
        raise ShapeError(
            f"token_to_adapter has shape {list(token_to_adapter.shape)}.", "It must be [tokens]."
        )


def check_per_slot(name: str, tensor: Tensor, slots: int, device: torch.device) -> None:
    """Shape and device of ranks or scales.

    Raises:
        ShapeError, DeviceError, DtypeError: it is no vector with an entry per slot.
    """
    if tensor.ndim != 1 or tensor.shape[0] != slots:
        raise ShapeError(f"{name} has shape {list(tensor.shape)}.", f"It must be [{slots}].")
    if tensor.device != device:
        raise DeviceError(f"{name} is on {tensor.device}.", f"Put it on {device}.")
    if name == "ranks" and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise DtypeError(f"ranks is {tensor.dtype}.", "Give int32.")


def check_id_range(token_to_adapter: Tensor, slots: int, ranks: Tensor | None) -> None:
    """Checked mode: waits for the device and looks at every id and rank.

    Raises:
        AdapterIdError: an id is outside -1..slots-1, or a rank is negative.
    """
    if token_to_adapter.numel():
        low, high = torch.stack([token_to_adapter.min(), token_to_adapter.max()]).tolist()
        if low < -1 or high >= slots:
            wrong = low if low < -1 else high
            where = int((token_to_adapter == wrong).nonzero()[0])
            raise AdapterIdError(
                f"token_to_adapter[{where}] is {wrong}.",
                f"Adapters are 0 to {slots - 1}; -1 is no adapter.",
            )
    if ranks is not None and int(ranks.min()) < 0:
        raise AdapterIdError(f"a rank is {int(ranks.min())}.", "Ranks are 0 or more.")


def check_rank_range(ranks: Tensor, stack_rank: int) -> None:
    """Checked mode: waits for the device and looks at every rank.

    Raises:
        AdapterIdError: a rank is negative or above the stacks' rank.
    """
    low, high = torch.stack([ranks.min(), ranks.max()]).tolist()
    if low < 0 or high > stack_rank:
        wrong = low if low < 0 else high
        raise AdapterIdError(f"a rank is {wrong}.", f"The stacks hold ranks up to {stack_rank}.")
