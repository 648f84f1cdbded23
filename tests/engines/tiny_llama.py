"""A tiny Llama with random weights, adapters for it, and the truth about them in float32."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

ADAPTERS = {"a1": 8, "a2": 16, "a3": 4, "a4": 16, "a5": 1}
"""Name -> rank. a1b is a1's successor with other weights, under the same id."""

LINEARS = {
    "self_attn.q_proj": (256, 256), "self_attn.k_proj": (256, 128), "self_attn.v_proj": (256, 128),
    "self_attn.o_proj": (256, 256), "mlp.gate_proj": (256, 512), "mlp.up_proj": (256, 512),
    "mlp.down_proj": (512, 256),
}  # fmt: skip


def write_model(folder: Path) -> None:
    """config.json, weights and adapters; the same in every run."""
    rng = torch.Generator().manual_seed(0)

    def weight(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * scale).bfloat16()

    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {
        "model.embed_tokens.weight": weight(1024, 256),
        "lm_head.weight": weight(1024, 256, scale=0.3),
        "model.norm.weight": torch.ones(256).bfloat16(),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, (width, out) in LINEARS.items():
            tensors[f"{prefix}{name}.weight"] = weight(out, width, scale=width**-0.5)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(256).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, rank in [*ADAPTERS.items(), ("a1b", 8)]:
        _write_adapter(folder / name, rank, rng)


def _write_adapter(folder: Path, rank: int, rng: torch.Generator) -> None:
    folder.mkdir()
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": [name.partition(".")[2] for name in LINEARS], "lora_dropout": 0.0,
        "base_model_name_or_path": "tiny",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(2):
        for name, (width, out) in LINEARS.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn(rank, width, generator=rng) * width**-0.5
            b = torch.randn(out, rank, generator=rng) * (0.7 * rank**-0.5)
            tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = b.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def merged_models(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """transformers' model in float32 with each adapter merged, one after the other; "": none."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    base = load_file(folder / "model.safetensors")
    settings = {k: v for k, v in CONFIG.items() if k not in ("architectures", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig(**settings)).float().eval()
    for name in names:
        state = {key: value.float() for key, value in base.items()}
        if name:
            lora = load_file(folder / name / "adapter_model.safetensors")
            for key in [k for k in lora if k.endswith("lora_A.weight")]:
                target = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                up = lora[key.replace("lora_A", "lora_B")].float()
                state[target] = state[target] + up @ lora[key].float()
        model.load_state_dict(state)
        yield name, model


def merged_tokens(folder: Path, requests: list[dict]) -> list[list[int]]:
    """Greedy tokens of every request by transformers in float32, its adapter merged."""
    found: dict[int, list[int]] = {}
    for name, model in merged_models(folder, {r["adapter"] for r in requests}):
        for index, request in enumerate(requests):
            if request["adapter"] == name:
                prompt = torch.tensor([request["prompt"]])
                with torch.no_grad():
                    out = model.generate(
                        prompt, max_new_tokens=request["tokens"], min_new_tokens=request["tokens"],
                        do_sample=False, eos_token_id=None, pad_token_id=0,
                    )  # fmt: skip
                found[index] = out[0, prompt.shape[1] :].tolist()
    return [found[index] for index in range(len(requests))]


def merged_gaps(folder: Path, requests: list[dict], tokens: list[list[int]]) -> list[list[float]]:
    """How far each token of an answer is below the best one, in logits, by transformers in float32
    with the request's adapter merged, given the answer up to there. A near tie that falls the other
    way costs its own gap and nothing after it; another adapter's tokens are off by units."""
    found: dict[int, list[float]] = {}
    for name, model in merged_models(folder, {r["adapter"] for r in requests}):
        for index, (request, answer) in enumerate(zip(requests, tokens, strict=True)):
            if request["adapter"] == name:
                text = torch.tensor([[*request["prompt"], *answer[:-1]]])
                with torch.no_grad():
                    logits = model(text).logits[0, len(request["prompt"]) - 1 :]
                chosen = logits[torch.arange(len(answer)), torch.tensor(answer)]
                found[index] = (logits.amax(-1) - chosen).tolist()
    return [found[index] for index in range(len(requests))]


def merged_logprobs(folder: Path, requests: list[dict]) -> list[torch.Tensor]:
    """Log-probabilities [vocabulary] of every request's first token, in float32."""
    found: dict[int, torch.Tensor] = {}
    for name, model in merged_models(folder, {r["adapter"] for r in requests}):
        for index, request in enumerate(requests):
            if request["adapter"] == name:
                with torch.no_grad():
                    logits = model(torch.tensor([request["prompt"]])).logits[0, -1]
                found[index] = torch.log_softmax(logits, -1)
    return [found[index] for index in range(len(requests))]
