"""Where unpacked sources of the engines are, for tests that read a module of theirs by its file.

DOP_VLLM_SOURCE and DOP_SGLANG_SOURCE name folders that hold the package `vllm` or `sglang`
(what a wheel unpacks to); the installed package is used otherwise. Without either, tests skip.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest


def package_folder(package: str) -> Path:
    """Folder of an engine's package; skips the test if there is none."""
    given = os.environ.get(f"DOP_{package.upper()}_SOURCE")
    if given:
        folder = Path(given) / package
        assert folder.is_dir(), f"{folder} is not there"
        return folder
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed; DOP_{package.upper()}_SOURCE is not set")
    return Path(next(iter(spec.submodule_search_locations)))


@contextmanager
def stubbed(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Put stand-ins for an engine's other modules into sys.modules for a while."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def stub(name: str, **attributes: object) -> ModuleType:
    """A module with the given content."""
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


def load_file(path: Path, name: str) -> ModuleType:
    """A module from its file alone; what it imports must be importable or stubbed."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop(name, None)
    return module


class Quiet:
    """A logger that says nothing under any of the names that engines use."""

    def __getattr__(self, name: str):
        return lambda *_, **__: None
