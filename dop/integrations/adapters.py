"""Adapters as tensors: read from PEFT folders, or made at random for tests and benchmarks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dop.errors import ConfigError, MissingDependencyError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of a Llama-like decoder layer."""

_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")


@dataclass(frozen=True)
class LoraWeights:
    """One adapter's weights for one linear: y += scale * (x @ a.T) @ b.T.

    Attributes:
        a: [rank, in_features].
        b: [out_features, rank].
        scale: alpha / rank, or what takes its place.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.a.shape[0]


Adapter = Mapping[str, LoraWeights]
"""Module path in the base model ("model.layers.0.self_attn.q_proj") -> its weights."""


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter of a PEFT folder (adapter_config.json, adapter_model.safetensors), on the CPU.

    Raises:
        ConfigError: the folder is no plain LoRA adapter, or cannot be read.
        MissingDependencyError: safetensors is not installed.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert isinstance(config, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"{folder} has no readable adapter_config.json ({error}).", "Give a PEFT folder."
        ) from error
    for key in ("use_dora", "lora_bias", "alora_invocation_tokens"):
        if config.get(key):
            raise ConfigError(f"adapter {folder} uses {key}.", "Only plain LoRA is served.")
    if config.get("peft_type", "LORA") != "LORA" or config.get("bias", "none") != "none":
        raise ConfigError(f"{folder} is no LoRA adapter without bias.", "Leave it out.")
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in _tensors(folder / "adapter_model.safetensors").items():
        match = _TENSOR.fullmatch(name)
        if match is not None:
            sides.setdefault(match[1], {})[match[2]] = tensor
    if not sides or any(len(pair) != 2 for pair in sides.values()):
        raise ConfigError(f"{folder} lacks lora_A or lora_B tensors.", "Save the adapter again.")
    return {m: _weights(m, pair["A"], pair["B"], config) for m, pair in sides.items()}


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingDependencyError(
            "safetensors is not installed.", "pip install safetensors"
        ) from error
    try:
        return dict(load_file(str(path)))
    except Exception as error:  # the library's own error class is not importable everywhere
        raise ConfigError(f"{path} cannot be read ({error}).", "Save the adapter again.") from error


def _weights(
    module: str, a: torch.Tensor, b: torch.Tensor, config: dict[str, object]
) -> LoraWeights:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ConfigError(
            f"{module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}.",
            "They should be [rank, in] and [out, rank].",
        )
    alpha = config.get("lora_alpha", 1)
    patterns = config.get("alpha_pattern")
    for key, value in (patterns if isinstance(patterns, dict) else {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            alpha = value
            break
    if not isinstance(alpha, (int, float)):
        raise ConfigError(f"lora_alpha of {module} is {alpha!r}.", "It should be a number.")
    rank = a.shape[0]
    return LoraWeights(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def random_adapter(
    model: nn.Module,
    rank: int,
    seed: int,
    targets: Iterable[str] = TARGETS,
    alpha: float | None = None,
) -> Adapter:
    """An adapter with random weights for a model's linears, of a size that changes outputs.

    Args:
        model: any module tree; its linears named in `targets` get weights, on their device.
        rank: of every product.
        seed: of the weights.
        targets: last part of the modules' names.
        alpha: scale is alpha / rank; 2 * rank if None.
    """
    names = set(targets)
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names:
            wide, tall = module.in_features, module.out_features
            a = torch.randn(rank, wide, generator=generator) / math.sqrt(wide)
            b = torch.randn(tall, rank, generator=generator) / math.sqrt(rank)
            place = (module.weight.device, module.weight.dtype)
            scale = (2 * rank if alpha is None else alpha) / rank
            adapter[name] = LoraWeights(a.to(*place), b.to(*place), scale)
    if not adapter:
        raise ConfigError(f"no linear is named {', '.join(sorted(names))}.", "Check the targets.")
    return adapter
