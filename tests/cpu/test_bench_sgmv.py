"""bench_sgmv: cases, contenders, checks, options, files."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_sgmv
from benchmarks.peers import contenders, run, timing
from benchmarks.peers.ahead import warm_compilers
from benchmarks.peers.cases import Case, build_cases, requests_per_adapter
from benchmarks.peers.contenders import Contender, Prepared, own
from benchmarks.peers.data import Data, Pools, relative_error
from benchmarks.peers.timing import CpuClock, Times, check
from dop.config import workloads_from_model
from dop.errors import ConfigError
from dop.workload import Workload

QKV = Workload("qkv_proj", 64, (64, 32, 32), 8, "float32")
DOWN = Workload("down_proj", 96, (64,), 8, "float32")
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine took 6 ms for an index_add_ of 5 rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def carve(case: Case, sets: int = 2) -> Data:
    return Data.carve(case, Pools([case], "cpu", torch.float32, sets))


# ------------------------------------------------------------------------------ cases


@pytest.mark.parametrize(
    ("mix", "requests", "want"),
    [
        ("uniform", 8, [3, 3, 2]),
        ("uniform", 128, [11] * 8 + [10, 10, 10, 10][:4]),
        ("skewed", 16, [5, 4, 3, 2, 1, 1]),
        ("skewed", 64, [17, 17, 11, 7, 5, 3, 2, 1, 1]),
        ("skewed", 1, [1]),
        ("distinct", 3, [1, 1, 1]),
        ("identical", 9, [9]),
    ],
)
def test_requests_per_adapter(mix: str, requests: int, want: list[int]) -> None:
    found = requests_per_adapter(mix, requests)
    if (mix, requests) == ("uniform", 128):
        assert sum(found) == 128
        assert sorted(set(found)) == [10, 11]
        assert len(found) == 12
    else:
        assert found == want


def test_cases_are_those_of_the_peers_benchmark() -> None:
    """Values that bench_peers.py gave for the same cases."""
    shapes = {w.name: w for w in workloads_from_model("Llama-3.1-8B", ranks=(16,))}
    case = Case(shapes["qkv_proj"], 16, "skewed")
    assert case.key == "decode:T16:skewed:qkv:r16:tight"
    assert case.token_slots == [1, 4, 0, 4, 0, 1, 2, 6, 4, 2, 3, 2, 0, 0, 2, 2]
    assert (case.slots, case.floor_bytes, case.calls) == (8, 4063232, 20)
    case = Case(replace(shapes["gate_up_proj"], rank=64), 2048, "uniform")
    assert case.request_slots == [0, 0, 1, 1]
    assert case.request_rows == [512] * 4
    assert (case.slots, case.floor_bytes, case.calls) == (2, 261095424, 11)
    case = Case(replace(shapes["down_proj"], rank=128), 128, "distinct")
    assert (case.slots, case.floor_bytes, case.calls) == (128, 609746944, 4)
    assert (case.sizes["a"], case.sizes["b"]) == (234881024, 67108864)


def test_all_cases_of_the_bars_and_their_order() -> None:
    workloads = workloads_from_model("Llama-3.1-8B", ranks=(8, 16, 32, 64, 128))
    cases = build_cases(workloads)
    assert len({case.key for case in cases}) == len(cases) == 660
    assert sum(case.kind == "decode" for case in cases) == 420
    tokens = list(dict.fromkeys(case.tokens for case in cases))
    assert tokens == [1, 16, 64, 8, 32, 128, 2048, 512, 8192]
    assert {case.mix for case in cases if case.tokens == 1} == {"distinct"}


def test_subsets() -> None:
    assert [c.key for c in build_cases([QKV, DOWN], (4,), patterns=["identical:down"])] == [
        "decode:T4:identical:down:r8:tight"
    ]
    assert len(build_cases([QKV], (1, 300), patterns=["prefill:*:qkv:*"])) == 4
    server = build_cases([QKV], (4,), ["identical"], least_slots=64)[0]
    assert (server.slots, server.key.endswith(":server")) == (64, True)
    with pytest.raises(ConfigError, match="no case matches"):
        build_cases([QKV], (4,), patterns=["T5"])
    with pytest.raises(ConfigError, match="unknown"):
        build_cases([QKV], (4,), ["odd"])
    with pytest.raises(ConfigError, match="1 or more"):
        build_cases([QKV], (0,))


# ------------------------------------------------------------------------------ data, checks


def naive(data: Data, layout: str) -> torch.Tensor:
    """The last set's update row by row, in float64."""
    w = data.case.workload
    found = torch.zeros((data.case.tokens, w.total_out), dtype=torch.float64)
    for t, slot in enumerate(data.case.token_slots):
        for s, (start, out) in enumerate(zip(w.offsets, w.out_features, strict=True)):
            if layout == "joined":
                a = data.joined[-1][0][slot, s * w.rank : (s + 1) * w.rank]
                b = data.joined[-1][1][slot, start : start + out]
            else:
                a, b = data.sliced[-1][0][s][slot], data.sliced[-1][1][s][slot]
            found[t, start : start + out] = b.double() @ (a.double() @ data.x[-1][t].double())
    return found


@pytest.mark.parametrize("layout", ["sliced", "joined"])
def test_update_is_the_reference(layout: str) -> None:
    data = carve(Case(QKV, 300, "skewed"))
    assert torch.allclose(data.update(layout).double(), naive(data, layout), rtol=1e-5, atol=1e-6)


def test_both_layouts_are_the_same_bytes() -> None:
    data = carve(Case(QKV, 4, "uniform"))
    sliced = torch.cat([stack.flatten() for stack in data.sliced[1][0]])
    assert torch.equal(sliced, data.joined[1][0].flatten())
    assert data.sets == 2
    assert data.x[0].data_ptr() != data.x[1].data_ptr()


def test_relative_error() -> None:
    update = torch.ones(3, 4)
    before = torch.randn(3, 4, dtype=torch.float64)
    assert relative_error(before + 2, before, update, 2) == pytest.approx(0)
    assert relative_error(before, before, update, 2) == pytest.approx(1)
    assert relative_error(before + 2.2, before, update, 2) == pytest.approx(0.1)
    assert relative_error(before, before, update * 0, 1) != relative_error(
        before, before, update, 1
    )


@pytest.mark.parametrize("name", ["torch", "bmm", "dense", "dop"])
@pytest.mark.parametrize("workload", [QKV, DOWN])
@pytest.mark.parametrize(("tokens", "mix"), [(1, "distinct"), (6, "identical"), (9, "skewed")])
def test_contenders_are_right(name: str, workload: Workload, tokens: int, mix: str) -> None:
    case = Case(workload, tokens, mix)
    contender = next(c for c in own("cpu") if c.name == name)
    if not contender.suits(case):
        assert name == "dense"
        return
    data = carve(case)
    clock, prepared = CpuClock(), contender.prepare(case, data)
    assert check(clock, clock.round(prepared, data.sets, 5), prepared, data) < 1e-5


def test_check_sees_a_wrong_result_and_a_round_that_skips_the_last_set() -> None:
    case = Case(QKV, 4, "uniform")
    data = carve(case)
    right = own("cpu")[1].prepare(case, data)
    clock = CpuClock()
    assert check(clock, clock.round(right, data.sets, 1), right, data) < 1e-5
    wrong = Prepared(lambda i: data.y[i].add_(1.0), right.layout)
    assert check(clock, clock.round(wrong, data.sets, 2), wrong, data) > 0.1


def test_few_calls_for_many_launches() -> None:
    assert Prepared(lambda i: None, launches=1024).most_calls == 1
    assert Prepared(lambda i: None, launches=5000).most_calls == 1
    assert Prepared(lambda i: None, launches=100).most_calls == 12


def test_times() -> None:
    times = Times.of([30.0, 10.0, 20.0], 10)
    assert (times.median, times.least, times.p90) == (2.0, 1.0, 3.0)


class Recorded:
    """A CUDA event or graph that writes down what happens."""

    def __init__(self, book: list[str], name: str) -> None:
        self.book, self.name, self.calls = book, name, 4

    def record(self) -> None:
        self.book.append("event")

    def run(self) -> None:
        self.book.append(self.name)

    def elapsed_time(self, end: Any) -> float:
        return 0.008  # milliseconds of a whole replay


def test_replays_take_turns_on_a_flushed_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    book: list[str] = []
    clock = timing.CudaClock.__new__(timing.CudaClock)
    clock.flush, clock.sink = torch.ones(4), torch.zeros(())
    clock.stream = types.SimpleNamespace(synchronize=lambda: None)
    whole = torch.sum

    def flush(*arguments: Any, **options: Any) -> torch.Tensor:
        book.append("flush")
        return whole(*arguments, **options)

    monkeypatch.setattr(torch, "sum", flush)
    monkeypatch.setattr(timing, "_event", lambda: Recorded(book, "event"))
    rounds = {name: Recorded(book, name) for name in "ab"}
    times = clock.time(rounds, 2)
    turn = ["flush", "event", "?", "event"]
    order = "".join(word for word in book if word in rounds)
    assert order == "baabbaab"[: 2 * (timing.WARM_ROUNDS + 2)]
    assert [word if word in ("flush", "event") else "?" for word in book] == turn * 8
    assert times["a"].median == pytest.approx(2.0)


def test_a_graph_cycles_through_the_sets_after_warming_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []
    clock = timing.CudaClock.__new__(timing.CudaClock)
    monkeypatch.setattr(clock, "wait", lambda: seen.append("wait"), raising=False)

    def capture(body: Callable[[], object], calls: int) -> Any:
        body()
        return types.SimpleNamespace(calls=calls)

    monkeypatch.setattr(clock, "_capture", capture, raising=False)
    prepared = Prepared(seen.append)
    assert clock.round(prepared, 3, 5).calls == 5
    assert seen == [0, 1, 2, "wait", 0, 1, 2, 0, 1]
    seen.clear()
    assert clock.round(Prepared(seen.append, launches=600), 3, 5).calls == 2
    assert seen == [0, 1, "wait", 0, 1]


# ------------------------------------------------------------------------------ the script


def start(*arguments: str) -> int:
    return bench_sgmv.main(["--device", "cpu", "--reps", "2", *arguments])


def test_cpu_run(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    shapes = ("--model", model, "--ranks", "4,8", "--tokens", "1,5", "--mixes", "uniform,identical")
    assert start(*shapes, "--out", str(out)) == 0
    document = json.loads(out.read_text())
    assert document["command"].startswith("python -m benchmarks.bench_sgmv --device cpu")
    assert document["env"]["dtype"] == "fp32"
    assert document["env"]["copy_gbps"] > 0
    assert {"torch", "python"} <= set(document["versions"])
    rows = document["rows"]
    assert {row["peer"] for row in rows} == {"dop", "torch", "bmm", "dense"}
    assert len({row["key"] for row in rows}) == 2 * 4 * 3  # ranks, layers, batches
    assert all(row["err"] < 1e-4 and row["both_us"] > 0 and row["floor_us"] > 0 for row in rows)
    assert document["summary"]["decode_best_peer"]["cases"] == 24
    printed = capsys.readouterr().out
    assert "against the best peer of each case" in printed
    assert "identical" in printed


def test_a_wrong_operator_is_no_result(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(case: Case, data: Data) -> Prepared:
        return Prepared(lambda i: data.y[i].add_(0.5))

    def broken(case: Case, data: Data) -> Prepared:
        raise RuntimeError("no such kernel")

    out = tmp_path / "out.json"
    mine = [Contender("dop", wrong), Contender("torch", broken), own("cpu")[2]]
    monkeypatch.setattr(bench_sgmv, "own", lambda device: mine)
    shapes = ("--model", model, "--ranks", "4", "--tokens", "3", "--mixes", "uniform")
    assert start(*shapes, "--layers", "o", "--out", str(out)) == 1
    rows = {row["peer"]: row for row in json.loads(out.read_text())["rows"]}
    assert "wrong result" in rows["dop"]["error"]
    assert "both_us" not in rows["dop"]
    assert rows["torch"]["error"] == "RuntimeError: no such kernel"
    assert rows["bmm"]["both_us"] > 0
    assert json.loads(out.read_text())["summary"] == {"decode_failed": 1}
    assert "FAILED on 1 cases" in capsys.readouterr().out


def test_time_budget(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert start("--model", model, "--ranks", "4", "--budget", "0", "--out", str(out)) == 1
    assert "time is up: 84 cases are left out" in capsys.readouterr().out
    assert not out.exists()


def test_host_cost(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.host.BURST", 3)
    out = tmp_path / "out.json"
    options = ("--host", "--ranks", "4,8", "--tokens", "1,4", "--layers", "qkv,o")
    assert start("--model", model, *options, "--out", str(out)) == 0
    found = json.loads(out.read_text())["host"]
    assert [(row["name"], row["case"].split(":")[3]) for row in found] == [
        ("dop", "qkv"),
        ("dense", "qkv"),
        ("dop", "o"),
        ("dense", "o"),
    ]
    assert all(row["median_us"] > 0 and ":T1:" in row["case"] for row in found)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_sgmv.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [bench_sgmv.NO_GPU]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--layers", "qkv,head"], "layer 'head' is unknown"),
        (["--contenders", "dop,vllm"], "contender 'vllm' is not here"),
        (["--mixes", "odd"], "mix 'odd' is unknown"),
        (["--ranks", "0"], "rank"),
        (["--peers", "/nowhere"], "no prepared kernel files"),
    ],
)
def test_bad_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(*options) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert len(printed.splitlines()) == 1


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_sgmv.main(["--list", "--ranks", "16", "--tokens", "1,64"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4 + 16


def test_compilers_are_warmed_for_the_cases_that_they_serve() -> None:
    served: list[str] = []

    def prepare(case: Case, data: Data) -> Prepared:
        return Prepared(lambda i: served.append(case.key))

    cases = build_cases([DOWN], (1, 4), ["identical"])
    only_many = Contender("some", prepare, lambda case: case.tokens > 1, compiles=True)
    warm_compilers(cases, [only_many, Contender("plain", prepare)], "cpu")
    assert served == ["decode:T4:identical:down:r8:tight"]


def test_turns_are_taken_case_by_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders of one case are timed together, and one that does not suit is left out."""
    seen: list[list[str]] = []

    class Clock(CpuClock):
        def time(self, rounds: Any, reps: int) -> dict[str, Times]:
            if "copy" not in rounds:
                seen.append(list(rounds))
            return super().time(rounds, reps)

    monkeypatch.setattr(run, "CpuClock", Clock)
    cases = build_cases([DOWN], (3,), ["uniform", "identical"])
    bench = run.Bench(cases, "cpu", 1)
    rows = list(run.run(bench, cases, own("cpu")[1:], float("inf")))
    assert seen == [["torch", "bmm"], ["torch", "bmm", "dense"]]
    assert [row["peer"] for row in rows] == ["torch", "bmm", "torch", "bmm", "dense"]


def test_gathered_product_has_a_limit() -> None:
    wide = Workload("o_proj", 4096, (4096,), 64, "bfloat16")
    assert contenders._gathers(Case(wide, 128, "distinct"))
    assert not contenders._gathers(Case(wide, 8192, "distinct"))
