"""Which packs serve a workload on a device, and in what order; the shipped ones are sound."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from pack_samples import H200, WORKLOAD, pack_at

from dop import packs
from dop.dispatch.cell import NEAR, TOGETHER, rows_per_segment
from dop.dispatch.table import Fit
from dop.errors import ConfigError, ExportError
from dop.export.load import load_cuda
from dop.export.pack import PackFile
from dop.packs.catalog import read_catalog, scan, write_catalog
from dop.packs.devices import arch_of, device_of
from dop.scenario import COLD, Scenario
from dop.workload import Workload

H100 = replace(H200, device_name="NVIDIA H100 80GB HBM3")
A100 = replace(H200, device_name="NVIDIA A100", arch="sm_80")
KEY, FP16 = WORKLOAD.key, "sgmv/float16/r16/64->64+32"


@pytest.fixture(autouse=True)
def own_shipped(tmp_path, monkeypatch):
    """Shipped packs of this test's own, and nothing remembered."""
    monkeypatch.setattr(packs, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(packs.PATH_VARIABLE, raising=False)
    packs.refresh()
    yield tmp_path / "shipped"
    packs.refresh()


def use(monkeypatch, *folders: Path) -> None:
    monkeypatch.setenv(packs.PATH_VARIABLE, os.pathsep.join(map(str, folders)))


def names(device: str, arch: str, key: str = KEY) -> list[tuple[str, str]]:
    return [(m.entry.path.stem, m.how) for m in packs.find(device, arch, key)]


def test_exact_device_then_same_architecture_then_sources(own_shipped, monkeypatch):
    pack_at(own_shipped / "h100" / "on_h100.doppack", monkeypatch, target=H100)
    pack_at(own_shipped / "h200" / "on_h200.doppack", monkeypatch, target=H200)
    pack_at(own_shipped / "a100" / "on_a100.doppack", monkeypatch, target=A100)
    write_catalog(own_shipped)
    assert names(H100.device_name, "sm_90") == [
        ("on_h100", "device"),
        ("on_h200", "arch"),
        ("on_a100", "source"),
    ]
    assert names("NVIDIA H200", "sm_90")[0] == ("on_h200", "device")
    assert names("NVIDIA A10G", "sm_86")[0] == ("on_a100", "arch")  # sm_80 code runs on sm_86
    assert {how for _, how in names("NVIDIA B200", "sm_100")} == {"source"}
    assert names("NVIDIA H200", "sm_90", "sgmv/bfloat16/r8/64->64") == []
    with pytest.raises(ExportError, match="architecture"):
        packs.find("x", "9.0", KEY)


def test_notes_say_what_is_not_exact(own_shipped, monkeypatch):
    pack_at(own_shipped / "h200" / "p.doppack", monkeypatch)
    write_catalog(own_shipped)
    (exact,) = packs.find("NVIDIA H200", "sm_90", KEY)
    assert exact.note == ""
    (other,) = packs.find("NVIDIA H100", "sm_90", KEY)
    assert "tuned on NVIDIA H200" in other.note
    (moved,) = packs.find("NVIDIA H200", "sm_90", FP16)
    assert "other 16-bit type" in moved.note


def test_folders_of_the_variable_come_first(own_shipped, tmp_path, monkeypatch):
    pack_at(own_shipped / "h200" / "shipped.doppack", monkeypatch)
    write_catalog(own_shipped)
    pack_at(tmp_path / "one" / "deep" / "one.doppack", monkeypatch, target=H100)
    pack_at(tmp_path / "two" / "two.doppack", monkeypatch, target=A100)
    use(monkeypatch, tmp_path / "one", tmp_path / "two")
    found = names("NVIDIA H200", "sm_90")
    assert found == [("one", "arch"), ("shipped", "device"), ("two", "source")]
    assert packs.folders()[:2] == (tmp_path / "one", tmp_path / "two")
    use(monkeypatch, tmp_path / "one", tmp_path / "none")
    with pytest.raises(ExportError, match="DOP_PACK_PATH"):
        packs.find("NVIDIA H200", "sm_90", KEY)


def test_an_exported_folder_counts_as_a_pack(own_shipped, tmp_path, monkeypatch):
    from pack_samples import fake_generate

    from dop.export.library import export_library
    from dop.export.select import select

    packed = pack_at(tmp_path / "p.doppack", monkeypatch)
    folder = tmp_path / "libs" / "mine"
    export_library(select(packed.path.with_suffix(".jsonl")), folder, fake_generate)
    (tmp_path / "libs" / "other").mkdir()
    (tmp_path / "libs" / "other" / "index.json").write_text('{"pages": 3}')  # not ours
    use(monkeypatch, tmp_path / "libs")
    (match,) = packs.find("NVIDIA H200", "sm_90", KEY)
    library = match.library()
    assert library.binary(library.choose(KEY, 8)).startswith(b"\x7fELF")
    assert packs.find("NVIDIA B200", "sm_100", KEY) == ()  # it carries no sources


def test_a_lookup_opens_no_shipped_pack(own_shipped, monkeypatch):
    pack_at(own_shipped / "h200" / "p.doppack", monkeypatch)
    write_catalog(own_shipped)
    packs.refresh()

    def refuse(*_):
        raise AssertionError("opened")

    with monkeypatch.context() as patch:
        patch.setattr(PackFile, "__init__", refuse)
        (match,) = packs.find("NVIDIA H200", "sm_90", KEY)
        assert packs.find("NVIDIA H200", "sm_90", KEY) == (match,)
    assert match.library() is match.library()


def test_catalogs_are_whole_or_refused(own_shipped, monkeypatch):
    pack_at(own_shipped / "h200" / "p.doppack", monkeypatch)
    written = write_catalog(own_shipped)
    assert read_catalog(own_shipped) == written == scan(own_shipped)
    assert read_catalog(own_shipped / "h200") == ()
    path = own_shipped / "catalog.json"
    data = json.loads(path.read_text())
    for spoil in (
        lambda d: d.update(version=9),
        lambda d: d["packs"][0].update(file="../p.doppack"),
        lambda d: d["packs"][0].pop("arch"),
        lambda d: d.update(packs=7),
    ):
        spoiled = json.loads(json.dumps(data))
        spoil(spoiled)
        path.write_text(json.dumps(spoiled))
        with pytest.raises(ExportError, match="damaged"):
            read_catalog(own_shipped)
    path.write_text("{")
    with pytest.raises(ExportError, match="damaged"):
        read_catalog(own_shipped)


def test_a_damaged_pack_in_a_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.doppack").write_bytes(b"PK nonsense")
    use(monkeypatch, tmp_path / "bad")
    with pytest.raises(ExportError, match=r"x\.doppack is damaged"):
        packs.find("NVIDIA H200", "sm_90", KEY)


def test_architectures_by_name(own_shipped, monkeypatch):
    known = {
        "NVIDIA H100 PCIe": "sm_90",
        "NVIDIA A100-SXM4-80GB": "sm_80",
        "NVIDIA A10G": "sm_86",
        "NVIDIA L4": "sm_89",
        "NVIDIA GeForce RTX 4090": "sm_89",
        "NVIDIA B200": "sm_100",
    }
    assert {name: arch_of(name) for name in known} == known
    with pytest.raises(ConfigError, match="--arch"):
        arch_of("A Made-up GPU")
    assert device_of("A Made-up GPU", "sm_77") == ("A Made-up GPU", "sm_77", "")
    monkeypatch.setattr("dop.measure.hostinfo.cuda_target", lambda: None)
    with pytest.raises(ConfigError, match="--device-name"):
        device_of(None, None)
    pack_at(own_shipped / "p.doppack", monkeypatch)
    write_catalog(own_shipped)
    packs.refresh()
    name, arch, note = device_of(None, None)
    assert (name, arch) == ("NVIDIA H200", "sm_90")
    assert "assumed" in note


def has_neighbour(fit: Fit, fits: Iterable[Fit]) -> bool:
    """Whether a hint may not tell a batch from another one of as many tokens."""

    def place(one: Fit) -> tuple[int, float]:
        scenario = Scenario.parse(one.scenario_key)
        return scenario.tokens, rows_per_segment(scenario)

    tokens, rows = place(fit)
    others = [place(one) for one in fits if one.scenario_key != fit.scenario_key]
    return any(t == tokens and max(r / rows, rows / r) <= NEAR for t, r in others)


AGAINST_TWIN = 0.25
"""What a shipped kernel loses in a batch, cold or warm, for the other one's sake. Tables have no
such limit: a pack that loses more wants its cold twins measured better."""


def better_twins(fits: Iterable[Fit]) -> list[Fit]:
    """Of a batch and its cold twin the one that loses less."""
    found: dict[str, Fit] = {}
    for fit in fits:
        name = fit.scenario_key.removesuffix(COLD)
        found[name] = min(fit, found.get(name, fit), key=lambda one: one.regret)
    return list(found.values())


class TestShipped:
    """The packs in the package itself."""

    folder = Path(packs.__file__).parent

    def test_the_catalog_is_what_the_packs_hold(self):
        assert read_catalog(self.folder) == scan(self.folder)
        assert read_catalog(self.folder)

    def test_they_are_small(self):
        sizes = [entry.size_bytes for entry in read_catalog(self.folder)]
        assert max(sizes) < 5 << 20
        assert sum(sizes) < 20 << 20

    def test_every_file_is_what_was_packed_and_every_table_within_its_regret(self):
        for entry in read_catalog(self.folder):
            library = load_cuda(entry.path)
            for name in library.index.files:
                library._read(name)
            limit = library.index.provenance["max_regret"]
            for key, table in library.table.workloads.items():
                Workload.parse(key)
                assert table.worst_regret <= AGAINST_TWIN, key
                for fit in better_twins(table.fits):
                    allowed = TOGETHER - 1 if has_neighbour(fit, table.fits) else limit
                    assert fit.regret <= max(limit, allowed) + 1e-3, (key, fit.scenario_key)
                if len({fit.scenario_key.split("/")[0] for fit in table.fits}) > 1:
                    assert table.between, key
