import time

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

ADAPTERS = 32
RANKS = (16, 16, 8, 16, 64, 16, 4, 16)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model():
    """Four layers of Llama-3.1-8B's widths in bf16, 32 adapters of mixed ranks."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1024,
    )
    with torch.device("cuda"):
        base = LlamaForCausalLM(config).to(torch.bfloat16)
    made = None
    for i in range(ADAPTERS):
        rank = RANKS[i % len(RANKS)]
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        if made is None:
            made = get_peft_model(base, lora, adapter_name=f"n{i}")
        else:
            made.add_adapter(f"n{i}", lora)
    generator = torch.Generator("cuda").manual_seed(1)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(weight.shape, generator=generator, device="cuda")
            weight.data = (noise * 0.15).to(weight.dtype)
    return made.eval().requires_grad_(False)


def names() -> list[str]:
    return [f"n{i}" for i in range(ADAPTERS)]


@torch.inference_mode()
def forward(model, rows, tokens):
    generator = torch.Generator("cuda").manual_seed(2)
    ids = torch.randint(0, 1024, (len(rows), tokens), generator=generator, device="cuda")
    return model(input_ids=ids, adapter_names=rows, use_cache=False).logits.float()


def seconds(model, rows, tokens, calls) -> float:
    forward(model, rows, tokens)
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            forward(model, rows, tokens)
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) / calls)
    return best


def close(got, expected):
    """Within bf16's rounding of four layers; a wrong adapter is off by tens of percent."""
    size = expected.abs().max()
    assert (got - expected).abs().max() <= 0.03 * size
    assert (got - expected).abs().mean() <= 0.007 * size


@pytest.mark.parametrize("tokens", [1, 17])
def test_outputs_equal_pefts_own(model, tokens):
    from dop.integrations import peft as dop_peft

    rows = names()
    rows[3] = rows[20] = "__base__"
    rows[5] = rows[6]
    expected = forward(model, rows, tokens)
    dop_peft.accelerate(model)
    try:
        got = forward(model, rows, tokens)
    finally:
        dop_peft.restore(model)
    close(got, expected)
    bare = forward(model, ["__base__"] * len(rows), tokens)
    assert (expected - bare).abs().max() > 0.1 * bare.abs().max()  # adapters matter here


def test_32_adapters_at_least_5x_pefts_own(model, capsys):
    from dop.integrations import peft as dop_peft

    figures = {}
    for tokens in (1, 16):
        own = seconds(model, names(), tokens, 3)
        dop_peft.accelerate(model)
        try:
            ours = seconds(model, names(), tokens, 10)
        finally:
            dop_peft.restore(model)
        figures[tokens] = own, ours
    with capsys.disabled():
        for tokens, (own, ours) in figures.items():
            print(
                f"\n{torch.cuda.get_device_name()}: 32 adapters, {tokens} tokens a row, 4 layers: "
                f"PEFT {own * 1e3:.2f} ms, dop {ours * 1e3:.2f} ms, {own / ours:.1f}x"
            )
    own, ours = figures[1]
    assert own / ours >= 5
