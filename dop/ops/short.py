"""The short path of `add_lora`: what an eager call does that is like an earlier one.

Everything that may differ between two calls is looked at in every call; all else was found by the
long path (eager.py) and kept. Whatever does not fit takes the long path, which says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dop.ops import calls, eager, native, settled
from dop.ops.derived import derived_words
from dop.ops.eager import Ranks, Scale, per_slot_ranks, per_slot_scale
from dop.ops.launch import LOCAL
from dop.ops.plan import SegmentPlan, plain_words
from dop.ops.stacks import STACKS
from dop.ops.switches import CHECKED

ShortPath = Callable[[Any, Any, Any, Any, Any, Any, Any], bool]
"""(y, x, a, b, plan, scale, ranks) -> whether the call was done."""


@dataclass(frozen=True)
class Surroundings:
    """What a call depends on besides its arguments; functions without arguments but for one.

    Attributes:
        modes: number of dispatch modes.
        grad_enabled: whether gradients are recorded.
        stream_of: (device) -> CUstream.
        capturing: whether the current stream records a CUDA graph.
        current_device: index.
    """

    modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
    grad_enabled: Callable[[], bool] = torch.is_grad_enabled
    stream_of: Callable[[int], int] = eager.stream_of
    capturing: Callable[[], bool] = eager.capturing
    current_device: Callable[[], int] = eager.current_device


def short_path(around: Surroundings) -> ShortPath:
    """The compiled short path where there is one, else that of Python."""
    if not native.reads_tensors():
        return _in_python(around)
    compiled = native.EXTENSION.Short(
        native.CAPSULE,
        Tensor,
        torch.nn.Parameter,
        STACKS,
        LOCAL,
        CHECKED,
        around.modes,
        around.grad_enabled,
        around.stream_of,
        around.capturing,
        around.current_device,
        own_words,
        calls.check,
    )
    run: ShortPath = compiled.run
    return run


def _in_python(around: Surroundings) -> ShortPath:
    modes, grad_enabled = around.modes, around.grad_enabled
    stream_of, capturing, current_device = (
        around.stream_of,
        around.capturing,
        around.current_device,
    )

    def run(y: Any, x: Any, a: Any, b: Any, plan: Any, scale: Any, ranks: Any) -> bool:
        if modes():
            return False
        try:
            several = type(a) is tuple or type(a) is list
            stacks = STACKS[id(a[0] if several else a)]
            shape = stacks.shape
            block = LOCAL.blocks[shape.number, plan.batch, stream_of(shape.device)]
            if not (
                (stacks.are(a, b) if several else stacks.are((a,), (b,)))
                and type(x) is Tensor
                and type(y) is Tensor
                and x.shape == block.x_shape
                and y.shape == block.y_shape
                and x.dtype is block.dtype
                and y.dtype is block.dtype
                and x.is_contiguous()
                and y.is_contiguous()
                and x.get_device() == shape.device == y.get_device() == current_device()
                and plan.slots <= stacks.slots
                and not (grad_enabled() and _wants_gradient(y, x, a, b, several))
                and not (block.stream and capturing())
                and not CHECKED.value
            ):
                return False
            if ranks is None and type(scale) is float and scale == 1.0:
                words = plan.words.get(block.tile_rows) or plain_words(plan, block.tile_rows)
            else:
                words = own_words(plan, block.tile_rows, ranks, scale)
            x_at, y_at = x.data_ptr(), y.data_ptr()
            if (x_at | y_at) & 15 or not (x_at and y_at):  # 0: it has no memory
                return False

            def start(overlap: bool) -> int:
                return block.call.run(x_at, y_at, stacks.words, words, overlap)

            code = settled.start(block, stacks, plan, False, start)
        except (KeyError, AttributeError, IndexError, TypeError, ValueError):
            return False  # the long path looks at the arguments and says what is wrong
        calls.check(code)
        return True

    return run


def _wants_gradient(y: Tensor, x: Tensor, a: Any, b: Any, several: bool) -> bool:
    weights = (*a, *b) if several else (a, b)
    return any(tensor.requires_grad for tensor in (x, y, *weights))


def own_words(plan: SegmentPlan, tile_rows: int, ranks: Ranks, scale: Scale) -> bytes:
    """Table addresses for a call with ranks or a scale of its own."""
    device = plan.buffer.device
    scales, number = per_slot_scale(scale, plan.slots, device)
    return derived_words(plan, tile_rows, per_slot_ranks(ranks, plan.slots, device), scales, number)
