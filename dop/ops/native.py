"""The one place that decides whether launches go through the compiled extension `_launch`.

It is optional: where it was not built, or with DOP_NATIVE=0, Python and ctypes do the same. Its
short path reads tensors through DLPack's C exchange API, which torch has from 2.10 on; before that
Python looks at the tensors and the extension only launches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dop.ops.switches import is_on


def _extension() -> Any:
    if not is_on("DOP_NATIVE", "1"):
        return None
    try:
        from dop.ops import _launch
    except ImportError:
        return None
    return _launch


EXTENSION: Any = _extension()
"""The extension module, or None."""

CAPSULE: Any = getattr(Tensor, "__dlpack_c_exchange_api__", None)
"""How tensors are read without Python, or None."""


def reads_tensors() -> bool:
    """Whether the short path of add_lora is the compiled one."""
    return EXTENSION is not None and CAPSULE is not None


def description() -> str:
    """What launches, for people."""
    if EXTENSION is None:
        return "Python and ctypes"
    return "compiled" if CAPSULE is not None else "compiled, but for the checks of tensors"


def weights(number: int, device: int, slots: int, words: bytes, tensors: tuple[Tensor, ...]) -> Any:
    """Checked weight stacks as the compiled short path compares them; None without it.

    Args:
        number, device: of their `Shape`.
        slots: adapters in each stack.
        words: `Stacks.words`.
        tensors: a of all slices, then b.
    """
    if not reads_tensors():
        return None
    return EXTENSION.Weights(CAPSULE, Tensor, number, device, slots, words, tensors)
