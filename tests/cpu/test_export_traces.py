"""The traces that packs and libraries carry: whole, in every type, and added to older packs."""

from __future__ import annotations

import json
import zipfile

import pytest
from pack_samples import TRACES as SAMPLES
from pack_samples import fake_generate, pack_at

from dop.cli.main import main
from dop.errors import ExportError
from dop.export.library import export_library
from dop.export.load import load
from dop.export.pack import PackFile, write_pack
from dop.export.select import select
from dop.export.traces import TRACES, add_traces, dump, parse
from dop.export.transfer import translated


@pytest.fixture
def packed(tmp_path, monkeypatch):
    return pack_at(tmp_path / "p.doppack", monkeypatch)


def named(pack: PackFile) -> set[str]:
    """Every key that the tables name as a kernel or as the fastest of a batch."""
    tables = pack.index.table.workloads.values()
    shipped = {key for table in tables for key in table.trace_keys}
    return shipped | {fit.best_trace_key for table in tables for fit in table.fits}


def test_every_trace_that_the_table_names_is_there_with_its_sketch(packed):
    pack = PackFile(packed.path)
    known = parse(pack.read(TRACES), packed.path)
    assert known.keys() == named(pack)
    assert all(one.trace.key == key for key, one in known.items())
    assert {one.sketch for one in known.values()} == {"made/up"}
    twin = translated(SAMPLES["b"], "bfloat16", "float16")
    assert {SAMPLES["b"].key, twin.key} <= known.keys()


def test_the_fastest_of_a_batch_is_there_even_if_another_is_shipped_for_it(tmp_path, monkeypatch):
    times = {"T8/distinct/8": {"a": 10.0, "b": 10.2}, "T8/identical/1": {"a": 20.0, "b": 10.0}}
    packed = pack_at(tmp_path / "p.doppack", monkeypatch, times=times, dtypes=("bfloat16",))
    shipped = {info.trace_key for info in load(packed.path).kernels.values()}
    known = parse(PackFile(packed.path).read(TRACES), "")
    assert shipped == {SAMPLES["b"].key}
    assert known[SAMPLES["a"].key].trace == SAMPLES["a"]


def test_in_another_type_intrinsics_are_its_own(packed):
    data = PackFile(packed.path).read(TRACES)
    twin = translated(SAMPLES["b"], "bfloat16", "float16")
    for key in (SAMPLES["b"].key, twin.key):
        assert parse(data, "", "float16")[key].trace == twin
        assert parse(data, "", "bfloat16")[key].trace == SAMPLES["b"]
    assert parse(data, "", "float32")[twin.key].trace == twin


def test_a_library_has_them_too(packed, tmp_path):
    selection = select(packed.path.with_suffix(".jsonl"))
    export_library(selection, tmp_path / "lib", fake_generate)
    assert TRACES in load(tmp_path / "lib").index.files
    known = parse((tmp_path / "lib" / TRACES).read_bytes(), "")
    assert {k.trace_key for k in selection.kernels} <= known.keys()


def test_a_pack_of_an_older_version_gets_the_same_file(packed, capsys):
    whole = packed.path.read_bytes()
    pack = PackFile(packed.path)
    wanted = pack.read(TRACES)
    with zipfile.ZipFile(packed.path) as archive:
        index = json.loads(archive.read("index.json"))
    files = {name: pack.read(name) for name in pack.index.files if name != TRACES}
    write_pack(packed.path, index, files)
    assert TRACES not in PackFile(packed.path).index.files
    log = packed.path.with_suffix(".jsonl")
    assert main(["export", "traces", str(packed.path), "--log", str(log), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["traces"], told["missing"]) == (len(named(pack)), 0)
    assert PackFile(packed.path).read(TRACES) == wanted
    assert packed.path.read_bytes() == whole
    with pytest.raises(ExportError, match="no trace of"):
        add_traces(packed.path, [])


def test_what_is_damaged_is_one_error_that_names_it(packed):
    data = PackFile(packed.path).read(TRACES)
    content = json.loads(data)
    assert dump(parse(data, "")) == data
    for spoil in (
        lambda c: c.pop("steps"),
        lambda c: c["steps"].append(["??", 1]),
        lambda c: c["traces"].update(x=["s", [10**6]]),
        lambda c: c["traces"].update(x=["s", [-1]]),
        lambda c: c["traces"].update(x=["s", [0] * 600]),
        lambda c: c["traces"].update(x=7),
        lambda c: c.update(traces=[1]),
    ):
        spoiled = json.loads(json.dumps(content))
        spoil(spoiled)
        with pytest.raises(ExportError, match=r"p\.doppack.*damaged"):
            parse(json.dumps(spoiled).encode(), packed.path)
    with pytest.raises(ExportError, match="damaged"):
        parse(b"{", packed.path)
