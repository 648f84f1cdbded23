"""From a trace to code: CUDA C++ with launch descriptions, or a CPU object file.

Nothing of TVM's host side is used on CUDA: the device kernels' source is taken as text, guarded
and made ready for plain nvcc or NVRTC, and every launch is described by values that a runner or an
exporter can use without TVM.
"""

from __future__ import annotations

import ast
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from dop.errors import BuildError, TraceError
from dop.lowering.apply import Application, _reason, apply_trace
from dop.lowering.program import shift_names
from dop.space.early import EARLY
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import MAX_SLICES, Workload

SCALARS = ("tokens", "tiles", *shift_names(MAX_SLICES))
"""Numbers that a kernel may take: int32 counts, int64 shifts."""


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """One kernel of a candidate and how to launch it.

    Attributes:
        name: its name in the source and the binary.
        grid: blocks along x, y, z as expressions over tokens and tiles (see `evaluate`).
        block: threads along x, y, z.
        dynamic_smem_bytes: dynamic shared memory.
        arguments: tensors, workspaces and scalars in the order of the kernel's parameters.
        dependent: programmatic dependent launch: the kernel may start before its predecessor in
            the stream ends, and waits for it itself.
        early: it may be launched so only if its tables and weights were complete before its
            predecessor started, since it reads them before it waits.
    """

    name: str
    grid: tuple[str, str, str]
    block: tuple[int, int, int]
    dynamic_smem_bytes: int
    arguments: tuple[str, ...]
    dependent: bool = False
    early: bool = False


@dataclass(frozen=True, slots=True)
class Workspace:
    """A global intermediate that the caller allocates.

    Attributes:
        name: as kernels' arguments name it.
        dtype: element type.
        elements: number of elements, an expression over tokens and tiles.
    """

    name: str
    dtype: str
    elements: str


@dataclass(frozen=True, slots=True)
class Generated:
    """Code of one candidate.

    Attributes:
        kind: "cuda" or "cpu".
        workload_key: what it computes.
        tile_rows: rows per tile of the plan it wants; 0 for the row form.
        source: CUDA C++, or LLVM IR on a CPU, for people and exports.
        kernels: launches in order (CUDA).
        workspaces: what the launches share (CUDA).
        object_code: relocatable object with TVM's packed entry (CPU), else empty.
        arguments: tensor arguments in order, then the shifts (see lowering/program.py).
    """

    kind: str
    workload_key: str
    tile_rows: int
    source: str
    kernels: tuple[KernelLaunch, ...]
    workspaces: tuple[Workspace, ...]
    object_code: bytes
    arguments: tuple[str, ...]


def generate(workload: Workload, trace: Trace, target: Target) -> Generated:
    """Code of a trace.

    Raises:
        TraceError: the trace does not fit the workload.
        BuildError: TVM refused the program.
    """
    app = apply_trace(workload, trace)
    try:
        if target.kind == "cuda":
            return _generate_cuda(app, target)
        return _generate_cpu(app, target)
    except (BuildError, TraceError):
        raise
    except Exception as error:  # TVM raises many kinds; each means that it refused the program
        raise BuildError(f"TVM refused the program: {_reason(error)}") from error


_ALLOWED = (ast.Expression, ast.BinOp, ast.Constant, ast.Name, ast.Load)


@cache
def _compiled(expression: str) -> Any:
    tree = ast.parse(expression, mode="eval")
    for node in ast.walk(tree):
        operators = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv)
        if not isinstance(node, (*_ALLOWED, *operators)):
            raise BuildError(f"{expression!r} is not a launch expression.")
    return compile(tree, "<launch>", "eval")


def evaluate(expression: str, *, tokens: int, tiles: int) -> int:
    """Value of a launch expression: integers, tokens, tiles, + - * // and parentheses only.

    Raises:
        BuildError: anything else stands in the expression.
    """
    scope = {"__builtins__": {}, "tokens": tokens, "tiles": tiles}
    return int(eval(_compiled(expression), scope))


def _generate_cuda(app: Application, target: Target) -> Generated:
    from dop.lowering.cuda_launch import order_start
    from dop.lowering.cuda_source import finish, signatures

    if app.tiles:
        return _generate_tiles(app)
    host, device = _lower(app, target)
    text = str(_code(device, "target.build.cuda").inspect_source("cuda"))
    launches, workspaces = _launches(host)
    known = {*app.program.arguments, *(w.name for w in workspaces), *SCALARS}
    found = []
    for name, parameters in signatures(text):
        unknown = [p for p in parameters if p not in known]
        if unknown or name not in launches:
            raise BuildError(f"kernel {name} wants {unknown}, which no launch provides.")
        found.append((name, parameters))
    order = list(launches)
    found.sort(key=lambda kernel: order.index(kernel[0]))
    program, names = app.program, tuple(name for name, _ in found)
    spaces = tuple(w.name for w in workspaces)
    source = finish(text, program, names)
    source, dependent = order_start(source, names, spaces, app.dependent_launch)
    early = names[:1] if app.dependent_launch == EARLY else ()
    kernels = [KernelLaunch(n, *launches[n], p, n in dependent, n in early) for n, p in found]
    return Generated(
        "cuda",
        program.workload.key,
        program.tile_rows,
        source,
        tuple(kernels),
        workspaces,
        b"",
        program.arguments,
    )


def _generate_tiles(app: Application) -> Generated:
    """Code of a trace whose kernels' tiles are intrinsics."""
    from dop.lowering.cuda_source import signatures
    from dop.lowering.tile_kernels import read_tiles

    tiles, program = read_tiles(app), app.program
    source = tiles.source
    kernels = tuple(
        KernelLaunch(
            *(name, one.kernel.grid, one.kernel.block, one.kernel.smem_bytes),
            *(arguments, one.dependent, one.early),
        )
        for (name, arguments), one in zip(signatures(source), tiles.kernels, strict=True)
    )
    v = tiles.v_elements
    return Generated(
        "cuda",
        program.workload.key,
        program.tile_rows,
        source,
        kernels,
        (Workspace("v", program.workload.dtype, v),) if v else (),
        b"",
        program.arguments,
    )


def _tvm_target(target: Target) -> Any:
    if target.kind == "cuda":
        limits = {
            "max_threads_per_block": target.max_threads,
            "max_shared_memory_per_block": target.max_smem_bytes,
            "thread_warp_size": 32,
        }
        host = tvm.target.Target({"kind": "llvm"})
        return tvm.target.Target({"kind": "cuda", "arch": target.arch, **limits}, host=host)
    options: dict[str, Any] = {"kind": "llvm", "mcpu": target.arch, "num-cores": target.units}
    if target.features:
        options["mattr"] = target.features.split(",")
    return tvm.target.Target(options)


@cache
def _skip_compiler() -> None:
    """Makes TVM hand its CUDA source over instead of compiling it: builders compile it."""
    tvm_ffi.register_global_func(
        "tvm_callback_cuda_compile", lambda code, *_: bytearray(code.encode()), override=True
    )


def _lower(app: Application, target: Target) -> tuple[Any, Any]:
    """Host and device modules of the scheduled program, after TVM's s_tir passes."""
    from tvm.tirx.build import split_host_device_mods

    tvm_target = _tvm_target(target)
    # Shared subexpressions would be 32-bit variables; the compiler finds them anyway.
    options: dict[str, Any] = {"tirx.disable_cse_tir": True}
    if app.async_copy:
        options["tirx.use_async_copy"] = 1
    with tvm.transform.PassContext(config=options), tvm_target:
        passes, _, finish_device = tirx.get_tir_pipeline("s_tir")
        bound = tirx.transform.BindTarget(tvm_target)(app.schedule.mod)
        host, devices = split_host_device_mods(passes(bound))
        if len(devices) != 1:
            raise BuildError("the trace binds no loop to blocks and threads.")
        device = finish_device()(next(iter(devices.values())))
    return host, device


def _code(module: Any, builder: str) -> Any:
    _skip_compiler()
    function = next(iter(module.functions.values()))
    target = function.attrs["target"]
    with target:
        return tvm.get_global_func(builder)(module, target)


Grid = tuple[str, str, str]
Block = tuple[int, int, int]


def _launches(
    host: Any,
) -> tuple[dict[str, tuple[Grid, Block, int]], tuple[Workspace, ...]]:
    """What the host function would have launched and allocated, in order."""
    launches: dict[str, tuple[Grid, Block, int]] = {}
    workspaces = []
    for function in host.functions.values():
        for node in _statements(function.body):
            if type(node).__name__ == "AllocBuffer":
                workspaces.append(_workspace(node))
            elif type(node).__name__ == "Evaluate" and _is_launch(node.value):
                name, launch = _launch(node.value)
                launches[name] = launch
    return launches, tuple(workspaces)


def _statements(node: Any) -> Iterator[Any]:
    """A statement and all statements inside it."""
    yield node
    if type(node).__name__ == "SeqStmt":
        for child in node.seq:
            yield from _statements(child)
        return
    for field in ("body", "then_case", "else_case"):
        child = getattr(node, field, None)
        if child is not None:
            yield from _statements(child)


def _is_launch(value: Any) -> bool:
    return type(value).__name__ == "Call" and "call_ffi_kernel" in str(
        getattr(value.op, "name", "")
    )


def _launch(call: Any) -> tuple[str, tuple[Grid, Block, int]]:
    parameters = [str(p) for p in call.attrs["launch_params"]]
    values = [str(getattr(v, "value", v)) for v in call.args[len(call.args) - len(parameters) :]]
    given = dict(zip(parameters, values, strict=True))
    grid = tuple(_expression(given.get(f"blockIdx.{axis}", "1")) for axis in "xyz")
    block = tuple(int(given.get(f"threadIdx.{axis}", "1")) for axis in "xyz")
    smem = int(given.get("tirx.use_dyn_shared_memory", "0"))
    return str(call.args[0].value), (grid, block, smem)  # type: ignore[return-value]


def _expression(text: str) -> str:
    evaluate(text, tokens=1, tiles=1)
    return text


def _workspace(node: Any) -> Workspace:
    buffer = node.buffer
    elements = " * ".join(f"({extent})" for extent in buffer.shape)
    name = re.sub(r"\W", "_", str(buffer.name))
    return Workspace(name, str(buffer.dtype), _expression(elements))


def _generate_cpu(app: Application, target: Target) -> Generated:
    tvm_target = _tvm_target(target)
    # A condition shared by a vector's lanes would become a variable of vector type: TVM fails.
    options = {"tirx.disable_cse_tir": True}
    with tvm.transform.PassContext(config=options), tvm_target:
        library = tvm.compile(app.schedule.mod, target=tvm_target)
    module = library.mod if hasattr(library, "mod") else library
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.o")
        module.write_to_file(path)
        with open(path, "rb") as file:
            code = file.read()
    program = app.program
    return Generated(
        "cpu",
        program.workload.key,
        program.tile_rows,
        str(module.inspect_source("ll")),
        (),
        (),
        code,
        program.arguments,
    )
