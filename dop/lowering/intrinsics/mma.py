"""Warp-level 16x16x16 matrix intrinsics (two mma.m16n8k16, fp32 accumulation) for fp16 and bf16.

A warp holds a 16 x 16 tile as a [32, 8] buffer in scope "warp": 8 elements per lane, in the order
of the registers of `mma` and `ldmatrix` (PTX ISA, "Matrix Fragments for mma.m16n8k16"). Operand B
and the result are two 8-column halves side by side. Each intrinsic is a description (what TVM must
find in the program) and an implementation, both written as TVMScript text: parsing text is what
makes registration fast (0.1 s per intrinsic; importing TVM's own collection takes 5 to 30 s).

    mma_<t>            c[i, j] += a[i, k] * b[j, k]            t: f16, bf16
    ldmatrix_a_<t>     a fragment of the left operand from dynamic shared memory
    ldmatrix_b_<t>     the same for the right operand (rows are its columns)
    store_shared       the fp32 result to dynamic shared memory
    store_global       the fp32 result to a workspace
    clear              the fp32 result to zero (implied where a tensorized reduction is decomposed)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import from_source
from tvm.script import tirx as T

from dop.errors import TraceError

DTYPES = {"f16": "float16", "bf16": "bfloat16"}
_PTX = {"f16": "fp16", "bf16": "bf16"}

LEFT = "{0} % 8 * 4 + {1} % 8 // 2, {1} // 8 * 4 + {0} // 8 * 2 + {1} % 2"
"""(lane, register) of element (row, column) of the left operand and of the result."""

RIGHT = "{0} % 8 * 4 + {1} % 8 // 2, {0} // 8 * 4 + {1} // 8 * 2 + {1} % 2"
"""(lane, register) of element (column of the product, k) of the right operand."""


def _left(i: Any, j: Any) -> tuple[Any, Any]:
    return i % 8 * 4 + j % 8 // 2, j // 8 * 4 + i // 8 * 2 + j % 2


def _right(i: Any, j: Any) -> tuple[Any, Any]:
    return i % 8 * 4 + j % 8 // 2, i // 8 * 4 + j // 8 * 2 + j % 2


def _tiled(place: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[..., tuple[Any, ...]]:
    def index_map(*index: Any) -> tuple[Any, ...]:
        *outer, i, j = index
        return (*outer, i // 16, j // 16, *place(i % 16, j % 16))

    return index_map


LAYOUTS: dict[str, tuple[str, Callable[..., tuple[Any, ...]]]] = {
    "ldmatrix_a": ("write", _tiled(_left)),
    "ldmatrix_b": ("write", _tiled(_right)),
    "store": ("read", _tiled(_left)),
}
"""Which buffer of a copy is in scope "warp", and how its last two dimensions become fragments."""


def _match(name: str, shape: str, dtype: str, scope: str, extra: str = "") -> str:
    return f'    {name} = T.match_buffer({name}_h, {shape}, "{dtype}", scope="{scope}"{extra})\n'


def _warp(name: str, dtype: str, factor: int = 8) -> str:
    return _match(name, "(32, 8)", dtype, "warp", f", align=64, offset_factor={factor}")


def _root(reads: str, writes: str) -> str:
    return f'    with T.sblock("root"):\n        T.reads({reads})\n        T.writes({writes})\n'


_LANES = '        for tx in T.thread_binding(0, 32, "threadIdx.x"):\n'


def _head(*names: str) -> str:
    parameters = ", ".join(f"{n}_h: T.handle" for n in names)
    return f"@T.prim_func(s_tir=True)\ndef f({parameters}):\n"


def _elements(kinds: str, reads: str, writes: str, statement: str) -> str:
    loops = "ijk"[: len(kinds)]
    names = ", ".join(loops)
    axes = ", ".join(f"v{x}" for x in loops)
    return (
        f"        for {names} in T.grid({', '.join(['16'] * len(kinds))}):\n"
        '            with T.sblock("element"):\n'
        f'                {axes} = T.axis.remap("{kinds}", [{names}])\n'
        f"                T.reads({reads})\n"
        f"                T.writes({writes})\n"
        f"                {statement}\n"
    )


def _load(kind: str, right: bool) -> tuple[str, str]:
    dtype = DTYPES[kind]
    strided = ", align=64, offset_factor=16"
    head, root = _head("w", "s"), _root("s[0:16, 0:16]", "w[0:32, 0:8]")
    place = (RIGHT if right else LEFT).format("vi", "vj")
    body = _elements("SS", "s[vi, vj]", f"w[{place}]", f"w[{place}] = s[vi, vj]")
    shared = _match("s", "(16, 16)", dtype, "shared.dyn", strided)
    description = head + shared + _warp("w", dtype) + root + body
    # TVM shrinks the result's buffer to a lane's 8 elements but leaves the operands' buffers whole
    # (it does not look into these calls). So a lane keeps its 8 elements at the front of each tile,
    # at constant indices: with the lane in the index nvcc may put the buffer into local memory.
    # Lanes 8n .. 8n + 7 give the row addresses of the n-th 8 x 8 matrix.
    row = "(tx // 16 * 8 + tx % 8)" if right else "(tx % 16)"
    column = "tx % 16 // 8 * 8" if right else "tx // 16 * 8"
    shared = _match("s", "(16, 16)", dtype, "shared.dyn", strided + ", strides=[s0, s1]")
    call = (
        'T.ptx_legacy.ldmatrix(False, 4, ".b16", w.data, w.elem_offset, '
        f's.access_ptr("r"), s0 * {row} + {column}, dtype="{dtype}")'
    )
    strides = "    s0 = T.int32()\n    s1 = T.int32()\n"
    run = f"            T.evaluate({call})\n"
    return description, head + strides + shared + _warp("w", dtype) + root + _LANES + run


def _multiply(kind: str) -> tuple[str, str]:
    dtype = DTYPES[kind]
    head = _head("a", "b", "c") + _warp("a", dtype) + _warp("b", dtype) + _warp("c", "float32")
    head += _root("c[0:32, 0:8], a[0:32, 0:8], b[0:32, 0:8]", "c[0:32, 0:8]")
    a, b = LEFT.format("vi", "vk"), RIGHT.format("vj", "vk")
    c = LEFT.format("vi", "vj")
    product = f'T.cast(a[{a}], "float32") * T.cast(b[{b}], "float32")'
    body = _elements("SSR", f"c[{c}], a[{a}], b[{b}]", f"c[{c}]", f"c[{c}] = c[{c}] + {product}")
    t = _PTX[kind]
    halves = "".join(
        f'            T.evaluate(T.ptx_legacy.mma("m16n8k16", "row", "col", "{t}", "{t}", "fp32", '
        f"a.data, a.elem_offset, b.data, b.elem_offset + {h}, "
        f'c.data, c.elem_offset + tx * 8 + {h}, False, dtype="float32"))\n'
        for h in (0, 4)
    )
    return head + body, head + _LANES + halves


def _clear() -> tuple[str, str]:
    head, root = _head("c"), _root("", "c[0:32, 0:8]")
    place = LEFT.format("vi", "vj")
    body = _elements("SS", "", f"c[{place}]", f"c[{place}] = T.float32(0)")
    run = (
        "            T.evaluate(T.cuda.mma_fill_legacy("
        '8, c.data, c.elem_offset, dtype="float32"))\n'
    )
    description = head + _match("c", "(32, 8)", "float32", "warp") + root + body
    return description, head + _warp("c", "float32", 1) + root + _LANES + run


def _store(scope: str) -> tuple[str, str]:
    head, root = _head("c", "o"), _root("c[0:32, 0:8]", "o[0:16, 0:16]")
    place = LEFT.format("vi", "vj")
    body = _elements("SS", f"c[{place}]", "o[vi, vj]", f"o[vi, vj] = c[{place}]")
    plain = _match("c", "(32, 8)", "float32", "warp") + _match("o", "(16, 16)", "float32", scope)
    strides = "    s0 = T.int32()\n    s1 = T.int32()\n"
    strided = _match("o", "(16, 16)", "float32", scope, ", offset_factor=1, strides=[s0, s1]")
    # Unrolled by nvcc (#pragma unroll), else the fragment may end in local memory; unrolled by TVM,
    # its constant indices are more than LowerWarpMemory understands.
    unroll = '{"pragma_auto_unroll_max_step": 16, "pragma_unroll_explicit": 0}'
    run = (
        f"            for e in T.serial(8, annotations={unroll}):\n"
        "                o[e // 2 % 2 * 8 + tx // 4, e // 4 * 8 + tx % 4 * 2 + e % 2] = c[tx, e]\n"
    )
    implementation = head + strides + _warp("c", "float32", 1) + strided + root + _LANES + run
    return head + plain + root + body, implementation


INTRINSICS: dict[str, Callable[[], tuple[str, str]]] = {
    **{f"ldmatrix_a_{t}": partial(_load, t, False) for t in DTYPES},
    **{f"ldmatrix_b_{t}": partial(_load, t, True) for t in DTYPES},
    **{f"mma_{t}": partial(_multiply, t) for t in DTYPES},
    "clear": _clear,
    "store_shared": partial(_store, "shared.dyn"),
    "store_global": partial(_store, "global"),
}
"""Texts of description and implementation by the intrinsic's name."""

_registered: set[str] = set()


def layout(name: str) -> tuple[str, Callable[..., tuple[Any, ...]]] | None:
    """The layout that a copy's fragment buffer needs for this intrinsic, or None."""
    for prefix, found in LAYOUTS.items():
        if name.startswith(prefix):
            return found
    return None


def register(name: str) -> str:
    """Makes an intrinsic known to TVM; returns the name that `tensorize` wants.

    Raises:
        TraceError: there is no such intrinsic.
    """
    if name not in INTRINSICS:
        raise TraceError(f"intrinsic {name!r} is unknown.", f"Known: {', '.join(INTRINSICS)}.")
    if name not in _registered:
        texts = INTRINSICS[name]()
        TensorIntrin.register(
            f"dop.{name}", *(from_source(text, extra_vars={"T": T}) for text in texts)
        )
        _registered.add(name)
    return f"dop.{name}"
