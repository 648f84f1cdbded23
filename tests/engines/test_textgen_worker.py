"""What bench_textgen_lora's process changes in vLLM's loading, over vLLM's own classes.

Runs wherever `import vllm.lora.worker_manager` works (also a vLLM without its binaries).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("safetensors")

from vllm.lora import lora_model, model_manager, worker_manager
from vllm.lora.request import LoRARequest

from benchmarks.textgen.models import TINY, find_model, write_adapter
from benchmarks.textgen.vllm_worker import _load_each_file_once

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYERS = 2


def loader():
    """vLLM's worker manager without an engine."""
    slots = model_manager.LoRAModelManager.__new__(model_manager.LoRAModelManager)
    slots.packed_modules, slots.modules, slots._registered_adapters = {}, {}, {}
    for layer in range(LAYERS):
        for part, name in (("self_attn", "qkv_proj"), ("mlp", "gate_up_proj")):
            path = f"model.layers.{layer}.{part}."
            slots.packed_modules[path + name] = [path + own for own in PACKED[name]]
    slots.is_pooling_model, slots.model, slots.packed_modules_mapping = False, object(), PACKED
    slots.moe_ep_load_spec = None
    slots.supported_lora_modules = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]
    manager = worker_manager.WorkerLoRAManager.__new__(worker_manager.WorkerLoRAManager)
    manager.max_position_embeddings, manager.vocab_size = 2048, 512
    manager._adapter_manager, manager._lora_model_cls = slots, lora_model.LoRAModel
    manager.lora_config = SimpleNamespace(
        max_lora_rank=16, lora_dtype=torch.bfloat16, target_modules=None
    )
    return manager, slots


def test_a_file_is_read_once_and_every_adapter_gets_its_weights(tmp_path, monkeypatch):
    for module in (lora_model, model_manager):
        monkeypatch.setattr(module, "PIN_MEMORY", False)
    write_adapter(tmp_path / "a", find_model(TINY, 64), 16, torch.bfloat16)
    reads, read = [], worker_manager.WorkerLoRAManager._load_adapter

    def counted(manager, request):
        reads.append(request.lora_int_id)
        return read(manager, request)

    monkeypatch.setattr(worker_manager.WorkerLoRAManager, "_load_adapter", counted)
    _load_each_file_once()
    manager, slots = loader()
    loaded = []
    for number in (1, 2, 3):
        lora = manager._load_adapter(LoRARequest(f"a{number}", number, str(tmp_path / "a")))
        slots._add_adapter(lora)  # packs the slices and folds the scale into B, in place
        loaded.append(lora)
    assert reads == [1]
    assert [lora.id for lora in loaded] == [1, 2, 3]
    assert len(slots._registered_adapters) == 3
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for lora in loaded:
        assert len(lora.loras) == 4 * LAYERS
        for name, path in (("q_proj", "self_attn.qkv_proj"), ("o_proj", "self_attn.o_proj")):
            got = lora.loras[f"model.layers.1.{path}"].lora_b
            b = tensors[f"base_model.model.model.layers.1.self_attn.{name}.lora_B.weight"]
            assert torch.equal(got[0] if isinstance(got, list) else got, 2 * b)  # alpha / rank = 2
