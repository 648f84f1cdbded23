"""Small packs for tests: real format, stand-in cubins (no compiler needed)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from export_logs import SM_90, records_of, write_log

from dop.errors import TraceError
from dop.export.make_pack import Packed, make_pack
from dop.export.select import read_measured
from dop.measure import compile_cuda
from dop.space.step import AnnotationStep, SplitStep
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload

H200 = replace(SM_90, device_name="NVIDIA H200")
WORKLOAD = Workload("qkv", 64, (64, 32), 16, "bfloat16")


def trace(number: int, *, matrix: bool = False) -> Trace:
    steps = [SplitStep(0, 0, 64, (number,), True)]
    if matrix:
        steps.append(AnnotationStep(0, 0, 11, "mma_bf16"))  # type: ignore[arg-type]
    return Trace(tuple(steps))


TRACES = {"a": trace(2), "b": trace(16, matrix=True), "c": trace(4)}
TIMES = {
    "T8/distinct/8": {"a": 10.0, "b": 30.0, "c": 10.2},
    "T8/uniform/3": {"a": 10.0, "b": 11.0, "c": 10.1},
    "T8/identical/1": {"a": 20.0, "b": 10.0, "c": 19.0},
    "T64/distinct/64": {"a": 40.0, "b": 120.0, "c": 41.0},
    "T64/identical/1": {"a": 80.0, "b": 20.0, "c": 79.0},
}


def fake_generate(workload: Workload, steps: Trace, target: Target) -> SimpleNamespace:
    """Code in the generator's form; a trace with an intrinsic of another type does not apply."""
    short = {"bfloat16": "bf16", "float16": "f16"}[workload.dtype]
    for step in steps.steps:
        if isinstance(step, AnnotationStep) and step.intrinsic != f"mma_{short}":
            raise TraceError(f"{step.intrinsic} does not fit {workload.dtype}.")
    number = steps.steps[0].lengths[0]  # type: ignore[attr-defined]
    if number == 63:
        raise TraceError("a trace of another version.")
    wait = 'asm volatile("griddepcontrol.wait;");' if number == 16 else ""
    body = f"y[{number}] = ({short})0; {wait}" + "// padding that all sources share\n" * 50
    source = f'extern "C" __global__ void main_kernel({short}* y) {{\n{body}}}\n'
    kernel = SimpleNamespace(
        name="main_kernel",
        grid=("tiles", "2", "1"),
        block=(32, 2, 1),
        dynamic_smem_bytes=0,
        arguments=("x", "a", "b", "tile_slot", "y", "a1_shift", "tokens"),
        dependent=number == 16,
    )
    return SimpleNamespace(
        kind="cuda",
        workload_key=workload.key,
        tile_rows=number if number >= 8 else 0,
        source=source,
        kernels=(kernel,),
        workspaces=(SimpleNamespace(name="v", dtype="float32", elements="(tokens * 3)"),),
        object_code=b"",
        arguments=(),
    )


def fake_cubin(source: str, arch: str) -> bytes:
    """The same for equal sources, so that deduplication shows."""
    return b"\x7fELF" + arch.encode() + hashlib.sha256(source.encode()).digest() * 20


def pack_at(
    path: Path,
    monkeypatch,
    *,
    workload: Workload = WORKLOAD,
    target: Target = H200,
    dtypes: tuple[str, ...] = ("float16", "bfloat16"),
    traces=TRACES,
    times=TIMES,
    **options,
) -> Packed:
    monkeypatch.setattr(compile_cuda, "compile_source", fake_cubin)
    monkeypatch.setattr(compile_cuda, "require_compiler", lambda: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.with_suffix(".jsonl")
    if not log.exists():
        write_log(log, records_of(workload, traces, times, target=target))
    settings = {"dtypes": dtypes, "max_regret": 0.05, "generate": fake_generate} | options
    return make_pack(read_measured(log), path, **settings)
