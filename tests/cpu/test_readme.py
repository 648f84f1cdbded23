"""What README.md says can be done: its commands, options, files and links exist."""

from __future__ import annotations

import gzip
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer.main

from dop.cli.main import build_app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    ")]
DOP = [line.split("#")[0].split() for line in COMMANDS if line.startswith("dop ")]


def command_of(words: list[str]):
    """The click command that the words lead to, and the words behind it."""
    command = typer.main.get_command(build_app(words[1:]))
    rest = words[1:]
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, f"dop has no {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    return command, rest


@pytest.mark.parametrize("words", DOP, ids=" ".join)
def test_every_dop_command_and_option_exists(words):
    command, rest = command_of(words)
    known = {name for parameter in command.params for name in parameter.opts}
    for word in rest:
        if word.startswith("-"):
            assert word in known, f"{' '.join(words)}: no option {word}"


def test_there_is_a_command_to_try_and_one_to_test():
    first = next(c for c in COMMANDS if "best.py" in c)
    second = next(c for c in COMMANDS if "pytest" in c)
    for command in (first, second):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e '.[")
    ci = (ROOT / ".ci" / "run").read_text().strip().splitlines()
    assert ci[-1] == second.rpartition(".venv/bin/")[2]


def test_models_are_shipped():
    shipped = {path.stem for path in (ROOT / "dop" / "models").glob("*.json")}
    named = set(re.findall(r"--model (\S+)", README)) - {"path/to/config.json"}
    assert named <= shipped
    listed = re.search(r"shipped names \((.*?)\)", README, flags=re.DOTALL)
    assert listed
    words = re.split(r",\s*| and\s+", listed[1])
    families = {name.rpartition("-") for name in shipped}
    for word in words:
        assert word in shipped or any(size == word for _, _, size in families), word


def test_extras_exist():
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"'\.\[(\w+)\]'", README):
        assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra


def named_file(pattern: str) -> dict:
    name = re.search(rf"benchmarks/results/{pattern}", README)
    assert name
    return json.loads((ROOT / name[0]).read_text())


def rows_of_table(head: str) -> dict[str, list[str]]:
    lines = README[README.index(head) :].splitlines()
    table = [line for line in lines[2 : lines.index("")] if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: row[1:] for row in cells}


def test_vllm_figures_are_those_of_the_committed_results():
    document = named_file(r"textgen-vllm-\S+?\.json")
    assert document["device"].split(" 80GB")[0] in README
    assert document["date"] in README
    batches = {
        "1": (1, "identical"),
        "32, all different adapters": (32, "distinct"),
        "64, all different adapters": (64, "distinct"),
        "64, 8 adapters": (64, "uniform"),
        "64, one adapter": (64, "identical"),
    }
    pace = {
        (row["batch"], row["popularity"], row["arm"]): row
        for row in document["rows"]
        if row["lengths"] == "64:48"
    }
    table = rows_of_table("| batch | no LoRA |")
    assert table.keys() == batches.keys()
    for name, (*paces, ratio) in table.items():
        found = [pace[(*batches[name], arm)] for arm in ("base", "stock", "dop")]
        assert paces == [f"{row['tokens_per_s']:,.0f}" for row in found], name
        assert ratio == f"{found[2]['over_stock']:.2f}x", name
    ratios = [row["over_stock"] for (*_, arm), row in pace.items() if arm == "dop"]
    assert len(ratios) == 12
    text = " ".join(README.split())
    mean, least = statistics.geometric_mean(ratios), min(ratios)
    assert f"Geometric mean of twelve cases {mean:.2f}x, least {least:.2f}x" in text
    first = [
        row["ttft_over_stock"]
        for row in document["rows"]
        if row["lengths"] == "2048:1" and row["arm"] == "dop"
    ]
    assert f"prompts {statistics.geometric_mean(first):.2f}x faster" in text
    slots, mean, least = speed_of("llama-3.1-8b-r64", 7)
    assert f"({slots} slots, seven cases) {mean:.2f}x, least {least:.2f}x" in text
    _, mean, least = speed_of("llama-3.2-1b-r16", 10)
    assert f"shape (ten cases) {mean:.2f}x, least {least:.2f}x" in text


def speed_of(what: str, cases: int) -> tuple[int, float, float]:
    """Slots, and Dop's speed over vLLM's LoRA: geometric mean and least."""
    (file,) = (ROOT / "benchmarks/results").glob(f"textgen-vllm-{what}-nvidia-h100-*.json")
    document = json.loads(file.read_text())
    ratios = [row["over_stock"] for row in document["rows"] if row["arm"] == "dop"]
    assert len(ratios) == cases
    return document["slots"], statistics.geometric_mean(ratios), min(ratios)


def test_peers_figures_are_those_of_the_committed_results():
    document = json.loads(
        gzip.decompress(
            (ROOT / "benchmarks/results/peers-nvidia-h100-2026-11-28.json.gz").read_bytes()
        )
    )
    us = {(row["key"], row["peer"]): row["both_us"] for row in document["rows"]}
    batches = {
        "1 token": "decode:T1:distinct",
        "64 tokens, 64 adapters": "decode:T64:distinct",
        "64 tokens, 8 adapters": "decode:T64:uniform",
        "64 tokens, 1 adapter": "decode:T64:identical",
        "2,048 tokens, 1 adapter": "prefill:T2048:identical",
    }
    table = rows_of_table("| batch | Dop | SGLang v2 |")
    assert table.keys() == batches.keys()
    for name, cells in table.items():
        for peer, cell in zip(("extra", "v2", "vllm", "cublas"), cells, strict=True):
            keys = [f"{batches[name]}:{part}:r16:tight" for part in ("qkv", "o", "gate_up", "down")]
            if cell:
                assert cell == f"{sum(us[key, peer] for key in keys):.1f}", (name, peer)
    cases = {key for key, _ in us}
    speed = {
        key: min(us[key, p] for p in ("v2", "vllm", "cublas") if (key, p) in us) / us[key, "extra"]
        for key in cases
    }
    slower = sum(value < 1 for value in speed.values())
    number = "None" if slower == 0 else slower
    said = f"{number} of the {len(cases)} {'is' if slower < 2 else 'are'} slower"
    assert said in " ".join(README.split())
    assert f"worst {min(speed.values()):.2f}x" in README
    for kind, count in (("decode", 420), ("prefill", 240)):
        assert sum(key.startswith(kind) for key in speed) == count
        mean = statistics.geometric_mean(v for k, v in speed.items() if k.startswith(kind))
        assert f"{count} {kind} batches" in README
        assert f"{mean:.2f}x" in README


def test_the_operator_example_runs():
    start = COMMANDS.index("from dop import ops") - 1
    end = next(i for i, line in enumerate(COMMANDS) if line.startswith("ops.add_lora"))
    names: dict[str, object] = {}
    exec("\n".join(COMMANDS[start : end + 1]), names)
    y, x, a, b = (names[name] for name in "yxab")
    for row, slot in enumerate((0, 3, 3, -1, 7)):
        want = x[row] @ a[slot].T @ b[slot].T if slot >= 0 else torch.zeros(96)
        torch.testing.assert_close(y[row], want, rtol=1e-4, atol=1e-3)


def test_modules_and_variables_exist():
    for name in re.findall(r"python3? -m (\w+(?:\.\w+)+)", README):
        place = ROOT / name.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), name
    code = "".join(path.read_text() for path in (ROOT / "dop").rglob("*.py"))
    for name in re.findall(r"\b(DOP_[A-Z_]+)", README):
        assert f'"{name}"' in code, name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_best_py_explains_itself_without_tuning():
    result = subprocess.run(
        [sys.executable, str(ROOT / "best.py"), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0
    assert "--budget" in result.stdout


def test_it_is_short():
    assert len(README.splitlines()) <= 150
