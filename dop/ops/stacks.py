"""Weight stacks that were checked. They are remembered as long as the tensors live, so that weights
are looked at once and not in every call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dop.errors import ShapeError
from dop.ops import native
from dop.ops.checks import as_list, check_storage
from dop.ops.shapes import Shape, shape_of, stack_words, three_axes


class Stacks:
    """Weight stacks that were checked.

    Attributes:
        shape: shapes and types.
        slots: adapters in each stack.
        refs: weak references to the stacks: a of all slices, then b.
        addresses, sizes: of the stacks, in the same order.
        words: a, b and the shifts of the slices behind the first, as kernels take them.
        native: the same for the compiled short path, or None.
        settled, captured: notes of the last plain launch, eager and captured, see settled.py.
    """

    __slots__ = ("__weakref__", "addresses", "captured", "native", "refs", "settled", "shape",
                 "sizes", "slots", "words")  # fmt: skip

    def __init__(self, shape: Shape, slots: int, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        self.shape, self.slots = shape, slots
        self.settled: bytes | None = None
        self.captured: bytes | None = None
        key, known = id(a[0]), STACKS

        def forget(_: object) -> None:
            # What takes the place of a dead A may look like it, and have changed as often.
            known.pop(key, None)

        self.refs = (*(weakref.ref(t, forget) for t in a), *(weakref.ref(t) for t in b))
        self.addresses = tuple(t.data_ptr() for t in (*a, *b))
        self.sizes = tuple(t.shape for t in (*a, *b))
        self.words = stack_words(self.addresses[: len(a)], self.addresses[len(a) :])
        self.native = native.weights(shape.number, shape.device, slots, self.words, (*a, *b))

    @property
    def a(self) -> list[Tensor]:
        """The stacks a, as long as they live."""
        refs = self.refs[: len(self.refs) // 2]
        return [tensor for ref in refs if (tensor := ref()) is not None]

    def are(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
        """These very tensors are meant, and they lie and look as they did."""
        tensors = (*a, *b)
        if len(tensors) != len(self.refs):
            return False
        for ref, address, size, tensor in zip(
            self.refs, self.addresses, self.sizes, tensors, strict=True
        ):
            if (
                ref() is not tensor
                or tensor.data_ptr() != address
                or tensor.shape != size
                or not tensor.is_contiguous()
            ):
                return False
        return True


STACKS: dict[int, Stacks] = {}
"""Checked weights by the identity of the first A."""


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
    found = STACKS[key] = _checked(list_a, list_b)
    return found


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
