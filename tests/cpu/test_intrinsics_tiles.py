"""The block-level intrinsics' kernels, run on host threads, against numpy."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dop.lowering.cuda_launch import WAIT, loads_in_place, wait_first
from dop.lowering.cuda_source import signatures
from dop.lowering.intrinsics.engine_shrink import EngineShrink
from dop.lowering.intrinsics.fused_engine import FusedEngine
from dop.lowering.intrinsics.pipelined_shrink import PipelinedShrink
from dop.lowering.intrinsics.register_expand import RegisterExpand
from dop.measure.tensor_map import TensorMap, tensor_map, wanted
from dop.workload import Workload

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
HERE = Path(__file__).parent
SHARED = re.compile(r"  extern __shared__ __align__\(\d+\) unsigned char dop_shared\[\];\n")


def _library(tmp_path: Path, kernel: str, launch: str, parameters: str) -> ctypes.CDLL:
    assert "asm" not in kernel
    kernel = SHARED.sub("  unsigned char* dop_shared = dop_shared_memory;\n", kernel)
    text = (
        f'#include "{HERE}/cuda_emulator.hpp"\n{kernel}\n'
        f'extern "C" void run({parameters}) {{ {launch} }}\n'
    )
    (tmp_path / "kernel.cpp").write_text(text)
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernel.so"), str(tmp_path / "kernel.cpp")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(tmp_path / "kernel.so"))


def _bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _float(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (values.astype(np.uint32) << 16).view(np.float32)


def _emulated_map(what: TensorMap, tensor: NDArray[np.uint16]) -> tuple[int, ...]:
    """Fields of the emulator's `dop_tensor_map`; the tensor must be as large as the map says."""
    assert tensor.size == what.dims[0] * what.dims[1] * what.dims[2]
    return (tensor.ctypes.data, *what.dims, what.box_rows)


def _call(library: ctypes.CDLL, *values: object) -> None:
    given = [
        ctypes.c_void_p(v.ctypes.data) if isinstance(v, np.ndarray) else ctypes.c_longlong(v)  # type: ignore[arg-type]
        for v in values
    ]
    library.run(*given)


TILES = 3
ROWS = np.array([13, 16, 0], np.int32)
ROW0 = np.array([2, 15, 0], np.int32)
SLOT = np.array([1, 0, 0], np.int32)


@pytest.mark.parametrize(
    ("rank", "shared", "parts", "workers"),
    [
        (24, False, 1, 0),
        (64, False, 1, 0),
        (64, True, 1, 0),
        (24, False, 3, 1),
        (64, False, 1, 2),
        (64, True, 2, 1),
        (64, True, 1, 2),
        (64, True, 2, 0),
        (24, False, 4, 0),
    ],
)
def test_register_expand(tmp_path: Path, rank: int, shared: bool, parts: int, workers: int) -> None:
    """With one worker its blocks go on from tile to tile."""
    w = Workload("two", 64, (128, 64), rank, "bfloat16")
    k = RegisterExpand(
        *(w, 16, 1, 1, 1, 2, 2),
        b_ahead=2 if workers else 1,
        tiles_first=rank == 64,
        shared_b=shared,
        parts=parts,
        workers=workers,
    )
    rng = np.random.default_rng(rank)
    ranks = np.array([rank if rank < 24 else rank - 12, rank, 0], np.int32)
    scale = np.array([0.5, 2.0, 1.0], np.float32)
    row_index = rng.permutation(32).astype(np.int32)
    y = _bf16(rng.standard_normal((32, 192), np.float32))
    b = [_bf16(rng.standard_normal((2, n, rank), np.float32)) for n in w.out_features]
    padded = k.padded_rank
    v = rng.standard_normal((parts, 2, TILES, 16, padded), np.float32)
    want = _float(y).copy()
    for tile in range(2):
        v[:, :, tile, :, ranks[tile] :] = 0
        b[0][SLOT[tile], :, -(-ranks[tile] // 8) * 8 :] = 0x7FC0  # NaN must not be touched
        b[1][SLOT[tile], :, -(-ranks[tile] // 8) * 8 :] = 0x7FC0
    v_bits = _bf16(v)
    for tile in range(2):
        rows = row_index[ROW0[tile] : ROW0[tile] + ROWS[tile]]
        for s, offset in enumerate(w.offsets):
            r = ranks[tile]
            left = _float(v_bits)[:, s, tile, : ROWS[tile], :r].sum(0)
            update = left @ _float(b[s])[SLOT[tile], :, :r].T
            want[rows, offset : offset + w.out_features[s]] += scale[tile] * update
        v_bits[:, :, tile, ROWS[tile] :] = 0x7FC0
    flat = np.concatenate([t.ravel() for t in b])
    blocks = (workers or TILES) * k.blocks
    kernel = k.source("kernel")
    launch = (
        f"launch({blocks}, 1, {{32, 1, 1}}, {k.smem_bytes}, [&] {{ kernel("
        "b, row_index, tile_rank, tile_row0, tile_rows, tile_scale, tile_slot, tiles, v, y, b1);"
        " });"
    )
    parameters = (
        "uint16_t* b, int* row_index, int* tile_rank, int* tile_row0, int* tile_rows, "
        "float* tile_scale, int* tile_slot, long long tiles, uint16_t* v, uint16_t* y, long long b1"
    )
    library = _library(tmp_path, kernel, launch, parameters)
    shift = b[0].nbytes // 16
    _call(library, flat, row_index, ranks, ROW0, ROWS, scale, SLOT, TILES, v_bits, y, shift)
    np.testing.assert_allclose(_float(y), want, rtol=0.01, atol=0.02)
    if parts > 1:  # their sum is not rounded again: the error is that of rounding y
        least = np.square(_float(_bf16(want)) - want).mean() ** 0.5
        assert np.square(_float(y) - want).mean() ** 0.5 < 1.03 * least


@pytest.mark.parametrize(
    ("rank", "split", "cluster", "rank_blocks", "stages", "workers", "early"),
    [
        (16, 1, 0, 1, 3, 0, False),
        (32, 2, 0, 1, 3, 0, False),
        (32, 4, 2, 1, 3, 0, False),
        (16, 4, 1, 1, 2, 0, False),
        (32, 8, 4, 1, 2, 0, False),
        (16, 1, 1, 2, 3, 1, False),
        (32, 4, 2, 2, 2, 2, False),
        (32, 2, 1, 1, 4, 1, False),
        (24, 2, 2, 4, 3, 1, False),
        (32, 4, 2, 2, 2, 2, True),
        (32, 2, 1, 1, 4, 4, True),
    ],
)
def test_pipelined_shrink(
    tmp_path: Path,
    rank: int,
    split: int,
    cluster: int,
    rank_blocks: int,
    stages: int,
    workers: int,
    early: bool,
) -> None:
    """With one worker its blocks go on from tile to tile; stages: fewer steps, all, and less. An
    early kernel waits in every block, and before it reads x."""
    w = Workload("two", 512, (128, 64), rank, "bfloat16")
    k = PipelinedShrink(
        *(w, 16, split, 64, stages, 1, 2 if rank == 32 and not workers else 1),
        cluster=cluster,
        rank_blocks=rank_blocks,
        workers=workers,
        early=early,
        l2_fetch=256 if cluster and not workers else 0,
    )
    rng = np.random.default_rng(split)
    ranks = np.array([rank - 3, rank, 0], np.int32)
    row_index = rng.permutation(32).astype(np.int32)
    x = _bf16(rng.standard_normal((32, 512), np.float32))
    a = [_bf16(rng.standard_normal((2, rank, 512), np.float32)) for _ in range(2)]
    for stack in a:
        stack[1, rank - 3 :] = 0x7FC0
    v = np.full((k.parts, 2, TILES, 16, k.padded_rank), 0x7FC0, np.uint16)
    kernel = k.source("kernel")
    block = f"{{{k.block[0]}, {k.block[1]}, {k.block[2]}}}"
    # The emulator's clusters lie along y.
    turned = "std::swap(blockIdx.x, blockIdx.y); std::swap(gridDim.x, gridDim.y);"
    turned = turned if workers else ""
    turned += f" waited = {int(not early)}; x_begin = x; x_end = x + 32 * 512;"
    launch = (
        f"launch({workers or TILES}, {split * rank_blocks}, {block}, {k.smem_bytes}, [&] {{ "
        f"{turned} kernel("
        "a, row_index, tile_rank, tile_row0, tile_rows, tile_slot, tiles, v, x, a1);"
        " if (!waited) std::abort(); }, "
        f"{k.cluster_blocks});"
    )
    parameters = (
        "uint16_t* a, int* row_index, int* tile_rank, int* tile_row0, int* tile_rows, "
        "int* tile_slot, long long tiles, uint16_t* v, uint16_t* x, long long a1"
    )
    library = _library(tmp_path, kernel, launch, parameters)
    flat = np.concatenate([t.ravel() for t in a])
    shift = a[0].nbytes // 16
    _call(library, flat, row_index, ranks, ROW0, ROWS, SLOT, TILES, v, x, shift)
    _check_v(v, x, a, ranks, (row_index, ROW0, ROWS))


def _check_v(
    v: NDArray[np.uint16],
    x: NDArray[np.uint16],
    a: list[NDArray[np.uint16]],
    ranks: NDArray[np.int32],
    tables: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]],
) -> None:
    """The sum of v [parts, slices, tiles, rows, padded rank] in the tiles that have rows; `tables`:
    rows of x, the first of each tile, and their number."""
    row_index, row0, rows = tables
    for tile in range(2):
        mine = row_index[row0[tile] : row0[tile] + rows[tile]]
        for s in range(2):
            want = np.zeros((rows[tile], v.shape[-1]), np.float32)
            stack = _float(a[s])[SLOT[tile], : ranks[tile]]
            want[:, : ranks[tile]] = _float(x)[mine] @ stack.T
            got = _float(v)[:, s, tile, : rows[tile]].sum(0)
            np.testing.assert_allclose(got, want, rtol=0.01, atol=0.1 * len(v))


@pytest.mark.parametrize("straight", [True, False])
@pytest.mark.parametrize(
    ("rank", "rows", "split", "rank_blocks", "rank_warps", "stages"),
    [
        (32, 64, 1, 1, 2, 3),
        (24, 64, 7, 1, 1, 2),
        (32, 64, 2, 4, 1, 4),
        (48, 64, 4, 2, 3, 2),
        (32, 64, 2, 1, 1, 3),
        (64, 128, 1, 2, 1, 2),
    ],
)
def test_engine_shrink(
    tmp_path: Path,
    rank: int,
    rows: int,
    split: int,
    rank_blocks: int,
    rank_warps: int,
    stages: int,
    straight: bool,
) -> None:
    """Where rows of x lie one behind the other the engine brings them, else threads; what lies
    beyond an adapter's rank, NaN here, counts as zero, and nothing beyond the stack's rank or x's
    rows is read."""
    width = 64 * 2 * split * stages
    w = Workload("two", width, (128, 64), rank, "bfloat16")
    k = EngineShrink(
        *(w, rows, split, 64, stages, rows // 16, rank_warps),
        warpgroups=True,
        rank_blocks=rank_blocks,
    )
    rng = np.random.default_rng(split)
    tokens = rows + rows // 2 + 4
    tile_rows = np.array([rows // 2 + 3, rows, 0], np.int32)
    row0 = np.array([1, rows // 2 + 4, 0], np.int32)
    ranks = np.array([rank - 3, rank, 0], np.int32)
    row_index = np.arange(tokens, dtype=np.int32)
    if not straight:
        first, second = slice(row0[0], row0[0] + tile_rows[0]), row0[1] + np.array([1, 2])
        row_index[first] = row_index[first][::-1]
        row_index[second] = row_index[second][::-1]
    x = _bf16(rng.standard_normal((tokens, width), np.float32))
    a = [_bf16(rng.standard_normal((2, rank, width), np.float32)) for _ in range(2)]
    for stack in a:
        stack[1, rank - 3 :] = 0x7FC0
    v = np.full((1, 2, TILES, rows, k.padded_rank), 0x7FC0, np.uint16)
    ranks_of_warp = k.block_ranks // rank_warps
    product = f"emulated_wgmma<{ranks_of_warp // 8}>(sum[0], x_at, a_at)"
    kernel = re.sub(
        r"#ifdef __CUDA_ARCH_FEAT_SM90_ALL\n#define DOP_WGMMA.*?#endif",
        f"#define DOP_WGMMA(x_at, a_at) {product}",
        wait_first(k.source("kernel")),
        flags=re.DOTALL,
    )
    ((_, arguments),) = signatures(kernel)
    names = [name for name in arguments if wanted([name])]
    sizes = {"dtype": w.dtype, "in_features": width, "rank": rank, "tokens": tokens, "slots": 2}
    sizes["out_features"] = w.out_features
    maps = np.zeros((3, 16), np.int64)
    for row, name, tensor in zip(maps, names, (x, *a), strict=True):
        row[:5] = _emulated_map(tensor_map(name, **sizes), tensor)
    block = f"{{{k.block[0]}, {k.block[1]}, {k.block[2]}}}"
    launch = (
        f"launch({TILES * rank_blocks}, {split}, {block}, {k.smem_bytes}, [&] {{ "
        f"waited = false; x_begin = x; x_end = x + {x.size}; kernel("
        "row_index, tile_rank, tile_row0, tile_rows, tile_slot, tiles, v, x, "
        "maps[0], maps[1], maps[2]); }, "
        f"{split});"
    )
    parameters = (
        "dop_tensor_map* given, int* row_index, int* tile_rank, int* tile_row0, "
        "int* tile_rows, int* tile_slot, long long tiles, uint16_t* v, uint16_t* x"
    )
    launch = f"dop_tensor_map maps[3]; std::memcpy(maps, given, sizeof(maps)); {launch}"
    library = _library(tmp_path, kernel, launch, parameters)
    _call(library, maps, row_index, ranks, row0, tile_rows, SLOT, TILES, v, x)
    _check_v(v, x, a, ranks, (row_index, row0, tile_rows))


FUSED = {
    "one slice": (FusedEngine(Workload("o", 512, (256,), 64, "bfloat16"), 16, 2, 3), "straight"),
    "rows apart": (FusedEngine(Workload("o", 512, (256,), 64, "bfloat16"), 16, 2, 3), "apart"),
    "two slices": (
        FusedEngine(Workload("two", 384, (256, 128), 128, "bfloat16"), 32, 2, 3),
        "straight",
    ),
    "two slices, rows apart": (
        FusedEngine(Workload("two", 256, (256, 128), 64, "bfloat16"), 48, 2, 4),
        "apart",
    ),
    "four blocks": (
        FusedEngine(Workload("o", 1024, (256,), 128, "bfloat16"), 16, 4, 3),
        "straight",
    ),
    "two groups of ranks a warpgroup": (
        FusedEngine(Workload("o", 256, (256,), 256, "bfloat16"), 16, 1, 2),
        "straight",
    ),
    "three groups of ranks": (
        FusedEngine(Workload("o", 384, (256,), 192, "bfloat16"), 32, 2, 3),
        "apart",
    ),
    "eight ranks a block": (
        FusedEngine(Workload("o", 1024, (512,), 64, "bfloat16"), 32, 8, 4),
        "straight",
    ),
    "sums apart, rows apart": (
        FusedEngine(Workload("o", 1024, (512,), 128, "bfloat16"), 24, 4, 2, apart=True, hints=True),
        "apart",
    ),
    "24 ranks a block": (
        FusedEngine(Workload("o", 1024, (512,), 192, "bfloat16"), 16, 8, 3, apart=True),
        "straight",
    ),
    "no tables of ranks and scales": (
        FusedEngine(Workload("o", 256, (128,), 64, "bfloat16"), 16, 1, 4),
        "plain",
    ),
    "rank 32": (FusedEngine(Workload("o", 512, (256,), 32, "bfloat16"), 32, 2, 3), "straight"),
    "rank 16, no tables of ranks": (
        FusedEngine(Workload("o", 256, (128,), 16, "bfloat16"), 16, 1, 4, apart=True),
        "plain",
    ),
    "rank 8, two slices, rows apart": (
        FusedEngine(Workload("two", 512, (512, 1024), 8, "bfloat16"), 16, 8, 4),
        "apart",
    ),
    "rank 96": (FusedEngine(Workload("o", 512, (256,), 96, "bfloat16"), 16, 2, 3), "straight"),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_engine(tmp_path: Path, name: str) -> None:
    """A full tile, one that ends in the second warpgroup's rows, one that ends in the first's, and
    one without rows. What lies beyond an adapter's rank is NaN in A and B; nothing but the tiles'
    rows of y is written."""
    run, check = _fused(tmp_path, *FUSED[name])
    run()
    check()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("how", ["straight", "apart"])
@pytest.mark.parametrize("apart", [False, True])
def test_fused_engine_ends_under_a_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool, how: str, tool: str
) -> None:
    """With more chunks than stages: they are brought while others are being computed."""
    k = FusedEngine(Workload("o", 512, (1024,), 64, "bfloat16"), 16, 2, 3, apart=apart)
    assert min(k.chunks) > k.stages > k.overlay == (0 if apart else 1)
    monkeypatch.setenv("EMULATED_TOOL", tool)
    run, _ = _fused(tmp_path, k, how)
    child = os.fork()
    if child == 0:
        run()
        os._exit(0)
    deadline = time.monotonic() + 60
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    if not done[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)


def _fused(
    tmp_path: Path, k: FusedEngine, how: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """What runs a kernel, and what judges y then."""
    w, height = k.workload, k.tile_rows
    assert not k.problem
    rng = np.random.default_rng(height)
    tile_rows = np.array([height - 3, height, 0, 5], np.int32)
    row0 = np.array([2, height - 1, 0, 2 * height], np.int32)
    slot = np.array([1, 0, 0, 2], np.int32)
    tiles, tokens = len(slot), 2 * height + 8
    true = {
        **{8: (5, 8, 1), 16: (3, 16, 8), 32: (29, 32, 9), 64: (61, 64, 9), 96: (90, 96, 65)},
        **{128: (29, 128, 65), 192: (128, 192, 100), 256: (250, 256, 16)},
    }[w.rank]
    if how == "plain":
        true = (w.rank,) * 3
    ranks = np.array([true[n] for n in (0, 1, 0, 2)], np.int32)
    scale = np.array([0.5, 2.0, 1.0, -1.0], np.float32)
    row_index = np.arange(tokens, dtype=np.int32)
    if how == "apart":
        row_index = rng.permutation(tokens).astype(np.int32)
    x = _bf16(rng.standard_normal((tokens, w.in_features), np.float32))
    y = _bf16(rng.standard_normal((tokens, w.total_out), np.float32) * 8)
    a = [_bf16(rng.standard_normal((3, w.rank, w.in_features), np.float32)) for _ in w.out_features]
    b = [_bf16(rng.standard_normal((3, n, w.rank), np.float32)) for n in w.out_features]
    for tile in (0, 1, 3):
        for s in range(w.slices):
            a[s][slot[tile], ranks[tile] :] = 0x7FC0
            b[s][slot[tile], :, ranks[tile] :] = 0x7FC0
    want, before = _float(y).copy(), y.copy()
    for tile in (0, 1, 3):
        mine = row_index[row0[tile] : row0[tile] + tile_rows[tile]]
        factor = 1.0 if how == "plain" else scale[tile]
        for s, offset in enumerate(w.offsets):
            v = _float(x)[mine] @ _float(a[s])[slot[tile], : ranks[tile]].T
            v = _float(_bf16(v))
            update = v @ _float(b[s])[slot[tile], :, : ranks[tile]].T
            want[mine, offset : offset + w.out_features[s]] += factor * update
    kernel = loads_in_place(k.source("kernel", WAIT))
    for macro, columns in (("DOP_SHRINK", k.shrink_rows), ("DOP_EXPAND", height)):
        kernel = re.sub(
            rf"#ifdef __CUDA_ARCH_FEAT_SM90_ALL\n#define {macro}.*?#endif",
            f"#define {macro}(sum, rows_at, columns_at) "
            f"emulated_wgmma<{columns // 8}>(sum, rows_at, columns_at)",
            kernel,
            flags=re.DOTALL,
        )
    ((_, arguments),) = signatures(kernel)
    names = [name for name in arguments if wanted([name])]
    sizes = {"dtype": w.dtype, "in_features": w.in_features, "out_features": w.out_features}
    sizes |= {"rank": w.rank, "tokens": tokens, "slots": 3}
    maps = np.zeros((len(names), 16), np.int64)
    tensors = {"x": x, "y": y, "a": a[0], "b": b[0], "a1": a[-1], "b1": b[-1]}
    for row, one in zip(maps, names, strict=True):
        row[:5] = _emulated_map(tensor_map(one, **sizes), tensors[one.split("_")[0]])
    block = f"{{{k.block[0]}, {k.block[1]}, {k.block[2]}}}"
    given = ", ".join(f"maps[{n}]" for n in range(len(names)))
    tables = ("0", "0") if how == "plain" else ("tile_rank", "tile_scale")
    launch = (
        f"launch(1, {tiles * k.tile_blocks}, {block}, {k.smem_bytes}, [&] {{ "
        "std::swap(blockIdx.x, blockIdx.y); std::swap(gridDim.x, gridDim.y); "
        f"waited = false; x_begin = x; x_end = x + {x.size}; kernel("
        f"row_index, {tables[0]}, tile_row0, tile_rows, {tables[1]}, tile_slot, y, x, {given}); "
        f"if (!waited) std::abort(); }}, {k.cluster});"
    )
    parameters = (
        "dop_tensor_map* given, int* row_index, int* tile_rank, int* tile_row0, int* tile_rows, "
        "float* tile_scale, int* tile_slot, uint16_t* y, uint16_t* x"
    )
    room = f"dop_tensor_map maps[{len(names)}]; std::memcpy(maps, given, sizeof(maps)); "
    library = _library(tmp_path, kernel, room + launch, parameters)

    def run(_: object = tensors) -> None:  # which the maps hold addresses of
        _call(library, maps, row_index, ranks, row0, tile_rows, scale, slot, y, x)

    def check() -> None:
        touched = np.zeros(tokens, bool)
        for tile in (0, 1, 3):
            touched[row_index[row0[tile] : row0[tile] + tile_rows[tile]]] = True
        assert np.array_equal(y[~touched], before[~touched])
        error = np.abs(_float(y) - want)
        assert error.max() < 0.01 * np.abs(want).max()

    return run, check
