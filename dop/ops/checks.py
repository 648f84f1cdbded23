"""What a call must look like: shapes, types, devices. Each error says what was given and wanted.

Checked weights become `Stacks`, which are kept as long as the tensors live, so that weights are
looked at once and not in every call.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dop.errors import AdapterIdError, ConfigError, DeviceError, DtypeError, ShapeError
from dop.workload import MAX_SLICES

DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
PLACES = ("cpu", "cuda")
ALIGN_BYTES = 16
INDEX_TYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Shape:
    """Shapes and types of a call site, one object per kind of call site and device.

    Attributes:
        in_features: width of x.
        outs: width of each slice of y.
        rank: rank of the stacks.
        dtype: element type.
        device: index of the GPU, -1 for the CPU.
        number: a small number of its own.
    """

    in_features: int
    outs: tuple[int, ...]
    rank: int
    dtype: torch.dtype
    device: int
    number: int

    @property
    def slices(self) -> int:
        """Number of slices."""
        return len(self.outs)

    @property
    def total_out(self) -> int:
        """Width of y."""
        return sum(self.outs)

    @property
    def key(self) -> str:
        """As `Workload.key` writes it."""
        return workload_key(self.dtype, self.rank, self.in_features, self.outs)


def workload_key(kind: torch.dtype, rank: int, width: int, outs: Sequence[int]) -> str:
    """Name of a call site's shapes, the same as `Workload.key`."""
    return f"sgmv/{DTYPES[kind]}/r{rank}/{width}->{'+'.join(map(str, outs))}"


_SHAPES: dict[Any, Shape] = {}


def shape_of(width: int, outs: tuple[int, ...], rank: int, kind: torch.dtype, device: int) -> Shape:
    """The one `Shape` object of these facts."""
    key = (width, outs, rank, kind, device)
    found = _SHAPES.get(key)
    if found is None:
        found = _SHAPES.setdefault(key, Shape(*key, number=len(_SHAPES)))
    return found


class Stacks:
    """Weight stacks that were checked.

    Attributes:
        shape: shapes and types.
        slots: adapters in each stack.
        refs: weak references to the stacks: a of all slices, then b.
        addresses: of the stacks, in the same order.
        words: a, b and the shifts of the slices behind the first, as kernels take them.
        needs_grad: a stack required gradients.
    """

    __slots__ = ("__weakref__", "addresses", "needs_grad", "refs", "shape", "slots", "words")

    def __init__(self, shape: Shape, slots: int, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        self.shape, self.slots = shape, slots
        self.refs = tuple(weakref.ref(t) for t in (*a, *b))
        self.addresses = tuple(t.data_ptr() for t in (*a, *b))
        self.needs_grad = any(t.requires_grad for t in (*a, *b))
        self.words = stack_words(self.addresses[: len(a)], self.addresses[len(a) :])

    def are(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
        """These very tensors are meant, and their memory has not moved.

        Written out for each number of slices: this runs in every call, and loops took 5 us.

        Raises:
            ValueError: another number of slices is meant.
        """
        refs, addresses = self.refs, self.addresses
        if len(refs) == 2:
            (a0,), (b0,) = a, b
            return (
                refs[0]() is a0 and refs[1]() is b0 and (a0.data_ptr(), b0.data_ptr()) == addresses
            )
        if len(refs) == 4:
            (a0, a1), (b0, b1) = a, b
            return (
                refs[0]() is a0
                and refs[1]() is a1
                and refs[2]() is b0
                and refs[3]() is b1
                and (a0.data_ptr(), a1.data_ptr(), b0.data_ptr(), b1.data_ptr()) == addresses
            )
        (a0, a1, a2), (b0, b1, b2) = a, b
        return (
            refs[0]() is a0
            and refs[1]() is a1
            and refs[2]() is a2
            and refs[3]() is b0
            and refs[4]() is b1
            and refs[5]() is b2
            and (a0.data_ptr(), a1.data_ptr(), a2.data_ptr()) == addresses[:3]
            and (b0.data_ptr(), b1.data_ptr(), b2.data_ptr()) == addresses[3:]
        )


def stack_words(a: Sequence[int], b: Sequence[int]) -> bytes:
    """Kernel arguments of the stacks at these addresses: a, b, a1_shift, a2_shift, b1_shift,
    b2_shift, 8 bytes each; shifts are distances in groups of 16 bytes."""
    shifts = []
    for addresses in (a, b):
        distances = [(p - addresses[0]) // ALIGN_BYTES for p in addresses[1:]]
        shifts += distances + [0] * (MAX_SLICES - 1 - len(distances))
    return struct.pack("=2Q4q", a[0], b[0], *shifts)


STACKS: dict[int, Stacks] = {}
"""Checked weights by the identity of the first A."""


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


def stacks_of(a: Any, b: Any) -> Stacks:
    """Checked weights, from the cache if these tensors were checked before.

    Args:
        a: per slice [slots, rank, in] or [slots, 1, rank, in].
        b: per slice [slots, out, rank] or [slots, 1, out, rank].

    Raises:
        ShapeError, DtypeError, DeviceError: they do not fit each other.
    """
    list_a, list_b = as_list(a, "a"), as_list(b, "b")
    key = id(list_a[0])
    found = STACKS.get(key)
    fits = found is not None and len(found.refs) == 2 * len(list_a) == 2 * len(list_b)
    if found is not None and fits and found.are(list_a, list_b):
        return found
    found = _checked(list_a, list_b)
    STACKS[key] = found
    weakref.finalize(list_a[0], _forget, key, weakref.ref(found))
    return found


def _forget(key: int, which: Any) -> None:
    if STACKS.get(key) is which():
        STACKS.pop(key, None)


def three_axes(tensor: Tensor, name: str) -> tuple[int, int, int]:
    """Sizes of a stack; an axis of 1 behind the slots is left out.

    Raises:
        ShapeError: it has another number of axes.
    """
    size = tuple(tensor.shape)
    if len(size) == 4 and size[1] == 1:
        size = (size[0], *size[2:])
    if len(size) != 3:
        wanted = "[slots, rank, in]" if name.startswith("a") else "[slots, out, rank]"
        raise ShapeError(f"{name} has shape {list(tensor.shape)}.", f"It must be {wanted}.")
    return size


def _checked(a: list[Tensor], b: list[Tensor]) -> Stacks:
    if len(a) != len(b):
        raise ShapeError(
            f"{len(a)} stacks a and {len(b)} stacks b.", "Give one of each for every slice."
        )
    check_storage(a, "a", a[0])
    check_storage(b, "b", a[0])
    slots, rank, width = three_axes(a[0], "a[0]")
    outs = []
    for s, (part_a, part_b) in enumerate(zip(a, b, strict=True)):
        size_a, size_b = three_axes(part_a, f"a[{s}]"), three_axes(part_b, f"b[{s}]")
        outs.append(size_b[1])
        if size_a != (slots, rank, width):
            raise ShapeError(
                f"a[{s}] has shape {list(part_a.shape)}.",
                f"It must be {[slots, rank, width]} as a[0] is.",
            )
        if (size_b[0], size_b[2]) != (slots, rank):
            raise ShapeError(
                f"b[{s}] has shape {list(part_b.shape)}.",
                f"With a[{s}] of shape {list(part_a.shape)} it must be [{slots}, out, {rank}].",
            )
    if 0 in (slots, rank, width, *outs):
        raise ShapeError(f"stacks of shapes {[list(t.shape) for t in (*a, *b)]} hold nothing.")
    kind = a[0].dtype
    index = a[0].get_device()
    return Stacks(shape_of(width, tuple(outs), rank, kind, index), slots, a, b)


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


def device_name(index: int) -> str:
    """Name of a device index."""
    return "cpu" if index < 0 else f"cuda:{index}"


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
