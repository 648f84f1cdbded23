"""The SGMV operator: y[t] += scale * (x[t] @ A[slot(t)].T) @ B[slot(t)].T for every row t.

    from dop import ops

    plan = ops.segment_plan(token_to_adapter, slots=64)          # once per forward pass
    ops.add_lora(qkv, hidden, (a_q, a_k, a_v), (b_q, b_k, b_v), plan)     # in every layer

Needs torch only. The torch.library ops (torch.ops.dop) are registered by importing this package.
"""

from dop.ops import custom_ops as _custom_ops  # noqa: F401  registers torch.ops.dop
from dop.ops.api import add_lora, segment_plan, sgmv_expand, sgmv_shrink
from dop.ops.plan import SegmentPlan
from dop.ops.punica import (
    add_lora_sgmv,
    add_lora_sgmv_custom_cutlass,
    add_lora_sgmv_cutlass,
)
from dop.ops.sources import Choice
from dop.ops.switches import allow_jit, checked
from dop.ops.warm import explain_choice, forget, warmup

__all__ = [
    "Choice",
    "SegmentPlan",
    "add_lora",
    "add_lora_sgmv",
    "add_lora_sgmv_custom_cutlass",
    "add_lora_sgmv_cutlass",
    "allow_jit",
    "checked",
    "explain_choice",
    "forget",
    "segment_plan",
    "sgmv_expand",
    "sgmv_shrink",
    "warmup",
]
