import time
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

ADAPTERS = 32
LAYERS = 4
RANKS = (16, 16, 8, 16, 64, 16, 4, 16)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS = LAYERS * len(TARGETS)


@pytest.fixture(scope="module")
def model():
    """Four layers of Llama-3.1-8B's widths in bf16, 32 adapters of mixed ranks."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=LAYERS,
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


def seconds(call, times) -> float:
    """Of one call: the best of three rounds by the wall clock, the GPU idle before and after."""
    call()
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            call()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) / times)
    return best


def close(got, expected):
    """Within bf16's rounding of four layers; a wrong adapter is off by tens of percent."""
    size = expected.abs().max()
    assert (got - expected).abs().max() <= 0.03 * size
    assert (got - expected).abs().mean() <= 0.007 * size


@contextmanager
def accelerated(model):
    """The model through the operator; fails if any of its layers goes back to PEFT's own."""
    from dop import ops
    from dop.integrations import peft as dop_peft

    calls, real = [], ops.add_lora

    def counted(y, *args, **kwargs):
        calls.append(y.device.type)
        return real(y, *args, **kwargs)

    dop_peft.accelerate(model)
    ops.add_lora = counted
    try:
        yield calls
    finally:
        ops.add_lora = real
        told = {
            reason
            for m in model.modules()
            if "_dop_mixed" in m.__dict__
            for reason in m.__dict__["_dop_mixed"].shared.told
        }
        dop_peft.restore(model)
    assert not told
    assert set(calls) == {"cuda"}
    assert len(calls) % LINEARS == 0


@contextmanager
def adapters_in(model, dtype):
    """PEFT keeps adapters of a bf16 model in float32 unless told otherwise."""
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    before = [p.data for p in weights]
    for p in weights:
        p.data = p.data.to(dtype)
    try:
        yield
    finally:
        for p, data in zip(weights, before, strict=True):
            p.data = data


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_equal_pefts_own(model, tokens, dtype):
    rows = names()
    rows[3] = rows[20] = "__base__"
    rows[5] = rows[6]
    with adapters_in(model, dtype):
        expected = forward(model, rows, tokens)
        with accelerated(model) as calls:
            got = forward(model, rows, tokens)
    assert len(calls) == LINEARS
    close(got, expected)
    bare = forward(model, ["__base__"] * len(rows), tokens)
    assert (expected - bare).abs().max() > 0.1 * bare.abs().max()  # adapters matter here
    shifted = forward(model, rows[1:] + rows[:1], tokens)
    with pytest.raises(AssertionError):
        close(shifted, expected)  # and a row with its neighbour's would be seen


def generate(model, new):
    """Greedy decoding of 32 requests, each with its own adapter."""
    ids = torch.arange(ADAPTERS * 8, device="cuda").reshape(ADAPTERS, 8)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    mask = torch.ones_like(ids)
    return model.generate(
        input_ids=ids, attention_mask=mask, adapter_names=names(), pad_token_id=0, **settings
    )


def test_32_adapters_at_least_5x_pefts_own(model, capsys):
    """A decode step (one token a row), a short prompt, and generate() with its cache."""
    cases = {
        "1 token a row": (lambda: forward(model, names(), 1), 3, 10),
        "16 tokens a row": (lambda: forward(model, names(), 16), 3, 10),
        "generate, 8 tokens": (lambda: generate(model, 8), 1, 1),
    }
    ratios = {}
    for dtype in (torch.float32, torch.bfloat16):
        for what, (call, own_times, times) in cases.items():
            with adapters_in(model, dtype):
                own = seconds(call, own_times)
                with accelerated(model):
                    ours = seconds(call, times)
            ratios[what, dtype] = own / ours
            with capsys.disabled():
                print(
                    f"\n{torch.cuda.get_device_name()}: 32 adapters in {dtype}, {what}, 4 layers: "
                    f"PEFT {own * 1e3:.2f} ms, dop {ours * 1e3:.2f} ms, {own / ours:.1f}x"
                )
    assert min(ratios.values()) >= 5, ratios
