"""Eager calls the long way: everything checked, and whatever the short path later uses is made.

Nothing here asks whether it is being traced: the ops of custom_ops.py come here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dop.errors import DtypeError, ShapeError
from dop.ops import checks, cpu, cpu_pack, halves, launch, settled, sources
from dop.ops.derived import derived_words
from dop.ops.launch import LOCAL, Block
from dop.ops.plan import (
    UNNUMBERED,
    SegmentPlan,
    batch_number,
    buffer_size,
    check_capacity,
    fill,
    upload,
)
from dop.ops.shapes import ALIGN_BYTES, Shape
from dop.ops.stacks import Stacks, stacks_of
from dop.ops.switches import CHECKED
from dop.workload import BESIDE

Stack = Tensor | Sequence[Tensor]
Scale = float | Tensor | Sequence[float]
Ranks = Tensor | Sequence[int] | None


def _no_stream(device: int) -> int:
    return 0


stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", _no_stream)
"""Current CUstream of a device."""

capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
"""Whether the current stream records a CUDA graph."""

current_device = getattr(torch._C, "_cuda_getDevice", lambda: -1)


def on_gpu(device: int) -> bool:
    """Whether a device index is a GPU's."""
    return device >= 0


def is_captured(stream: int) -> bool:
    """Whether the current stream records a CUDA graph; the default stream (0) cannot."""
    return bool(stream) and capturing()


def device_guard(device: int) -> Any:
    """Makes a GPU the current one for a `with` block."""
    return torch.cuda.device(device)


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


def call_facts(
    plan: SegmentPlan, rank: int, scale: Scale, ranks: Ranks
) -> tuple[Tensor | None, Tensor | None, float]:
    """Ranks, scales and scale of a call, checked."""
    rank_tensor = per_slot_ranks(ranks, plan.slots, plan.buffer.device)
    scales, number = per_slot_scale(scale, plan.slots, plan.buffer.device)
    if CHECKED and rank_tensor is not None and not (rank_tensor.is_cuda and capturing()):
        checks.check_rank_range(rank_tensor, rank)
    return rank_tensor, scales, number


def check_tensors(**tensors: Any) -> None:
    """Refuses what is no tensor.

    Raises:
        DtypeError: it names the argument.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name} is a {type(tensor).__name__}.", "Give a tensor.")


def make_plan(
    token_to_adapter: Tensor,
    slots: int,
    ranks: Tensor | None,
    facts: tuple[Tensor | None, float],
    adapters: int | None,
    out: SegmentPlan | None,
) -> SegmentPlan:
    """`segment_plan` of checked arguments; facts: scales and scale."""
    device, tokens = token_to_adapter.device, token_to_adapter.shape[0]
    scales, number = facts
    captured = token_to_adapter.is_cuda and capturing()
    if CHECKED and not captured:  # a capture cannot be waited for
        checks.check_id_range(token_to_adapter, slots, ranks)
    if out is None:
        buffer = torch.empty(buffer_size(tokens, slots), dtype=torch.int32, device=device)
        out = SegmentPlan(buffer, tokens, slots)
    else:
        check_capacity(out, tokens, slots, device)
    if token_to_adapter.is_cuda:
        loading = launch.driver().relaxed() if captured else nullcontext()
        with device_guard(token_to_adapter.get_device()), loading:
            fill(out.buffer, token_to_adapter, slots, ranks, scales, number)
    else:
        fill(out.buffer, token_to_adapter, slots, ranks, scales, number)
    plain = ranks is None and scales is None and number == 1.0
    out.refilled(adapters, ranks is not None, is_plain=plain, in_graph=captured)
    return out


def add_lora(
    y: Tensor, x: Tensor, a: Stack, b: Stack, plan: SegmentPlan, scale: Scale, ranks: Ranks
) -> Tensor:
    """`add_lora` with everything checked; makes what the short path then uses."""
    check_tensors(x=x, y=y)
    stacks = checked_stacks(x, a, b, plan)
    shape = stacks.shape
    checks.check_rows("y", y, plan.tokens, shape.total_out, shape)
    checks.check_no_gradient("add_lora", y)
    rank_tensor, scales, number = call_facts(plan, shape.rank, scale, ranks)
    if plan.tokens == 0:
        return y
    if not on_gpu(shape.device):
        list_a, list_b = checks.as_list(a, "a"), checks.as_list(b, "b")
        cpu_path(y, x, list_a, list_b, stacks, plan, rank_tensor, scales, number)
        return y
    with device_guard(shape.device):
        _run_cuda(y, x, stacks, plan, rank_tensor, scales, number)
    return y


def checked_stacks(x: Tensor, a: Stack, b: Stack, plan: SegmentPlan) -> Stacks:
    """The weights of a call, checked as all of it but for y."""
    stacks = stacks_of(a, b)
    checks.check_plan(plan, stacks)
    checks.check_rows("x", x, plan.tokens, stacks.shape.in_features, stacks.shape)
    checks.check_no_gradient("add_lora", x, *checks.as_list(a, "a"), *checks.as_list(b, "b"))
    return stacks


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
    x, target = dense(x), dense(y)

    def start(overlap: bool) -> int:
        return launch.launch(block, x.data_ptr(), target.data_ptr(), stacks.words, words, overlap)

    settled.start(block, stacks, plan, is_captured(block.stream), start)
    if target is not y:
        y.copy_(target)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if kernels can read it, else a contiguous, aligned copy."""
    if not tensor.is_contiguous():
        return tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGN_BYTES == 0 else tensor.clone()


def block_for(shape: Shape, plan: SegmentPlan, beside: bool = False) -> Block:
    """Launches for a call site and a plan on the current stream; `beside`: in two pieces, of which
    the first runs beside the base layer's matmul.

    Blocks are kept, but for those made while a graph is captured: their workspace belongs to the
    graph's memory.
    """
    if plan.batch == UNNUMBERED:
        plan.batch = batch_number(plan.tokens, plan.slots, plan.adapters)
    stream = stream_of(shape.device)
    key: tuple[object, ...] = (shape.number, plan.batch, stream)
    if beside:
        key += (BESIDE,)
    captured = is_captured(stream)
    found = None if captured else LOCAL.blocks.get(key)
    if found is None:
        choice = sources.choose(shape, plan.tokens, plan.slots, plan.adapters, beside)
        assert choice.kernel is not None
        batch = (plan.tokens, plan.slots)
        found = launch.new_block(choice.kernel, shape, batch, stream, capturing=captured)
        if not captured:
            launch.remember(key, found)
    return found


def shrink(x: Tensor, a: Stack, plan: SegmentPlan, ranks: Ranks) -> Tensor:
    """`sgmv_shrink` with everything checked."""
    check_tensors(x=x)
    a = checks.as_list(a, "a")
    rank, width = checks.check_side(a, "a", plan)
    checks.check_rows("x", x, plan.tokens, width, checks.side_shape(a[0]))
    checks.check_no_gradient("sgmv_shrink", x, *a)
    ranks, _, _ = call_facts(plan, rank, 1.0, ranks)
    index = x.get_device()
    if plan.tokens == 0:
        return x.new_zeros((len(a), 0, rank), dtype=torch.float32)
    if not on_gpu(index):
        return cpu.shrink(x, a, plan, ranks)
    with device_guard(index):
        stream = stream_of(index)
        return halves.shrink(dense(x), a, plan, ranks, stream, is_captured(stream))


def expand(
    y: Tensor,
    v: Tensor,
    b: Stack,
    plan: SegmentPlan,
    scale: Scale,
    ranks: Ranks,
) -> Tensor:
    """`sgmv_expand` with everything checked."""
    check_tensors(y=y, v=v)
    b = checks.as_list(b, "b")
    rank, total = checks.check_side(b, "b", plan)
    checks.check_rows("y", y, plan.tokens, total, checks.side_shape(b[0]))
    checks.check_v(v, (len(b), plan.tokens, rank), y)
    checks.check_no_gradient("sgmv_expand", y, v, *b)
    facts = call_facts(plan, rank, scale, ranks)
    index = y.get_device()
    if plan.tokens == 0:
        return y
    if not on_gpu(index):
        cpu.expand(y, v, b, plan, *facts)
        return y
    with device_guard(index):
        stream, target = stream_of(index), dense(y)
        halves.expand(target, dense(v), b, plan, facts, stream, is_captured(stream))
        if target is not y:
            y.copy_(target)
    return y
