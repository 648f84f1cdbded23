"""CPU tensors are served by an exported library on DOP_PACK_PATH where one knows the shape."""

import pytest
import torch
from sgmv_reference import reference, rows, stacks
from test_library import WORKLOAD, cpu_log

from dop import ops
from dop.export.cpu_library import CpuLibrary
from dop.export.select import select

pytest.importorskip("tvm")
SLOTS = 6


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    from dop.export.library import export_library

    folder = tmp_path_factory.mktemp("packs")
    export_library(select(cpu_log(folder / "log.jsonl")), folder / "mine" / "lib")
    return folder / "mine"


@pytest.fixture
def calls(exported, monkeypatch):
    """How often the library ran."""
    found = []
    real = CpuLibrary.sgmv
    monkeypatch.setattr(CpuLibrary, "sgmv", lambda *a, **k: found.append(a) or real(*a, **k))
    monkeypatch.setenv("DOP_PACK_PATH", str(exported))
    ops.forget()
    yield found
    ops.forget()


def case(tokens):
    w = WORKLOAD
    a, b = stacks(SLOTS, w.rank, w.in_features, w.out_features)
    x, y = rows(tokens, w.in_features, w.total_out)
    return a, b, x, y, torch.randint(-1, SLOTS, (tokens,), generator=torch.Generator())


def near(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_the_library_serves_and_follows_changes(calls):
    for tokens in (1, 7, 40):
        a, b, x, y, ids = case(tokens)
        plan = ops.segment_plan(ids, slots=SLOTS)
        for _ in range(2):
            want = reference(y, x, a, b, ids.tolist())
            near(ops.add_lora(y.clone(), x, a, b, plan), want)
            a[1].mul_(2)  # in place: the library holds a copy of the slices
    assert len(calls) == 6
    strided = y.T.contiguous().T
    near(ops.add_lora(strided.clone(), x, a, b, plan), reference(y, x, a, b, ids.tolist()))
    choice = ops.explain_choice(WORKLOAD, tokens=7, device="cpu")
    assert "lib" in choice.reason


def test_what_the_library_does_not_know_is_served_by_torch(calls):
    a, b, x, y, ids = case(9)
    ranks = [1, 5, 3, 2, 0, 4]
    want = reference(y, x, a, b, ids.tolist(), ranks)
    near(ops.add_lora(y.clone(), x, a, b, ops.segment_plan(ids, slots=SLOTS, ranks=ranks)), want)
    plan = ops.segment_plan(ids, slots=SLOTS)
    near(
        ops.add_lora(y.clone(), x, a, b, plan, scale=0.5),
        reference(y, x, a, b, ids.tolist(), None, 0.5),
    )
    assert not calls


def test_a_damaged_library_is_passed_over(calls, exported, monkeypatch, tmp_path):
    import shutil

    shutil.copytree(exported / "lib", tmp_path / "lib")
    binary = next(p for p in (tmp_path / "lib").iterdir() if p.suffix == ".so")
    binary.write_bytes(b"nonsense")
    monkeypatch.setenv("DOP_PACK_PATH", str(tmp_path))
    ops.forget()
    a, b, x, y, ids = case(3)
    plan = ops.segment_plan(ids, slots=SLOTS)
    near(ops.add_lora(y.clone(), x, a, b, plan), reference(y, x, a, b, ids.tolist()))
    assert not calls
    assert "torch" in str(ops.explain_choice(WORKLOAD, tokens=3, device="cpu"))
