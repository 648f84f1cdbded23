"""Packs: one small file, the same bytes for the same log, lazy, and honest when damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from export_logs import records_of, write_log
from pack_samples import H200, TIMES, TRACES, WORKLOAD, fake_generate, pack_at, trace

from dop.errors import ConfigError, ExportError, Failure
from dop.export import reuse
from dop.export.dtypes import parse_dtypes
from dop.export.index import runs_on
from dop.export.load import CudaLibrary, load
from dop.export.make_pack import TILE_SIZES
from dop.export.pack import SOURCES, PackFile, write_pack
from dop.export.select import select
from dop.export.transfer import translated
from dop.measurement import Measurement
from dop.space.step import PragmaStep, SplitStep
from dop.space.trace import Trace

ROOT = Path(__file__).parents[2]
FP16 = "sgmv/float16/r16/64->64+32"


@pytest.fixture
def packed(tmp_path, monkeypatch):
    return pack_at(tmp_path / "p.doppack", monkeypatch)


def test_a_pack_serves_what_the_log_holds(packed):
    library = load(packed.path)
    assert isinstance(library, CudaLibrary)
    assert set(library.workloads) == {WORKLOAD.key, FP16}
    info = library.choose(WORKLOAD.key, 64, 1)
    assert info.trace_key == TRACES["b"].key
    assert info.tile_rows == 16
    assert info.launches[0].dependent
    assert info.launches[0].grid == ("tiles", "2", "1")
    assert info.min_arch == 90  # it waits for its predecessor
    assert library.binary(info).startswith(b"\x7fELFsm_90a")
    assert library.source(info) == fake_generate(WORKLOAD, TRACES["b"], None).source
    assert library.choose(WORKLOAD.key, 64, 64).min_arch == 80
    provenance = library.index.provenance
    assert provenance["device"] == "NVIDIA H200"
    assert len(provenance["log_sha256"]) == 64
    assert provenance["max_regret"] == 0.05


def test_the_table_in_a_pack_decides_as_the_log_does(packed):
    table = select(packed.path.with_suffix(".jsonl")).table.workloads[WORKLOAD.key]
    shipped = load(packed.path).table.workloads[WORKLOAD.key]
    for tokens in (1, 7, 8, 9, 20, 64, 300, 9999):
        for adapters in (None, 1, 2, tokens):
            assert shipped.choose(tokens, adapters) == table.choose(tokens, adapters)
    assert shipped.worst_regret == pytest.approx(table.worst_regret, abs=1e-3)


def test_the_other_type_is_built_for_real_and_marked(packed):
    library = load(packed.path)
    for tokens, adapters in ((8, 8), (64, 1)):
        info = library.choose(FP16, tokens, adapters)
        assert info.transferred_from == WORKLOAD.key
        assert "f16" in library.source(info)
        assert "bf16" not in library.source(info)
        native = library.choose(WORKLOAD.key, tokens, adapters)
        assert native.transferred_from == ""
        assert library.binary(native) != library.binary(info)
    assert library.index.provenance["transferred"] == [FP16]
    moved = translated(TRACES["b"], "bfloat16", "float16")
    assert moved.steps[1].intrinsic == "mma_f16"
    assert library.choose(FP16, 64, 1).trace_key == moved.key


def test_what_was_tuned_in_a_type_is_not_transferred(tmp_path, monkeypatch):
    only = pack_at(tmp_path / "p.doppack", monkeypatch, dtypes=("bfloat16",))
    assert load(only.path).workloads == (WORKLOAD.key,)
    with pytest.raises(ExportError, match="nothing for float32"):
        pack_at(tmp_path / "p.doppack", monkeypatch, dtypes=("float32",))
    assert parse_dtypes("fp16, bf16,fp16") == ("float16", "bfloat16")
    with pytest.raises(ConfigError, match="int8"):
        parse_dtypes("int8")


def test_same_log_same_bytes_and_equal_binaries_once(packed, tmp_path, monkeypatch):
    before = packed.path.read_bytes()
    pack_at(packed.path, monkeypatch)
    assert packed.path.read_bytes() == before
    # both kernels generate the same code
    same = {"a": TRACES["a"], "b": trace(16), "c": TRACES["a"]}
    monkeypatch.setattr("pack_samples.TRACES", same)
    twice = pack_at(
        tmp_path / "q.doppack", monkeypatch, generate=lambda w, t, g: fake_generate(w, trace(2), g)
    )
    names = zipfile.ZipFile(twice.path).namelist()
    assert len([n for n in names if n.endswith(".cubin")]) == 2  # one per type, not per kernel
    assert len(load(twice.path).kernels) > 2


def test_sources_are_small_and_may_be_left_out(packed, tmp_path, monkeypatch):
    members = {m.filename: m for m in zipfile.ZipFile(packed.path).infolist()}
    assert members[SOURCES].compress_size < members[SOURCES].file_size / 5
    without = pack_at(tmp_path / "q.doppack", monkeypatch, sources=False)
    library = load(without.path)
    assert library.source(next(iter(library.kernels.values()))) is None
    assert without.size_bytes < packed.size_bytes


def test_a_source_of_one_architecture_is_not_shipped(tmp_path, monkeypatch):
    def with_wgmma(workload, steps, target):
        code = fake_generate(workload, steps, target)
        body = "wgmma.mma_async.sync" if code.tile_rows else ""
        return SimpleNamespace(**{**vars(code), "source": f"{code.source}// {body}\n"})

    packed = pack_at(tmp_path / "p.doppack", monkeypatch, generate=with_wgmma)
    library = load(packed.path)
    for info in library.kernels.values():
        assert (library.source(info) is None) == (info.tile_rows > 0)
        assert library.binary(info)


def test_opening_reads_the_index_only(packed, monkeypatch):
    seen = []
    member = PackFile._member
    monkeypatch.setattr(PackFile, "_member", lambda s, n: seen.append(n) or member(s, n))
    library = load(packed.path)
    assert seen == ["index.json"]
    info = library.choose(WORKLOAD.key, 8, 8)
    library.binary(info)
    assert seen == ["index.json", info.file]


def test_a_kernel_that_cannot_be_built_any_more_is_passed_over(tmp_path, monkeypatch):
    traces = {**TRACES, "old": trace(63)}
    times = {key: {**row, "old": 1.0} for key, row in TIMES.items()}
    packed = pack_at(tmp_path / "p.doppack", monkeypatch, traces=traces, times=times)
    assert len(packed.notes) == 1
    assert "another version" in packed.notes[0]
    library = load(packed.path)
    assert library.index.notes == packed.notes
    assert traces["old"].key not in {k.trace_key for k in library.kernels.values()}
    assert library.table.workloads[WORKLOAD.key].worst_regret <= 0.05
    with pytest.raises(ExportError, match="no usable record"):
        pack_at(
            tmp_path / "q.doppack",
            monkeypatch,
            traces={"old": trace(63)},
            times={key: {"old": 1.0} for key in TIMES},
        )
    assert not (tmp_path / "q.doppack").exists()


def test_tiles_that_no_plan_has_are_passed_over(tmp_path, monkeypatch):
    def odd(workload, steps, target):
        code = fake_generate(workload, steps, target)
        return SimpleNamespace(**{**vars(code), "tile_rows": 12 if code.tile_rows else 0})

    packed = pack_at(tmp_path / "p.doppack", monkeypatch, generate=odd)
    assert "tiles of 12 rows" in packed.notes[0]
    assert {k.tile_rows for k in load(packed.path).kernels.values()} == {0}
    plan = pytest.importorskip("dop.ops.plan")
    assert plan.TILE_SIZES == TILE_SIZES


def test_tiles_that_no_plan_has_are_never_built(tmp_path, monkeypatch):
    """The trace tells; building it to see would cost a round of choosing for every such kernel."""
    traces = {**TRACES, "odd": Trace((SplitStep(0, 0, None, (12,), True),))}
    times = {key: {**row, "odd": 1.0} for key, row in TIMES.items()}
    built = []

    def watched(workload, steps, target):
        built.append(steps.key)
        return fake_generate(workload, steps, target)

    packed = pack_at(
        tmp_path / "p.doppack", monkeypatch, traces=traces, times=times, generate=watched
    )
    assert traces["odd"].key not in built
    assert "1 kernels want tiles that no plan has" in packed.notes[0]


def test_early_kernels_are_for_batches_of_few_tokens(tmp_path, monkeypatch):
    early = Trace((*TRACES["a"].steps, PragmaStep(5, 0, "dependent_launch", 3)))
    traces = {**TRACES, "early": early}
    times = {key: {**row, "early": 0.5} for key, row in TIMES.items()}
    options = {"traces": traces, "times": times}

    def serving(name, **more):
        packed = pack_at(tmp_path / name, monkeypatch, **options, **more)
        table = load(packed.path).table.workloads[WORKLOAD.key]
        rows = {row.tokens for row in table.rows if row.trace_key == early.key}
        return rows, " ".join(packed.notes)

    chosen, notes = serving("all.doppack", early=64)
    assert chosen >= {8, 64}
    assert "left out" not in notes
    chosen, notes = serving("few.doppack")
    assert 8 in chosen
    assert max(chosen) <= 16
    assert "1 kernels that read weights before they wait: left out beyond 16 tokens" in notes
    chosen, notes = serving("none.doppack", early=0)
    assert not chosen
    assert "left out everywhere" in notes


def shipped_of(path, records):
    path.unlink(missing_ok=True)
    write_log(path, records)
    return {kernel.trace_key for kernel in select(path).kernels}


def test_what_faulted_in_one_batch_is_shipped_for_none(tmp_path):
    path = tmp_path / "log.jsonl"
    records = records_of(WORKLOAD, TRACES, TIMES, target=H200)
    assert TRACES["b"].key in shipped_of(path, records)
    bad = next(r for r in records if r.trace == TRACES["b"])
    failed = Measurement.failed(Failure.LAUNCH, "an illegal memory access")
    records.append(dataclasses.replace(bad, scenario_key="T512/identical/1", measurement=failed))
    assert TRACES["b"].key not in shipped_of(path, records)


def test_a_workload_that_cannot_be_transferred_is_left_out_and_noted(tmp_path, monkeypatch):
    def only_bf16(workload, steps, target):
        if workload.dtype == "float16":
            raise ExportError("no such intrinsic.")
        return fake_generate(workload, steps, target)

    packed = pack_at(tmp_path / "p.doppack", monkeypatch, generate=only_bf16)
    assert load(packed.path).workloads == (WORKLOAD.key,)
    assert packed.notes[0].startswith(f"{FP16} is not shipped")


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a pack")
    elif how == "flipped":
        for place in range(200, len(data) - 400, 97):
            data[place] ^= 0x55
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "empty", "text", "flipped"])
def test_a_damaged_file_is_one_clear_error(packed, how):
    damage(packed.path, how)
    with pytest.raises(ExportError, match="damaged"):
        load(packed.path)


def test_any_single_damaged_byte_is_found_before_a_launch(packed):
    whole = packed.path.read_bytes()
    clean = load(packed.path)
    wanted = {name: clean.binary(info) for name, info in clean.kernels.items()}
    for place in range(0, len(whole), 61):
        data = bytearray(whole)
        data[place] ^= 0xFF
        packed.path.write_bytes(data)
        with contextlib.suppress(ExportError):
            library = load(packed.path)
            for name, info in library.kernels.items():
                assert library.binary(info) == wanted[name], place
                library.source(info)


def test_a_swapped_binary_is_refused(packed):
    with zipfile.ZipFile(packed.path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    names = [name for name in contents if name.endswith(".cubin")]
    contents[names[0]] = contents[names[1]]
    with zipfile.ZipFile(packed.path, "w", zipfile.ZIP_LZMA) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    library = load(packed.path)
    info = next(k for k in library.kernels.values() if k.file == names[0])
    with pytest.raises(ExportError, match="not the file that was packed"):
        library.binary(info)


def test_wrong_indexes_and_greedy_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dop.export.pack.MAX_FILE_BYTES", 1 << 16)
    path = tmp_path / "p.doppack"
    index = {"format": "dop-library", "version": 1}
    write_pack(path, index, {})
    with pytest.raises(ExportError, match="version 1"):
        load(path)
    write_pack(path, {"format": "zip"}, {})
    with pytest.raises(ExportError, match="not the index"):
        load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("index.json", b" " * ((1 << 16) + 1))
    with pytest.raises(ExportError, match="claims"):
        load(path)
    with pytest.raises(ExportError, match="does not exist"):
        load(tmp_path / "none.doppack")


def test_a_library_folder_and_a_pack_say_the_same(packed, tmp_path):
    from dop.export.library import export_library

    selection = select(packed.path.with_suffix(".jsonl"))
    export_library(selection, tmp_path / "lib", fake_generate)
    folder, pack = load(tmp_path / "lib"), load(packed.path)
    for name, info in folder.kernels.items():
        assert pack.kernels[name].launches == info.launches
        assert pack.binary(pack.kernels[name]) == folder.binary(info)


def test_packs_load_with_the_standard_library_alone(packed):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dop.export.load import load\n"
        f"library = load(Path({str(packed.path)!r}))\n"
        f"info = library.choose({WORKLOAD.key!r}, 8)\n"
        "library.binary(info); library.source(info)\n"
        "import dop.packs, dop.packs.answer, dop.packs.devices\n"
        "found = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(found & {'numpy', 'torch', 'tvm', 'orjson', 'typer', 'rich'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("binary", "device", "runs"),
    [
        ("sm_90a", "sm_90", True),
        ("sm_90a", "sm_90a", True),
        ("sm_90a", "sm_100", False),
        ("sm_80", "sm_86", True),
        ("sm_86", "sm_80", False),
        ("sm_80", "sm_90", False),
        ("sm_100f", "sm_103", True),
        ("sm_120", "sm_121", True),
    ],
)
def test_which_binaries_run_where(binary, device, runs):
    assert runs_on(binary, device) is runs
    with pytest.raises(ExportError, match="architecture"):
        runs_on(binary, "gfx90a")


def test_the_command_writes_a_pack(packed, tmp_path, monkeypatch, capsys):
    from dop.cli.main import main

    codegen = importlib.import_module("dop.lowering.codegen")
    monkeypatch.setattr(codegen, "generate", fake_generate)
    log, out = packed.path.with_suffix(".jsonl"), tmp_path / "out" / "x.doppack"
    command = ["export", "pack", str(log), "-o", str(out), "--jobs", "1"]
    assert main([*command, "--json", "--dtype", "bf16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == out.stat().st_size
    assert found["worst_regret"][WORKLOAD.key] <= 0.05
    assert main(["export", "catalog", str(out.parent)]) == 0
    assert "1 packs" in capsys.readouterr().out
    for wrong, why in (
        (["-o", str(tmp_path / "x.zip")], ".doppack"),
        (["--dtype", "int4"], "int4"),
        (["--ranks", "99"], "those workloads"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--regret", "nan"], "regret"),
    ):
        assert main([*command, *wrong]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert why in lines[0]


def counted(calls):
    def generate(workload, steps, target):
        calls.append(workload.key)
        return fake_generate(workload, steps, target)

    return generate


def test_unchanged_kernels_are_reused(tmp_path, monkeypatch):
    path, calls = tmp_path / "p.doppack", []
    first = pack_at(path, monkeypatch, generate=counted(calls))
    assert (first.built, first.reused) == (len(calls), 0)
    before = path.read_bytes()

    calls.clear()
    again = pack_at(path, monkeypatch, generate=counted(calls), reuse=path)
    assert (calls, again.built, again.reused) == ([], 0, first.built)
    assert path.read_bytes() == before
    assert f"{first.built} reused" in again.effort

    # another regret ships one more kernel; only that one is built, in both types
    more = pack_at(path, monkeypatch, generate=counted(calls), reuse=path, max_regret=0.0)
    assert (more.built, more.reused) == (len(calls), first.built)
    assert 0 < more.built < first.built + more.built


def test_nothing_is_reused_from_another_builder(tmp_path, monkeypatch):
    path, calls = tmp_path / "p.doppack", []
    first = pack_at(path, monkeypatch)
    monkeypatch.setattr("dop.export.reuse.builder", lambda: "another")
    other = pack_at(path, monkeypatch, generate=counted(calls), reuse=path)
    assert (len(calls), other.reused) == (first.built, 0)
    assert "another version" in other.notes[-1]
    path.write_bytes(b"damaged")
    damaged = pack_at(path, monkeypatch, generate=counted(calls), reuse=path)
    assert damaged.reused == 0
    assert "damaged" in damaged.notes[-1]


def test_a_pack_without_sources_gives_nothing_to_one_with_them(tmp_path, monkeypatch):
    path = tmp_path / "p.doppack"
    first = pack_at(path, monkeypatch, sources=False)
    assert pack_at(path, monkeypatch, reuse=path).reused == 0
    assert pack_at(path, monkeypatch, reuse=path, sources=False).reused == first.built


def test_the_builder_knows_its_files(monkeypatch):
    reuse.builder.cache_clear()
    one = reuse.builder()
    monkeypatch.setattr(reuse, "_PARTS", reuse._PARTS[1:])
    reuse.builder.cache_clear()
    assert reuse.builder() != one
    reuse.builder.cache_clear()
    root = Path(reuse.dop.__file__).parent
    assert all(list(root.glob(part)) for part in reuse._PARTS)
