"""The builder: (workload, trace, target) to an artifact, in a warm worker process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dop.errors import BuildError, ConstraintError, Failure, MissingDependencyError, TraceError
from dop.measure.artifact import Artifact, GeneratedLike
from dop.measure.compile_cpu import CompilerError, adopt_runtime, compile_cpu, runtime_object
from dop.measure.worker import Handler, load
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload

GENERATE = "dop.lowering.codegen:generate"


@dataclass(frozen=True)
class BuildConfig:
    """What every build of a worker shares.

    Attributes:
        target: what is built for.
        generate: "module:function" with the signature of `dop.lowering.codegen.generate`.
        runtime: cpu_runtime.c compiled, or nothing to have each worker compile it.
    """

    target: Target
    generate: str = GENERATE
    runtime: bytes = b""


@dataclass(frozen=True)
class BuildTask:
    """One candidate."""

    workload: Workload
    trace: Trace


@dataclass(frozen=True)
class Built:
    """What a build gave: an artifact, or a failure class and its cause.

    Attributes:
        seconds: wall time of the build.
    """

    artifact: Artifact | None
    failure: Failure = Failure.NONE
    message: str = ""
    seconds: float = 0.0


def create(config: BuildConfig) -> Handler:
    """Handler of a builder worker; yields one `Built` per task."""
    generate: Callable[[Workload, Trace, Target], GeneratedLike] = load(config.generate)

    def handle(task: BuildTask) -> Iterator[Built]:
        begin = time.perf_counter()
        built = build(generate, task, config.target)
        seconds = time.perf_counter() - begin
        yield Built(built.artifact, built.failure, built.message, seconds)

    if config.runtime:
        adopt_runtime(config.runtime)
    return handle


def require_compiler(target: Target) -> bytes:
    """The compiled CPU run time for `BuildConfig`, nothing for CUDA.

    Raises:
        MissingDependencyError: there is no compiler; better said once than for every candidate.
    """
    if target.kind == "cpu":
        return runtime_object()
    from dop.measure.compile_cuda import require_compiler as require_cuda

    require_cuda()
    return b""


def build(
    generate: Callable[[Workload, Trace, Target], GeneratedLike], task: BuildTask, target: Target
) -> Built:
    """Builds one candidate; every failure becomes a `Built` with its class.

    Raises:
        MissingDependencyError: there is no compiler: no candidate could be built.
    """
    try:
        code = generate(task.workload, task.trace, target)
        check_limits(code, target)
        return Built(_compile(code, target))
    except MissingDependencyError:
        raise
    except CompilerError as error:
        return _failed(Failure.COMPILE, error)
    except ConstraintError as error:
        return _failed(Failure.CONSTRAINT, error)
    except (BuildError, TraceError) as error:
        return _failed(Failure.BUILD, error)
    except Exception as error:  # a fault of the code generator must not end the run
        return _failed(Failure.BUILD, error, f"{type(error).__name__}: ")


def _failed(failure: Failure, error: BaseException, prefix: str = "") -> Built:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return Built(None, failure, prefix + (lines or ["no message"])[0][:300])


def check_limits(code: GeneratedLike, target: Target) -> None:
    """Refuses launches that the target cannot hold.

    Raises:
        ConstraintError: too much shared memory or too many threads per block.
    """
    if target.kind != "cuda":
        return
    for kernel in code.kernels:
        threads = kernel.block[0] * kernel.block[1] * kernel.block[2]
        if threads > target.max_threads or threads < 1:
            raise ConstraintError(
                f"{kernel.name}: {threads} threads per block, at most {target.max_threads}."
            )
        if kernel.dynamic_smem_bytes > target.max_smem_bytes:
            raise ConstraintError(
                f"{kernel.name}: {kernel.dynamic_smem_bytes} bytes of shared memory per block, "
                f"at most {target.max_smem_bytes}."
            )


def _compile(code: GeneratedLike, target: Target) -> Artifact:
    if target.kind == "cuda":
        from dop.measure.compile_cuda import compile_cuda

        return compile_cuda(code, target.arch)
    return compile_cpu(code)
