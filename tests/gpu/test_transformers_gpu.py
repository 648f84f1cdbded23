import copy

import pytest
import torch

pytest.importorskip("transformers")

VOCAB = 256


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


def merged_tokens(model, adapter, prompt, count):
    """Greedy tokens of the adapter merged into float32 weights."""
    alone = copy.deepcopy(model).float()
    for name, weights in (adapter or {}).items():
        delta = weights.scale * weights.b.float() @ weights.a.float()
        with torch.no_grad():
            alone.get_submodule(name).weight += delta
    ids = torch.tensor([prompt], device="cuda")
    mask = torch.ones_like(ids)
    out = alone.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("graphs", [False, True])
def test_requests_equal_their_adapter_merged(model, graphs):
    """First tokens, which rounding rarely turns; a wrong adapter turns nearly all of them."""
    from dop.integrations.adapters import random_adapter
    from dop.integrations.transformers import LoraEngine, Request

    adapters = {f"n{i}": random_adapter(model, (4, 8, 16, 32)[i % 4], i) for i in range(12)}
    requests = []
    for i in range(48):
        generator = torch.Generator().manual_seed(i)
        prompt = torch.randint(1, VOCAB, (3 + i,), generator=generator).tolist()
        requests.append(Request(prompt, None if i % 13 == 12 else f"n{i % 13}", 4))
    config = {"use_cuda_graph": (graphs, False)}
    with LoraEngine(
        model, adapters, slots=6, max_requests=8, max_length=64, max_batch_tokens=64, config=config
    ) as engine:
        outputs = engine.generate(requests)
    right = sum(
        output.tokens[0] == merged_tokens(model, adapters.get(r.adapter), r.prompt, 1)[0]
        for r, output in zip(requests, outputs, strict=True)
    )
    bare = sum(
        output.tokens[0] == merged_tokens(model, None, r.prompt, 1)[0]
        for r, output in zip(requests, outputs, strict=True)
    )
    assert right >= 0.9 * len(requests)
    assert bare <= 0.5 * len(requests)
