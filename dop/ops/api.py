"""`add_lora` and its relatives: eager calls take a short path straight to the driver; what is
traced (torch.compile, fake tensors, subclasses) goes through torch.library, see custom_ops.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dop.errors import ShapeError
from dop.ops import checks, eager
from dop.ops.eager import Ranks, Scale, Stack, per_slot_ranks, per_slot_scale
from dop.ops.plan import SegmentPlan
from dop.ops.short import Surroundings, short_path

_is_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_short_path = short_path(Surroundings())


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
    uses must be kept alive as long as the graph; refill it with `out` before a replay. It ends with
    a plain launch, behind which tables, and weights written before, are complete.

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

    Weights may be written by torch at any time before the call. What torch does not count (`.data`,
    raw pointers, other libraries' kernels) must not be the last launch before it: make the plan
    behind such a write (docs/operator.md).

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.
        MissingKernelError: no kernel for the shape, and building one is forbidden.
    """
    if _is_compiling():
        return _traced(y, x, a, b, plan, scale, ranks)
    if _short_path(y, x, a, b, plan, scale, ranks):
        return y
    if _dispatch_modes() or _any_traced(y, x, a, b, plan):
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
