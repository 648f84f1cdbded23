"""Turning a square of float32 in vector registers, for CPUs.

    turn_<n>    c[j, i] = a[i, j]    n x n elements, rows of a as vectors of n lanes

Stage by stage, halves of ever shorter stretches change places between two vectors: n log2(n)
shuffles for n * n elements, where building each vector from single elements takes n * n.
"""

from __future__ import annotations

from functools import cache

from tvm.s_tir import TensorIntrin
from tvm.script import from_source
from tvm.script import tirx as T

Shuffle = tuple[str, tuple[str, str], list[int]]
"""Name of the result, two vectors, and the places of its elements in both of them joined."""


def shuffles(lanes: int) -> tuple[list[Shuffle], list[str]]:
    """What turns the vectors v0, v1, ... and the names of the results in order."""
    found: list[Shuffle] = []
    names = [f"v{i}" for i in range(lanes)]
    distance = lanes // 2
    while distance:
        low = [j if not j & distance else lanes + j - distance for j in range(lanes)]
        high = [j + distance if not j & distance else lanes + j for j in range(lanes)]
        new = list(names)
        for i in range(lanes):
            if i & distance:
                continue
            pair = names[i], names[i + distance]
            for k, order in ((i, low), (i + distance, high)):
                new[k] = f"w{distance}_{k}"
                found.append((new[k], pair, order))
        names, distance = new, distance // 2
    return found, names


@cache
def register_turn(lanes: int) -> str:
    """Registers the intrinsic for squares of `lanes` (a power of two) and returns its name."""
    name = f"turn_{lanes}"
    start = _head(lanes)
    sources = start + _description(lanes), start + _implementation(lanes)
    pair = (from_source(source, extra_vars={"T": T}) for source in sources)
    TensorIntrin.register(name, *pair, override=True)
    return name


def _head(lanes: int) -> str:
    shape = f"({lanes}, {lanes})"
    strides = "".join(f"    {b}0 = T.int32()\n" for b in "ac")
    buffers = "".join(
        f'    {b} = T.match_buffer({b}_h, {shape}, "float32", scope="{scope}", offset_factor=1, '
        f"strides=[{b}0, 1])\n"
        for b, scope in (("a", "global"), ("c", "local"))
    )
    return (
        "@T.prim_func(s_tir=True)\n"
        f"def f(a_h: T.handle, c_h: T.handle):\n{strides}{buffers}"
        '    with T.sblock("root"):\n'
        f"        T.reads(a[0:{lanes}, 0:{lanes}])\n"
        f"        T.writes(c[0:{lanes}, 0:{lanes}])\n"
    )


def _description(lanes: int) -> str:
    return (
        f"        for i, j in T.grid({lanes}, {lanes}):\n"
        '            with T.sblock("element"):\n'
        '                vi, vj = T.axis.remap("SS", [i, j])\n'
        "                T.reads(a[vi, vj])\n"
        "                T.writes(c[vj, vi])\n"
        "                c[vj, vi] = a[vi, vj]\n"
    )


def _implementation(lanes: int) -> str:
    """T.let: a plain assignment would become a buffer in memory."""
    steps, results = shuffles(lanes)
    ramp = f"T.ramp(0, 1, {lanes})"
    lines = [f"v{i}: T.let = a[{i}, {ramp}]" for i in range(lanes)]
    lines += [f"{n}: T.let = T.Shuffle([{', '.join(pair)}], {order})" for n, pair, order in steps]
    lines += [f"c[{i}, {ramp}] = {name}" for i, name in enumerate(results)]
    return "".join(f"        {line}\n" for line in lines)
