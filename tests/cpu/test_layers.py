"""The one-way flow: who may import whom, and that serving never needs TVM."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dop"

FLOW = (
    ("errors", "workload", "scenario", "target", "measurement", "effort"),
    ("config", "space"),
    ("cost_model", "search"),
    ("lowering",),
    ("measure",),
    ("database",),
    ("family", "prior", "earlier", "progress", "recorded", "tune", "engine_kernels", "collect_env"),
    ("dispatch",),
    ("export", "packs"),
    ("ops",),
    ("integrations",),
    ("report",),
    ("cli",),
)
"""The roles from left to right; those of one group may import each other."""

RANK = {role: place for place, group in enumerate(FLOW) for role in group}

LIGHT = ("space", "search", "cost_model", "database", "dispatch")
WITHOUT = {
    **dict.fromkeys(LIGHT, ("tvm", "tvm_ffi", "torch")),
    "integrations": ("tvm", "tvm_ffi", "lightgbm", "rich", "typer", "pydantic"),
    "ops": ("tvm", "tvm_ffi", "lightgbm", "rich", "typer", "pydantic", "numpy", "orjson"),
}
"""Packages that a role imports nowhere, not even inside a function."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def role_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str, package: str) -> Iterator[str]:
    """Dotted names that a module imports, inside functions too, but not for types only."""
    tree = ast.parse(source)
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in node.body
        for child in ast.walk(inner)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}: relative imports hide where they lead"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_role_has_a_place():
    roles = {role_of(path) for path in MODULES} - {"__init__", "__main__"}
    assert roles <= set(RANK), f"say in FLOW where {sorted(roles - set(RANK))} stands"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_to_its_right(path: Path):
    role = role_of(path)
    if role in ("__init__", "__main__"):
        return
    for name in imports(path.read_text(), str(path)):
        top, *rest = name.split(".")
        assert top not in WITHOUT.get(role, ()), f"{path} imports {name}"
        if top == "dop" and rest:
            target = rest[0]
            assert RANK.get(target, 0) <= RANK[role], f"{path} imports {name}, to its right"


def test_the_check_sees_imports_inside_functions_and_skips_types():
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def f():\n    import tvm.runtime\n    from dop.cli import main\n"
    )
    assert list(imports(source, "x"))[1:] == ["tvm.runtime", "dop.cli.main"]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )


def test_light_roles_load_neither_tvm_nor_torch():
    light = [p for p in MODULES if role_of(p) in LIGHT]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in light]
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "heavy = {'tvm', 'torch', 'tvm_ffi'} & set(sys.modules)\nassert not heavy, heavy"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


SERVING = ("dop.ops", "dop.packs.answer", "dop.export.load", "dop.ops.nvrtc", "dop.ops.cpu_pack")


def test_serving_needs_torch_alone():
    """What an engine's process imports brings nothing that torch had not brought already."""
    code = (
        "import importlib, sys\nimport torch\nbefore = set(sys.modules)\n"
        f"for name in {SERVING!r}: importlib.import_module(name)\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "strange = new - set(sys.stdlib_module_names) - {'dop', 'torch'}\n"
        "assert not strange, strange"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
