"""`dop export cuh`: all chosen kernels, their dispatch and a host API as one CUDA C++ header."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dop.errors import DopError, ExportError
from dop.export.cuda_text import ONE_GPU, CudaText, cxx, take_apart
from dop.export.provenance import in_comment
from dop.export.select import Kernel, Measured, Selection, choose, workload_name
from dop.workload import DTYPES, Workload

if TYPE_CHECKING:
    from dop.lowering.codegen import Generated, KernelLaunch
    from dop.space.trace import Trace
    from dop.target import Target

Generate = Callable[[Workload, "Trace", "Target"], "Generated"]

TEMPLATES = Path(__file__).with_name("templates")
MAX_WORKSPACES = 8
_DTYPE = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
_POINTERS = (
    *("x", "a", "b", "y", "y_in"),
    *("token_slot", "token_rank", "token_scale", "row_index"),
    *("tile_slot", "tile_row0", "tile_rows", "tile_rank", "tile_scale"),
)
_NUMBERS = ("a1_shift", "a2_shift", "b1_shift", "b2_shift", "tokens", "tiles", "slots")


@dataclass(frozen=True, slots=True)
class _Part:
    """A kernel of the header: what was chosen, its code, its text."""

    kernel: Kernel
    code: Generated
    text: CudaText


class UnfitKernelsError(ExportError):
    """Kernels that a header cannot hold; `keys`: (workload key, trace key) -> why."""

    def __init__(self, keys: dict[tuple[str, str], str]) -> None:
        self.keys = keys
        super().__init__(next(iter(keys.values())), "The log may come from another version of Dop.")


def header_of(
    measured: Measured, max_regret: float, generate: Generate | None = None
) -> tuple[str, Selection, list[str]]:
    """The header of a log's device; kernels that it cannot hold are passed over, and what serves
    their batches is chosen anew.

    Returns:
        The text, what is in it, and notes on what was passed over.

    Raises:
        ExportError: as `header`, or nothing is left.
    """
    banned: dict[tuple[str, str], str] = {}
    remembered = _remembering(generate)
    while True:
        selection = choose(measured, max_regret, banned)
        try:
            text = header(selection, remembered)
        except UnfitKernelsError as error:
            banned |= error.keys
            continue
        return text, selection, [f"passed over: {why}" for why in banned.values()]


def _generate(workload: Workload, trace: Trace, target: Target) -> Generated:
    from dop.lowering.codegen import generate

    return generate(workload, trace, target)


def _remembering(generate: Generate | None) -> Generate:
    """The code generator, which makes each kernel once however often a selection is made anew."""
    found: dict[tuple[str, str, str], Generated] = {}

    def once(workload: Workload, trace: Trace, target: Target) -> Generated:
        key = (workload.key, trace.key, target.key)
        if key not in found:
            found[key] = (generate or _generate)(workload, trace, target)
        return found[key]

    return once


def header(selection: Selection, generate: Generate | None = None) -> str:
    """The header's text; the same log gives the same text.

    Args:
        selection: of a CUDA device.
        generate: `dop.lowering.codegen.generate`, or a stand-in.

    Raises:
        ExportError: the selection is not for CUDA.
        UnfitKernelsError: kernels of it cannot be put into a header.
    """
    if selection.target.kind != "cuda":
        raise ExportError(
            f"{selection.target.device_name} is no CUDA device.", "Use dop export library for CPUs."
        )
    parts = _parts(selection, generate)
    includes = dict.fromkeys(name for part in parts for name in part.text.includes)
    known = ("<cstddef>", "<cstdint>", "<limits>", "<vector>", "<cuda_runtime.h>")
    head = _template(
        "sgmv_head.cuh",
        {
            "PROVENANCE": "\n".join(_provenance(selection)),
            "INCLUDES": "\n".join(f"#include {name}" for name in includes if name not in known),
        },
    )
    tail = _template("sgmv_tail.cuh", _tables(selection, parts))
    return head + "\n".join(_body(parts)) + tail


def _parts(selection: Selection, generate: Generate | None) -> list[_Part]:
    make = generate or _generator()
    parts = []
    unfit: dict[tuple[str, str], str] = {}
    for kernel in selection.kernels:
        key = (kernel.workload.key, kernel.trace_key)
        try:
            code = make(kernel.workload, kernel.record.trace, selection.target)
        except DopError as error:
            unfit[key] = f"{kernel.name} cannot be generated: {error.cause}"
            continue
        if ONE_GPU.search(code.source):
            unfit[key] = f"{kernel.name} has instructions of {selection.target.arch} alone."
        elif len(code.workspaces) > MAX_WORKSPACES:
            unfit[key] = f"{kernel.name} has {len(code.workspaces)} workspaces."
        else:
            parts.append(_Part(kernel, code, take_apart(code.source)))
    if unfit:
        raise UnfitKernelsError(unfit)
    return parts


def _generator() -> Generate:
    from dop.lowering.codegen import generate

    return generate


def _template(name: str, values: dict[str, str]) -> str:
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def _provenance(selection: Selection) -> Iterator[str]:
    for line in selection.provenance.lines():
        yield f"// {line}"
    for key, table in selection.table.workloads.items():
        yield f"// {key}: {len(table.trace_keys)} kernels, at most {table.worst_regret:.1%} slower"
        yield "//   than the fastest measured kernel in any measured scenario"


def _body(parts: Sequence[_Part]) -> Iterator[str]:
    """Kernels grouped by preamble, so that each preamble and its macros appear once."""
    groups: dict[str, list[_Part]] = {}
    for part in parts:
        groups.setdefault(part.text.helpers, []).append(part)
    for helpers, group in groups.items():
        text = group[0].text
        yield f"namespace {helpers} {{  // what the code generator's kernels share"
        yield "using ::max;\nusing ::min;"
        yield text.preamble + f"}}  // namespace {helpers}\n"
        for part in group:
            yield from _kernel(part, helpers)
        for macro in text.macros:
            yield f"#undef {macro}"
        yield ""


def _kernel(part: _Part, helpers: str) -> Iterator[str]:
    code, kernel = part.code, part.kernel
    space, inner = f"w_{workload_name(kernel.workload)}", f"k_{kernel.trace_key}"
    yield f"// {kernel.workload.key}, trace {kernel.trace_key}"
    form = f"tiles of {code.tile_rows} rows" if code.tile_rows else "one token at a time"
    yield f"// {in_comment(kernel.record.sketch)}: {form}"
    for fit in kernel.fits:
        seconds = "not measured" if fit.seconds is None else f"{fit.seconds * 1e6:.2f} us"
        floor = "" if fit.floor_s is None else f", floor {fit.floor_s * 1e6:.2f} us"
        yield f"//   {fit.scenario_key}: {seconds}{floor}"
    yield f"namespace {space} {{ namespace {inner} {{"
    yield f"using namespace {helpers};"
    yield part.text.kernels
    yield from _workspace_function(part)
    yield from _launch_function(part)
    yield f"}} }}  // namespace {space}::{inner}\n"


def _workspace_function(part: _Part) -> Iterator[str]:
    yield "static inline size_t workspace(sgmv::detail::Call& call, char* base) {"
    yield "  const long long tokens = call.tokens, tiles = call.tiles;"
    yield "  (void)tokens, (void)tiles, (void)base;"
    yield "  size_t end = 0;"
    for i, space in enumerate(part.code.workspaces):
        size = _element_bytes(space.dtype)
        yield f"  call.workspace[{i}] = sgmv::detail::at(base, end);  // {space.name}"
        yield f"  end += sgmv::detail::padded({cxx(space.elements)} * {size});"
    yield "  return end;\n}"


def _element_bytes(dtype: str) -> int:
    sizes = {**DTYPES, "int32": 4, "int64": 8, "int8": 1, "uint8": 1}
    if dtype not in sizes:
        raise ExportError(f"a workspace of {dtype} is not supported.", "Report the trace.")
    return sizes[dtype]


def _launch_function(part: _Part) -> Iterator[str]:
    workspaces = [w.name for w in part.code.workspaces]
    yield "static inline cudaError_t launch(sgmv::detail::Call& call, cudaStream_t stream) {"
    yield "  const long long tokens = call.tokens, tiles = call.tiles;"
    yield "  (void)tokens, (void)tiles;"
    yield "  cudaError_t error = cudaSuccess;"
    for i, launch in enumerate(part.code.kernels):
        yield from _launch(i, launch, workspaces)
    yield "  return error;\n}"


def _launch(index: int, launch: KernelLaunch, workspaces: Sequence[str]) -> Iterator[str]:
    arguments = []
    for name in launch.arguments:
        if name in workspaces:
            arguments.append(f"&call.workspace[{workspaces.index(name)}]")
        elif name in _POINTERS or name in _NUMBERS:
            arguments.append(f"(void*)&call.{name}")
        else:
            raise ExportError(f"kernel {launch.name} wants {name!r}, which no caller has.")
    function = f"(const void*)&{launch.name}"
    grid = ", ".join(cxx(extent) for extent in launch.grid)
    block = ", ".join(map(str, launch.block))
    if launch.dynamic_smem_bytes > 48 * 1024:
        smem = launch.dynamic_smem_bytes
        yield f"  static bool allowed{index}[sgmv::detail::kMaxDevices] = {{}};"
        yield f"  error = sgmv::detail::allow_smem({function}, {smem}, allowed{index});"
        yield "  if (error != cudaSuccess) return error;"
    yield f"  void* arguments{index}[] = {{{', '.join(arguments)}}};"
    yield f"  error = sgmv::detail::launch({function}, {grid}, {block},"
    flags = f"{launch.dynamic_smem_bytes}, {str(launch.dependent).lower()}"
    yield f"                               {flags}, arguments{index}, stream);"
    yield "  if (error != cudaSuccess) return error;"


def _tables(selection: Selection, parts: Sequence[_Part]) -> dict[str, str]:
    """Contents of the three arrays in the tail."""
    kernels: list[str] = []
    rows: list[str] = []
    workloads: list[str] = []
    index = {(p.kernel.workload.key, p.kernel.trace_key): i for i, p in enumerate(parts)}
    for part in parts:
        space = f"w_{workload_name(part.kernel.workload)}::k_{part.kernel.trace_key}"
        smem = max((k.dynamic_smem_bytes for k in part.code.kernels), default=0)
        kernels.append(
            f'      {{"{part.kernel.name}", {part.code.tile_rows}, {part.text.min_arch}, {smem},\n'
            f"       {space}::launch, {space}::workspace}},"
        )
    for key, table in selection.table.workloads.items():
        mine = selection.of(key)
        shape = Workload.parse(key)
        outs = ", ".join(map(str, shape.out_features))
        first = index[key, mine[0].trace_key]
        workloads.append(
            f"      {{{{{shape.in_features}, {{{outs}}}, {shape.slices}, {shape.rank}, "
            f"Dtype::{_DTYPE[shape.dtype]}}}, {len(rows)}, {len(table.rows)}, "
            f"{first}, {len(mine)}}},  // {key}"
        )
        for row in table.rows:
            upto = "any()" if row.rows_upto == math.inf else repr(row.rows_upto)
            rows.append(f"      {{{row.tokens}, {upto}, {index[key, row.trace_key]}}},")
    return {
        "KERNELS": "\n".join(kernels),
        "ROWS": "\n".join(rows),
        "WORKLOADS": "\n".join(workloads),
        "WORKLOAD_COUNT": str(len(workloads)),
    }
