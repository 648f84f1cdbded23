"""What a wheel holds: every file that the code reads, nothing of the rest."""

from __future__ import annotations

import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SHIPPED = ("models/SOURCES.md",)


def package_data() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text()
    block = text.partition("\ndop = [\n")[2].partition("]")[0]
    return [line.strip().strip('",') for line in block.splitlines() if line.strip()]


def data_files() -> list[str]:
    found = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "dop"], capture_output=True, text=True
    )
    if found.returncode or not found.stdout:
        pytest.skip("not a git checkout")
    names = [name.removeprefix("dop/") for name in found.stdout.splitlines()]
    return [name for name in names if not name.endswith(".py") and name not in NOT_SHIPPED]


def test_every_data_file_is_in_the_wheel():
    patterns = package_data()
    missing = [n for n in data_files() if not any(fnmatch(n, pattern) for pattern in patterns)]
    assert not missing, f"name them in pyproject.toml, package-data: {missing}"


def test_every_pattern_matches_something():
    files = data_files()
    for pattern in package_data():
        assert any(fnmatch(name, pattern) for name in files), pattern


def test_what_is_needed_at_run_time_is_there():
    files = data_files()
    for suffix in (".bin", ".cu", ".cuh", ".doppack", ".json", ".c"):
        assert any(name.endswith(suffix) for name in files), suffix
