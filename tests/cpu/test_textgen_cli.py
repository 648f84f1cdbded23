import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.bench_textgen_lora import main, parse
from dop.errors import ConfigError

SMALL = ["--device", "cpu", "--model", "tiny", "--lora-rank", "4", "--repeats", "2"]


def test_all_arms_on_a_cpu(tmp_path, capsys):
    arguments = [*SMALL, "--cases", "3/distinct/4:5,2/uniform/punica", "--maxlen", "12"]
    assert main([*arguments, "--save-to", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "run"
    assert lines[0]["versions"]["transformers"]
    repeats = [line for line in lines if line["kind"] == "repeat"]
    rows = [line for line in lines if line["kind"] == "row"]
    assert len(rows) == 2 * 4
    assert len(repeats) == 2 * 4 * 2
    fixed = [r for r in rows if r["lengths"] == "4:5"]
    assert {r["arm"] for r in fixed} == {"base", "stock", "dop", "loop"}
    assert all(r["tokens_per_s"] > 0 and r["ttft_p99_ms"] > 0 for r in rows)
    assert all(r["step_ms"] > 0 for r in fixed)
    for row in rows:
        assert (row["retention"] is None) == (row["arm"] == "base")
        if row["arm"] != "base":
            assert 0 < row["bound"] < 1
    assert {line["tokens"] for line in repeats if line["case"] == "b3/distinct/4:5"} == {15}
    assert (tmp_path / "plot.svg").read_text().lstrip().startswith("<?xml")
    for row in (tmp_path / "table.md").read_text().splitlines()[2:]:
        assert row in shown


@pytest.mark.parametrize(
    "bad",
    [
        ["--arms", "best"],
        ["--arms", "base+specialize"],
        ["--load", "many"],
        ["--engine", "vllm", "--device", "cpu"],
        ["--lora-popularity", "often"],
        ["--batch-size", "many"],
        ["--cases", "1/distinct"],
        ["--repeats", "0"],
    ],
)
def test_options_that_make_no_sense(bad):
    with pytest.raises(ConfigError):
        parse(bad)


def test_more_adapters_than_slots(capsys):
    few = ["--arms", "dop", "--cases", "4/distinct/3:3", "--slots", "2", "--adapters", "5"]
    assert main([*SMALL, *few, "--num-batches", "3"]) == 0
    assert "b4/distinct/3:3: dop" in capsys.readouterr().out


def test_arms_of_another_engine():
    with pytest.raises(ConfigError, match="tuned-json"):
        main([*SMALL, "--arms", "tuned-json"])
