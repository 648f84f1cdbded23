"""Building an export's kernels: trace -> code -> binary, in this process or several."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dop.errors import DopError, ExportError
from dop.measure.artifact import Artifact, GeneratedLike

if TYPE_CHECKING:
    from dop.space.trace import Trace
    from dop.target import Target
    from dop.workload import Workload

Generate = Callable[["Workload", "Trace", "Target"], GeneratedLike]


@dataclass(frozen=True, slots=True)
class BuildJob:
    """A kernel to build.

    Attributes:
        name: for messages.
        workload: what it shall compute.
        trace: its steps.
        target: what it is built for.
    """

    name: str
    workload: Workload
    trace: Trace
    target: Target


def generated(job: BuildJob, generate: Generate | None = None) -> GeneratedLike:
    """The code of a job.

    Raises:
        ExportError: the trace does not apply.
    """
    if generate is None:
        from dop.lowering.codegen import generate as generate_code

        generate = generate_code
    try:
        return generate(job.workload, job.trace, job.target)
    except DopError as error:
        raise ExportError(
            f"{job.name} cannot be generated: {error.cause}",
            "The log may come from another version of Dop.",
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # TVM raises many kinds; each means that it refused the program
        text = " ".join(str(error).split())[:160]
        raise ExportError(
            f"{job.name} cannot be generated: {type(error).__name__}: {text}.",
            "The log may come from another version of Dop.",
        ) from error


def build_cuda(job: BuildJob, generate: Generate | None = None) -> Artifact:
    """The cubin of a job, with its launches.

    Raises:
        ExportError: it cannot be generated, or the compiler refuses it.
        MissingDependencyError: there is no compiler.
    """
    from dop.measure.compile_cpu import CompilerError
    from dop.measure.compile_cuda import compile_cuda

    code = generated(job, generate)
    try:
        return compile_cuda(code, job.target.arch)
    except CompilerError as error:
        raise ExportError(f"{job.name} does not compile: {error}") from error


Outcome = Artifact | ExportError


def _attempt(job: BuildJob, generate: Generate | None = None) -> Outcome:
    """Errors that a person can meet travel as values: not every exception survives a process."""
    try:
        return build_cuda(job, generate)
    except ExportError as error:
        return ExportError(error.cause, error.action)


def build_all(
    jobs: Sequence[BuildJob], *, processes: int = 1, generate: Generate | None = None
) -> Iterator[tuple[BuildJob, Outcome]]:
    """Builds every job, in order; what cannot be built comes as its error.

    Args:
        jobs: what to build.
        processes: 1: this one; else that many others.
        generate: stand-in for the code generator; only in this process.

    Raises:
        ExportError: a process died.
        MissingDependencyError: there is no compiler.
    """
    from dop.measure.compile_cuda import require_compiler

    require_compiler()
    count = min(processes, len(jobs))
    if count <= 1 or generate is not None:
        for job in jobs:
            yield job, _attempt(job, generate)
        return
    # A fresh interpreter: a fork of a process with threads (torch, TVM) may hang.
    context = multiprocessing.get_context("spawn")
    with (
        _one_thread_each(),
        ProcessPoolExecutor(
            count, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
        ) as pool,
    ):
        try:
            yield from zip(jobs, pool.map(_attempt, jobs), strict=True)
        except BrokenProcessPool as error:
            raise ExportError(
                "a process that builds kernels died.", "Give fewer --jobs: memory may be short."
            ) from error


def _end_with(parent: int) -> None:
    """Lets a process end soon after its parent: one that is killed cannot tell its pool."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """The processes share the machine: TVM's own pool of threads stays small in each."""
    before = os.environ.get("TVM_NUM_THREADS")
    os.environ["TVM_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TVM_NUM_THREADS"]
        else:
            os.environ["TVM_NUM_THREADS"] = before


def default_processes() -> int:
    """The cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)))
