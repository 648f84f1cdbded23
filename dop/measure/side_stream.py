"""A second stream for work beside what the current one does, in the order that pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _current_stream() -> torch.cuda.Stream:
    return torch.cuda.current_stream()


class SideStream:
    """Work that waits for a mark in the current stream, and is launched behind what follows it.

    Behind, since a matmul of few rows puts a block on nearly every multiprocessor and would wait
    for those that work before it has taken (1 to 3 us a call); launched behind it, the work runs on
    what is left over. In a graph "behind" alone is no order: both start at once, and the work may
    still come first. So a kernel that does nothing is launched in front of it. One mark at a time.

    Args:
        stream: the second one.
        pause: launches a kernel that does nothing on the stream of this number.
    """

    def __init__(
        self, stream: torch.cuda.Stream, pause: Callable[[int], object] | None = None
    ) -> None:
        self._stream, self._pause = stream, pause
        self._marked, self._done = _new_event(), _new_event()

    @property
    def number(self) -> int:
        """CUstream."""
        return int(self._stream.cuda_stream)

    def mark(self) -> None:
        """What `run` launches waits for what is in the current stream now."""
        self._marked.record(_current_stream())

    def run(self, launch: Callable[[], T]) -> T:
        """Calls `launch`, which launches on `number`; the current stream waits for it, whatever
        becomes of it: a capture that is left unjoined cannot end."""
        self._stream.wait_event(self._marked)
        try:
            if self._pause is not None:
                self._pause(self.number)
            return launch()
        finally:
            self._done.record(self._stream)
            _current_stream().wait_event(self._done)
