"""What docs/operator.md says: its example runs, its names, files and variables exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from dop import errors, ops

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "operator.md").read_text()
BLOCKS = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", TEXT, flags=re.MULTILINE)


def test_the_example_runs():
    code = next(block for block in BLOCKS if "import torch" in block)
    names: dict[str, object] = {}
    exec("\n".join(line[4:] for line in code.splitlines()), names)
    y, x, a, b = (names[name] for name in "yxab")
    assert isinstance(y, torch.Tensor)
    ids = names["token_to_adapter"].tolist()
    want = torch.stack([x[t] @ a[s].T @ b[s].T * (s >= 0) for t, s in enumerate(ids)])
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-3)


def test_names_exist():
    for name in re.findall(r"ops\.([a-z]\w+)\(", TEXT):
        assert hasattr(ops, name), name
    for name in re.findall(r"`(\w+Error)`", TEXT):
        assert issubclass(getattr(errors, name), errors.DopError)


def test_variables_are_read_somewhere():
    code = "".join(path.read_text() for path in (ROOT / "dop").rglob("*.py"))
    for name in re.findall(r"`(DOP_[A-Z]+(?:_[A-Z]+)*)", TEXT):
        assert f'"{name}"' in code, name


def test_the_table_of_pins_is_the_committed_result():
    result = json.loads((ROOT / "tests" / "engines" / "pins.json").read_text())
    assert result["dop_requires"] == ["torch>=2.6"]
    assert '"torch>=2.6"' in (ROOT / "pyproject.toml").read_text()
    for row in result["engines"]:
        assert list(row["added"]) == ["dop"]
        assert not row["removed"]
        assert not row["moved"]
        name, _, version = row["engine"].partition("==")
        pins = row["pinned_by_the_engine"]
        alone, beside = row["packages_alone"], row["packages_beside_dop"]
        line = f"| {name} {version} | {alone} | {beside} (Dop) | none | torch {pins['torch']}, "
        assert line + f"apache-tvm-ffi {pins['apache-tvm-ffi']} |" in TEXT


def test_links_lead_somewhere():
    for path in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
