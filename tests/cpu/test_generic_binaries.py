"""The committed binaries of the generic kernels belong to the committed sources."""

from __future__ import annotations

import pytest

from dop.errors import BuildError, MissingDependencyError
from dop.ops.generic import loader

NAMES = [f"sm_{c}" for c in loader.CUBINS] + [loader.PTX]
ELF = b"\x7fELF"


@pytest.mark.parametrize("unit", loader.SOURCES)
def test_binaries_are_of_this_source(unit):
    assert loader.index()["sources"][unit] == loader.source_hash(unit), (
        f"{unit}.cu changed: run python -m dop.ops.generic.build and commit what it writes"
    )


@pytest.mark.parametrize("unit", loader.SOURCES)
@pytest.mark.parametrize("name", NAMES)
def test_each_binary_unpacks(unit, name):
    image = loader.read_binary(unit, name)
    if name == loader.PTX:
        assert b".target compute_80" in image or b".target sm_80" in image
    else:
        assert image.startswith(ELF)


def test_they_are_small_and_none_is_left_over():
    files = {path.name: path.stat().st_size for path in loader.FOLDER.glob("*.bin")}
    assert set(files) == set(loader.index()["files"])
    assert sum(files.values()) < 1_000_000


@pytest.mark.parametrize(
    ("capability", "name"),
    [(80, "sm_80"), (87, "sm_86"), (89, "sm_89"), (90, "sm_90"), (103, "sm_100"),
     (110, "compute_80"), (121, "sm_120"), (150, "compute_80")],
)  # fmt: skip
def test_a_device_gets_a_binary_that_it_runs(capability, name):
    assert loader.binary_for(capability) == name


def test_a_gpu_that_is_too_old_is_named():
    with pytest.raises(MissingDependencyError, match=r"7\.5"):
        loader.binary_for(75)


def test_a_damaged_binary_is_named(tmp_path, monkeypatch):
    unit = "plan"
    index = loader.index()
    file = f"{unit}-sm_90.bin"
    (tmp_path / file).write_bytes((loader.FOLDER / file).read_bytes()[:-1])
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    monkeypatch.setattr(loader, "index", lambda: index)
    with pytest.raises(BuildError, match="sm_90"):
        loader.read_binary(unit, "sm_90")
