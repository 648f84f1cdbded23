"""The operator for tracers: torch.library ops with fakes. Eager calls do not come through here.

Plans travel as their buffer and two numbers, so a plan may be an input of a compiled function or
be made inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dop.errors import ShapeError
from dop.ops import eager
from dop.ops.plan import SegmentPlan, buffer_size, fill

LIBRARY = torch.library.Library("dop", "DEF")  # type: ignore[no-untyped-call]

_FACTS = "Tensor? ranks, Tensor? scales, float scale"
_PLAN = "Tensor plan, SymInt tokens, SymInt slots, SymInt adapters"

SCHEMAS = {
    "segment_plan": f"(Tensor token_to_adapter, SymInt slots, {_FACTS}) -> Tensor",
    "segment_plan_out": f"(Tensor(a!) plan, Tensor token_to_adapter, SymInt slots, {_FACTS}) -> ()",
    "add_lora": f"(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, {_PLAN}, {_FACTS}, "
    "bool settled=False) -> ()",
    "sgmv_shrink": f"(Tensor x, Tensor[] a, {_PLAN}, Tensor? ranks) -> Tensor",
    "sgmv_expand": f"(Tensor(a!) y, Tensor v, Tensor[] b, {_PLAN}, {_FACTS}) -> ()",
}
UNKNOWN = -1
"""`adapters` where the caller gave no hint."""


def _plan_of(
    buffer: Tensor, tokens: int, slots: int, adapters: int, settled: bool = False
) -> SegmentPlan:
    """A plan around a buffer. It is marked as one whose content may change unnoticed, so that
    nothing derived from it is trusted later; settled only if it was made outside of what is
    traced: inside, compilers copy buffers as they like."""
    _check_size(buffer, tokens, slots)
    hint = None if adapters == UNKNOWN else adapters
    return SegmentPlan(buffer, tokens, slots, hint, in_graph=True, settled=settled)


def _check_size(buffer: Tensor, tokens: int, slots: int) -> None:
    if buffer.numel() != buffer_size(tokens, slots):
        raise ShapeError(
            f"a plan of {buffer.numel()} elements for {tokens} tokens and {slots} slots.",
            "Under torch.compile give plans as segment_plan returned them.",
        )


def _segment_plan(
    token_to_adapter: Tensor,
    slots: int,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> Tensor:
    size = buffer_size(token_to_adapter.shape[0], slots)
    # Cleared, because tracers compare whole tensors: gaps between the tables are not written.
    buffer = torch.zeros(size, dtype=torch.int32, device=token_to_adapter.device)
    fill(buffer, token_to_adapter, slots, ranks, scales, scale)
    return buffer


def _segment_plan_out(
    plan: Tensor,
    token_to_adapter: Tensor,
    slots: int,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> None:
    _check_size(plan, token_to_adapter.shape[0], slots)
    fill(plan, token_to_adapter, slots, ranks, scales, scale)


def _scale(scales: Tensor | None, scale: float) -> Any:
    if scales is None:
        return scale
    return scales if scale == 1.0 else scales * scale


def _add_lora(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    plan: Tensor,
    tokens: int,
    slots: int,
    adapters: int,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
    settled: bool = False,
) -> None:
    own = _plan_of(plan, tokens, slots, adapters, settled)
    # Where a dispatch mode is still on, the public function would lead back here.
    call = eager.add_lora if torch._C._len_torch_dispatch_stack() else _short_add_lora
    call(y, x, a, b, own, _scale(scales, scale), ranks)


def _short_add_lora(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    plan: SegmentPlan,
    scale: Any,
    ranks: Tensor | None,
) -> None:
    from dop.ops import api

    api.add_lora(y, x, a, b, plan, scale=scale, ranks=ranks)


def _sgmv_shrink(
    x: Tensor,
    a: Sequence[Tensor],
    plan: Tensor,
    tokens: int,
    slots: int,
    adapters: int,
    ranks: Tensor | None,
) -> Tensor:
    return eager.shrink(x, a, _plan_of(plan, tokens, slots, adapters), ranks)


def _sgmv_expand(
    y: Tensor,
    v: Tensor,
    b: Sequence[Tensor],
    plan: Tensor,
    tokens: int,
    slots: int,
    adapters: int,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> None:
    own = _plan_of(plan, tokens, slots, adapters)
    eager.expand(y, v, b, own, _scale(scales, scale), ranks)


def _fake_segment_plan(token_to_adapter: Tensor, slots: int, *_: Any) -> Tensor:
    size = buffer_size(token_to_adapter.shape[0], slots)
    return token_to_adapter.new_empty((size,), dtype=torch.int32)


def _fake_nothing(*_: Any) -> None:
    return None


def _fake_shrink(x: Tensor, a: Sequence[Tensor], *_: Any) -> Tensor:
    return x.new_empty((len(a), x.shape[0], a[0].shape[-2]), dtype=torch.float32)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "segment_plan": (_segment_plan, _fake_segment_plan),
    "segment_plan_out": (_segment_plan_out, _fake_nothing),
    "add_lora": (_add_lora, _fake_nothing),
    "sgmv_shrink": (_sgmv_shrink, _fake_shrink),
    "sgmv_expand": (_sgmv_expand, _fake_nothing),
}


def _register() -> None:
    tags = (torch.Tag.pt2_compliant_tag,)
    for name, schema in SCHEMAS.items():
        real, fake = _IMPLEMENTATIONS[name]
        LIBRARY.define(name + schema, tags=tags)  # type: ignore[no-untyped-call]
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, real, key)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"dop::{name}", fake, lib=LIBRARY)


_register()
OPS: Any = torch.ops.dop


def _plan_arguments(plan: SegmentPlan) -> tuple[Any, ...]:
    adapters = UNKNOWN if plan.adapters is None else plan.adapters
    return plan.buffer, plan.tokens, plan.slots, adapters


def traced_plan(
    token_to_adapter: Tensor,
    slots: int,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
    adapters: int | None,
    out: SegmentPlan | None,
) -> SegmentPlan:
    """`segment_plan` through torch.library."""
    if out is not None:
        OPS.segment_plan_out(out.buffer, token_to_adapter, slots, ranks, scales, scale)
        out.adapters = adapters
        out.in_graph = True
        out.settled = False
        out.version += 1
        return out
    buffer = OPS.segment_plan(token_to_adapter, slots, ranks, scales, scale)
    return SegmentPlan(buffer, token_to_adapter.shape[0], slots, adapters, in_graph=True)


def traced_add_lora(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    plan: SegmentPlan,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> Tensor:
    """`add_lora` through torch.library."""
    OPS.add_lora(y, x, a, b, *_plan_arguments(plan), ranks, scales, scale, plan.settled)
    return y


def traced_shrink(
    x: Tensor, a: Sequence[Tensor], plan: SegmentPlan, ranks: Tensor | None
) -> Tensor:
    """`sgmv_shrink` through torch.library."""
    found: Tensor = OPS.sgmv_shrink(x, a, *_plan_arguments(plan), ranks)
    return found


def traced_expand(
    y: Tensor,
    v: Tensor,
    b: Sequence[Tensor],
    plan: SegmentPlan,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> Tensor:
    """`sgmv_expand` through torch.library."""
    OPS.sgmv_expand(y, v, b, *_plan_arguments(plan), ranks, scales, scale)
    return y
