"""`dop export`: one line for every error, whole files or none."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from export_logs import CPU, SM_90, record, write_log
from test_cuda_header import ALONE, TRACES, fake_generate

from dop.cli.main import main
from dop.errors import ExportError, Failure
from dop.export.files import write_file, write_folder
from dop.scenario import named
from dop.workload import Workload

pytest.importorskip("tvm")
WORKLOAD = Workload("o", 64, (64,), 8, "bfloat16")
FAST, SLOW = TRACES["3"], TRACES["2"]
OTHER = replace(SM_90, device_name="another GPU")


@pytest.fixture(autouse=True)
def small_kernels(monkeypatch):
    monkeypatch.setattr("dop.lowering.codegen.generate", fake_generate)


def log(path: Path, *targets) -> Path:
    records = []
    for target in targets:
        for tokens in (1, 8):
            scenario = named("distinct", tokens)
            records.append(record(WORKLOAD, scenario, FAST, 1e-6, target=target))
            records.append(record(WORKLOAD, scenario, SLOW, 3e-6, target=target))
    return write_log(path, records)


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_cuh_writes_the_header_and_tells_the_table(tmp_path, capsys):
    source = log(tmp_path / "log.jsonl", SM_90)
    output = tmp_path / "src" / "sgmv.cuh"
    assert main(["export", "cuh", "--log", str(source), "-o", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == [f"bf16_r8_64_64_{FAST.key}"]
    assert found["bytes"] == output.stat().st_size
    assert found["worst_regret"] == {WORKLOAD.key: 0.0}
    assert found["provenance"]["log_sha256"] in output.read_text()
    before = output.read_bytes()
    assert main(["export", "cuh", "--log", str(source), "-o", str(output)]) == 0
    assert output.read_bytes() == before
    assert "T8/distinct/8" in capsys.readouterr().out
    assert os.listdir(output.parent) == ["sgmv.cuh"]


def test_cuh_tells_the_table_of_one_gpu_and_ships_the_ranks_asked_for(tmp_path, capsys):
    scenario, other = named("distinct", 8), replace(WORKLOAD, rank=16)
    times = ((WORKLOAD, FAST, 3e-6), (WORKLOAD, ALONE, 1e-6), (other, FAST, 1e-6))
    source = write_log(tmp_path / "log.jsonl", [record(w, scenario, t, s) for w, t, s in times])
    command = ["export", "cuh", "--log", str(source), "-o", str(tmp_path / "sgmv.cuh")]
    assert main([*command, "--ranks", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == [f"bf16_r8_64_64_{FAST.key}", f"bf16_r8_64_64_{ALONE.key}"]
    assert found["own"]["arch"] == "sm_90a"
    assert found["own"]["worst_regret"] == {WORKLOAD.key: 0.0}
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "Where it is compiled for sm_90a:" in told
    assert "3 kernels for 2 workloads" in told
    assert main([*command, "--ranks", "32"]) == 2
    assert "no record of those workloads" in one_line(capsys)


def test_a_cpu_device_in_the_log_does_not_disturb_the_header(tmp_path):
    source = log(tmp_path / "log.jsonl", CPU, SM_90)
    output = tmp_path / "sgmv.cuh"
    assert main(["export", "cuh", "--log", str(source), "-o", str(output)]) == 0
    assert SM_90.device_name in output.read_text()


def test_several_devices_need_a_choice(tmp_path, capsys):
    source = log(tmp_path / "log.jsonl", SM_90, OTHER)
    command = ["export", "cuh", "--log", str(source), "-o", str(tmp_path / "sgmv.cuh")]
    assert main(command) == 2
    line = one_line(capsys)
    assert "--device" in line
    assert "'another GPU'" in line
    assert not (tmp_path / "sgmv.cuh").exists()
    assert main([*command, "--device", "another GPU"]) == 0
    assert "another GPU" in (tmp_path / "sgmv.cuh").read_text()
    capsys.readouterr()
    assert main([*command, "--device", "no such"]) == 2
    assert "'no such'" in one_line(capsys)


@pytest.mark.parametrize("verb", ["cuh", "library"])
def test_missing_empty_and_useless_logs(tmp_path, capsys, verb):
    output = tmp_path / "out"
    command = ["export", verb, "-o", str(output), "--log"]
    assert main([*command, str(tmp_path / "none.jsonl")]) == 2
    assert "does not exist" in one_line(capsys)
    (tmp_path / "empty.jsonl").write_text("")
    assert main([*command, str(tmp_path / "empty.jsonl")]) == 2
    assert "empty" in one_line(capsys)
    (tmp_path / "text.jsonl").write_text("hello\nworld\n")
    assert main([*command, str(tmp_path / "text.jsonl")]) == 2
    assert "no record" in one_line(capsys)
    failed = record(WORKLOAD, named("distinct", 8), FAST, 0, failure=Failure.COMPILE)
    useless = write_log(tmp_path / "useless.jsonl", [failed])
    assert main([*command, str(useless)]) == 2
    assert "no usable record" in one_line(capsys)
    assert main([*command, str(tmp_path)]) == 2
    one_line(capsys)
    assert not output.exists()


def test_a_cpu_log_gives_no_header(tmp_path, capsys):
    source = log(tmp_path / "log.jsonl", CPU)
    assert main(["export", "cuh", "--log", str(source), "-o", str(tmp_path / "x.cuh")]) == 2
    assert "no record of a cuda device" in one_line(capsys)


def test_what_cannot_be_written_is_left_as_it_was(tmp_path, capsys, monkeypatch):
    source = log(tmp_path / "log.jsonl", SM_90)
    output = tmp_path / "sgmv.cuh"
    output.write_text("old")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert main(["export", "cuh", "--log", str(source), "-o", str(folder)]) == 2
    assert "is a folder" in one_line(capsys)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(["export", "cuh", "--log", str(source), "-o", str(output)]) == 2
    assert "No space left" in one_line(capsys)
    assert output.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["folder", "log.jsonl", "sgmv.cuh"]


def test_folders_are_replaced_whole_and_never_somebody_elses(tmp_path, monkeypatch):
    path = tmp_path / "lib"
    write_folder(path, {"index.json": b"1", "a": b"a"}, marker="index.json")
    write_folder(path, {"index.json": b"2"}, marker="index.json")
    assert os.listdir(path) == ["index.json"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(ExportError, match="not an export"):
        write_folder(mine, {"index.json": b"1"}, marker="index.json")
    assert os.listdir(mine) == ["thesis.txt"]

    refusals = []

    def refuse(source, target):
        if Path(target) == path and not refusals:
            refusals.append(source)
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        os.replace(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(ExportError, match="Permission denied"):
        write_folder(tmp_path / "lib", {"index.json": b"3"}, marker="index.json")
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["lib", "mine"]
    assert (path / "index.json").read_bytes() == b"2"


def test_files_keep_the_usual_permissions(tmp_path):
    write_file(tmp_path / "f", b"x")
    (tmp_path / "g").write_bytes(b"x")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "g").stat().st_mode


def test_a_larger_regret_ships_fewer_kernels(tmp_path, capsys):
    records = [
        record(WORKLOAD, named("distinct", 1), FAST, 1.0e-6),
        record(WORKLOAD, named("distinct", 1), SLOW, 1.2e-6),
        record(WORKLOAD, named("distinct", 8), FAST, 1.2e-6),
        record(WORKLOAD, named("distinct", 8), SLOW, 1.0e-6),
    ]
    source = write_log(tmp_path / "log.jsonl", records)
    counts = []
    for regret in ("5", "25"):
        command = ["export", "cuh", "--log", str(source), "--regret", regret, "--json"]
        assert main([*command, "-o", str(tmp_path / "sgmv.cuh")]) == 0
        counts.append(len(json.loads(capsys.readouterr().out)["kernels"]))
    assert counts == [2, 1]


def test_odd_numbers_in_options_and_logs(tmp_path, capsys):
    late = record(WORKLOAD, named("distinct", 8), FAST, 1e-6, timestamp=10**18)
    source = write_log(tmp_path / "log.jsonl", [late])
    command = ["export", "cuh", "--log", str(source), "-o", str(tmp_path / "sgmv.cuh")]
    assert main(command) == 0
    assert f"newest    {10**18} s after 1970" in (tmp_path / "sgmv.cuh").read_text()
    capsys.readouterr()
    for regret in ("nan", "-1"):
        assert main([*command, "--regret", regret]) == 2
        one_line(capsys)
