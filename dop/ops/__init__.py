"""The SGMV operator: y[t] += scale * (x[t] @ A[slot(t)].T) @ B[slot(t)].T for every row t."""

from dop.ops.plan import SegmentPlan
from dop.ops.switches import allow_jit, checked

__all__ = ["SegmentPlan", "allow_jit", "checked"]
