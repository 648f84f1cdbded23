"""Matrix intrinsics that AN tensorize steps may name; registered with TVM on first use."""

from dop.lowering.intrinsics.mma import INTRINSICS, layout, register

__all__ = ["INTRINSICS", "layout", "register"]
