import copy
import logging

import pytest
import torch

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dop.errors import ConfigError
from dop.integrations import peft as dop_peft

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore:Adapter name", "ignore:.lora_bias=True")
ROWS = ["a", "__base__", "b", "a", "c", "__base__", "d", "b"]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
        )
    ).eval()


def lora(rank: int, **options) -> LoraConfig:
    options = {"target_modules": TARGETS, "init_lora_weights": False} | options
    return LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", **options)


def mixed_model(**first):
    """Adapters a to d of ranks 4, 8, 16 and 3; c changes few modules, with its own patterns."""
    model = get_peft_model(tiny_llama(), lora(4, **first), adapter_name="a")
    model.add_adapter("b", lora(8))
    few = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 40}}
    model.add_adapter("c", lora(16, target_modules=["q_proj", "down_proj"], **few))
    model.add_adapter("d", lora(3, use_rslora=True))
    return model.eval()


def ids(rows: int, tokens: int = 5) -> torch.Tensor:
    return torch.randint(0, 96, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, names=ROWS, tokens=5):
    return model(input_ids=ids(len(names), tokens), adapter_names=names).logits


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def calls(monkeypatch) -> list[int]:
    """Rows of every call of the operator from here on."""
    from dop import ops

    seen, real = [], ops.add_lora

    def counted(y, *args, **kwargs):
        seen.append(y.shape[0])
        return real(y, *args, **kwargs)

    monkeypatch.setattr(ops, "add_lora", counted)
    return seen


def test_mixed_batch_equals_pefts_own(monkeypatch):
    model = mixed_model()
    expected = logits(model)
    dop_peft.accelerate(model)
    seen = calls(monkeypatch)
    close(logits(model), expected)
    assert seen == [len(ROWS) * 5] * 14


def test_every_row_equals_its_adapter_alone():
    model = dop_peft.accelerate(mixed_model())
    got = logits(model)
    for row, name in enumerate(ROWS):
        with torch.no_grad():
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=ids(len(ROWS))[row : row + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(input_ids=ids(len(ROWS))[row : row + 1]).logits
        close(got[row : row + 1], alone)


def test_other_batches_after_the_first_use_the_right_slots():
    model, own = mixed_model(), mixed_model()
    own.load_state_dict(model.state_dict())
    dop_peft.accelerate(model, max_slots=2)
    for names in (["a"], ["b", "a"], ["c", "d", "a", "b"], ["__base__"], ["d", "c"], ["a", "d"]):
        close(logits(model, names), logits(own, names))
        close(logits(model, names, 1), logits(own, names, 1))


def stacks(model):
    states = [m.__dict__["_dop_mixed"] for m in model.modules() if "_dop_mixed" in m.__dict__]
    return [state.stack for state in states if state.stack is not None]


def test_the_same_adapters_in_another_order_need_no_more_slots():
    model, own = mixed_model(), mixed_model()
    own.load_state_dict(model.state_dict())
    dop_peft.accelerate(model)
    close(logits(model, list("abcd")), logits(own, list("abcd")))
    first = stacks(model)
    assert {stack.slots for stack in first} == {4}
    close(logits(model, list("dcba")), logits(own, list("dcba")))
    close(logits(model, ["b", "d"]), logits(own, ["b", "d"]))
    assert all(a is b for a, b in zip(first, stacks(model), strict=True))


def test_generate_makes_one_plan_a_length(monkeypatch):
    from dop import ops

    model = mixed_model()
    prompt = {"input_ids": ids(4), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    names = ["a", "b", "__base__", "c"]
    expected = model.generate(**prompt, adapter_names=names)
    dop_peft.accelerate(model)
    plans, real = [], ops.segment_plan
    monkeypatch.setattr(ops, "segment_plan", lambda *a, **k: plans.append(1) or real(*a, **k))
    assert torch.equal(model.generate(**prompt, adapter_names=names), expected)
    assert len(plans) == 2  # the prompt's rows and the decode step's


def test_weights_changed_in_place_are_noticed():
    model, own = mixed_model(), mixed_model()
    own.load_state_dict(model.state_dict())
    dop_peft.accelerate(model)
    before = logits(model)
    for m in (model, own):
        layer = m.base_model.model.model.layers[0].self_attn.q_proj
        with torch.no_grad():
            layer.lora_B["a"].weight.mul_(3)
        layer.set_scale("b", 5.0)
    after = logits(model)
    assert not torch.allclose(after, before)
    close(after, logits(own))


def test_a_reloaded_adapter_never_shows_its_predecessor():
    model = dop_peft.accelerate(mixed_model())
    before = logits(model)
    model.delete_adapter("b")
    model.add_adapter("b", lora(32))
    own = copy.deepcopy(model)
    dop_peft.restore(own)
    after = logits(model)
    assert not torch.allclose(after, before)
    close(after, logits(own))


def test_refresh_sees_writes_that_leave_no_trace():
    model = dop_peft.accelerate(mixed_model())
    before = logits(model)
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["a"].weight
    weight.data.mul_(-2)
    dop_peft.refresh(model)
    own = copy.deepcopy(model)
    close(logits(model), logits(dop_peft.restore(own)))
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"lora_bias": True}, "bias"), ({"use_dora": True}, None)],
)
def test_what_cannot_be_served_goes_to_peft(options, word, monkeypatch, caplog):
    torch.manual_seed(3)
    model = mixed_model(**options)
    own = copy.deepcopy(model)
    dop_peft.accelerate(model)
    if word is None:  # PEFT refuses DoRA in mixed batches itself
        with pytest.raises(ValueError, match="DoRA"):
            logits(model)
        return
    seen = calls(monkeypatch)
    with caplog.at_level(logging.WARNING):
        close(logits(model), logits(own))
        logits(model)
    assert not seen
    assert [word in r.message for r in caplog.records].count(True) == 1
    close(logits(model, ["b", "d"]), logits(own, ["b", "d"]))
    assert seen


def test_an_operator_that_refuses_leaves_the_batch_to_peft(monkeypatch, caplog):
    from dop import ops

    model = mixed_model()
    expected = logits(model)
    dop_peft.accelerate(model)

    def refuse(*_args, **_kwargs):
        raise ConfigError("no kernel for this.")

    monkeypatch.setattr(ops, "add_lora", refuse)
    with caplog.at_level(logging.WARNING):
        close(logits(model), expected)
    assert sum("no kernel for this" in r.message for r in caplog.records) == 1


def test_gradients_are_pefts_business(monkeypatch):
    model = dop_peft.accelerate(mixed_model())
    seen = calls(monkeypatch)
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["a"].weight.requires_grad_()
    model(input_ids=ids(2), adapter_names=["a", "b"]).logits.sum().backward()
    grad = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["a"].weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0
    assert not seen


def test_layers_that_are_not_linear_stay(caplog):
    model = get_peft_model(
        tiny_llama(), lora(4, target_modules=["q_proj", "embed_tokens"]), adapter_name="a"
    ).eval()
    expected = logits(model, ["a", "__base__"])
    with caplog.at_level(logging.WARNING):
        dop_peft.accelerate(model)
    assert any("Embedding" in r.message for r in caplog.records)
    close(logits(model, ["a", "__base__"]), expected)


def test_restore_gives_the_classes_back():
    model = mixed_model()
    classes = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    dop_peft.accelerate(dop_peft.accelerate(model))
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] != classes
    assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
    dop_peft.restore(model)
    assert [type(m) for m in model.modules()] == classes


def test_models_without_lora_are_refused():
    with pytest.raises(ConfigError, match="no LoRA layers"):
        dop_peft.accelerate(tiny_llama())
    with pytest.raises(ConfigError, match="max_slots"):
        dop_peft.accelerate(mixed_model(), max_slots=0)
