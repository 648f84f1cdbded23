"""Punica's signatures: semantics on the CPU, launches, errors, and that the binary is current."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import fake_driver
import pytest
import torch

from dop import ops
from dop.errors import DtypeError, ShapeError
from dop.ops import launch, punica

LAYERS, WIDTH, OUT, RANK = 3, 20, 11, 5
ENDS = [0, 4, 4, 5, 9]


def case(kind=torch.float32, transposed=True):
    g = torch.Generator().manual_seed(3)
    sizes = (LAYERS, RANK, WIDTH) if transposed else (LAYERS, WIDTH, RANK)
    a = [torch.randn(*sizes, generator=g).to(kind) for _ in range(4)]
    b = [torch.randn(LAYERS, RANK, OUT, generator=g).to(kind) for _ in range(4)]
    pointers = [torch.tensor([t.data_ptr() for t in stack]) for stack in (a, b)]
    x, y = torch.randn(10, WIDTH, generator=g).to(kind), torch.randn(10, OUT, generator=g).to(kind)
    return y, x, a, b, pointers, torch.tensor(ENDS, dtype=torch.int32)


def reference(y, x, a, b, layer, transposed):
    want = y.double()
    for i in range(4):
        rows, down = slice(ENDS[i], ENDS[i + 1]), a[i][layer].double()
        want[rows] += x[rows].double() @ (down.T if transposed else down) @ b[i][layer].double()
    return want


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
def test_on_the_cpu(kind, transposed):
    y, x, a, b, pointers, s = case(kind, transposed)
    want = reference(y, x, a, b, 1, transposed)
    last = y[9].clone()  # behind the last segment
    call = ops.add_lora_sgmv_custom_cutlass if transposed else ops.add_lora_sgmv_cutlass
    call(y, x, *pointers, s, 1, RANK)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 1e-2}[kind]
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(y[9], last)


def test_launches_pass_what_the_kernels_take(monkeypatch):
    y, x, _, _, pointers, s = case()
    driver = fake_driver.install(monkeypatch, (1, RANK, WIDTH, (OUT,), 4), 0)
    seen = []
    driver.load = lambda image, launches: driver.functions.extend(launches) or [1, 2]
    driver.dop_punica_shrink_f32 = lambda p: seen.append(p)
    driver.dop_punica_expand_f32 = lambda p: seen.append(p)
    ops.add_lora_sgmv(y, x, *pointers, s, 2, RANK)
    shrink, expand = seen
    common = {"segments": 4, "layer": 2, "rank": RANK, "token_slot": s.data_ptr()}
    v = shrink["v"]
    assert v == expand["v"]
    assert shrink == {
        "x": x.data_ptr(), "a": pointers[0].data_ptr(), "v": v, "in_features": WIDTH,
        "transposed": 1, **common,
    }  # fmt: skip
    assert expand == {"v": v, "b": pointers[1].data_ptr(), "y": y.data_ptr(), "out": OUT, **common}
    assert [entry[1][:2] for entry in driver.launches] == [(10, 1), (10, 1)]
    ops.add_lora_sgmv(y, x, *pointers, s, 1, RANK, a_is_transposed=False)
    assert (seen[2]["layer"], seen[2]["transposed"]) == (1, 0)
    launch.forget()


ON_HOST = """
#include "cuda_on_host.h"
#include "punica.cu"
extern "C" void run(const float* x, const long long* a, const long long* b, const int* ends,
                    float* v, float* y, int tokens, int in, int out, int rank, int segments,
                    int layer, int transposed) {
  auto first = [=] {
    dop_punica_shrink_f32(x, a, ends, v, in, rank, segments, layer, transposed);
  };
  auto second = [=] { dop_punica_expand_f32(v, b, ends, y, out, rank, segments, layer); };
  host::launch(first, {(unsigned)tokens, (unsigned)(rank + 7) / 8, 1}, {128, 1, 1}, 0, 1);
  host::launch(second, {(unsigned)tokens, (unsigned)(out + 127) / 128, 1}, {128, 1, 1}, 0, 2);
}
"""


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The kernels of punica.cu on the CPU."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("punica")
    (folder / "run.cc").write_text(ON_HOST)
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{punica.SOURCE.parent}"]
    command += [f"-I{Path(__file__).parent}", "-o", str(folder / "run.so"), str(folder / "run.cc")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "run.so")).run


@pytest.mark.parametrize("transposed", [True, False])
def test_the_kernels_themselves(on_host, transposed):
    y, x, a, b, pointers, s = case(transposed=transposed)
    want = reference(y, x, a, b, 2, transposed)
    last = y[9].clone()
    v = torch.full((10, RANK), float("nan"))
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (x, *pointers, s, v, y)]
    on_host(*addresses, 10, WIDTH, OUT, RANK, 4, 2, int(transposed))
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(y[9], last)


def test_errors():
    y, x, _, _, (wa, wb), s = case()
    with pytest.raises(ShapeError, match=r"s has shape \[4\].*\[5\]"):
        ops.add_lora_sgmv(y, x, wa, wb, s[1:], 0, RANK)
    with pytest.raises(DtypeError, match=r"wb_ptr is torch\.int32"):
        ops.add_lora_sgmv(y, x, wa, wb.int(), s, 0, RANK)
    with pytest.raises(DtypeError, match=r"y is torch\.float16, x is torch\.float32"):
        ops.add_lora_sgmv(y.half(), x, wa, wb, s, 0, RANK)
    with pytest.raises(ShapeError, match="y has shape"):
        ops.add_lora_sgmv(y[1:], x, wa, wb, s, 0, RANK)
    with pytest.raises(ShapeError, match="layer -1"):
        ops.add_lora_sgmv(y, x, wa, wb, s, -1, RANK)


def test_parameters_are_in_the_order_of_the_source():
    text = punica.SOURCE.read_text()
    for kernel, names in (("shrink", punica.SHRINK), ("expand", punica.EXPAND)):
        head = text.split(f"dop_punica_{kernel}_##name(")[1].split(")")[0]
        found = [part.split()[-1].lstrip("*") for part in head.replace("\\", " ").split(",")]
        assert [n.replace("token_slot", "ends") for n in names] == found


def test_the_binary_holds_every_kernel():
    image = punica.read_binary()
    assert ctypes.c_uint32.from_buffer_copy(image).value == 0xBA55ED50  # magic of a fatbin


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_source_compiles_without_warnings(tmp_path):
    command = ["nvcc", "-cubin", "-arch=sm_90", "-std=c++17", "-Werror", "all-warnings"]
    command += [str(punica.SOURCE), "-o", str(tmp_path / "out.cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
