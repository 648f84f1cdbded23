"""Plain kernels as text, run one thread after another under AddressSanitizer: no thread reads or
writes beside its tensors, tables, workspaces or its own arrays, however far apart the stacks of
weights lie."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dop.errors import ConstraintError
from dop.space.generate import build_space
from dop.space.sketch import Sketch
from dop.space.trace import Trace
from dop.target import SM_90
from dop.workload import Workload

pytest.importorskip("tvm")

from dop.lowering.codegen import Generated, KernelLaunch, evaluate, generate
from dop.measure.artifact import shift_of

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
HERE = Path(__file__).parent
SLOTS = 3
SLOT_OF = (2, 0, -1, 2, 1)
"""Slot of each token."""
RANKS = (13, 1, 1 << 30)
"""True rank of each slot; the last stands for nobody's."""
FIRST = 'extern "C" __global__'
TYPES = {"float32": "float", "bfloat16": "nv_bfloat16"}


def tables(tile_rows: int) -> tuple[dict[str, tuple[int, ...]], int]:
    """Tables of the batch, and the number of tiles."""
    tokens = len(SLOT_OF)
    if not tile_rows:
        ranks = tuple(RANKS[max(slot, 0)] for slot in SLOT_OF)
        return {"token_slot": SLOT_OF, "token_rank": ranks, "token_scale": (1,) * tokens}, tokens
    order = sorted(range(tokens), key=lambda t: (SLOT_OF[t] < 0, SLOT_OF[t], t))
    used = [(slot, SLOT_OF.count(slot)) for slot in range(SLOTS)]
    rows = [(slot, left) for slot, count in used for left in range(count, 0, -tile_rows)]
    begin = {slot: min(i for i, t in enumerate(order) if SLOT_OF[t] == slot) for slot, _ in used}
    starts = [begin[slot] + SLOT_OF.count(slot) - left for slot, left in rows]
    tiles = tokens // tile_rows + min(tokens, SLOTS)
    spare = tiles - len(rows)
    found = {
        "tile_slot": [slot for slot, _ in rows],
        "tile_row0": starts,
        "tile_rows": [min(left, tile_rows) for _, left in rows],
        "tile_rank": [RANKS[slot] for slot, _ in rows],
        "tile_scale": [1] * len(rows),
    }
    padded = {name: (*values, *(0,) * spare) for name, values in found.items()}
    return {**padded, "row_index": tuple(order)}, tiles


def arrays(workload: Workload, code: Generated) -> tuple[list[str], dict[str, int]]:
    """Declarations of everything that kernels take, and the numbers among them."""
    lists, tiles = tables(code.tile_rows)
    tokens, w, element = len(SLOT_OF), workload, TYPES[workload.dtype]
    lines = [
        f"auto x = room<{element}>({tokens * w.in_features});",
        f"auto y = room<{element}>({tokens * w.total_out}); auto y_in = y;",
    ]
    for s, out in enumerate(w.out_features):
        lines.append(f"auto a{s} = far_room<{element}>({SLOTS * w.rank * w.in_features});")
        lines.append(f"auto b{s} = far_room<{element}>({SLOTS * w.rank * out});")
    for name, values in lists.items():
        kind = "float" if name.endswith("_scale") else "int"
        lines.append(f"auto {name} = room<{kind}>({len(values)});")
        lines += [f"{name}[{i}] = {value};" for i, value in enumerate(values)]
    for space in code.workspaces:
        count = evaluate(space.elements, tokens=tokens, tiles=tiles)
        lines.append(f"auto {space.name} = room<{TYPES[space.dtype]}>({count});")
    return lines, {"tokens": tokens, "tiles": tiles}


def argument(name: str, numbers: dict[str, int]) -> str:
    stack = shift_of(name)
    if stack is not None:
        return f"((char*){stack} - (char*){stack[0]}0) / 16"
    return str(numbers[name]) if name in numbers else f"{name}0" if name in ("a", "b") else name


def launch(kernel: KernelLaunch, numbers: dict[str, int]) -> str:
    grid = [evaluate(extent, **numbers) for extent in kernel.grid]
    block = ", ".join(map(str, kernel.block))
    given = ", ".join(argument(name, numbers) for name in kernel.arguments)
    shape = ", ".join(map(str, grid))
    return f"each_thread({{{shape}}}, {{{block}}}, [&] {{ {kernel.name}({given}); }});"


def run(workload: Workload, code: Generated, folder: Path) -> str:
    """What the sanitizer says, "" if nothing."""
    kernels = code.source[code.source.index(FIRST) :]
    kernels = re.sub(r"^\s*asm volatile\(.*\);\n", "", kernels, flags=re.MULTILINE)
    kernels = kernels.replace("__shared__ alignas(64)", "alignas(64) static")
    lines, numbers = arrays(workload, code)
    main = "\n".join([*lines, *(launch(kernel, numbers) for kernel in code.kernels)])
    text = f'#include "{HERE}/cuda_addresses.hpp"\n{kernels}\nint main() {{\n{main}\n}}\n'
    (folder / "kernel.cpp").write_text(text)
    command = [
        "g++",
        "-std=c++17",
        "-O0",
        "-w",
        "-fsanitize=address,bounds",
        "-fno-sanitize-recover",
    ]
    built = subprocess.run(
        [*command, "-o", str(folder / "kernel"), str(folder / "kernel.cpp")],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[:3000]
    done = subprocess.run(
        [str(folder / "kernel")],
        capture_output=True,
        text=True,
        env={"ASAN_OPTIONS": "detect_leaks=0"},
    )
    return done.stderr[:3000] if done.returncode else ""


def sketches(workload: Workload) -> list[Sketch]:
    names = ("rows/", "row_tiles/")
    return [s for s in build_space(workload, SM_90).sketches if s.name.startswith(names)]


def test_what_faulted_once(tmp_path: Path) -> None:
    """logs/h200.jsonl.xz, line 29167: an illegal address. The text was without fault; the
    machine code had 32 registers and 5.8 KB of stack a thread. Such kernels are not made now."""
    workload = Workload("qkv", 4096, (4096, 1024, 1024), 128, "bfloat16")
    sketch = next(s for s in sketches(workload) if s.name.startswith("rows/columns/"))
    values = {
        "expand.steps": 8,
        "expand.threads": 512,
        "expand.vector": 2,
        "expand.load": 1,
        "shrink.split_k": 16,
        "shrink.warps": 1,
        "shrink.ranks": 8,
    }
    assert "separate loads of B in a step: 256" in (sketch.broken_limit(values) or "")
    trace = Trace(tuple(step.bind(values) for step in sketch.steps))
    assert trace.key == "70b816c1b9b54c96"
    assert not run(workload, generate(workload, trace, SM_90), tmp_path)


def test_the_sanitizer_sees_what_is_beside_an_array(tmp_path: Path) -> None:
    workload = Workload("o", 512, (256,), 8, "bfloat16")
    sketch = sketches(workload)[0]
    code = generate(workload, sketch.bind(sketch.default()), SM_90)
    for array in ("a", "b", "x", "v_rf"):
        wrong = code.source.replace(f"*)({array}_ptr + (", f"*)({array}_ptr + 131072 + (")
        wrong = re.sub(rf"\b{array}_ptr\[", f"{array}_ptr[131072 + ", wrong)
        assert wrong != code.source
        changed = Generated(**{**{n: getattr(code, n) for n in code.__slots__}, "source": wrong})
        assert "AddressSanitizer" in run(workload, changed, tmp_path)


def test_the_sanitizer_sees_an_offset_of_32_bits(tmp_path: Path) -> None:
    workload = Workload("qkv", 256, (128, 64), 16, "bfloat16")
    sketch = sketches(workload)[0]
    code = generate(workload, sketch.bind(sketch.default()), SM_90)
    for array in ("a", "b"):
        wrong = code.source.replace(f"*)({array}_ptr + (", f"*)({array}_ptr + (int)(")
        assert wrong != code.source
        changed = Generated(**{**{n: getattr(code, n) for n in code.__slots__}, "source": wrong})
        assert "AddressSanitizer" in run(workload, changed, tmp_path)


SHAPES = (
    Workload("odd", 520, (264, 40), 13, "bfloat16"),
    Workload("qkv", 512, (320, 64, 64), 16, "bfloat16"),
    Workload("narrow", 96, (72,), 8, "bfloat16"),
    Workload("wide", 256, (128, 64), 16, "float32"),
)


@pytest.mark.parametrize("workload", SHAPES, ids=lambda w: w.name)
def test_plain_kernels_stay_within_their_arrays(workload: Workload, tmp_path: Path) -> None:
    def judged(drawn: tuple[Sketch, dict[str, int], Generated]) -> str:
        sketch, values, code = drawn
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        said = run(workload, code, folder)
        return f"{sketch.name} {values}: {said}" if said else ""

    drawn = []
    for sketch in sketches(workload):
        rng, found = random.Random(3), 0
        while found < 2:
            values = sketch.sample(rng)
            try:
                trace = sketch.bind(values)
            except ConstraintError:
                continue
            found += 1
            drawn.append((sketch, values, generate(workload, trace, SM_90)))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as cores:  # g++ and what it made
        assert not [said for said in cores.map(judged, drawn) if said]


@pytest.mark.parametrize(("load", "word"), [(2, "nv_bfloat162"), (4, "nv_bfloat164")])
@pytest.mark.parametrize("form", ["rows", "row_tiles"])
def test_narrow_loads_of_b_find_stacks_far_away(
    form: str, load: int, word: str, tmp_path: Path
) -> None:
    """Such a load was once a vector of 32-bit addresses: wrong for stacks 4 GB apart."""
    workload = Workload("qkv", 256, (128, 64, 64), 16, "bfloat16")
    sketch = next(s for s in sketches(workload) if s.name.startswith(f"{form}/columns/"))
    code = generate(workload, sketch.bind({**sketch.default(), "expand.load": load}), SM_90)
    assert f"= *({word}*)(b_ptr + " in code.source
    assert "b_ptr[" not in code.source
    assert not run(workload, code, tmp_path)


def test_lanes_share_no_columns_behind_the_last(tmp_path: Path) -> None:
    """In one block for more columns than there are, they read and wrote beside their arrays."""
    workload = Workload("o", 96, (136,), 64, "bfloat16")
    sketch = next(s for s in sketches(workload) if s.name.startswith("rows/lanes/"))
    for groups in (8, 16):
        values = {**sketch.default(), "expand.groups": groups}
        assert not run(workload, generate(workload, sketch.bind(values), SM_90), tmp_path)
    for groups in (32, 64, 128):
        values = {**sketch.default(), "expand.groups": groups}
        assert f"columns of a block: {8 * groups}" in (sketch.broken_limit(values) or "")
    narrow = Workload("k", 96, (48,), 16, "bfloat16")
    assert not any("/lanes/" in s.name for s in sketches(narrow))
