"""The exports, read by the engines' own loaders: every tuned shape finds its entry."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sources import Quiet, load_file, package_folder, stub, stubbed
from synthetic_engine import DEVICE, sglang_records, vllm_records

from dop.errors import ExportError
from dop.export import sglang as sglang_export
from dop.export import vllm as vllm_export


def vllm_loader(monkeypatch: pytest.MonkeyPatch, folder: Path):
    path = package_folder("vllm") / "lora/ops/triton_ops/utils.py"
    envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=str(folder))
    stubs = {
        "vllm": stub("vllm", envs=envs),
        "vllm.logger": stub("vllm.logger", init_logger=lambda _: Quiet()),
        "vllm.platforms": stub("vllm.platforms", current_platform=None),
        "vllm.utils": stub("vllm.utils"),
        "vllm.utils.math_utils": stub("vllm.utils.math_utils", next_power_of_2=lambda n: n),
        "vllm.utils.torch_utils": stub("vllm.utils.torch_utils", async_tensor_h2d=None),
        "vllm.utils.gpu_sync_debug": stub("vllm.utils.gpu_sync_debug"),
    }
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: DEVICE)
    with stubbed(stubs):
        return load_file(path, "vllm_triton_utils").get_lora_op_configs


def test_vllm_finds_every_tuned_shape(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    found = vllm_export.export_vllm(vllm_records(), folder, DEVICE)
    load = vllm_loader(monkeypatch, folder)
    assert {entry.task.kernel for entry in found} == {"shrink", "expand"}
    vllm_export.compare(found, [load(**entry.query) for entry in found])


def test_vllm_gets_different_entries_for_different_queries(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    found = vllm_export.export_vllm(vllm_records(), folder, DEVICE)
    load = vllm_loader(monkeypatch, folder)
    shifted = [load(**entry.query) for entry in found]
    shifted = shifted[1:] + shifted[:1]
    with pytest.raises(ExportError, match="loads as"):
        vllm_export.compare(found, shifted)


def test_vllm_never_misses_a_number_of_slices(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    single = [r for r in vllm_records() if r.task.workload.slices == 1]
    vllm_export.export_vllm(single, folder, DEVICE)
    load = vllm_loader(monkeypatch, folder)
    for slices in (1, 2, 3):
        leaf = load("expand", 65, 32, 4096, 16, slices, True)
        assert {"block_m", "block_n", "block_k", "num_warps", "num_stages", "num_ctas"} <= set(leaf)
        assert "split_k" in load("shrink", 65, 32, 4096, 16, slices, None)


def sglang_loader(monkeypatch: pytest.MonkeyPatch, folder: Path):
    path = package_folder("sglang") / "kernels/ops/lora/dense/lora_tuning_config.py"
    monkeypatch.setenv("SGLANG_LORA_CONFIG_DIR", str(folder))
    stubs = {
        "triton": stub("triton", __version__="3.6.0"),
        "sglang": stub("sglang"),
        "sglang.srt": stub("sglang.srt"),
        "sglang.srt.utils": stub("sglang.srt.utils", get_device_name=lambda: DEVICE),
    }
    with stubbed(stubs):
        return load_file(path, "sglang_tuning_config")


def test_sglang_finds_every_tuned_shape(tmp_path, monkeypatch):
    records = sglang_records()
    found = sglang_export.export_sglang(records, tmp_path, DEVICE, "3.6.0")
    loader = sglang_loader(monkeypatch, tmp_path)
    assert {table.task.kernel for table in found} == {"shrink", "expand"}
    for table in found:
        load = getattr(loader, f"get_lora_{table.task.kernel}_config")
        for chunk, options in table.options.items():
            task = table.task
            got = load(task.long_side, task.workload.rank, task.workload.slices, chunk)
            assert got == options, (task.key, chunk)
