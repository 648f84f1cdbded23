"""The block-level intrinsics' kernels, run on host threads, against numpy."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dop.lowering.intrinsics.pipelined_shrink import PipelinedShrink
from dop.lowering.intrinsics.register_expand import RegisterExpand
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
    ("rank", "shared", "parts", "workers", "floats"),
    [
        (24, False, 1, 0, False),
        (64, False, 1, 0, False),
        (64, True, 1, 0, False),
        (24, False, 3, 1, False),
        (64, False, 1, 2, False),
        (64, True, 2, 1, False),
        (64, True, 1, 2, False),
        (64, True, 2, 0, False),
        (24, False, 4, 0, False),
        (64, True, 2, 0, True),
        (24, False, 4, 0, True),
    ],
)
def test_register_expand(
    tmp_path: Path, rank: int, shared: bool, parts: int, workers: int, floats: bool
) -> None:
    """With one worker its blocks go on from tile to tile."""
    w = Workload("two", 64, (128, 64), rank, "bfloat16")
    k = RegisterExpand(
        *(w, 16, 1, 1, 1, 2, 2),
        b_ahead=2 if workers else 1,
        tiles_first=rank == 64,
        shared_b=shared,
        parts=parts,
        workers=workers,
        float_sums=floats,
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
    given = v if floats else _bf16(v)
    for tile in range(2):
        rows = row_index[ROW0[tile] : ROW0[tile] + ROWS[tile]]
        for s, offset in enumerate(w.offsets):
            r = ranks[tile]
            left = (v if floats else _float(given))[:, s, tile, : ROWS[tile], :r].sum(0)
            left = _float(_bf16(left)) if floats else left  # rounded once, here
            update = left @ _float(b[s])[SLOT[tile], :, :r].T
            want[rows, offset : offset + w.out_features[s]] += scale[tile] * update
        given[:, :, tile, ROWS[tile] :] = np.nan if floats else 0x7FC0
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
    _call(library, flat, row_index, ranks, ROW0, ROWS, scale, SLOT, TILES, given, y, shift)
    np.testing.assert_allclose(_float(y), want, rtol=0.01, atol=0.02)
    if parts > 1:  # their sum is not rounded (again): the error is that of rounding y
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
    _check_shrink(tmp_path, k, seed=split)


@pytest.mark.parametrize("with_y", [True, False])
@pytest.mark.parametrize(
    ("split", "cluster", "rank_blocks", "depth"),
    [(7, 7, 1, 64), (14, 7, 2, 64), (4, 2, 1, 64), (2, 1, 2, 64), (7, 1, 1, 128), (1, 1, 1, 64)],
)
def test_sums_in_float32_and_y_ahead(
    tmp_path: Path, split: int, cluster: int, rank_blocks: int, depth: int, with_y: bool
) -> None:
    """Each piece of the rows of y is asked for once, and none besides; without y nothing is."""
    w = Workload("two", 14 * 128, (128, 64), 32, "bfloat16")
    k = PipelinedShrink(
        *(w, 16, split, depth, 2, 1, 1),
        cluster=cluster,
        rank_blocks=rank_blocks,
        y_ahead=True,
        float_sums=True,
    )
    assert k.writes_floats == (split > cluster)
    asked = _check_shrink(tmp_path, k, seed=split, with_y=with_y)
    want = np.zeros_like(asked)
    want[: ROWS[:2].sum() if with_y else 0] = 1
    np.testing.assert_array_equal(asked, want)


def _check_shrink(
    tmp_path: Path, k: PipelinedShrink, seed: int, with_y: bool = False
) -> NDArray[np.uint8]:
    """Runs the kernel and checks v; gives how often pieces of y were asked for, rows in order."""
    w, width, rank = k.workload, k.workload.in_features, k.workload.rank
    rng = np.random.default_rng(seed)
    ranks = np.array([rank - 3, rank, 0], np.int32)
    row_index = rng.permutation(32).astype(np.int32)
    x = _bf16(rng.standard_normal((32, width), np.float32))
    a = [_bf16(rng.standard_normal((2, rank, width), np.float32)) for _ in range(2)]
    for stack in a:
        stack[1, rank - 3 :] = 0x7FC0
    sums = np.full((k.parts, 2, TILES, 16, k.padded_rank), np.nan, np.float32)
    v = sums if k.writes_floats else _bf16(sums)
    y = np.zeros((32, w.total_out), np.uint16)
    asked = np.zeros((32, w.total_out // 8), np.uint8)
    kernel = k.source("kernel")
    block = f"{{{k.block[0]}, {k.block[1]}, {k.block[2]}}}"
    # The emulator's clusters lie along y.
    turned = "std::swap(blockIdx.x, blockIdx.y); std::swap(gridDim.x, gridDim.y);"
    turned = turned if k.workers else ""
    turned += f" waited = {int(not k.early)}; x_begin = x; x_end = x + 32 * {width};"
    turned += " y_begin = (const char*)y; y_asked = asked;"
    grid = f"{k.workers or TILES}, {k.split_k * k.rank_blocks}"
    if k.rank_blocks > 1 and not k.workers:
        grid = f"{TILES * k.rank_blocks}, {k.split_k}"
    y_argument = f" {'y' if with_y else 'nullptr'}," if k.y_ahead else ""
    launch = (
        f"launch({grid}, {block}, {k.smem_bytes}, [&] {{ {turned} kernel("
        f"a, row_index, tile_rank, tile_row0, tile_rows, tile_slot, tiles, v, x,{y_argument} a1);"
        " if (!waited) std::abort(); }, "
        f"{k.cluster_blocks});"
    )
    parameters = (
        "uint16_t* a, int* row_index, int* tile_rank, int* tile_row0, int* tile_rows, "
        "int* tile_slot, long long tiles, uint16_t* v, uint16_t* x, uint16_t* y, "
        "unsigned char* asked, long long a1"
    )
    library = _library(tmp_path, kernel, launch, parameters)
    flat = np.concatenate([t.ravel() for t in a])
    shift = a[0].nbytes // 16
    _call(
        library, flat, row_index, ranks, ROW0, ROWS, SLOT, TILES, v, x, y, asked, shift
    )  # fmt: skip
    for tile in range(2):
        rows = row_index[ROW0[tile] : ROW0[tile] + ROWS[tile]]
        for s in range(2):
            want = np.zeros((ROWS[tile], k.padded_rank), np.float32)
            stack = _float(a[s])[SLOT[tile], : ranks[tile]]
            want[:, : ranks[tile]] = _float(x)[rows] @ stack.T
            found = v if k.writes_floats else _float(v)
            got = found[:, s, tile, : ROWS[tile]].sum(0)
            if k.writes_floats:
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
            else:
                np.testing.assert_allclose(got, want, rtol=0.01, atol=0.1 * k.parts)
    used = np.concatenate([row_index[ROW0[t] : ROW0[t] + ROWS[t]] for t in range(2)])
    others = np.setdiff1d(np.arange(32), used)
    return asked[np.concatenate([used, others])]
