"""TVM's CUDA text taken apart and made fit for a header that anyone may include.

A source is a preamble (includes, helper types and functions) followed by kernels. Preambles repeat
from kernel to kernel and define macros and functions at global scope; here each distinct one
becomes a namespace of its own, its includes are collected, and nothing leaks.
"""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass

from dop.errors import ExportError

_KERNEL = re.compile(r'^extern "C" __global__ ', re.MULTILINE)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*([<\"][^>\"]+[>\"])[ \t]*$", re.MULTILINE)
_RTC = re.compile(r"^#ifdef __CUDACC_RTC__\n.*?^#else\n(.*?)^#endif[^\n]*\n", re.M | re.S)
_ALIAS = re.compile(r"^[ \t]*#define (uint|uchar|ushort) (unsigned \w+)[ \t]*$", re.MULTILINE)
_FREE_FUNCTION = re.compile(r"^(?=__device__ |__host__ __device__ )", re.MULTILINE)
_FORCED = "static __device__ __forceinline__"
_DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)", re.MULTILINE)
_UNDEF = re.compile(r"^[ \t]*#[ \t]*undef[ \t]+(\w+)", re.MULTILINE)

_NARROW = re.compile(r"\bint src_off\b")
"""Offset parameter of the asynchronous copies' helpers: 32 bits reach 4 GB of 16-bit weights at
most, and the slices' stacks are separate allocations that may lie further apart."""

_SHARED = re.compile(r"(?<=extern __shared__ __align__\()\d+(?=\) unsigned char dop_shared\[\])")
"""Both kernels of a source declare it: it is one variable, of the larger alignment."""

_SM90 = re.compile(
    r"\bwgmma\b|\bsetmaxnreg\b|cp\.async\.bulk|\bmbarrier\.|griddepcontrol|"
    r"barrier\.cluster|CUtensorMap|dop_tensor_map|__cluster_dims__|cudaGridDependencySynchronize"
)
"""What no GPU before Hopper has."""


ONE_GPU = re.compile(
    r"\bwgmma\.mma_async\b|\bsetmaxnreg\b|\btcgen05\.|\bdop_tensor_map [abxy]\d?_box\d"
)
"""Instructions of one architecture only ("sm_90a"), or helpers made of such: compiled for another
one, "sm_90" included, such a source stops with a trap. A pack ships its binary and not its text; a
header calls it only where it was compiled for that architecture."""

OWN_ARCH = "sm_90a"
_OWN_MACRO = "__CUDA_ARCH_FEAT_SM90_ALL"


@dataclass(frozen=True, slots=True)
class CudaText:
    """A source taken apart.

    Attributes:
        includes: headers, as they stand behind #include.
        preamble: helpers, without includes.
        kernels: the kernels as static functions.
        macros: names that the preamble leaves defined.
        min_arch: 80, or 90 if the kernels need it.
        alone: they need OWN_ARCH.
    """

    includes: tuple[str, ...]
    preamble: str
    kernels: str
    macros: tuple[str, ...]
    min_arch: int
    alone: bool = False

    @property
    def helpers(self) -> str:
        """Namespace of the preamble: equal preambles have equal names."""
        return "helpers_" + hashlib.sha256(self.preamble.encode()).hexdigest()[:8]


def take_apart(source: str) -> CudaText:
    """The parts of a generated CUDA source.

    Raises:
        ExportError: there is no kernel in it.
    """
    first = _KERNEL.search(source)
    if first is None:
        raise ExportError("a generated source holds no kernel.", "Report the trace.")
    preamble = _RTC.sub(r"\1", source[: first.start()])
    includes = [name for name in _INCLUDE.findall(preamble) if name != "<cuda.h>"]
    preamble = _INCLUDE.sub("", preamble)
    preamble = _ALIAS.sub(r"  using \1 = \2;", preamble)
    preamble = _FREE_FUNCTION.sub("static inline ", preamble)
    preamble = preamble.replace("static inline __device__ __forceinline__", _FORCED)  # says inline
    preamble = _NARROW.sub("long long src_off", preamble)
    preamble = re.sub(r"\n{3,}", "\n\n", preamble).strip("\n") + "\n"
    left = [m for m in _DEFINE.findall(preamble) if m not in _UNDEF.findall(preamble)]
    kernels = _KERNEL.sub("static __global__ ", source[first.start() :])
    kernels = _without_declarations(kernels).strip("\n") + "\n"
    largest = max(map(int, _SHARED.findall(kernels)), default=0)
    kernels = _SHARED.sub(str(largest), kernels)
    min_arch = 90 if _SM90.search(kernels) else 80
    alone = bool(ONE_GPU.search(kernels))
    if min_arch > 80:
        newer = f"__CUDA_ARCH__ >= {min_arch * 10}"
        kernels = _guarded(kernels, f"defined({_OWN_MACRO})" if alone else newer)
    return CudaText(
        tuple(dict.fromkeys(includes)),
        preamble,
        kernels,
        tuple(dict.fromkeys(left)),
        min_arch,
        alone,
    )


def _without_declarations(kernels: str) -> str:
    return re.sub(r"^static __global__ [^;{]*\);\n", "", kernels, flags=re.MULTILINE)


def _guarded(kernels: str, condition: str) -> str:
    """Bodies that only some devices compile; on others such a kernel stops at once, loudly."""
    begin = f"#if !defined(__CUDA_ARCH__) || {condition}\n"
    end = "#else\n  __trap();\n#endif\n}"
    text = re.sub(r"^(static __global__ [^;{]*\) \{\n)", rf"\1{begin}", kernels, flags=re.M)
    return re.sub(r"^\}", end, text, flags=re.MULTILINE)


def cxx(expression: str) -> str:
    """A launch expression (integers, tokens, tiles, + - * //) in C++; its operands are long long.

    Raises:
        ExportError: it holds anything else.
    """
    try:
        return _cxx(ast.parse(expression, mode="eval").body)
    except SyntaxError as error:
        raise ExportError(f"{expression!r} is not a launch expression.") from error


_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "/",
}


def _cxx(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return f"{node.value}LL"
    if isinstance(node, ast.Name) and node.id in ("tokens", "tiles"):
        return node.id
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return f"({_cxx(node.left)} {_OPERATORS[type(node.op)]} {_cxx(node.right)})"
    raise ExportError(f"{ast.unparse(node)!r} does not belong in a launch expression.")
