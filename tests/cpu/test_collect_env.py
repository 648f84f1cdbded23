"""Versions where packages were unpacked by hand: the modules say what the metadata does not."""

from __future__ import annotations

import sys
import textwrap
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from dop import collect_env


@pytest.fixture(autouse=True)
def fresh():
    collect_env._versions.cache_clear()
    yield
    collect_env._versions.cache_clear()


def without_metadata(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    known = metadata.version

    def version(name: str) -> str:
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)


def unpacked(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(textwrap.dedent(text))


def test_a_module_without_metadata_says_its_version(tmp_path, monkeypatch):
    unpacked(tmp_path, "loose_package", "print('noise'); __version__ = '9.8.7'")
    unpacked(tmp_path, "broken_package", "raise OSError('no library')")
    packages = {
        "loose": ("no-such-distribution", "loose_package"),
        "broken": ("no-such-distribution", "broken_package"),
        "absent": ("no-such-distribution", "no_such_module"),
    }
    monkeypatch.setattr(collect_env, "_PACKAGES", packages)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = collect_env.versions()
    assert found["loose"] == "9.8.7"
    assert not {"broken", "absent"} & set(found)
    assert "loose_package" not in sys.modules


def test_a_module_that_is_imported_is_asked_here(monkeypatch):
    without_metadata(monkeypatch, "apache-tvm")
    monkeypatch.setitem(sys.modules, "tvm", SimpleNamespace(__version__="1.2.3", __spec__=True))
    assert collect_env.versions()["tvm"] == "1.2.3"


def test_metadata_comes_first():
    assert collect_env.versions()["torch"] == metadata.version("torch")
