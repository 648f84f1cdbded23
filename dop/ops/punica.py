"""Punica's signatures, for people who come from there: one weight pointer per segment of rows.

Source: punica-ai/punica, src/punica/ops/__init__.py (semantics and argument order).

After a change of punica.cu: python -c "from dop.ops.punica import build; build()" (needs nvcc).
"""

from __future__ import annotations

import ctypes
import lzma
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from dop.errors import DeviceError, DtypeError, ExportError, ShapeError
from dop.measure.artifact import Buffer, Launch
from dop.ops import checks, eager, launch
from dop.ops.launch import LOCAL, DeviceKernel
from dop.ops.shapes import DTYPES, Shape, shape_of, stack_words

SOURCE = Path(__file__).with_suffix(".cu")
BINARY = Path(__file__).with_suffix(".fatbin.xz")
ARCHS = (80, 86, 89, 90, 100, 120)

THREADS, RANKS = 128, 8
SHRINK = ("x", "a", "token_slot", "v", "in_features", "rank", "segments", "layer", "transposed")
EXPAND = ("v", "b", "token_slot", "y", "out", "rank", "segments", "layer")
"""Parameters of the kernels in order, see punica.cu; token_slot stands for the segments' ends."""

SUFFIX = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
C_TYPES = {torch.float16: ctypes.c_int16, torch.bfloat16: ctypes.c_int16}


def add_lora_sgmv_custom_cutlass(
    y: Tensor,
    x: Tensor,
    wa_ptr: Tensor,
    wb_ptr: Tensor,
    s: Tensor,
    layer_idx: int,
    lora_rank: int,
) -> None:
    """y[s[i]:s[i+1]] += x[s[i]:s[i+1]] @ deref(wa_ptr[i]).T @ deref(wb_ptr[i]), in place.

    Nothing is waited for; the sum over the rank is taken in float32. What the pointers lead to
    cannot be checked.

    Args:
        y: [tokens, out], contiguous.
        x: [tokens, in], contiguous, same type.
        wa_ptr: int64 [segments], addresses of [layers, rank, in].
        wb_ptr: int64 [segments], addresses of [layers, rank, out].
        s: int32 [segments + 1], where segments begin: s[0] = 0, s[-1] = tokens.
        layer_idx: layer of the weights.
        lora_rank: rank.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.
    """
    add_lora_sgmv(y, x, wa_ptr, wb_ptr, s, layer_idx, lora_rank)


def add_lora_sgmv_cutlass(
    y: Tensor,
    x: Tensor,
    wa_ptr: Tensor,
    wb_ptr: Tensor,
    s: Tensor,
    layer_idx: int,
    lora_rank: int,
) -> None:
    """As `add_lora_sgmv_custom_cutlass`, with A as [layers, in, rank]:
    y[s[i]:s[i+1]] += x[s[i]:s[i+1]] @ deref(wa_ptr[i]) @ deref(wb_ptr[i])."""
    add_lora_sgmv(y, x, wa_ptr, wb_ptr, s, layer_idx, lora_rank, a_is_transposed=False)


def add_lora_sgmv(
    y: Tensor,
    x: Tensor,
    wa_ptr: Tensor,
    wb_ptr: Tensor,
    s: Tensor,
    layer_idx: int,
    lora_rank: int,
    *,
    a_is_transposed: bool = True,
) -> None:
    """Punica's operator; see `add_lora_sgmv_custom_cutlass` for the arguments.

    Args:
        a_is_transposed: A is [layers, rank, in]; False: [layers, in, rank].
    """
    _check(y, x, wa_ptr, wb_ptr, s, layer_idx, lora_rank)
    if x.shape[0] == 0 or wa_ptr.shape[0] == 0:
        return
    if not eager.on_gpu(x.get_device()):
        _on_cpu(y, x, wa_ptr, wb_ptr, s, layer_idx, lora_rank, a_is_transposed)
        return
    index = x.get_device()
    shape = shape_of(x.shape[1], (y.shape[1],), lora_rank, x.dtype, index)
    with eager.device_guard(index):
        stream = eager.stream_of(index)
        key = ("punica", shape.number, x.shape[0], wa_ptr.shape[0], layer_idx, a_is_transposed,
               stream)  # fmt: skip
        capturing = eager.is_captured(stream)
        block = None if capturing else LOCAL.blocks.get(key)
        if block is None:
            kernel = _kernel(shape, wa_ptr.shape[0], layer_idx, a_is_transposed)
            block = launch.new_block(kernel, shape, (x.shape[0], 1), stream, capturing=capturing)
            if not capturing:
                launch.remember(key, block)
        words = stack_words([wa_ptr.data_ptr()], [wb_ptr.data_ptr()])
        ends = s.data_ptr().to_bytes(8, sys.byteorder) * 3
        launch.launch(block, x.data_ptr(), y.data_ptr(), words, ends)


def _check(
    y: Tensor, x: Tensor, wa_ptr: Tensor, wb_ptr: Tensor, s: Tensor, layer: int, rank: int
) -> None:
    for name, tensor in (("y", y), ("x", x)):
        if tensor.ndim != 2 or tensor.shape[0] != x.shape[0] or not tensor.is_contiguous():
            raise ShapeError(
                f"{name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}.",
                "It must be contiguous, [tokens, width], with the same tokens in x and y.",
            )
        if tensor.dtype not in DTYPES or tensor.dtype != x.dtype:
            raise DtypeError(
                f"{name} is {tensor.dtype}, x is {x.dtype}.",
                "Give both in float16, bfloat16 or float32.",
            )
    segments = wa_ptr.shape[0] if wa_ptr.ndim == 1 else -1
    wanted = {
        "wa_ptr": (wa_ptr, torch.int64, segments),
        "wb_ptr": (wb_ptr, torch.int64, segments),
        "s": (s, torch.int32, segments + 1),
    }
    for name, (tensor, kind, length) in wanted.items():
        if tensor.dtype != kind:
            raise DtypeError(f"{name} is {tensor.dtype}.", f"It must be {kind}.")
        if tensor.ndim != 1 or tensor.shape[0] != length or not tensor.is_contiguous():
            raise ShapeError(
                f"{name} has shape {list(tensor.shape)}.",
                f"With {max(segments, 0)} segments it must be [{max(length, 0)}], contiguous.",
            )
    for name, tensor in (("y", y), *((n, t) for n, (t, _, _) in wanted.items())):
        if tensor.device != x.device:
            raise DeviceError(f"{name} is on {tensor.device}, x on {x.device}.", "Move it.")
    if layer < 0 or rank < 1:
        raise ShapeError(f"layer {layer} and rank {rank}.", "Give 0 or more, and 1 or more.")
    checks.check_no_gradient("add_lora_sgmv", x, y)


@lru_cache(maxsize=4096)
def _kernel(shape: Shape, segments: int, layer: int, transposed: bool) -> DeviceKernel:
    suffix, block = SUFFIX[shape.dtype], (THREADS, 1, 1)
    rank_blocks, out_blocks = -(-shape.rank // RANKS), -(-shape.total_out // THREADS)
    launches = (
        Launch(f"dop_punica_shrink_{suffix}", ("tokens", str(rank_blocks), "1"), block, 0, SHRINK),
        Launch(f"dop_punica_expand_{suffix}", ("tokens", str(out_blocks), "1"), block, 0, EXPAND),
    )
    numbers = {
        "in_features": shape.in_features,
        "out": shape.total_out,
        "rank": shape.rank,
        "segments": segments,
        "layer": layer,
        "transposed": int(transposed),
    }
    space = (Buffer("v", "float32", f"tokens * {shape.rank}"),)
    return DeviceKernel(
        f"punica_{suffix}", "punica", "pointers per segment", 0, launches, space, read_binary,
        numbers, "punica",
    )  # fmt: skip


def read_binary() -> bytes:
    """The fatbin of punica.cu.

    Raises:
        ExportError: it is missing or damaged.
    """
    try:
        return lzma.decompress(BINARY.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise ExportError(f"{BINARY} cannot be used: {error}.", "Install dop again.") from error


def _at(address: int, rows: int, columns: int, kind: torch.dtype) -> Tensor:
    """Matrix in host memory."""
    array = (C_TYPES.get(kind, ctypes.c_float) * (rows * columns)).from_address(address)
    return torch.frombuffer(array, dtype=kind, count=rows * columns).view(rows, columns)


def _on_cpu(
    y: Tensor,
    x: Tensor,
    wa_ptr: Tensor,
    wb_ptr: Tensor,
    s: Tensor,
    layer: int,
    rank: int,
    transposed: bool,
) -> None:
    width, out, size = x.shape[1], y.shape[1], x.element_size()
    ends = s.tolist()
    pairs = zip(wa_ptr.tolist(), wb_ptr.tolist(), strict=True)
    for i, (at_a, at_b) in enumerate(pairs):
        rows = slice(ends[i], ends[i + 1])
        if rows.start >= rows.stop:
            continue
        a = _at(at_a + layer * rank * width * size, *((rank, width) if transposed else
                                                      (width, rank)), x.dtype).float()  # fmt: skip
        b = _at(at_b + layer * rank * out * size, rank, out, x.dtype).float()
        v = x[rows].float() @ (a.T if transposed else a)
        y[rows] = (y[rows].float() + v @ b).to(y.dtype)


def build() -> int:
    """Compiles punica.cu for all GPUs from sm_80 on; returns the bytes written."""
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHS]
    codes.append("-gencode=arch=compute_80,code=compute_80")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "punica.fatbin"
        options = ["-fatbin", "-std=c++17", *codes, str(SOURCE), "-o", str(path)]
        subprocess.run(["nvcc", *options], check=True)
        data = lzma.compress(path.read_bytes(), preset=9)
    BINARY.write_bytes(data)
    return len(data)
