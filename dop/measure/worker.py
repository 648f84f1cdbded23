"""A worker process: `python -m dop.measure.worker FD`. It does what its parent sends it.

The parent sends one start message (search path, handler, configuration, niceness) and then
tasks; for each task the worker answers any number of ("item", value) and one ("end", None) or
("error", text). It is a plain interpreter, not a fork: the parent's main module is not imported
again, and a crash or a kill takes nothing else down.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

Handler = Callable[[Any], Iterator[object]]
"""Answers a task with zero or more items."""


@dataclass(frozen=True)
class Start:
    """What a worker is told first.

    Attributes:
        path: the parent's sys.path.
        handler: "module:factory"; the factory takes `config` and returns a Handler.
        config: any value that pickles, kept pickled until the path is set.
        nice: by how much to lower the priority.
    """

    path: list[str]
    handler: str
    config: bytes
    nice: int


def load(name: str) -> Any:
    """The object that "module:attribute" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _leave_with_parent(parent: int) -> None:
    """Ends this process once its parent is gone, also out of a task that hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _serve(pipe: Connection) -> None:
    start: Start = pipe.recv()
    sys.path[:] = start.path
    if start.nice:
        os.nice(start.nice)
    try:
        handler = cast(Handler, load(start.handler)(pickle.loads(start.config)))
    except BaseException as error:
        pipe.send(("error", _describe(error)))
        return
    pipe.send(("up", None))
    while True:
        payload = pipe.recv()
        try:
            for item in handler(pickle.loads(payload)):
                pipe.send(("item", item))
        except Exception as error:
            pipe.send(("error", _describe(error)))
        else:
            pipe.send(("end", None))


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def main() -> None:
    """Serves tasks until the parent closes the pipe."""
    pipe = Connection(int(sys.argv[1]))
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(pipe)
    sys.stdout.flush()
    os._exit(0)  # no teardown: a library of a faulty candidate may crash in it


if __name__ == "__main__":
    main()
