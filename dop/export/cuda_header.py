"""`dop export cuh`: all chosen kernels, their dispatch and a host API as one CUDA C++ header.

A header is compiled for whatever its user asks for. Kernels with instructions of one architecture
alone (wgmma: sm_90a) are therefore in a second table, which is looked at only where the header was
compiled for that architecture; the first one serves every GPU without them.

Early kernels (PR dependent_launch 3) read weights before they wait for the kernel before them. A
header cannot know when weights were written, so it launches them plainly, which is right and slower
than what was measured: they are chosen only in workloads that lack others for some batch.

Kernels that take tensor maps (dop/measure/tensor_map.py) are left out: the driver's interface makes
the maps, and a header's user links the runtime alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dop.errors import DopError, ExportError
from dop.export.cuda_text import OWN_ARCH, CudaText, cxx, take_apart
from dop.export.provenance import in_comment
from dop.export.select import (
    Kernel,
    Measured,
    Selection,
    choose,
    having,
    is_early,
    takes_maps,
    workload_name,
)
from dop.measure import tensor_map
from dop.space.step import AnnotationStep, Step
from dop.workload import DTYPES, Workload

if TYPE_CHECKING:
    from dop.lowering.codegen import Generated, KernelLaunch
    from dop.space.trace import Trace
    from dop.target import Target

Generate = Callable[[Workload, "Trace", "Target"], "Generated"]
Key = tuple[str, str]
"""Workload key and trace key."""

MAPS = "tensor maps, which the driver's interface makes"
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
    """Kernels that a header cannot hold where they are.

    Attributes:
        keys: those that it cannot hold at all, and why.
        alone: those that only the table of one architecture may name.
    """

    def __init__(self, keys: dict[Key, str], alone: set[Key]) -> None:
        self.keys = keys
        self.alone = alone
        cause = next(iter(keys.values()), f"a kernel has instructions of {OWN_ARCH} alone.")
        super().__init__(cause, "The log may come from another version of Dop.")


@dataclass(frozen=True, slots=True)
class Header:
    """A header.

    Attributes:
        text: its content.
        selection: what serves every GPU.
        own: what serves where it is compiled for OWN_ARCH, if that differs.
        notes: what a person should know, one line each.
    """

    text: str
    selection: Selection
    own: Selection | None
    notes: tuple[str, ...]

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels of it."""
        return (*self.selection.kernels, *_more(self.selection, self.own))


def header_of(measured: Measured, max_regret: float, generate: Generate | None = None) -> Header:
    """The header of a log's device.

    Kernels of one architecture alone are known from their traces. What turns out while it is
    generated to be one of them, or cannot be generated, is passed over where it stood, and what
    serves its batches is chosen anew.

    Raises:
        ExportError: as `header`, or nothing is left.
    """
    unfit: dict[Key, str] = {}
    alone, mapped = of_one_gpu(measured), having(measured, takes_maps)
    early = early_ones(measured, alone | mapped)
    remembered = _remembering(generate)
    while True:
        banned = early | mapped | unfit.keys()
        selection = choose(measured, max_regret, banned | alone)
        own = _own(measured, max_regret, banned, selection) if alone else None
        try:
            text = header(selection, remembered, own)
        except UnfitKernelsError as error:
            unfit |= error.keys
            alone |= error.alone
            continue
        notes = [f"passed over: {why}" for why in unfit.values()]
        if early:
            notes.append(f"{len(early)} kernels read weights before they wait; they are left out.")
        if mapped:
            notes.append(f"{len(mapped)} kernels take {MAPS}; they are left out.")
        left = {key for key, _ in alone | mapped} - selection.table.workloads.keys()
        notes += [f"{key} has kernels of {OWN_ARCH} alone; it is left out." for key in sorted(left)]
        return Header(text, selection, own, tuple(notes))


def of_one_gpu(measured: Measured) -> set[Key]:
    """Kernels with instructions of one architecture alone, as their traces tell."""

    def warpgroups(step: Step) -> bool:
        return isinstance(step, AnnotationStep) and step.intrinsic.startswith("warpgroup_")

    return having(measured, warpgroups)


def early_ones(measured: Measured, alone: set[Key]) -> set[Key]:
    """Early kernels, as their traces tell, of workloads that have others for every batch, which
    every GPU can run."""

    found = having(measured, is_early)
    passed = found | alone
    batches: set[Key] = set()
    served: set[Key] = set()
    for e in measured.entries:
        if e.ok:
            batches.add((e.workload_key, e.scenario_key))
            if (e.workload_key, e.trace_key) not in passed:
                served.add((e.workload_key, e.scenario_key))
    needed = {workload for workload, _ in batches - served}
    return {key for key in found if key[0] not in needed}


def _own(
    measured: Measured, max_regret: float, banned: set[Key], selection: Selection
) -> Selection | None:
    """What serves where the header is compiled for OWN_ARCH: the selection's kernels, and others
    where those of OWN_ARCH alone are faster by more than the regret."""
    tables = selection.table.workloads
    given = {key: table.trace_keys for key, table in tables.items()}
    own = choose(measured, max_regret, banned, given)
    if own.target.arch != OWN_ARCH:
        return None
    return own if _more(selection, own) else None


def _more(selection: Selection, own: Selection | None) -> tuple[Kernel, ...]:
    """The kernels that `own` has beside those of the selection, of its workloads."""
    known = {_key(kernel) for kernel in selection.kernels}
    mine = [k for k in (own.kernels if own else ()) if k.workload.key in selection.table.workloads]
    return tuple(kernel for kernel in mine if _key(kernel) not in known)


def _key(kernel: Kernel) -> Key:
    return kernel.workload.key, kernel.trace_key


def _generate(workload: Workload, trace: Trace, target: Target) -> Generated:
    from dop.lowering.codegen import generate

    return generate(workload, trace, target)


def _remembering(generate: Generate | None) -> Generate:
    """The code generator, which makes each kernel once however often a selection is made anew."""
    found: dict[tuple[str, str, str], Generated | DopError] = {}

    def once(workload: Workload, trace: Trace, target: Target) -> Generated:
        key = (workload.key, trace.key, target.key)
        if key not in found:
            try:
                found[key] = (generate or _generate)(workload, trace, target)
            except DopError as error:
                found[key] = error
        code = found[key]
        if isinstance(code, DopError):
            raise code
        return code

    return once


def header(
    selection: Selection, generate: Generate | None = None, own: Selection | None = None
) -> str:
    """The header's text; the same log gives the same text.

    Args:
        selection: of a CUDA device.
        generate: `dop.lowering.codegen.generate`, or a stand-in.
        own: what serves where the header is compiled for OWN_ARCH; None: the same.

    Raises:
        ExportError: the selection is not for CUDA.
        UnfitKernelsError: kernels of it cannot be put into a header.
    """
    if selection.target.kind != "cuda":
        raise ExportError(
            f"{selection.target.device_name} is no CUDA device.", "Use dop export library for CPUs."
        )
    parts = _parts(selection, generate, own)
    includes = dict.fromkeys(name for part in parts for name in part.text.includes)
    known = ("<cstddef>", "<cstdint>", "<limits>", "<vector>", "<cuda_runtime.h>")
    head = _template(
        "sgmv_head.cuh",
        {
            "PROVENANCE": "\n".join(_provenance(selection, own)),
            "INCLUDES": "\n".join(f"#include {name}" for name in includes if name not in known),
        },
    )
    tail = _template("sgmv_tail.cuh", _tables(selection, parts, own))
    return head + "\n".join(_body(parts)) + tail


def _parts(selection: Selection, generate: Generate | None, own: Selection | None) -> list[_Part]:
    """The selection's kernels, workload by workload, then those that `own` has beside them."""
    make = generate or _generate
    parts = []
    unfit: dict[Key, str] = {}
    alone: set[Key] = set()
    everywhere = {_key(kernel) for kernel in selection.kernels}
    for kernel in (*selection.kernels, *_more(selection, own)):
        key = _key(kernel)
        try:
            code = make(kernel.workload, kernel.record.trace, selection.target)
        except DopError as error:
            unfit[key] = f"{kernel.name} cannot be generated: {error.cause}"
            continue
        text = take_apart(code.source)
        if text.alone and key in everywhere:
            alone.add(key)
        elif any(tensor_map.wanted(launch.arguments) for launch in code.kernels):
            unfit[key] = f"{kernel.name} takes {MAPS}."
        elif len(code.workspaces) > MAX_WORKSPACES:
            unfit[key] = f"{kernel.name} has {len(code.workspaces)} workspaces."
        else:
            parts.append(_Part(kernel, code, text))
    if unfit or alone:
        raise UnfitKernelsError(unfit, alone)
    return parts


def _template(name: str, values: dict[str, str]) -> str:
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def _provenance(selection: Selection, own: Selection | None) -> Iterator[str]:
    for line in selection.provenance.lines():
        yield f"// {line}"
    if own:
        yield f"// Without kernels of {OWN_ARCH} alone:"
    for key, table in selection.table.workloads.items():
        yield f"// {key}: {len(table.trace_keys)} kernels, at most {table.worst_regret:.1%} slower"
        yield "//   than the fastest one that a header may hold, in any measured scenario"
    if own:
        yield f"// Compiled for {OWN_ARCH}, with them:"
        for key in selection.table.workloads:
            table = own.table.workloads[key]
            count, worst = len(table.trace_keys), table.worst_regret
            yield f"// {key}: {count} kernels, at most {worst:.1%} slower"


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
    where = f", {OWN_ARCH} alone" if part.text.alone else ""
    yield f"// {in_comment(kernel.record.sketch)}: {form}{where}"
    if any(launch.early for launch in code.kernels):
        yield "// measured as a dependent launch; launched plainly here, since it reads A at once"
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


def _tables(selection: Selection, parts: Sequence[_Part], own: Selection | None) -> dict[str, str]:
    """Contents of the three arrays in the tail."""
    kernels: list[str] = []
    rows: list[str] = []
    workloads: list[str] = []
    index = {_key(part.kernel): i for i, part in enumerate(parts)}
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
        mine_own = own.table.workloads[key].rows if own else ()
        outs = ", ".join(map(str, shape.out_features))
        first = index[key, mine[0].trace_key]
        workloads.append(
            f"      {{{{{shape.in_features}, {{{outs}}}, {shape.slices}, {shape.rank}, "
            f"Dtype::{_DTYPE[shape.dtype]}}}, {len(rows)}, {len(table.rows)}, "
            f"{len(rows) + len(table.rows)}, {len(mine_own)}, {first}, {len(mine)}}},  // {key}"
        )
        for row in (*table.rows, *mine_own):
            upto = "any()" if row.rows_upto == math.inf else repr(row.rows_upto)
            rows.append(f"      {{{row.tokens}, {upto}, {index[key, row.trace_key]}}},")
    return {
        "KERNELS": "\n".join(kernels),
        "ROWS": "\n".join(rows),
        "WORKLOADS": "\n".join(workloads),
        "WORKLOAD_COUNT": str(len(workloads)),
    }
