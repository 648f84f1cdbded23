"""`dop explain`: which record serves a batch, why, and what serves where none does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pack_samples import TIMES, TRACES, WORKLOAD, pack_at

from dop import packs
from dop.cli.main import main
from dop.errors import ConfigError
from dop.packs.answer import Batch, explain
from dop.packs.catalog import write_catalog
from dop.workload import Workload

KEY = WORKLOAD.key
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def pack(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(packs, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(packs.PATH_VARIABLE, raising=False)
    monkeypatch.setattr("dop.measure.hostinfo.cuda_target", lambda: None)
    packed = pack_at(tmp_path / "shipped" / "h200" / "p.doppack", monkeypatch)
    write_catalog(tmp_path / "shipped")
    packs.refresh()
    yield packed.path
    packs.refresh()


def ask(tokens, adapters=None, workload=WORKLOAD, device="NVIDIA H200", arch="sm_90"):
    return explain(Batch(workload, tokens, adapters, device, arch))


def reasons(answer) -> str:
    return "\n".join(answer.reasons)


def test_a_measured_batch_names_record_times_and_alternatives(pack):
    answer = ask(64, 1)
    assert answer.served_by == "pack"
    assert answer.trace == TRACES["b"].key
    assert answer.pack == str(pack)
    assert answer.bucket == 64
    assert "4 + min(64, slots)" in answer.form
    first = answer.evidence[0]
    assert first.scenario == "T64/identical/1"
    assert first.seconds == pytest.approx(20e-6)
    assert first.regret == 0
    (other,) = first.alternatives  # a wins where b does not, so c is not shipped
    assert other.trace_key == TRACES["a"].key
    assert other.seconds == pytest.approx(80e-6)
    assert other.regret == pytest.approx(80 / 20 - 1)
    assert answer.provenance["records"] == 15
    text = answer.text()
    for word in (TRACES["b"].key, "20.00 us", "regret 0.0%", "H200", "p.doppack", "floor"):
        assert word in text


def test_buckets_between_and_beyond_say_what_they_are(pack):
    assert "interpolated between 8 and 64" in reasons(ask(20, 20))
    assert "next larger bucket, 24" in reasons(ask(20, 20))
    assert "extrapolated" in reasons(ask(100, 100))
    assert "more than the largest bucket, 512" in reasons(ask(4096, 64))
    assert "the bucket of 8 (measured)" in reasons(ask(8, 8))
    assert {e.scenario for e in ask(20, 20).evidence} == {"T8/distinct/8", "T64/distinct/64"}


def test_unknown_adapters_tell_the_loss(pack):
    answer = ask(8)
    # in 8 tokens a loses 26 % in the geometric mean, b 49 %, and c 25 %, which a is near enough to
    assert answer.trace == TRACES["a"].key
    assert answer.worst == pytest.approx(1.0)
    assert answer.worst_scenario == "T8/identical/1"
    assert "CUDA graph" in reasons(answer)
    assert f"{answer.worst:.1%}" in reasons(answer)
    assert {e.scenario for e in answer.evidence} == {k for k in TIMES if k.startswith("T8/")}


def test_the_answer_is_the_choice_of_the_run_time(pack):
    library = packs.find("NVIDIA H200", "sm_90", KEY)[0].library()
    for tokens in (1, 5, 8, 9, 31, 64, 65, 700):
        for adapters in (None, 1, tokens):
            assert ask(tokens, adapters).trace == library.choose(KEY, tokens, adapters).trace_key


def test_another_gpu_of_the_architecture_is_told_so(pack):
    answer = ask(8, 8, device="NVIDIA H100")
    assert answer.served_by == "pack"
    assert "tuned on NVIDIA H200" in reasons(answer)


def test_older_gpus_build_what_they_can_and_fall_back(pack):
    row = ask(64, 64, device="NVIDIA A100", arch="sm_80")
    assert row.served_by == "nvrtc"
    assert "NVRTC" in reasons(row)
    tile = ask(64, 1, device="NVIDIA A100", arch="sm_80")  # that kernel needs sm_90
    assert tile.served_by == "generic"
    assert "source needs sm_90" in reasons(tile)
    assert ask(8, 8, device="NVIDIA V100", arch="sm_70").served_by == "nothing"


def test_a_rank_that_was_not_tuned_names_fallback_and_way_out(pack):
    answer = ask(8, 8, Workload("qkv", 64, (64, 32), 12, "bfloat16"))
    assert answer.served_by == "generic"
    text = reasons(answer)
    assert "strides" in text
    assert "ranks 16" in text
    assert "ranks=12" in text
    assert "33%" in text
    larger = ask(8, 8, Workload("qkv", 64, (64, 32), 24, "bfloat16"))
    assert "none of these is larger" in reasons(larger)


def test_a_layer_that_was_not_tuned(pack):
    assert "dop tune" in reasons(ask(8, 8, Workload("o", 64, (64,), 16, "bfloat16")))
    cpu = ask(8, 8, Workload("qkv", 64, (64, 32), 16, "float32"))
    assert cpu.served_by == "torch"


def test_impossible_batches_are_refused():
    for tokens, adapters in ((0, None), (8, 9), (8, 0)):
        with pytest.raises(ConfigError):
            ask(tokens, adapters)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["explain", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command_in_words_and_json(pack, capsys):
    code, text, _ = run(capsys, "--workload", KEY, "--tokens", "64", "--adapters", "1")
    assert code == 0
    assert TRACES["b"].key in text
    code, text, error = run(
        capsys, "--workload", KEY, "--tokens", "64", "--device-name", "NVIDIA H100", "--json"
    )
    (answer,) = json.loads(text)
    assert answer["served_by"] == "pack"
    assert answer["batch"]["adapters"] is None
    assert answer["batch"]["workload"]["rank"] == 16
    assert error == ""
    code, text, _ = run(capsys, "-m", "Llama-3.1-8B", "--rank", "24", "--tokens", "8", "--json")
    assert [a["served_by"] for a in json.loads(text)] == ["generic"] * 4
    code, text, _ = run(capsys, "-m", "Llama-3.1-8B", "--layer", "qkv", "--tokens", "8")
    assert text.startswith("qkv_proj: sgmv/bfloat16/r16/4096->4096+1024+1024")


def test_the_command_prints_tables_of_packs_and_logs(pack, capsys):
    code, text, _ = run(capsys, "--workload", KEY, "--table")
    assert code == 0
    assert "T64/identical/1" in text
    assert "not measured" in text
    assert "loses at most" in text
    log = str(pack.with_suffix(".jsonl"))
    code, text, _ = run(capsys, "--log", log, "--table")
    assert "Every measured token count left out" not in text  # two counts leave nothing between
    code, text, _ = run(capsys, "--log", log, "--table", "--json")
    assert KEY in json.loads(text)["table"]["workloads"]
    code, text, _ = run(capsys, "--log", log, "--tokens", "64", "--adapters", "1")
    assert "once the log is exported" in text
    assert TRACES["b"].key in text


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--tokens", "8"], "--model"),
        (["--workload", KEY], "--tokens"),
        (["--workload", "nonsense", "--tokens", "8"], "workload key"),
        (["-m", "nobody", "--tokens", "8"], "nobody"),
        (["-m", "Llama-3.1-8B", "--layer", "lm_head", "--tokens", "8"], "qkv_proj"),
        (["--workload", KEY, "--tokens", "8", "--adapters", "9"], "adapters"),
        (["--workload", KEY, "--tokens", "8", "--device-name", "Abacus"], "--arch"),
        (["--workload", KEY, "--tokens", "8", "--pack", "none.doppack"], "does not exist"),
        (["--log", "none.jsonl", "--table"], "does not exist"),
        (["--workload", "sgmv/bfloat16/r4/8->8", "--table"], "no pack holds"),
        (["--layer", "qkv", "--tokens", "8"], "--model"),
    ],
)
def test_errors_are_one_line(arguments, why, capsys):
    code, _, error = run(capsys, *arguments)
    assert code == 2
    lines = [line for line in error.splitlines() if not line.startswith("no GPU here")]
    assert len(lines) == 1
    assert why in lines[0]


BASE_INSTALL = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tvm", "torch", "orjson", "typer", "rich", "numpy"):
            raise ModuleNotFoundError(f"{name} must not be needed", name=name)
sys.meta_path.insert(0, Refuse())
from dop.packs.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_works_without_the_tuners_packages():
    def ask_process(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BASE_INSTALL, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    device = ("--device-name", "NVIDIA H200")
    done = ask_process("--model", "Llama-3.1-8B", "--tokens", "32", "--json", *device)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers[0]["batch"]["workload"]["name"] == "qkv_proj"
    wrong = ask_process("--model", "nobody", "--tokens", "32", *device)
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1


def test_slots_bound_an_unknown_batch(capsys):
    few = explain(Batch(WORKLOAD, 64, None, "NVIDIA H200", "sm_90", 1))
    assert few.trace == ask(64, 1).trace
    assert few.worst is not None
    assert few.worst < ask(64).worst
    assert "no more than 1 adapters" in reasons(few)
    assert [e.scenario for e in few.evidence] == ["T64/identical/1"]
    assert "64 tokens, unknown adapters, 1 slots" in few.text()
    assert main(["explain", "--workload", KEY, "--tokens", "64", "--slots", "1"]) == 0
    out = capsys.readouterr().out
    assert few.kernel in out
    assert f"{few.worst:.1%}" in out
    with pytest.raises(ConfigError, match="0 slots"):
        Batch(WORKLOAD, 64, None, "NVIDIA H200", "sm_90", 0)
