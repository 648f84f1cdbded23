"""Exported libraries: built from a log, loaded without TVM, right to float64, checked by hash."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from export_logs import defaults, record, write_log

from dop.errors import ConfigError, ExportError
from dop.export.load import CpuLibrary, CudaLibrary, load
from dop.export.select import select
from dop.measure.compile_cuda import find_nvcc
from dop.measure.hostinfo import cpu_target
from dop.scenario import named
from dop.workload import Workload

pytest.importorskip("tvm")
WORKLOAD = Workload("qkv", 96, (64, 32), 5, "float32")  # an odd rank, two slices
HERE = Path(__file__).parent


def cpu_log(path: Path, workload: Workload = WORKLOAD) -> Path:
    """A log in which every default wins one bucket."""
    target = cpu_target(2)
    found = defaults(workload, target)
    by_rows = {c.trace.key: c for c in found}
    records = []
    for i, candidate in enumerate(list(by_rows.values())[:3]):
        for j, tokens in enumerate((1, 8, 32)):
            seconds = 1e-6 * (10 + 20 * abs(i - j))
            scenario = named("uniform", tokens)
            records.append(record(workload, scenario, candidate.trace, seconds, target=target))
    return write_log(path, records)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    from dop.export.library import export_library

    folder = tmp_path_factory.mktemp("export")
    selection = select(cpu_log(folder / "log.jsonl"))
    export_library(selection, folder / "lib")
    return folder / "lib"


def arrays(workload: Workload, tokens: int, slots: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    a = [draw(slots, workload.rank, workload.in_features) for _ in workload.out_features]
    b = [draw(slots, out, workload.rank) for out in workload.out_features]
    token_slot = rng.integers(-1, slots, tokens).astype(np.int32)
    return draw(tokens, workload.in_features), a, b, token_slot, draw(tokens, workload.total_out)


def reference(x, a, b, token_slot, y):
    want = y.astype(np.float64)
    for t, slot in enumerate(token_slot):
        if slot >= 0:
            parts = [
                x[t].astype(np.float64) @ a_s[slot].T.astype(np.float64) @ b_s[slot].T
                for a_s, b_s in zip(a, b, strict=True)
            ]
            want[t] += np.concatenate(parts)
    return want


WITHOUT_TVM = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tvm", "tvm_ffi", "torch", "orjson", "typer"):
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[2])
import numpy as np
from dop.export.load import load
library = load(sys.argv[1])
data = np.load(sys.argv[3])
slices = sum(name.startswith("a") for name in data.files)
weights = library.weights([data[f"a{s}"] for s in range(slices)],
                          [data[f"b{s}"] for s in range(slices)])
y = data["y"].copy()
library.sgmv(data["x"], weights, data["token_slot"], y)
np.save(sys.argv[4], y)
library.close()
"""


def test_loads_and_runs_where_tvm_cannot_be_imported(exported, tmp_path):
    x, a, b, token_slot, y = arrays(WORKLOAD, 37, 6)
    named_arrays = {f"a{s}": v for s, v in enumerate(a)} | {f"b{s}": v for s, v in enumerate(b)}
    np.savez(tmp_path / "in.npz", x=x, y=y, token_slot=token_slot, **named_arrays)
    command = [sys.executable, "-c", WITHOUT_TVM, str(exported), str(HERE.parents[1])]
    command += [str(tmp_path / "in.npz"), str(tmp_path / "out.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got, want = np.load(tmp_path / "out.npy"), reference(x, a, b, token_slot, y)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    bare = token_slot < 0
    assert bare.any()
    assert np.array_equal(got[bare], y[bare])


@pytest.mark.parametrize("tokens", [1, 2, 8, 33, 150])
def test_every_kernel_is_right_for_every_batch(exported, tokens):
    library = load(exported)
    assert isinstance(library, CpuLibrary)
    x, a, b, token_slot, y = arrays(WORKLOAD, tokens, 5, seed=tokens)
    weights = library.weights(a, b)
    want = reference(x, a, b, token_slot, y)
    for kernel in library.kernels.values():
        got = y.copy()
        library.sgmv(x, weights, token_slot, got, kernel=kernel)
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), kernel.name
    library.close()


def test_index_says_what_it_is_and_where_from(exported):
    index = json.loads((exported / "index.json").read_text())
    assert index["kind"] == "cpu"
    assert re.fullmatch(r"[0-9a-f]{64}", index["provenance"]["log_sha256"])
    assert index["provenance"]["versions"]["tvm"] == "0.27.0"
    assert {k["workload"] for k in index["kernels"]} == {WORKLOAD.key}
    library = load(exported)
    assert len(library.kernels) == 3  # every default wins one bucket by far
    picks = [library.choose(WORKLOAD.key, tokens).trace_key for tokens in (1, 8, 32)]
    assert len(set(picks)) == 3
    library.close()


def test_c_header_compiles_and_matches_the_library(exported, tmp_path):
    entries = re.findall(r"^int (dop_f32\w+)\(", (exported / "dop_sgmv.h").read_text(), re.M)
    assert len(entries) == 3
    calls = "\n".join(f"  if (!{entry}) return 1;" for entry in entries)
    (tmp_path / "main.c").write_text(
        f'#include "dop_sgmv.h"\nint main(void) {{\n{calls}\n  return dop_threads(1, 0) != 1;\n}}\n'
    )
    command = ["gcc", "-Wall", "-Werror", "-Wno-address", f"-I{exported}", str(tmp_path / "main.c")]
    command += [str(exported / "libdop_sgmv.so"), f"-Wl,-rpath,{exported}"]
    subprocess.run([*command, "-o", str(tmp_path / "main")], check=True)
    assert subprocess.run([str(tmp_path / "main")]).returncode == 0


def copy_of(exported: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_damage_is_found_before_anything_is_loaded(exported, tmp_path):
    changed = copy_of(exported, tmp_path / "changed")
    data = bytearray((changed / "libdop_sgmv.so").read_bytes())
    data[-1] ^= 1
    (changed / "libdop_sgmv.so").write_bytes(data)
    with pytest.raises(ExportError, match="not the file that was exported"):
        load(changed)
    lacking = copy_of(exported, tmp_path / "lacking")
    (lacking / "libdop_sgmv.so").unlink()
    with pytest.raises(ExportError, match="cannot be read"):
        load(lacking)
    with pytest.raises(ExportError, match="no exported library"):
        load(tmp_path / "nothing")
    index = json.loads((exported / "index.json").read_text())
    for spoil, what in (
        (lambda i: i.update(version=99), "version 99"),
        (lambda i: i.update(format="zip"), "not the index"),
        (lambda i: i.pop("table"), "damaged"),
        (lambda i: i["files"].update({"../x": "0"}), "is not a file of"),
        (lambda i: i["kernels"][0].update(file="other.so"), "lacks a binary"),
        (lambda i: i["table"].update(target="llvm -mcpu=x -mattr=+avx9 -num-cores=2"), "avx9"),
    ):
        spoiled = json.loads(json.dumps(index))
        spoil(spoiled)
        (changed / "index.json").write_text(json.dumps(spoiled))
        (changed / "libdop_sgmv.so").write_bytes((exported / "libdop_sgmv.so").read_bytes())
        with pytest.raises(ExportError, match=what):
            load(changed)


def test_wrong_calls_are_refused(exported):
    library = load(exported)
    x, a, b, token_slot, y = arrays(WORKLOAD, 8, 4)
    weights = library.weights(a, b)
    for bad in (
        lambda: library.sgmv(x[:, :50], weights, token_slot, y),
        lambda: library.sgmv(x.astype(np.float64), weights, token_slot, y),
        lambda: library.sgmv(x, weights, token_slot + 4, y),
        lambda: library.sgmv(x, weights, token_slot, y[:, ::-1]),
        lambda: library.weights(a[:1], b),
        lambda: library.weights(a, [b[0], b[1][:, :8]]),
        lambda: library.weights([v[:, :, :90] for v in a], b),
    ):
        with pytest.raises(ConfigError):
            bad()
    library.sgmv(x[:0], weights, token_slot[:0], y[:0])
    before = y.copy()
    library.sgmv(x, weights, np.full(8, -1), y)
    assert np.array_equal(before, y)
    library.close()


CUDA = Workload("qkv", 512, (512, 128), 16, "bfloat16")


def fake_generate(workload, trace, target):
    launch = SimpleNamespace(
        name="k",
        grid=("tokens", "(tokens + 3) // 4", "1"),
        block=(32, 4, 1),
        dynamic_smem_bytes=64 << 10,
        arguments=("x", "a", "b", "token_slot", "v", "y_in", "y", "a1_shift", "b1_shift", "tokens"),
    )
    space = SimpleNamespace(name="v", dtype="float32", elements="(tokens * 32)")
    return SimpleNamespace(
        kind="cuda",
        workload_key=workload.key,
        tile_rows=0,
        source="",
        kernels=(launch,),
        workspaces=(space,),
        object_code=b"",
        arguments=(),
    )


def test_tensor_maps_are_made_for_a_launch(monkeypatch):
    from test_tensor_map import Library

    from dop.export import load as loading
    from dop.measure import cuda_driver
    from dop.measure.artifact import Launch

    driver, given = Library(), []
    monkeypatch.setattr(cuda_driver, "driver", lambda: driver)
    monkeypatch.setattr(cuda_driver, "module", lambda image: nullcontext(image))
    allowed = []
    function = SimpleNamespace(
        launch=lambda *args: given.append(args[-1].values),
        allow_large_clusters=lambda: allowed.append(True),
    )
    monkeypatch.setattr(cuda_driver, "Function", lambda module, name: function)
    one = Launch("k", ("tiles", "1", "1"), (32, 1, 1), 0, ("x_box64", "a_box16", "a1_box16", "x"))
    info = SimpleNamespace(name="kernel", workload=CUDA, launches=(one,), file="file")

    def library():
        table = SimpleNamespace(target_key="")
        index = SimpleNamespace(kernels={}, table=table, kind="cuda")
        return CudaLibrary("lib", index, lambda name: b"cubin")

    pointers = {"x": 16, "a0": 32, "a1": 48}
    library().launch(info, pointers, tokens=6, tiles=6, stream=7, slots=5)
    library().launch(info, pointers, tokens=6, tiles=6, stream=7)
    width, rank = CUDA.in_features, CUDA.rank
    assert [(m["address"], m["dims"], m["box"]) for m in driver.maps[:3]] == [
        (16, (width, 6, 1), (64, 64, 1)),
        (32, (width, rank, 5), (64, 16, 1)),
        (48, (width, rank, 5), (64, 16, 1)),
    ]
    assert driver.maps[4]["dims"] == (width, rank, loading.MOST_SLOTS)
    assert [list(v)[:2] for v in given[0][:3]] == [[0, 16], [1, 32], [2, 48]]
    assert allowed == [True, True]  # once for each library
    library().launch(info, pointers, tokens=0, tiles=0, stream=7)
    assert len(given) == 2
    fused = Launch("k", ("tiles", "1", "1"), (32, 1, 1), 0, ("b_box64", "b1_box64", "y_box8"))
    info.launches = (fused,)
    library().launch(info, {"b0": 64, "b1": 80, "y": 96}, tokens=6, tiles=6, stream=7, slots=5)
    assert [(m["address"], m["dims"], m["box"]) for m in driver.maps[6:]] == [
        (64, (rank, CUDA.out_features[0], 5), (64, 64, 1)),
        (80, (rank, CUDA.out_features[1], 5), (64, 64, 1)),
        (96, (CUDA.total_out, 6, 1), (64, 8, 1)),
    ]
    given.pop()
    info.launches = (one,)
    monkeypatch.setattr(cuda_driver, "driver", lambda: object())
    with pytest.raises(ExportError, match=r"kernel of lib .*CUDA 12.*Update"):
        library().launch(info, pointers, tokens=6, tiles=6, stream=7)
    monkeypatch.setattr(cuda_driver, "driver", lambda: driver)
    with pytest.raises(ExportError, match="wants 'a1'"):
        library().launch(info, {"x": 16, "a0": 32}, tokens=6, tiles=6, stream=7)


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
def test_cubins_are_built_and_named(tmp_path):
    from test_cuda_header import FAKE, TRACES
    from test_cuda_header import fake_generate as small_kernel

    from dop.export.library import export_library

    log = write_log(
        tmp_path / "log.jsonl", [record(FAKE[0], named("distinct", 8), TRACES["3"], 1e-6)]
    )
    export_library(select(log, kind="cuda"), tmp_path / "lib", small_kernel)
    library = load(tmp_path / "lib")
    (info,) = library.kernels.values()
    data = (tmp_path / "lib" / info.file).read_bytes()
    assert data.startswith(b"\x7fELF")
    assert info.launches[0].name.encode() in data
    assert info.file == f"{info.name}.cubin"


def test_cuda_launches_get_what_the_index_says(tmp_path, monkeypatch):
    """The driver is a stand-in: what is tested is what reaches cuLaunchKernel."""
    from dop.export.library import export_library
    from dop.measure import compile_cuda, cuda_driver

    monkeypatch.setattr(
        compile_cuda, "compile_source", lambda source, arch: b"cubin " + arch.encode()
    )
    scenario = named("distinct", 8)
    log = write_log(
        tmp_path / "log.jsonl",
        [record(CUDA, scenario, c.trace, 1e-6 * (i + 1)) for i, c in enumerate(defaults(CUDA))],
    )
    export_library(select(log, kind="cuda"), tmp_path / "lib", fake_generate)
    library = load(tmp_path / "lib")
    assert isinstance(library, CudaLibrary)
    info = library.choose(CUDA.key, 6)
    assert (tmp_path / "lib" / info.file).read_bytes() == b"cubin sm_90a"
    assert library.workspace_bytes(info, 6, 6) == {"v": 6 * 32 * 4}
    names = ("x", "a0", "a1", "b0", "b1", "token_slot", "v", "y_in", "y")
    pointers = {name: 1024 * (i + 1) for i, name in enumerate(names)}
    monkeypatch.setattr(cuda_driver, "driver", lambda: None)
    with pytest.raises(ExportError, match="NVIDIA"):
        library.launch(info, pointers, tokens=6, tiles=6, stream=7)
    launches = []

    class Function:
        def __init__(self, module, name):
            launches.append((module, name))

        def allow_dynamic_smem(self, size):
            launches.append(size)

        def launch(self, grid, block, smem, stream, parameters):
            values = parameters.values
            launches.append((grid, block, smem, stream, [v.value for v in values]))
            kinds = [type(v) for v in values[-3:]]
            assert kinds == [ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]

    monkeypatch.setattr(cuda_driver, "driver", lambda: object())
    monkeypatch.setattr(cuda_driver, "module", lambda image: nullcontext(image))
    monkeypatch.setattr(cuda_driver, "Function", Function)
    library.launch(info, pointers, tokens=6, tiles=6, stream=7)
    order = ("x", "a0", "b0", "token_slot", "v", "y_in", "y")
    values = [*(pointers[n] for n in order), 1024 // 16, 1024 // 16, 6]
    assert launches == [
        (b"cubin sm_90a", "k"),
        64 << 10,
        ([6, 2, 1], (32, 4, 1), 64 << 10, 7, values),
    ]
    with pytest.raises(ExportError, match="aligned"):
        library.launch(info, pointers | {"x": 1025}, tokens=6, tiles=6, stream=7)
    short = {k: v for k, v in pointers.items() if k != "v"}
    with pytest.raises(ExportError, match="wants 'v'"):
        library.launch(info, short, tokens=6, tiles=6, stream=7)
    library.close()
