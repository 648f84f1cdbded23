import json
import math
import sys
import time
from statistics import fmean, median
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.bench_textgen_lora import _warm, main, parse, watch
from benchmarks.textgen import load
from benchmarks.textgen.engine import OneAdapterAtATime, split, stock_of
from benchmarks.textgen.merge import Group, merge, read
from benchmarks.textgen.models import TINY, find_model, write_adapter
from benchmarks.textgen.results import (
    COLUMNS,
    CaseResult,
    rows,
    summary,
    table,
    title,
    write_lines,
)
from benchmarks.textgen.timing import Run, Stats, Timing, percentile, step_ms, summarise
from benchmarks.textgen.vllm_arms import VllmOptions, environment, llm_arguments, load_arms
from benchmarks.textgen.vllm_worker import timeline
from benchmarks.textgen.workload import Case, Job, punica_lengths, waves
from dop.errors import ConfigError, DopError, MissingDependencyError


def test_lengths_follow_punicas_distribution():
    lengths = punica_lengths(20_000, 2048)
    prompts = [p for p, _ in lengths]
    totals = [p + o for p, o in lengths]
    assert min(prompts) >= 1
    assert min(o for _, o in lengths) >= 2
    assert max(totals) <= 2048
    # log-normal with shape 0.8 and scale 18, shifted by -1 and cut to whole tokens
    assert median(prompts) == pytest.approx(17, abs=1)
    assert fmean(prompts) == pytest.approx(18 * math.exp(0.8**2 / 2) - 1.5, rel=0.03)
    assert fmean(totals) == pytest.approx(1024, rel=0.05)
    assert punica_lengths(50, 2048) == punica_lengths(50, 2048)
    assert max(p + o for p, o in punica_lengths(1000, 16)) <= 16
    with pytest.raises(ConfigError, match="maxlen"):
        punica_lengths(3, 3)


def ids(groups):
    return [[job.adapter for job in group] for group in groups]


def test_fixed_lengths_come_in_batches_of_the_mix():
    groups = waves(Case(16, "uniform", "5:7"), 3, 64, 64, 100)
    assert [len(g) for g in groups] == [16, 16, 16]
    for group in groups:
        assert {(len(j.prompt), j.output) for j in group} == {(5, 7)}
        assert sorted(j.adapter for j in group) == sorted([0, 1, 2, 3] * 4)
    assert groups[0] != groups[1]
    distinct = waves(Case(4, "distinct", "5:7"), 3, 64, 6, 100)
    assert ids(distinct) == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]
    assert {*ids(waves(Case(4, "identical", "5:7"), 1, 64, 64, 100))[0]} == {0}


def test_punicas_lengths_come_in_one_group():
    (group,) = waves(Case(8, "distinct"), 4, 128, 8, 100)
    assert len(group) == 32
    assert [j.adapter for j in group] == [i % 8 for i in range(32)]  # never twice among 8
    assert all(0 < token < 100 for j in group for token in j.prompt)
    (group,) = waves(Case(8, "uniform"), 4, 128, 64, 100)
    assert len({j.adapter for j in group}) == 6  # ceil(sqrt(32))


@pytest.mark.parametrize(
    ("case", "word"),
    [((0, "uniform"), "batch-size"), ((4, "some"), "popularity"), ((4, "uniform", "7"), "lengths")],
)
def test_cases_that_make_no_sense(case, word):
    with pytest.raises(ConfigError, match=word):
        Case(*case)


def test_step_time_counts_only_the_full_batch():
    early = Timing(0.0, [0.1, 0.2, 0.3, 0.4])
    late = Timing(0.0, [0.2, 0.3, 0.4, 0.9])  # alone at its end
    assert step_ms([early, late]) == pytest.approx(100)
    assert step_ms([Timing(0.0, [0.5])]) is None
    one, other = Timing(0.0, [0.1, 0.2, 0.3]), Timing(0.4, [0.5, 0.6, 0.7])
    assert step_ms([one, one, other]) == pytest.approx(200)  # never side by side
    run = summarise([[early, late]], fixed=True)
    assert run.step_ms == pytest.approx(100)
    assert run.decode_tokens_per_s == pytest.approx(20)
    assert run.pace == run.decode_tokens_per_s
    assert (run.seconds, run.tokens) == (pytest.approx(0.9), 8)
    assert run.ttft_ms.mean == pytest.approx(150)
    assert run.tpot_ms.p99 == pytest.approx(233.3, rel=0.01)
    first = summarise([[Timing(0.0, [0.5]), Timing(0.1, [0.7])]], fixed=True)
    assert first.tpot_ms is first.token_ms is None
    assert first.pace == pytest.approx(2 / 0.7)
    free = summarise([[early, late]], fixed=False)
    assert free.step_ms is None
    assert free.pace == pytest.approx(8 / 0.9)


def test_percentiles():
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([0, 10], 0.99) == pytest.approx(9.9)


def run_of(pace: float, step: float | None = None) -> Run:
    stats = Stats(1.0, 1.0, 2.0)
    return Run(1.0, 10, pace, stats, Stats(1000 / pace, 1, 2), step, pace if step else None)


def test_retention_its_bound_and_ratios_are_of_one_repeat():
    result = CaseResult(Case(4, "distinct", "2:2"), read_ms=2.0)
    result.runs = {
        "base": [run_of(100, 8.0), run_of(200, 8.0)],
        "stock": [run_of(50, 16.0), run_of(100, 16.0)],
        "dop": [run_of(75, 10.0), run_of(150, 10.0)],
    }
    assert result.retention("stock") == pytest.approx(0.5)
    assert result.retention("dop") == pytest.approx(0.75)
    assert result.bound == pytest.approx(0.8)
    row = result.row("dop")
    assert row["of_bound"] == pytest.approx(0.75 / 0.8)
    assert row["over_stock"] == pytest.approx(1.5)
    assert row["spread"] == pytest.approx(75 / 112.5)
    assert result.row("base")["retention"] is None
    lines = table([result]).splitlines()
    assert len(lines) == 2 + 3
    assert len({len(line) for line in lines}) == 1
    assert all(len(line.split("|")) == len(COLUMNS) + 2 for line in lines)
    assert (
        "2:2 dop: 1.50x stock (least 1.50), 1.00x stock's TTFT (least 1.00), 0.75 ret"
        in "\n".join(summary([result]))
    )


def test_prefill_alone_has_no_bound():
    prefill = summarise([[Timing(0.0, [0.5])]], fixed=True)
    slower = summarise([[Timing(0.0, [0.6])]], fixed=True)
    result = CaseResult(Case(1, "distinct", "9:1"), 1.0, {"base": [prefill], "stock": [slower]})
    row = result.row("stock")
    assert row["bound"] is row["of_bound"] is row["tpot_mean_ms"] is None
    assert row["retention"] == pytest.approx(0.5 / 0.6)
    assert result.row("base")["ttft_over_stock"] == pytest.approx(1.2)
    assert "nan" not in table([result])


def test_a_missing_base_leaves_retention_out():
    result = CaseResult(Case(4, "distinct"), 1.0, {"dop": [run_of(10)]})
    assert result.bound is None
    assert rows([result])[0]["retention"] is None
    assert summary([result]) == []


def test_the_loop_never_mixes_adapters():
    class Fake:
        def __init__(self):
            self.seen = []

        def run(self, jobs, concurrency):
            self.seen.append((len(jobs), {j.adapter for j in jobs}, concurrency))
            return [Timing(j.prompt[0], [0.0]) for j in jobs]

        def close(self):
            raise AssertionError

    fake = Fake()
    arm = OneAdapterAtATime(fake)
    jobs = [Job([i], 1, i % 3) for i in range(7)]
    assert [t.start_s for t in arm.run(jobs, 5)] == list(range(7))
    assert fake.seen == [(3, {0}, 5), (2, {1}, 5), (2, {2}, 5)]
    arm.close()


def test_models_and_what_their_adapters_weigh(tmp_path):
    named = find_model("Llama-3.1-8B", 2048)
    assert named.vocabulary == 128256
    assert named.adapter_bytes(16, torch.bfloat16) == 83_886_080  # 42M numbers
    assert named.kv_bytes(1, torch.bfloat16) == 131_072
    tiny = find_model(TINY, 64)
    write_adapter(tmp_path / "a", tiny, 8, torch.float32)
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert 0 <= size - tiny.adapter_bytes(8, torch.float32) < 8192
    with pytest.raises(ConfigError):
        find_model("no-such-model", 64)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_model(str(tmp_path), 64)


def options(tmp_path, **changes) -> VllmOptions:
    return VllmOptions(
        **{
            "rank": 16, "slots": 4, "adapters": 4, "batch_sizes": (2, 4), "maxlen": 32,
            "kv_tokens": 100, "dtype": torch.bfloat16, "work": tmp_path / "work", **changes,
        }
    )  # fmt: skip


def test_vllms_arms_differ_in_what_they_should(tmp_path):
    given = options(tmp_path, tuned=tmp_path)
    each = {n: environment(n, given) for n in ("base", "stock", "tuned-json", "dop")}
    assert len({e["VLLM_CACHE_ROOT"] for e in each.values()}) == 4
    assert {n for n, e in each.items() if e["VLLM_PLUGINS"]} == {"dop"}
    assert {n for n, e in each.items() if "VLLM_TUNED_CONFIG_FOLDER" in e} == {"tuned-json"}
    model = find_model(TINY, 64)
    base, lora = (llm_arguments(model, given, on, tmp_path) for on in (False, True))
    extra = {"enable_lora": True, "max_loras": 4, "max_cpu_loras": 4, "max_lora_rank": 16}
    assert {**base, **extra} == lora
    assert base["kv_cache_memory_bytes"] == model.kv_bytes(100 + 32 * 5, torch.bfloat16)
    assert base["compilation_config"] == {"cudagraph_capture_sizes": [1, 2, 4]}


def test_switches_are_any_arms_and_compared_with_stock_of_the_same(tmp_path):
    assert split("stock+specialize") == ("stock", {"specialize_active_lora": True})
    assert split("dop") == ("dop", {})
    for bad in ("base+specialize", "dop+faster", "best", "loop+specialize"):
        with pytest.raises(ConfigError):
            split(bad)
    arms = ("base", "stock", "stock+specialize", "dop", "dop+specialize")
    assert [stock_of(a, arms) for a in arms] == [
        "stock", None, None, "stock", "stock+specialize",
    ]  # fmt: skip
    assert stock_of("dop+specialize", ("stock", "dop+specialize")) == "stock"
    assert stock_of("dop", ("base", "stock+specialize", "dop")) == "stock+specialize"
    assert stock_of("dop", ("base", "dop")) is None
    about = {
        "engine": "vllm",
        "model": "M",
        "rank": 8,
        "device": "NVIDIA H100",
        "date": "2026-01-02",
    }
    for arms, mark in (
        (("base", "stock+specialize", "dop+specialize"), "specialize-"),
        (("base", "stock", "dop", "dop+specialize"), ""),
        (("base", "dop"), ""),
    ):
        result = CaseResult(Case(1, "identical"), 1.0, {arm: [] for arm in arms})
        assert Group(about, [result]).stem == f"textgen-vllm-m-r8-nvidia-h100-{mark}2026-01-02"
    given = options(tmp_path)
    plain, switched = (environment(n, given) for n in ("dop", "dop+specialize"))
    assert plain.pop("VLLM_CACHE_ROOT") != switched.pop("VLLM_CACHE_ROOT")
    assert plain == switched
    dual = environment("dop+dual", given)
    assert dual.pop("VLLM_CACHE_ROOT") not in (plain, switched)
    assert dual == {**plain, "VLLM_LORA_ENABLE_DUAL_STREAM": "1"}
    assert split("dop+dual") == ("dop", {})
    behind = environment("dop+behind", given)
    del behind["VLLM_CACHE_ROOT"]
    assert behind == {**plain, "DOP_VLLM_BESIDE": "0"}


FAKE_VLLM = {
    "__init__.py": """
import os, types
class SamplingParams:
    def __init__(self, max_tokens, temperature, ignore_eos, detokenize):
        self.max_tokens = max_tokens
class TokensPrompt(dict):
    pass
class _Engine:
    def __init__(self): self.flying, self.loras, self.most = {}, [], 0
    def add_lora(self, request):
        from vllm.lora.worker_manager import WorkerLoRAManager
        self.loras.append(WorkerLoRAManager()._load_adapter(request))
    def add_request(self, name, prompt, params, lora_request=None):
        if prompt["prompt_token_ids"] == [13]: raise ValueError("unlucky")
        self.flying[name] = [0, params.max_tokens]
        self.most = max(self.most, len(self.flying))
    def step(self):
        out = []
        for name, state in list(self.flying.items()):
            state[0] += 1
            tokens = types.SimpleNamespace(token_ids=[0] * state[0])
            finished = state[0] == state[1]
            if finished: del self.flying[name]
            out.append(types.SimpleNamespace(
                request_id=name, outputs=[tokens], finished=finished))
        print("in flight", self.most, "loras", self.loras, os.environ["VLLM_PLUGINS"], flush=True)
        return out
class LLM:
    def __init__(self, **kwargs):
        print("kwargs", kwargs, flush=True)
        self.llm_engine = _Engine()
""",
    "lora/__init__.py": "",
    "lora/request.py": """
class LoRARequest:
    def __init__(self, name, id, path): self.lora_int_id, self.lora_path = id, path
""",
    "lora/worker_manager.py": """
class Model:
    def __init__(self, id): self.id = id
    def clone(self, id): return Model(id)
    def __repr__(self): return str(self.id)
class WorkerLoRAManager:
    def _load_adapter(self, request):
        print("read", request.lora_path, flush=True)
        return Model(request.lora_int_id)
""",
    "platforms.py": """
class _Cpu:
    def is_cuda(self): return False
current_platform = _Cpu()
""",
}


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    for name, text in FAKE_VLLM.items():
        file = tmp_path / "fake" / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in [n for n in sys.modules if n.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))


def test_a_vllm_process_serves_and_ends(tmp_path, fake_vllm):
    arms = load_arms(["base", "dop"], find_model(TINY, 64), options(tmp_path))
    try:
        jobs = [Job([1, 2], 3 + i % 2, i % 4) for i in range(7)]
        for arm in arms.values():
            times = arm.run(jobs, 3)
            assert [len(t.token_s) for t in times] == [j.output for j in jobs]
            assert all(t.start_s <= t.token_s[0] <= t.token_s[-1] for t in times)
        assert arms["dop"].device_bytes() is None
        with pytest.raises(DopError, match="unlucky"):
            arms["base"].run([Job([13], 2, 0)], 1)
    finally:
        for arm in arms.values():
            arm.close()
            arm.close()
    log = (tmp_path / "work" / "dop.log").read_text()
    assert "in flight 3 loras [1, 2, 3, 4] dop" in log
    assert log.count("read /") == 1  # one file, read once for the adapters of all slots
    assert "'enable_lora': True" in log
    base = (tmp_path / "work" / "base.log").read_text()
    assert "in flight 3 loras [] \n" in base
    assert "enable_lora" not in base


def test_a_switch_reaches_vllm_and_an_arm_tells_where_its_time_goes(tmp_path, fake_vllm):
    arms = load_arms(["dop+specialize"], find_model(TINY, 64), options(tmp_path))
    try:
        text = arms["dop+specialize"].profile([Job([1, 2], 3, 0)], 1)
    finally:
        arms["dop+specialize"].close()
    assert "cumulative" in text
    assert "'specialize_active_lora': True" in (tmp_path / "work/dop+specialize.log").read_text()


def test_a_timeline_shows_kernels_past_the_middle_in_order():
    def event(name, start, end, stream=7, kind=DeviceType.CUDA):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(
            name=name, time_range=span, device_resource_id=stream, device_type=kind
        )

    kernels = [
        event("expand", 131.0, 133.5),
        event("early", 10.0, 11.0),
        event("shrink", 105.0, 108.0, stream=13),
        event("matmul", 100.0, 130.0),
        event("earlier", 1.0, 2.0),
        event("copy" * 40, 140.0, 141.0),
        event("too early", 50.0, 60.0),
        event("too early as well", 60.0, 70.0),
        event("and this", 80.0, 90.0),
    ]
    others = [event("aten::mm", 100.0, 150.0, kind=DeviceType.CPU)] * 9
    lines = timeline([*others, *kernels], rows=3).splitlines()
    assert [line.split() for line in lines] == [
        ["start", "after", "took", "stream", "kernel"],
        ["0.0", "0.0", "30.0", "7", "matmul"],
        ["5.0", "-25.0", "3.0", "13", "shrink"],  # beside the matmul
        ["31.0", "1.0", "2.5", "7", "expand"],
        [],
    ]
    assert timeline(kernels).splitlines()[-2].endswith(" " + "copy" * 15)
    assert timeline(others) == ""
    assert timeline([]) == ""


def test_adapters_that_come_and_go_are_read_every_time(tmp_path, fake_vllm):
    many = options(tmp_path, adapters=9)
    lora = llm_arguments(find_model(TINY, 64), many, True, tmp_path)
    assert (lora["max_loras"], lora["max_cpu_loras"]) == (4, 9)
    arms = load_arms(["stock"], find_model(TINY, 64), many)
    arms["stock"].close()
    log = (tmp_path / "work" / "stock.log").read_text()
    assert log.count("read /") == 4


def test_a_vllm_that_does_not_load_shows_its_log(tmp_path, fake_vllm):
    broken = tmp_path / "fake" / "vllm" / "__init__.py"
    broken.write_text("raise RuntimeError('no kernel image')\n")
    with pytest.raises(DopError, match="no kernel image"):
        load_arms(["base"], find_model(TINY, 64), options(tmp_path))


def test_a_vllm_that_crashes_is_noticed_at_once(tmp_path, fake_vllm):
    """Even if a child of it keeps the pipe open."""
    broken = tmp_path / "fake" / "vllm" / "__init__.py"
    broken.write_text(
        "import os, time\nif os.fork():\n    os.kill(os.getpid(), 9)\ntime.sleep(30)\nos._exit(0)\n"
    )
    begin = time.monotonic()
    with pytest.raises(DopError, match="base died"):
        load_arms(["base"], find_model(TINY, 64), options(tmp_path))
    assert time.monotonic() - begin < 20


def test_vllm_has_to_be_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="vLLM"):
        load_arms(["base"], find_model(TINY, 64), options(tmp_path))


def saved(folder, results, **changes):
    about = {
        "engine": "vllm", "model": "Llama-3.1-8B", "rank": 16, "slots": 64, "dtype": "bfloat16",
        "device": "NVIDIA H200", "date": "2026-01-02", "versions": {"vllm": "0.24.0"},
        "revision": "abc", "vllm_args": {}, **changes,
    }  # fmt: skip
    write_lines(folder, about, results)
    return folder


def measured(case: Case, **paces) -> CaseResult:
    fixed = case.fixed is not None and case.fixed[1] > 1
    runs = {a: [run_of(p, 1000 / p if fixed else None) for p in ps] for a, ps in paces.items()}
    return CaseResult(case, 2.0, runs)


def test_runs_of_two_gpus_in_one_table(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    one, two = Case(32, "distinct", "64:96"), Case(64, "identical", "64:96")
    first = Case(8, "distinct", "2048:1")
    paces = {"base": [100, 110], "stock": [50, 50], "dop": [90, 100]}
    a = saved(tmp_path / "a", [measured(first, **paces), measured(one, **paces)])
    b = saved(tmp_path / "b", [measured(two, **paces)], date="2026-01-03")
    again = saved(tmp_path / "again", [measured(one, base=[100], stock=[50], dop=[80])])
    other = saved(tmp_path / "r64", [measured(one, **paces)], rank=64)
    assert main(["--merge", *map(str, (a, b, again, other)), "--save-to", str(tmp_path / "o")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| batch |") == 2  # rank 64 has a table of its own
    lines = shown.splitlines()
    assert [line.split("|")[1].strip() for line in lines if "| dop " in line] == [
        "32", "64", "8", "32",
    ]  # decoding first  # fmt: skip
    assert "64:96 dop: 1.85x stock (least 1.80)" in shown  # 1.8, 2.0, 1.6 and 1.8, 2.0
    stem = tmp_path / "o" / "textgen-vllm-llama-3.1-8b-r16-nvidia-h200"
    file = stem.with_name(stem.name + "-2026-01-03.json")
    document = json.loads(file.read_text())
    assert document["date"] == "2026-01-02, 2026-01-03"
    assert {k: document[k] for k in ("revision", "device")} == {
        "revision": "abc", "device": "NVIDIA H200",
    }  # fmt: skip
    (mean,) = [m for m in document["summary"] if (m["lengths"], m["arm"]) == ("64:96", "dop")]
    assert mean["of_bound"]["least"] > mean["retention"]["least"] > 0
    svg = file.with_suffix("").with_name(file.stem + ".svg").read_text()
    assert "64:96" in svg
    assert "time to first token" in svg
    back = read(file)
    assert back.document() == document
    assert [len(r.runs["dop"]) for r in back.results] == [3, 2, 2]


def test_without_matplotlib_there_are_tables_and_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    case = Case(1, "distinct", "64:96")
    for rank in (16, 64):
        saved(tmp_path / f"r{rank}", [measured(case, stock=[1], dop=[2])], rank=rank)
    both = [str(tmp_path / "r16"), str(tmp_path / "r64")]
    assert main(["--merge", *both, "--save-to", str(tmp_path / "o")]) == 0
    assert len(list((tmp_path / "o").glob("*.json"))) == 2
    assert capsys.readouterr().out.count("no figure: matplotlib") == 2


def test_what_cannot_be_merged(tmp_path):
    case = Case(1, "distinct", "64:96")
    a = saved(tmp_path / "a", [measured(case, stock=[1], dop=[2])])
    b = saved(tmp_path / "b", [measured(case, dop=[2])])
    with pytest.raises(ConfigError, match=r"stock, dop in one file and dop in another"):
        merge([read(a), read(b)])
    for bad in ("", "{}\n", "[1]\n", '{"kind": "run"}\n{"kind": "repeat"}\n'):
        (tmp_path / "results.jsonl").write_text(bad)
        with pytest.raises(ConfigError, match="no result"):
            read(tmp_path)


class Slow:
    """An arm that takes its time; fails when asked for the 13th time."""

    def __init__(self):
        self.asked = []

    def run(self, jobs, concurrency):
        self.asked.append([job.adapter for job in jobs])
        time.sleep(0.01)
        if len(self.asked) == 13:
            raise DopError("the engine is gone.")
        return [Timing(0.0, [0.1 * (i + 1) for i in range(j.output)]) for j in jobs]

    def device_bytes(self):
        return None

    def close(self):
        self.asked.append("closed")


def bench_with(monkeypatch, arm, *more):
    monkeypatch.setattr("benchmarks.bench_textgen_lora.load", lambda *_: {"dop": arm})
    cases = ",".join(f"4/{mix}/2:3" for mix in ("distinct", "uniform", "identical"))
    return main(["--arms", "dop", "--cases", cases, "--model", "tiny", "--device", "cpu", *more])


def test_a_run_that_breaks_shows_the_cases_it_finished(tmp_path, monkeypatch, capsys):
    arm = Slow()
    with pytest.raises(DopError, match="gone"):
        bench_with(monkeypatch, arm, "--repeats", "5", "--save-to", str(tmp_path))
    assert [r.case.popularity for r in read(tmp_path).results] == ["distinct", "uniform"]
    assert capsys.readouterr().out.count("| dop ") == 2
    assert arm.asked[-1] == "closed"


def test_behind_its_budget_a_run_measures_every_case_once(tmp_path, monkeypatch):
    bench_with(
        monkeypatch, Slow(), "--repeats", "2", "--budget", "1e-3", "--save-to", str(tmp_path)
    )
    assert [len(r.runs["dop"]) for r in read(tmp_path).results] == [1, 1, 1]


def test_first_tokens_can_take_more_batches_than_steps(monkeypatch):
    monkeypatch.setattr("benchmarks.bench_textgen_lora.load", lambda *_: {"dop": arm})
    arm = Slow()
    cases = ["--cases", "2/distinct/4:3,2/distinct/4:1", "--repeats", "1", "--prefill-batches", "3"]
    main(["--arms", "dop", "--model", "tiny", "--device", "cpu", *cases, "--num-batches", "1"])
    assert len(arm.asked[:-1]) == (1 + 1) + (1 + 3)  # each case once to warm up


def test_warming_up_takes_a_batch_and_the_adapters_that_fit():
    (group,) = waves(Case(4, "distinct"), 8, 64, 16, 100)
    chosen = _warm(group, Case(4, "distinct"), 6)
    assert [job.adapter for job in chosen] == [0, 1, 2, 3, 4, 5]
    assert max(job.output for job in chosen) <= 4


def test_where_the_time_goes_stands_in_a_file(tmp_path):
    class Tells(Slow):
        def profile(self, jobs, concurrency):
            return f"{len(jobs)} requests, {concurrency} at once"

    given = SimpleNamespace(
        profile=Case(2, "distinct", "4:3"), maxlen=7, adapters=4, seed=0, save_to=tmp_path / "new"
    )
    watch({"base": Slow(), "dop": Tells()}, given, find_model(TINY, 64))
    text = (tmp_path / "new/profile.txt").read_text()
    assert text == "==== dop, b2/distinct/4:3\n\n16 requests, 2 at once\n"
    given.profile = None
    watch({"dop": None}, given, find_model(TINY, 64))


def test_a_load_asks_for_every_adapter_and_reports_memory(tmp_path, monkeypatch, capsys):
    assert load.parse("20:7") == load.Load(20, 7)
    for bad in ("20", "7:20", "a:b", "0:0"):
        with pytest.raises(ConfigError):
            load.parse(bad)
    asked = [job.adapter for job in load.jobs_of(load.Load(20, 7), 100)]
    assert {asked.count(adapter) for adapter in range(7)} == {2, 3}
    arm = Slow()
    bench_with(
        monkeypatch, arm, "--repeats", "1", "--adapters", "7", "--load", "20:7",
        "--save-to", str(tmp_path),
    )  # fmt: skip
    assert "dop: 20 of 20 requests over 7 adapters" in capsys.readouterr().out
    assert arm.asked[-2] == asked
    found = read(tmp_path).header["load"]["dop"]
    assert (found["answered"], found["bytes_before"]) == (20, None)
    grown = {**found, "bytes_before": 5 << 20, "bytes_after": (5 << 20) + 8}
    assert load.lines({"dop": grown})[0].endswith("5 MiB of the GPU before, +8 bytes after")
    with pytest.raises(ConfigError, match="--adapters 7"):
        parse(["--device", "cpu", "--adapters", "3", "--load", "20:7"])
    with pytest.raises(ConfigError, match="--save-to"):
        parse(["--device", "cpu", "--profile", "1/identical/4:4"])


def test_title_names_device_versions_and_date():
    header = {
        "model": "m", "rank": 16, "dtype": "float32", "engine": "e", "device": "d",
        "date": "2026-01-02", "versions": {"torch": "2.0"},
    }  # fmt: skip
    assert title(header) == "m, rank 16, float32, e, d, 2026-01-02 (torch 2.0)"
    assert json.dumps(header)
