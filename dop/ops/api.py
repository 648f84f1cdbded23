"""`add_lora` and its relatives: eager calls take a short path straight to the driver; what is
traced (torch.compile, fake tensors, subclasses) goes through torch.library, see custom_ops.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dop.errors import DtypeError, ShapeError
from dop.measure import cuda_driver
from dop.ops import checks, cpu, cpu_pack, halves, launch, sources
from dop.ops.checks import STACKS, Stacks, stacks_of
from dop.ops.derived import derived_words
from dop.ops.launch import LOCAL, STACKS_AT, TABLES_AT, XY, Block, pack_xy
from dop.ops.plan import (
    ROW_TABLES,
    SegmentPlan,
    buffer_size,
    check_capacity,
    fill,
    plain_words,
    upload,
)
from dop.ops.switches import CHECKED

Stack = Tensor | Sequence[Tensor]
Scale = float | Tensor | Sequence[float]
Ranks = Tensor | Sequence[int] | None

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_grad_enabled = torch.is_grad_enabled
_ROW_END = TABLES_AT.start + 8 * len(ROW_TABLES)
_ROWS_AT = slice(TABLES_AT.start, _ROW_END)


def _no_stream(device: int) -> int:
    return 0


_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _no_stream)
_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
_current_device = getattr(torch._C, "_cuda_getDevice", lambda: -1)


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
    tokens = token_to_adapter.shape[0]
    rank_tensor = per_slot_ranks(ranks, slots, device)
    scales, number = per_slot_scale(1.0 if scale is None else scale, slots, device)
    if scales is not None:
        scales = scales.float()
    if _is_compiling() or _is_traced(token_to_adapter):
        from dop.ops import custom_ops

        return custom_ops.traced_plan(
            token_to_adapter, slots, rank_tensor, scales, number, adapters, out
        )
    if CHECKED:
        checks.check_id_range(token_to_adapter, slots, rank_tensor)
    if out is None:
        buffer = torch.empty(buffer_size(tokens, slots), dtype=torch.int32, device=device)
        out = SegmentPlan(buffer, tokens, slots)
    else:
        check_capacity(out, tokens, slots, device)
    fill(out.buffer, token_to_adapter, slots, rank_tensor, scales, number)
    plain = rank_tensor is None and scales is None and number == 1.0
    graph = token_to_adapter.is_cuda and _capturing()
    out.refilled(adapters, rank_tensor is not None, is_plain=plain, in_graph=graph)
    return out


def _is_traced(tensor: Tensor) -> bool:
    """A subclass (fake, functional, ...), or a dispatch mode that wants to see what happens."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) or _dispatch_modes() > 0


def per_slot_ranks(ranks: Ranks, slots: int, device: torch.device) -> Tensor | None:
    """Ranks as an int32 tensor [slots] on the device.

    Raises:
        ShapeError, DeviceError, DtypeError: they do not fit.
    """
    if ranks is None:
        return None
    if not isinstance(ranks, Tensor):
        if len(ranks) != slots:
            raise ShapeError(f"{len(ranks)} ranks.", f"Give one per slot, {slots}.")
        return upload([int(rank) for rank in ranks], torch.int32, device)
    checks.check_per_slot("ranks", ranks, slots, device)
    return ranks if ranks.dtype == torch.int32 and ranks.is_contiguous() else _int32(ranks)


def _int32(ranks: Tensor) -> Tensor:
    return ranks.to(torch.int32).contiguous()


def per_slot_scale(scale: Scale, slots: int, device: torch.device) -> tuple[Tensor | None, float]:
    """A scale as (tensor [slots] or None, number).

    Raises:
        ShapeError, DeviceError: it does not fit.
    """
    if isinstance(scale, (int, float)):
        return None, float(scale)
    if not isinstance(scale, Tensor):
        if len(scale) != slots:
            raise ShapeError(f"{len(scale)} scales.", f"Give one per slot, {slots}.")
        return upload([float(s) for s in scale], torch.float32, device), 1.0
    checks.check_per_slot("scale", scale, slots, device)
    return scale.contiguous(), 1.0


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
        list_a: Any = a if type(a) is tuple or type(a) is list else (a,)
        list_b: Any = b if type(b) is tuple or type(b) is list else (b,)
        stacks = STACKS[id(list_a[0])]
        shape = stacks.shape
        block = LOCAL.blocks[shape.number, plan.batch, _stream(shape.device)]
        if (
            stacks.are(list_a, list_b)
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
                view[TABLES_AT if block.tile_rows else _ROWS_AT] = words
                start = block.start
                for config, function, parameters in block.calls:
                    code = start(config, function, parameters, None)
                    if code:
                        cuda_driver.check("cuLaunchKernelEx", code)
                return y
    except (KeyError, AttributeError, IndexError, TypeError, ValueError):
        pass  # the long path looks at the arguments and says what is wrong
    return run(y, x, a, b, plan, scale, ranks)


def _call_words(plan: SegmentPlan, tile_rows: int, ranks: Ranks, scale: Scale) -> bytes:
    """Table addresses for a call with ranks or a scale of its own."""
    device = plan.buffer.device
    scales, number = per_slot_scale(scale, plan.slots, device)
    return derived_words(plan, tile_rows, per_slot_ranks(ranks, plan.slots, device), scales, number)


def run(
    y: Tensor, x: Tensor, a: Stack, b: Stack, plan: SegmentPlan, scale: Scale, ranks: Ranks
) -> Tensor:
    """`add_lora` with everything checked; makes what the short path then uses."""
    _check_tensors(x=x, y=y)
    if _any_traced(y, x, a, b, plan):
        return _traced(y, x, a, b, plan, scale, ranks)
    stacks = stacks_of(a, b)
    shape = stacks.shape
    checks.check_plan(plan, stacks)
    checks.check_rows("x", x, plan.tokens, shape.in_features, shape)
    checks.check_rows("y", y, plan.tokens, shape.total_out, shape)
    list_a, list_b = checks.as_list(a, "a"), checks.as_list(b, "b")
    checks.check_no_gradient("add_lora", x, y, *list_a, *list_b)
    rank_tensor, scales, number = _call_facts(plan, shape.rank, scale, ranks)
    if plan.tokens == 0:
        return y
    if not on_gpu(shape.device):
        cpu_path(y, x, list_a, list_b, stacks, plan, rank_tensor, scales, number)
        return y
    with _device_guard(shape.device):
        _run_cuda(y, x, stacks, plan, rank_tensor, scales, number)
    return y


def on_gpu(device: int) -> bool:
    """Whether a device index is a GPU's."""
    return device >= 0


def is_captured(stream: int) -> bool:
    """Whether the current stream records a CUDA graph; the default stream (0) cannot."""
    return bool(stream) and _capturing()


def _device_guard(device: int) -> Any:
    return torch.cuda.device(device)


def _call_facts(
    plan: SegmentPlan, rank: int, scale: Scale, ranks: Ranks
) -> tuple[Tensor | None, Tensor | None, float]:
    """Ranks, scales and scale of a call, checked."""
    rank_tensor = per_slot_ranks(ranks, plan.slots, plan.buffer.device)
    scales, number = per_slot_scale(scale, plan.slots, plan.buffer.device)
    if CHECKED and rank_tensor is not None:
        checks.check_rank_range(rank_tensor, rank)
    return rank_tensor, scales, number


def _check_tensors(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name} is a {type(tensor).__name__}.", "Give a tensor.")


def _any_traced(*arguments: Any) -> bool:
    tensors: list[Any] = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            tensors += argument
        else:
            tensors.append(getattr(argument, "buffer", argument))
    return any(isinstance(t, Tensor) and _is_traced(t) for t in tensors)


def cpu_path(
    y: Tensor,
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    stacks: Stacks,
    plan: SegmentPlan,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> None:
    """A call on CPU tensors: by an exported library if there is one, else by torch."""
    plain = plan.is_plain and ranks is None and scales is None and scale == 1.0
    if plain and cpu_pack.run(y, x, a, b, stacks, plan):
        return
    cpu.add_lora(y, x, a, b, plan, ranks, scales, scale)


def _run_cuda(
    y: Tensor,
    x: Tensor,
    stacks: Stacks,
    plan: SegmentPlan,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> None:
    block = block_for(stacks.shape, plan)
    words = derived_words(plan, block.tile_rows, ranks, scales, scale)
    x, target = _dense(x), _dense(y)
    launch.launch(block, x.data_ptr(), target.data_ptr(), stacks.words, words)
    if target is not y:
        y.copy_(target)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor itself if kernels can read it, else a contiguous, aligned copy."""
    if not tensor.is_contiguous():
        return tensor.contiguous()
    return tensor if tensor.data_ptr() % checks.ALIGN_BYTES == 0 else tensor.clone()


def block_for(shape: checks.Shape, plan: SegmentPlan) -> Block:
    """Launches for a call site and a plan on the current stream.

    Blocks are kept, but for those made while a graph is captured: their workspace belongs to the
    graph's memory.
    """
    stream = _stream(shape.device)
    key = (shape.number, plan.batch, stream)
    capturing = is_captured(stream)
    found = None if capturing else LOCAL.blocks.get(key)
    if found is None:
        choice = sources.choose(shape, plan.tokens, plan.slots, plan.adapters)
        assert choice.kernel is not None
        batch = (plan.tokens, plan.slots)
        found = launch.new_block(choice.kernel, shape, batch, stream, capturing=capturing)
        if not capturing:
            launch.remember(key, found)
    return found


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
    _check_tensors(x=x)
    stacks = checks.as_list(a, "a")
    rank, width = checks.check_side(stacks, "a", plan)
    checks.check_rows("x", x, plan.tokens, width, checks.side_shape(stacks[0]))
    rank_tensor, _, _ = _call_facts(plan, rank, 1.0, ranks)
    if _is_compiling() or _any_traced(x, stacks, plan):
        from dop.ops import custom_ops

        return custom_ops.traced_shrink(x, stacks, plan, rank_tensor)
    checks.check_no_gradient("sgmv_shrink", x, *stacks)
    index = x.get_device()
    if plan.tokens == 0:
        return x.new_zeros((len(stacks), 0, rank), dtype=torch.float32)
    if not on_gpu(index):
        return cpu.shrink(x, stacks, plan, rank_tensor)
    with _device_guard(index):
        stream = _stream(index)
        return halves.shrink(_dense(x), stacks, plan, rank_tensor, stream, is_captured(stream))


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
    _check_tensors(y=y, v=v)
    stacks = checks.as_list(b, "b")
    rank, total = checks.check_side(stacks, "b", plan)
    checks.check_rows("y", y, plan.tokens, total, checks.side_shape(stacks[0]))
    checks.check_v(v, (len(stacks), plan.tokens, rank), y)
    rank_tensor, scales, number = _call_facts(plan, rank, scale, ranks)
    if _is_compiling() or _any_traced(y, v, stacks, plan):
        from dop.ops import custom_ops

        return custom_ops.traced_expand(y, v, stacks, plan, rank_tensor, scales, number)
    checks.check_no_gradient("sgmv_expand", y, v, *stacks)
    index = y.get_device()
    if plan.tokens == 0:
        return y
    if not on_gpu(index):
        cpu.expand(y, v, stacks, plan, rank_tensor, scales, number)
        return y
    facts = (rank_tensor, scales, number)
    with _device_guard(index):
        stream, target = _stream(index), _dense(y)
        halves.expand(target, _dense(v), stacks, plan, facts, stream, is_captured(stream))
        if target is not y:
            y.copy_(target)
    return y


def _traced(
    y: Tensor, x: Tensor, a: Stack, b: Stack, plan: SegmentPlan, scale: Scale, ranks: Ranks
) -> Tensor:
    from dop.ops import custom_ops

    device = plan.buffer.device
    rank_tensor = per_slot_ranks(ranks, plan.slots, device)
    scales, number = per_slot_scale(scale, plan.slots, device)
    list_a = [a] if isinstance(a, Tensor) else list(a)
    list_b = [b] if isinstance(b, Tensor) else list(b)
    return custom_ops.traced_add_lora(y, x, list_a, list_b, plan, rank_tensor, scales, number)
