"""What README.md says can be done: its commands, options, files and links exist."""

from __future__ import annotations

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


def test_the_figures_are_those_of_the_committed_results():
    name = re.search(r"\((benchmarks/results/cuda-\S+\.json)\)", README)
    assert name
    document = json.loads((ROOT / name[1]).read_text())
    text = " ".join(README.split())
    rows, figures = document["rows"], document["summary"]
    assert document["device"] in text
    assert document["date"] in text
    assert f"over {len(rows)} cases" in text
    assert f"Dop is {figures['geomean']:.2f}x as fast" in text
    assert f"untuned default {figures['default_geomean']:.2f}x" in text
    assert f"the worst {figures['min']:.2f}x" in text
    slower = sum(row["speedup"] < 1 for row in rows)
    assert {9: "Nine"}.get(slower, str(slower)) + " cases are slower than torch" in text
    better = [min(r["loop_us"], r["bmm_us"]) / r["dop_us"] for r in rows]
    assert statistics.geometric_mean(better) == pytest.approx(figures["geomean"])


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
