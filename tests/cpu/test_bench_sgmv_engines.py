"""bench_sgmv: what engines are called with; the extra operator of bench_peers."""

from __future__ import annotations

import importlib
import os
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import dop_ops, engines
from benchmarks.peers.cases import Case
from benchmarks.peers.contenders import Prepared
from benchmarks.peers.data import Data, Pools, relative_error
from benchmarks.peers.timing import CpuClock, check
from dop.errors import ConfigError
from dop.workload import Workload

QKV = Workload("qkv_proj", 64, (64, 32, 32), 8, "float32")
DOWN = Workload("down_proj", 96, (64,), 8, "float32")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine took 6 ms for an index_add_ of 5 rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def carve(case: Case, sets: int = 2) -> Data:
    return Data.carve(case, Pools([case], "cpu", torch.float32, sets))


# ------------------------------------------------------------------------------ engines


def simulate(x: torch.Tensor, weights: torch.Tensor, info: Any, slices: int) -> torch.Tensor:
    """x times each segment's stack, as SGLang's shrink gives it: rows in the order of x."""
    found = torch.zeros((len(x), weights.shape[1]), dtype=x.dtype)
    starts, owners = info.seg_indptr.tolist(), info.weight_indices.tolist()
    order = range(len(x)) if info.permutation is None else info.permutation.tolist()
    for segment, owner in enumerate(owners):
        rows = starts[segment : segment + 2]
        assert rows[1] - rows[0] <= info.max_len
        for row in list(order)[slice(*rows)]:
            found[row] += weights[owner] @ x[row]
    return found


def grow(v: torch.Tensor, weights: torch.Tensor, info: Any, offsets: Any, y: torch.Tensor) -> None:
    starts, owners = info.seg_indptr.tolist(), info.weight_indices.tolist()
    order = range(len(v)) if info.permutation is None else info.permutation.tolist()
    rank, bounds = weights.shape[2], list(offsets)
    for segment, owner in enumerate(owners):
        for row in list(order)[slice(*starts[segment : segment + 2])]:
            for s, (low, high) in enumerate(pairwise(bounds)):
                y[row, low:high] += weights[owner, low:high] @ v[row, s * rank : (s + 1) * rank]


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of SGLang's entry points that work through the batch info that they are given."""

    def module(name: str, **members: Any) -> None:
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))

    def csgmv_expand(**k: Any) -> None:
        bounds = k["slice_offsets_cpu"].tolist()
        grow(k["x"], k["weights"], k["batch_info"], bounds, k["base_output"])

    def qkv(v: Any, b: Any, info: Any, offs: Any, widest: int, y: Any, n_slices: int) -> None:
        assert (n_slices, widest) == (3, 64)
        grow(v, b, info, offs.tolist(), y)

    base = engines.SGLANG_OPS
    module("sglang.srt.lora.utils", LoRABatchInfo=types.SimpleNamespace)
    module(
        f"{base}.chunked_sgmv_shrink",
        chunked_sgmv_lora_shrink_forward=lambda x, weights, batch_info, num_slices: simulate(
            x, weights, batch_info, num_slices
        ),
    )
    module(f"{base}.chunked_sgmv_expand", chunked_sgmv_lora_expand_forward=csgmv_expand)
    module(f"{base}.sgemm_lora_a", sgemm_lora_a_fwd=lambda x, a, i, stack_num: simulate(x, a, i, 1))
    module(f"{base}.qkv_lora_b", qkv_lora_b_fwd=qkv)
    module(
        f"{base}.gate_up_lora_b",
        gate_up_lora_b_fwd=lambda v, b, info, width, y: grow(v, b, info, [0, width, 2 * width], y),
    )
    module(
        f"{base}.sgemm_lora_b",
        sgemm_lora_b_fwd=lambda v, b, info, y: grow(v, b, info, [0, b.shape[1]], y),
    )


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("prepare", [engines._csgmv, engines._triton])
@pytest.mark.parametrize(
    "workload", [QKV, DOWN, Workload("gate_up_proj", 64, (96, 96), 8, "float32")]
)
@pytest.mark.parametrize(("tokens", "mix"), [(1, "distinct"), (40, "skewed"), (260, "uniform")])
def test_sglang_batches(
    prepare: Callable[[Case, Data], Prepared], workload: Workload, tokens: int, mix: str
) -> None:
    case = Case(workload, tokens, mix)
    data = carve(case, 1)
    prepared = prepare(case, data)
    clock = CpuClock()
    assert check(clock, clock.round(prepared, 1, 1), prepared, data) < 1e-5


@pytest.mark.usefixtures("sglang")
def test_csgmv_grid() -> None:
    case = Case(QKV, 64, "identical")
    note = engines._csgmv(case, carve(case, 1)).note
    assert note == {"chunk": 16, "segments": 4, "grid": 64}
    case = Case(QKV, 1000, "identical")
    note = engines._csgmv(case, carve(case, 1), most_rows=128).note
    assert note == {"chunk": 128, "segments": 8, "grid": 8}


def test_engines_that_are_not_here_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "sglang"):
        monkeypatch.setitem(sys.modules, name, None)
    found, missing = engines.find()
    assert found == []
    assert [line.split(":")[0] for line in missing] == ["vllm", "csgmv", "c128", "triton", "v2"]


def test_folder_of_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no prepared kernel files"):
        engines.use_folder(tmp_path)
    (tmp_path / "MANIFEST.json").write_text("{}")
    (tmp_path / "peer_of_a_test.py").write_text("FOUND = 1\n")
    with zipfile.ZipFile(tmp_path / "csgmv_configs.zip", "w") as archive:
        archive.writestr("csgmv_configs/some.json", "{}")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("SGLANG_LORA_CONFIG_DIR", "")
    monkeypatch.delenv("SGLANG_LORA_CONFIG_DIR")
    engines.use_folder(tmp_path)
    assert importlib.import_module("peer_of_a_test").FOUND == 1
    assert (Path(os.environ["SGLANG_LORA_CONFIG_DIR"]) / "csgmv_configs/some.json").is_file()
    assert sys.path[-1].endswith("mini")


# ------------------------------------------------------------------------------ extra operator


@dataclass
class FakeOp:
    """bench_peers.py's Op."""

    layout: str
    shrink: Any = None
    expand: Any = None
    both: Any = None
    launches: Any = None
    note: Any = None


@dataclass
class FakeData:
    """bench_peers.py's Data, of one of ours."""

    data: Data

    def __post_init__(self) -> None:
        self.x, self.y, self.tok, self.device = (
            self.data.x,
            self.data.y,
            self.data.slots,
            self.data.device,
        )

    def weights(self, layout: str) -> Any:
        assert layout == "vllm"
        wide = [[[t.unsqueeze(1) for t in part] for part in pair] for pair in self.data.sliced]
        return [pair[0] for pair in wide], [pair[1] for pair in wide]


@pytest.mark.parametrize("split", ["", "1"])
def test_extra_operator(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOP_BENCH_SPLIT", split)
    data = carve(Case(QKV, 9, "skewed"))
    theirs = types.SimpleNamespace(
        kind="decode", smode="tight", T=9, slots=8, active=5, outs=(64, 32, 32), rank=8, K=64
    )
    op = dop_ops.make(torch, theirs, FakeData(data), FakeOp)
    assert op.layout == "vllm"
    assert op.note["adapters_hint"] == 8
    assert "sgmv/float32/r8/64->64+32+32, 9 tokens, 8 adapters" in op.note["kernel"]
    before = data.y[-1].clone()
    if split:
        op.expand(1, op.shrink(1))
    else:
        assert op.shrink is None
        op.both(1)
    assert relative_error(data.y[-1], before, data.update("sliced"), 1) < 1e-5


def test_hint_is_what_the_peers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOP_BENCH_HINT", raising=False)
    hint = dop_ops.adapters_hint
    assert hint("decode", True, 64, 16, 9) == 16
    assert hint("decode", True, 1, 1, 1) == 1
    assert hint("decode", True, 5, 8, 5) == 5
    assert hint("decode", False, 64, 64, 1) is None
    assert hint("prefill", True, 2048, 4, 3) == 3
    monkeypatch.setenv("DOP_BENCH_HINT", "exact")
    assert hint("decode", False, 64, 64, 9) == 9
    monkeypatch.setenv("DOP_BENCH_HINT", "never")
    assert hint("prefill", True, 2048, 4, 3) is None
    monkeypatch.setenv("DOP_BENCH_HINT", "maybe")
    with pytest.raises(ValueError, match="peers, exact or never"):
        hint("prefill", True, 2048, 4, 3)
