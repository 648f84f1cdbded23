"""Switches of the operator: checked mode and permission to compile. Both start from the
environment (DOP_CHECKED=1, DOP_JIT=0) and hold for the whole process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def is_on(name: str, default: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(name, default).strip().lower() not in ("", "0", "false", "no", "off")


class Switch:
    """A boolean that can be set for good or, in a `with` block, for a while."""

    def __init__(self, value: bool) -> None:
        self.value = value

    def __bool__(self) -> bool:
        return self.value

    def set(self, value: bool) -> _Restore:
        """Sets the value; the result, used in a `with` statement, sets it back at the end."""
        before, self.value = self.value, bool(value)
        return _Restore(self, before)

    @contextmanager
    def during(self, value: bool) -> Iterator[None]:
        """Sets the value for the block."""
        with self.set(value):
            yield


class _Restore:
    def __init__(self, switch: Switch, before: bool) -> None:
        self._switch, self._before = switch, before

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        self._switch.value = self._before


CHECKED = Switch(is_on("DOP_CHECKED", "0"))
JIT = Switch(is_on("DOP_JIT", "1"))


def checked(on: bool = True) -> _Restore:
    """Turns checked mode on or off: adapter ids and ranks are looked at on the host.

    In checked mode every `segment_plan` waits for the device once. Without it an id outside
    0..slots-1 counts as no adapter, so nothing is read or written out of bounds.

        with ops.checked():
            plan = ops.segment_plan(ids, slots=8)     # AdapterIdError if an id is 8 or -2

    Returns:
        Something that restores the old mode when used in a `with` statement.
    """
    return CHECKED.set(on)


def allow_jit(on: bool = True) -> _Restore:
    """Allows or forbids building kernels at run time (NVRTC).

    Where it is forbidden, a call that no pack and no shipped kernel serves raises
    MissingKernelError, which names the shape, the device and the folders searched.

    Returns:
        Something that restores the old permission when used in a `with` statement.
    """
    return JIT.set(on)
