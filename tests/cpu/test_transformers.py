import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from transformers import LlamaConfig, LlamaForCausalLM

from dop.errors import ConfigError
from dop.integrations.adapters import random_adapter, read_adapter
from dop.integrations.lora_model import token_slots
from dop.integrations.transformers import LoraEngine, Request, Slots

VOCAB = 200


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def adapters(model):
    """Four adapters of ranks 4, 8, 5 and 16; the third changes two projections only."""
    few = {"targets": ("q_proj", "down_proj"), "alpha": 40}
    return {
        "french": random_adapter(model, 4, 1),
        "legal": random_adapter(model, 8, 2),
        "short": random_adapter(model, 5, 3, **few),
        "sql": random_adapter(model, 16, 4),
    }


def prompt(seed: int, tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (tokens,), generator=generator).tolist()


def merged(model, adapter):
    """A copy of the model with the adapter in its weights."""
    alone = copy.deepcopy(model)
    for name, weights in (adapter or {}).items():
        with torch.no_grad():
            alone.get_submodule(name).weight += weights.scale * weights.b @ weights.a
    return alone


def alone(model, adapter, request: Request) -> list[int]:
    ids = torch.tensor([request.prompt])
    out = merged(model, adapter).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


def check(model, adapters, requests, outputs):
    distinct = set()
    for request, output in zip(requests, outputs, strict=True):
        assert output.tokens == alone(model, adapters.get(request.adapter), request)
        assert len(output.token_s) == len(output.tokens)
        assert output.start_s < output.token_s[0] <= output.token_s[-1]
        distinct.add(tuple(output.tokens))
    assert len(distinct) > 1


def test_every_request_equals_its_adapter_merged(model, adapters):
    names = ["french", None, "legal", "short", "sql", "french", None, "sql"]
    requests = [Request(prompt(i, 3 + 5 * i), name, 4 + i) for i, name in enumerate(names)]
    with LoraEngine(model, adapters, max_requests=4, max_length=64) as engine:
        outputs = engine.generate(requests)
        again = engine.generate(requests[::-1], concurrency=2)
    check(model, adapters, requests, outputs)
    check(model, adapters, requests[::-1], again)


def test_the_same_prompt_under_each_adapter(model, adapters):
    """What a prefix cache that ignores adapters would get wrong."""
    requests = [Request(prompt(7, 40), name, 6) for name in (*adapters, None) for _ in range(2)]
    with LoraEngine(model, adapters, max_requests=3, max_length=64) as engine:
        outputs = engine.generate(requests)
    check(model, adapters, requests, outputs)
    assert len({tuple(o.tokens) for o in outputs}) == 5


def test_prompts_longer_than_a_pass(model, adapters):
    requests = [Request(prompt(i, 50), name, 5) for i, name in enumerate(["sql", None, "legal"])]
    with LoraEngine(model, adapters, max_requests=3, max_length=64, max_batch_tokens=16) as engine:
        outputs = engine.generate(requests)
    check(model, adapters, requests, outputs)


def test_fewer_slots_than_adapters(model, adapters):
    names = ["french", "legal", "short", "sql"] * 2
    requests = [Request(prompt(i, 6), name, 5) for i, name in enumerate(names)]
    with LoraEngine(model, adapters, slots=2, max_requests=8, max_length=32) as engine:
        outputs = engine.generate(requests)
    check(model, adapters, requests, outputs)


def test_an_adapter_replaced_under_its_name(model, adapters):
    requests = [Request(prompt(3, 8), name, 8) for name in ("french", "legal", "french")]
    with LoraEngine(model, adapters, max_requests=4, max_length=32) as engine:
        before = engine.generate(requests)
        engine.add_adapter("french", adapters["sql"])
        after = engine.generate(requests)
        engine.remove_adapter("legal")
        with pytest.raises(ConfigError, match="unknown"):
            engine.generate(requests)
    check(model, {**adapters, "french": adapters["sql"]}, requests, after)
    assert before[0].tokens != after[0].tokens
    assert before[1].tokens == after[1].tokens


def test_the_model_is_given_back(model, adapters):
    ids = torch.tensor([prompt(1, 9)])
    with torch.no_grad():
        before = model(ids).logits
        with LoraEngine(model, adapters, max_length=32) as engine:
            engine.generate([Request(prompt(1, 9), "sql", 3)])
            engine.close()
        assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_adapters_from_peft_folders(model, adapters, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj"],
        alpha_pattern={"up_proj": 20},
        rank_pattern={"q_proj": 8},
        init_lora_weights=False,
    )
    tuned = get_peft_model(copy.deepcopy(model), config)
    tuned.save_pretrained(tmp_path / "one")
    request = Request(prompt(5, 10), "one", 8)
    with LoraEngine(model, {"one": tmp_path / "one"}, max_length=32) as engine:
        got = engine.generate([request])[0].tokens
    ids = torch.tensor([request.prompt])
    expected = tuned.merge_and_unload().generate(ids, max_new_tokens=8, do_sample=False)
    assert got == expected[0, 10:].tolist()
    assert got != alone(model, None, request)
    assert read_adapter(tmp_path / "one")["model.layers.0.self_attn.q_proj"].scale == 6 / 8


def test_refusals(model, adapters, tmp_path):
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        LoraEngine(model, {"a": tmp_path})
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    with pytest.raises(ConfigError, match="use_dora"):
        LoraEngine(model, {"a": tmp_path})
    wrong = {"model.layers.9.self_attn.q_proj": next(iter(adapters["sql"].values()))}
    with pytest.raises(ConfigError, match="no linear"):
        LoraEngine(model, {"a": wrong})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with LoraEngine(model, {"a": adapters["french"]}, max_length=32) as engine:
        for bad in (Request([], "a"), Request([1] * 32, "a"), Request([1], "a", 0)):
            with pytest.raises(ConfigError, match="tokens"):
                engine.generate([bad])
        with pytest.raises(ConfigError, match="rank"):
            engine.add_adapter("b", adapters["sql"])


def test_token_slots_of_padded_batches():
    slots = torch.tensor([3, -1, 0, -1, -1], dtype=torch.int32)
    starts = torch.tensor([0, 2, 3, 7, 7, 7], dtype=torch.int32)
    assert token_slots(slots, starts, 9).tolist() == [3, 3, -1, 0, 0, 0, 0, -1, -1]


def test_slots_are_kept_while_in_use():
    slots = Slots(2)
    assert slots.acquire("a") == (0, True)
    assert slots.acquire("a") == (0, False)
    assert slots.acquire("b") == (1, True)
    assert slots.acquire("c") is None
    slots.release("a")
    assert slots.acquire("c") is None
    slots.release("a")
    assert slots.acquire("c") == (0, True)
    assert slots.acquire("a") is None
    assert slots.in_use("b")
