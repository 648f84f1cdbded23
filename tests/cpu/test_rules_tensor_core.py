"""Tensor-core rules: the sketches they derive, and the CUDA text that comes out of them."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dop.errors import TraceError
from dop.space.generate import build_space
from dop.space.sketch import Sketch
from dop.space.trace import Trace
from dop.target import SM_90
from dop.workload import Workload

pytest.importorskip("tvm")

from dop.lowering.codegen import Generated, generate
from dop.lowering.intrinsics import register

OUT = Workload("o_proj", 4096, (4096,), 16, "bfloat16")
QKV = Workload("qkv_proj", 4096, (4096, 1024, 1024), 13, "float16")


def sketch_of(workload: Workload) -> Sketch | None:
    found = [s for s in build_space(workload, SM_90).sketches if "tensor_core" in s.name]
    return found[0] if found else None


def build(workload: Workload, **numbers: int) -> Generated:
    sketch = sketch_of(workload)
    assert sketch is not None
    values = {**sketch.default(), **{k.replace("__", "."): v for k, v in numbers.items()}}
    return generate(workload, sketch.bind(values), SM_90)


@pytest.fixture(scope="module")
def plain() -> Generated:
    return build(OUT, shrink__stages=3)


@pytest.fixture(scope="module")
def sliced() -> Generated:
    return build(
        QKV,
        tokens__tile_rows=32,
        expand__row_warps=2,
        shrink__row_warps=2,
        expand__columns=64,
        expand__column_warps=2,
    )


@pytest.mark.parametrize("width", [896, 2048, 4096, 14336])
@pytest.mark.parametrize("rank", [1, 8, 13, 16, 64, 128])
def test_default_fits(width: int, rank: int) -> None:
    sketch = sketch_of(Workload("w", width, (width,), rank, "bfloat16"))
    assert sketch is not None
    assert sketch.broken_limit(sketch.default()) is None


def test_float32_and_odd_widths_have_no_sketch() -> None:
    assert sketch_of(Workload("w", 4096, (4096,), 16, "float32")) is None
    assert sketch_of(Workload("w", 4100, (4096,), 16, "bfloat16")) is None
    assert sketch_of(Workload("w", 4096, (4100,), 16, "bfloat16")) is None


def test_limits_refuse_too_much_shared_memory() -> None:
    sketch = sketch_of(OUT)
    assert sketch is not None
    large = {
        **sketch.default(),
        "tokens.tile_rows": 128,
        "expand.row_warps": 4,
        "expand.column_warps": 2,
        "shrink.row_warps": 8,
        "shrink.k_tiles": 16,
        "shrink.split_k": 4,
        "shrink.stages": 4,
    }
    assert "shared memory" in str(sketch.broken_limit(large))


def test_trace_round_trip_builds_the_same_source(plain: Generated) -> None:
    sketch = sketch_of(OUT)
    assert sketch is not None
    trace = sketch.bind({**sketch.default(), "shrink.stages": 3})
    again = Trace.from_json(trace.to_json())
    assert again == trace
    assert sketch.match(again) is not None
    assert generate(OUT, again, SM_90).source == plain.source


def test_matrix_instructions_and_asynchronous_copies(plain: Generated) -> None:
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in plain.source
    assert "ldmatrix.sync.aligned.m8n8.x4" in plain.source
    copies = re.findall(r"cp_async_legacy\w*_cg_16", plain.source)
    assert len(copies) > 10, "x and A go to shared memory in 16-byte asynchronous copies"
    assert "wait_group_2" in plain.source, "a pipeline of three stages keeps two copies in flight"


def test_launches_and_workspace(plain: Generated) -> None:
    shrink, expand = plain.kernels
    assert shrink.grid == ("tiles", "8", "1")
    assert expand.grid == ("tiles", "32", "1")
    assert plain.tile_rows == 16
    assert [w.name for w in plain.workspaces] == ["v_rf"]
    assert expand.dynamic_smem_bytes >= 16 * 128 * 4


def test_slices_of_different_width_are_found_by_number(sliced: Generated) -> None:
    shrink, expand = sliced.kernels
    assert {"a1_shift", "a2_shift"} <= set(shrink.arguments)
    assert {"b1_shift", "b2_shift"} <= set(expand.arguments)
    assert "f32.f16.f16.f32" in sliced.source


def test_rows_behind_a_tile_are_not_looked_up(plain: Generated) -> None:
    # cp.async's address is computed even if nothing is copied.
    for line in plain.source.splitlines():
        if "cp_async_legacy_pred" in line and "row_index_ptr[" in line:
            assert "min(" in line
            assert "tokens" in line


def test_unknown_intrinsic_is_named() -> None:
    with pytest.raises(TraceError, match="mma_f64"):
        register("mma_f64")


def test_samples_build() -> None:
    rng = random.Random(5)
    for workload in (OUT, QKV):
        sketch = sketch_of(workload)
        assert sketch is not None
        built = 0
        while built < 2:
            values = sketch.sample(rng)
            if sketch.broken_limit(values) is None:
                assert len(generate(workload, sketch.bind(values), SM_90).kernels) == 2
                built += 1


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_compiles_without_local_memory(sliced: Generated, tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text(sliced.source)
    command = ["nvcc", "-arch=sm_90a", "-cubin", "-Xptxas", "-v", "-o", str(tmp_path / "k.cubin")]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert frames == [("0", "0")] * 2
