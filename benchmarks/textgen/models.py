"""The model that a run serves: its config, what its adapters weigh, folders on disk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from dop.config.hf import model_shape, parse_config
from dop.errors import ConfigError

TINY = "tiny"
_TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}
# What the shipped configs leave out because the operator does not need it.
_VOCABULARY = {"Llama-2": 32000, "Llama-3": 128256, "Qwen3": 151936}
_TIED = ("Llama-3.2-1B", "Qwen3-0.6B")


@dataclass(frozen=True)
class BenchModel:
    """A model to serve.

    Attributes:
        name: for the table.
        config: of transformers.
        checkpoint: folder with weights; None for random ones.
    """

    name: str
    config: dict[str, Any]
    checkpoint: Path | None = None

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.config["vocab_size"])

    def adapter_bytes(self, rank: int, dtype: torch.dtype) -> int:
        """Bytes of one adapter on all linears of all layers."""
        shape = parse_config(self.config, self.name)
        numbers = sum(rank * (wide + tall) for wide, tall in shape.linears.values())
        return numbers * shape.layers * dtype.itemsize

    def kv_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values of a number of tokens."""
        shape = parse_config(self.config, self.name)
        return 2 * tokens * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize


def find_model(name: str, maxlen: int) -> BenchModel:
    """A tiny model, one of `dop tune`'s named models with random weights, or a checkpoint.

    Raises:
        ConfigError: neither.
    """
    if name == TINY:
        return BenchModel(TINY, {**_TINY_CONFIG, "max_position_embeddings": max(2048, maxlen)})
    folder = Path(name)
    if folder.is_dir():
        config = _read(folder / "config.json")
        if "vocab_size" not in config:
            raise ConfigError(f"{folder}/config.json has no vocab_size.", "Complete it.")
        weights = any(folder.glob("*.safetensors"))
        return BenchModel(folder.name, config, folder if weights else None)
    shape = model_shape(name)
    raw = resources.files("dop") / "models" / f"{shape.name}.json"
    config = json.loads(raw.read_text())
    vocabulary = next(v for k, v in _VOCABULARY.items() if shape.name.startswith(k))
    config |= {
        "vocab_size": vocabulary,
        "max_position_embeddings": max(8192, maxlen),
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": shape.name in _TIED,
    }
    return BenchModel(shape.name, config)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        assert isinstance(config, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}).", "Check --model.") from error
    return config


def write_adapter(folder: Path, model: BenchModel, rank: int, dtype: torch.dtype) -> None:
    """A PEFT folder with random weights on every linear of the model's layers."""
    from safetensors.torch import save_file

    shape = parse_config(model.config, model.name)
    groups = {"o_proj": "self_attn", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for layer in range(shape.layers):
        for name, (wide, tall) in shape.linears.items():
            path = f"base_model.model.model.layers.{layer}.{groups.get(name, 'self_attn')}.{name}"
            a = torch.randn(rank, wide, generator=generator, dtype=torch.float32)
            b = torch.randn(tall, rank, generator=generator, dtype=torch.float32)
            tensors[f"{path}.lora_A.weight"] = (a / math.sqrt(wide)).to(dtype)
            tensors[f"{path}.lora_B.weight"] = (b * 1e-3).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(shape.linears),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def copy_bandwidth(device: torch.device, megabytes: int = 512) -> float:
    """Bytes per second that a copy moves (read plus written), the best of a few."""
    import time

    size = (megabytes if device.type == "cuda" else min(megabytes, 64)) << 20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - begin) / 4)
    return 2 * size / best
