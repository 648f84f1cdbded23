"""The guard zones of the GPU tests find what they are there for; here on the CPU, with torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import guarded  # noqa: E402
import sanitize_packs  # noqa: E402

from dop import packs  # noqa: E402
from dop.export.load import load_cuda  # noqa: E402
from dop.ops import cpu, eager  # noqa: E402
from dop.ops.plan import fill_by_torch  # noqa: E402
from dop.workload import Workload  # noqa: E402

WORKLOAD = Workload.parse("sgmv/float32/r12/40->24+8")


@pytest.fixture(autouse=True)
def whole_plans(monkeypatch):
    """Here the CPU stands in for a GPU, which reads the tables of tiles too."""
    monkeypatch.setattr(eager, "fill", fill_by_torch)


def no_source(search):
    raise AssertionError("the CPU asks no source")


def run(batch="mixed"):
    arena = guarded.Arena(zone=256, device="cpu")
    return guarded.run(WORKLOAD, guarded.BATCHES[batch], no_source, arena)


@pytest.mark.parametrize("batch", list(guarded.BATCHES))
def test_a_right_call_passes(batch):
    assert run(batch) == []


def after(change):
    """The real sums, then something that a wrong kernel might do."""
    real = cpu.add_lora

    def wrong(y, x, a, b, *rest):
        real(y, x, a, b, *rest)
        change(y, x, a, b)

    return patch.object(cpu, "add_lora", wrong)


def beside(tensor, offset):
    """The element at an offset from a tensor's first."""
    return torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + offset)


@pytest.mark.parametrize("place", [-1, 67 * 32])
def test_a_write_beside_y_is_found(place):
    with after(lambda y, x, a, b: beside(y, place).fill_(0)):
        assert run() == ["wrote outside of y"]


def test_a_read_beside_the_weights_is_found():
    def change(y, x, a, b):
        y[3] += 0 * beside(b[0], b[0].numel())

    with after(change):
        assert "relative error nan" in run()


def test_a_wrong_rank_is_found():
    def change(y, x, a, b):
        rows = guarded.BATCHES["mixed"].ids == 1  # true rank 1: one rank too many
        y[rows, :24] += 0.5 * (x[rows] @ a[0][1, 1:2].T) @ b[0][1, :, 1:2].T

    with after(change):
        assert run()[0].startswith("relative error")


def test_a_changed_row_without_adapter_is_found():
    def change(y, x, a, b):
        y[guarded.BATCHES["mixed"].ids < 0] += 1e-6

    with after(change):
        assert run()[0] == "changed rows without adapter"


def cases():
    with patch.object(torch.cuda, "get_device_capability", lambda: (9, 0)):
        return [
            *sanitize_packs.pack_cases(("mixed",)),
            *sanitize_packs.generic_cases(("mixed", "one")),
        ]


def test_every_shipped_kernel_is_in_one_shard():
    names = [case.name for case in cases()]
    shards = [[c.name for c in sanitize_packs.share(cases(), i, 8)] for i in range(8)]
    assert sorted(name for shard in shards for name in shard) == sorted(names)
    assert len(names) == len(set(names))
    assert all(shards)
    shipped, tried = set(), set()
    for entry in packs.shipped():
        library = load_cuda(entry.path)
        for info in library.kernels.values():
            binary = info.name, library.index.files[info.file]
            shipped.add(binary)
            if f"{entry.path.parent.name}/{entry.path.name}:{info.name}" in names:
                assert binary not in tried
                tried.add(binary)
    assert shipped == tried


def test_what_was_checked_is_left_out(tmp_path):
    all_cases = [case for case in cases() if case.digest]
    first, second = all_cases[0].digest, all_cases[1].digest
    file = tmp_path / "checked.txt"
    file.write_text(f"# racecheck\n\n{first}\n{second} h100/some.doppack\n")
    checked = sanitize_packs.digests(file)
    assert checked == {first, second}
    with patch.object(torch.cuda, "get_device_capability", lambda: (9, 0)):
        left = [*sanitize_packs.pack_cases(("mixed",), checked)]
    assert [c.name for c in left] == [c.name for c in all_cases if c.digest not in checked]
    assert len(left) < len(all_cases)


@pytest.mark.parametrize("part", ["halves:sgmv/float32/r12/", "plan:67x6", "plan:700x1024"])
def test_halves_and_plans_pass(part):
    """Those cases need no kernel of a pack, so that they run here."""
    (case,) = (case for case in cases() if case.name.startswith(part))
    for name in case.batches:
        arena = guarded.Arena(zone=256, device="cpu")
        assert case.run(guarded.BATCHES[name or "one"], arena) == []


def test_a_wrong_plan_is_found():
    (case,) = (case for case in cases() if case.name == "plan:67x6")
    real = eager.fill

    def wrong(buffer, *rest):
        real(buffer, *rest)
        buffer[3] += 1

    with patch.object(eager, "fill", wrong):
        found = case.run(guarded.BATCHES["one"], guarded.Arena(zone=256, device="cpu"))
    assert any("differs" in line for line in found)


def test_an_error_is_a_failure():
    def fail(batch, arena):
        raise RuntimeError("an illegal memory access")

    case = sanitize_packs.Case("k", "g", 1, fail, ("one",))
    assert sanitize_packs.attempt(case, guarded.BATCHES["one"], 0) == [
        "RuntimeError: an illegal memory access"
    ]


STALL = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import guarded, sanitize_packs
names = ("ends", "does not", "comes behind")
sanitize_packs.pack_cases = lambda *_: [
    sanitize_packs.Case(
        n, n, 9 - i, lambda *_, n=n: time.sleep(60 * (n == "does not")) or [], ("mixed",), n
    )
    for i, n in enumerate(names)
]
sanitize_packs.generic_cases = lambda *_: []
sanitize_packs.Arena = lambda zone: None
sys.exit(sanitize_packs.main())
"""


def test_a_call_that_does_not_end_is_a_failure():
    folder = str(Path(guarded.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", STALL, folder, "--batches", "mixed", "--stall", "1"],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["failures"] == ["does not: did not end within 1 s"]
    assert told["not_run"] == ["comes behind"]
    assert told["clean"] == ["ends"]
    assert (told["kernels"], told["calls"]) == (2, 2)
