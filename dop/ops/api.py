"""`add_lora` and its relatives: eager calls take a short path straight to the driver; what is
traced (torch.compile, fake tensors, subclasses) goes through torch.library, see custom_ops.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dop.errors import ShapeError
from dop.measure import cuda_driver
from dop.ops import checks, eager
from dop.ops.derived import derived_words
from dop.ops.eager import Ranks, Scale, Stack, per_slot_ranks, per_slot_scale
from dop.ops.launch import LOCAL, STACKS_AT, TABLES_AT, XY, pack_xy
from dop.ops.plan import ROW_TABLES, SegmentPlan, plain_words
from dop.ops.stacks import STACKS
from dop.ops.switches import CHECKED

_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_grad_enabled = torch.is_grad_enabled
_stream, _capturing, _current_device = eager.stream_of, eager.capturing, eager.current_device
_ROW_END = TABLES_AT.start + 8 * len(ROW_TABLES)
_ROWS_AT = slice(TABLES_AT.start, _ROW_END)


def segment_plan(
    token_to_adapter: Tensor,
    *,
    slots: int,
    ranks: Ranks = None,
    scale: Scale | None = None,
    adapters: int | None = None,
    out: SegmentPlan | None = None,
) -> SegmentPlan:
    """Which adapter each row of a batch uses. Made once per forward pass, shared by all layers.

    Nothing is waited for, and with `out` nothing is allocated. A plan that a captured CUDA graph
    uses must be kept alive as long as the graph; refill it with `out` before a replay.

    Args:
        token_to_adapter: int32 or int64 [tokens], on the device of x: slot of each row's adapter,
            -1 for none. Other ids outside 0..slots-1 count as -1 (in checked mode they raise).
        slots: adapters that the weight stacks hold.
        ranks: true rank per slot, int [slots], a tensor on the same device or a host sequence; an
            adapter of rank 8 in a stack of rank 64 then costs rank 8. None: all stacks are full.
            Rank 0 is an empty slot, which adds nothing.
        scale: factor of every update, or one per slot: a number, [slots] tensor or host sequence.
            None: 1.
        adapters: distinct adapters in the batch if the host knows it. Only a hint for choosing a
            kernel: a wrong one costs time, never a result.
        out: a plan for as many tokens and slots, to be refilled in place.

    Returns:
        The plan, or `out`.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.
        AdapterIdError: an id or a rank is out of range (checked mode).
    """
    checks.check_ids(token_to_adapter)
    if slots < 1:
        raise ShapeError(f"{slots} slots.", "Give the number of adapters in the stacks, 1 or more.")
    device = token_to_adapter.device
    rank_tensor = per_slot_ranks(ranks, slots, device)
    scales, number = per_slot_scale(1.0 if scale is None else scale, slots, device)
    if scales is not None:
        scales = scales.float()
    if _is_compiling() or _is_traced(token_to_adapter):
        from dop.ops import custom_ops

        return custom_ops.traced_plan(
            token_to_adapter, slots, rank_tensor, scales, number, adapters, out
        )
    return eager.make_plan(token_to_adapter, slots, rank_tensor, (scales, number), adapters, out)


def _is_traced(tensor: Tensor) -> bool:
    """A subclass (fake, functional, ...), or a dispatch mode that wants to see what happens."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) or _dispatch_modes() > 0


def add_lora(
    y: Tensor,
    x: Tensor,
    a: Stack,
    b: Stack,
    plan: SegmentPlan,
    *,
    scale: Scale = 1.0,
    ranks: Ranks = None,
) -> Tensor:
    """y[t] += scale * (x[t] @ A[slot(t)].T) @ B[slot(t)].T for every row t, in place.

    Rows without an adapter keep their bits. Sums are taken in float32; results are the same in
    every run. There is no gradient: call it under torch.no_grad() or torch.inference_mode().

    Args:
        y: [tokens, sum of out], float16, bfloat16 or float32; the slices side by side.
        x: [tokens, in], same type and device. x and y should be contiguous; if they are not, they
            are copied (y there and back).
        a: one stack per slice (1 to 3), [slots, rank, in] or [slots, 1, rank, in], contiguous and
            16-byte aligned. The slices are allocations of their own.
        b: one stack per slice, [slots, out of the slice, rank] or [slots, 1, out, rank].
        plan: of `segment_plan`, for these tokens and at most the stacks' slots. What stands in A
            and B behind an adapter's true rank must be finite.
        scale: a factor on top of the plan's: a number, or one per slot of the plan. A scale that
            is known when the plan is made costs nothing there.
        ranks: true rank per slot of the plan, instead of the plan's.

    Returns:
        y.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.
        MissingKernelError: no kernel for the shape, and building one is forbidden.
    """
    if _is_compiling() or _dispatch_modes():
        return _traced(y, x, a, b, plan, scale, ranks)
    try:
        # The short path. Everything that must be looked at in every call is looked at here.
        several = type(a) is tuple or type(a) is list
        stacks = STACKS[id(a[0] if several else a)]
        shape = stacks.shape
        block = LOCAL.blocks[shape.number, plan.batch, _stream(shape.device)]
        if (
            (stacks.are(a, b) if several else stacks.is_one(a, b))
            and type(x) is Tensor
            and type(y) is Tensor
            and x.shape == block.x_shape
            and y.shape == block.y_shape
            and x.dtype is block.dtype
            and y.dtype is block.dtype
            and x.is_contiguous()
            and y.is_contiguous()
            and x.get_device() == shape.device == y.get_device() == _current_device()
            and plan.slots <= stacks.slots
            and not (_grad_enabled() and (x.requires_grad or y.requires_grad or stacks.needs_grad))
        ):
            stream = block.stream
            x_at, y_at = x.data_ptr(), y.data_ptr()
            if not ((x_at | y_at) & 15) and not (stream and _capturing()) and not CHECKED.value:
                if ranks is None and type(scale) is float and scale == 1.0:
                    words = plan.words.get(block.tile_rows) or plain_words(plan, block.tile_rows)
                else:
                    words = _call_words(plan, block.tile_rows, ranks, scale)
                pack_xy(block.area, XY, x_at, y_at, y_at)
                view = block.view
                view[STACKS_AT] = stacks.words
                if words is not block.words:
                    view[TABLES_AT if block.tile_rows else _ROWS_AT] = words
                    block.words = words
                start = block.start
                for config, function, parameters in block.calls:
                    code = start(config, function, parameters, None)
                    if code:
                        cuda_driver.check("cuLaunchKernelEx", code)
                return y
    except (KeyError, AttributeError, IndexError, TypeError, ValueError):
        pass  # the long path looks at the arguments and says what is wrong
    if _any_traced(y, x, a, b, plan):
        return _traced(y, x, a, b, plan, scale, ranks)
    return eager.add_lora(y, x, a, b, plan, scale, ranks)


def _any_traced(*arguments: Any) -> bool:
    tensors: list[Any] = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            tensors += argument
        else:
            tensors.append(getattr(argument, "buffer", argument))
    return any(isinstance(t, Tensor) and _is_traced(t) for t in tensors)


def sgmv_shrink(x: Tensor, a: Stack, plan: SegmentPlan, *, ranks: Ranks = None) -> Tensor:
    """v[s, t] = x[t] @ A_s[slot(t)].T for every row t.

    Args:
        x: [tokens, in].
        a: one stack per slice, [slots, rank, in] or [slots, 1, rank, in].
        plan: of `segment_plan`.
        ranks: true rank per slot of the plan, instead of the plan's.

    Returns:
        float32 [slices, tokens, rank]; zero in rows without adapter and behind the true rank.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.
    """
    if _is_compiling() or _any_traced(x, a, plan):
        from dop.ops import custom_ops

        own = per_slot_ranks(ranks, plan.slots, plan.buffer.device)
        return custom_ops.traced_shrink(x, _as_list(a), plan, own)
    return eager.shrink(x, a, plan, ranks)


def sgmv_expand(
    y: Tensor,
    v: Tensor,
    b: Stack,
    plan: SegmentPlan,
    *,
    scale: Scale = 1.0,
    ranks: Ranks = None,
) -> Tensor:
    """y[t] += scale * v[s, t] @ B_s[slot(t)].T, the slices side by side, in place.

    Args:
        y: [tokens, sum of out].
        v: float32 [slices, tokens, rank].
        b: one stack per slice, [slots, out of the slice, rank] or [slots, 1, out, rank].
        plan: of `segment_plan`.
        scale: a factor on top of the plan's: a number, or one per slot of the plan.
        ranks: true rank per slot of the plan, instead of the plan's.

    Returns:
        y.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.
    """
    if _is_compiling() or _any_traced(y, v, b, plan):
        from dop.ops import custom_ops

        own = per_slot_ranks(ranks, plan.slots, plan.buffer.device)
        scales, number = per_slot_scale(scale, plan.slots, plan.buffer.device)
        return custom_ops.traced_expand(y, v, _as_list(b), plan, own, scales, number)
    return eager.expand(y, v, b, plan, scale, ranks)


def _as_list(stacks: Stack) -> list[Tensor]:
    return [stacks] if isinstance(stacks, Tensor) else list(stacks)


def _traced(
    y: Tensor, x: Tensor, a: Stack, b: Stack, plan: SegmentPlan, scale: Scale, ranks: Ranks
) -> Tensor:
    from dop.ops import custom_ops

    device = plan.buffer.device
    rank_tensor = per_slot_ranks(ranks, plan.slots, device)
    scales, number = per_slot_scale(scale, plan.slots, device)
    return custom_ops.traced_add_lora(
        y, x, _as_list(a), _as_list(b), plan, rank_tensor, scales, number
    )


def _call_words(plan: SegmentPlan, tile_rows: int, ranks: Ranks, scale: Scale) -> bytes:
    """Table addresses for a call with ranks or a scale of its own."""
    device = plan.buffer.device
    scales, number = per_slot_scale(scale, plan.slots, device)
    return derived_words(plan, tile_rows, per_slot_ranks(ranks, plan.slots, device), scales, number)
