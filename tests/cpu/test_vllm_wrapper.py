"""The vLLM plugin over a stand-in for vLLM (fake_vllm.py) with dop.ops on the CPU."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import itertools
import logging
import sys
import weakref
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from fake_vllm import BaseLinearLayerWithLoRA, LogitsProcessorWithLoRA, Mapping

from dop.errors import DopError, MissingKernelError
from dop.integrations import vllm as plugin
from dop.integrations import vllm_graphs
from dop.ops.beside import Beside, Pending

HIDDEN = 32


@pytest.fixture(scope="module")
def wrapper_module():
    """dop.integrations.vllm_wrapper, imported over the stand-in and forgotten afterwards."""
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed; tests/engines tests the plugin with it")
    fake_vllm.install()
    try:
        yield importlib.import_module("dop.integrations.vllm_wrapper")
    finally:
        for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
            del sys.modules[name]
        sys.modules.pop("dop.integrations.vllm_wrapper", None)


@pytest.fixture(autouse=True)
def second_stream(monkeypatch):
    """There is one unless a test says otherwise, whatever the machine's environment says."""
    monkeypatch.delenv("DOP_VLLM_BESIDE", raising=False)


class Engine:
    """A wrapper, three layers and a manager, as the engine's worker builds them."""

    def __init__(self, module, tokens: int = 64, **changes):
        self.config = fake_vllm.config(**changes)
        self.wrapper = module.DopPunicaWrapper(tokens, 8, "cpu", lora_config=self.config)
        self.layers = {
            name: BaseLinearLayerWithLoRA(self.config, widths, HIDDEN)
            for name, widths in (("qkv", (48, 16, 16)), ("gate_up", (64, 64)), ("o", (32,)))
        }
        modules = {**self.layers, "lm_head": LogitsProcessorWithLoRA()}
        self.manager = fake_vllm.LoRAModelManager(self.wrapper, modules, self.config)

    def adapter(self, lora_id: int, rank: int, seed: int, head: bool = False):
        """Load an adapter of a rank and give its weights by layer."""
        rng = torch.Generator().manual_seed(seed)
        model = {}
        for name, layer in self.layers.items():
            kind = self.config.lora_dtype
            a = [torch.randn(rank, HIDDEN, generator=rng).to(kind) for _ in layer.output_slices]
            b = [torch.randn(w, rank, generator=rng).to(kind) for w in layer.output_slices]
            model[name] = SimpleNamespace(lora_a=a, lora_b=b)
        if head:
            model["lm_head"] = SimpleNamespace(lora_a=None, lora_b=None)
        self.manager._registered_adapters[lora_id] = model
        self.manager.activate_adapter(lora_id)
        return model

    def step(self, ids, prompt=None):
        self.manager.set_adapter_mapping(Mapping(tuple(ids), tuple(prompt or ids)))

    def expected(self, name: str, x: torch.Tensor, ids) -> torch.Tensor:
        widths = self.layers[name].output_slices
        y = torch.zeros(x.shape[0], sum(widths))
        for row, lora_id in enumerate(ids):
            if lora_id > 0:
                weights = self.manager._registered_adapters[lora_id][name]
                parts = [
                    (x[row].float() @ a.float().T) @ b.float().T
                    for a, b in zip(weights.lora_a, weights.lora_b, strict=True)
                ]
                y[row] = torch.cat(parts)
        return y

    def check(self, ids, padded: int = 0) -> None:
        """Every layer's result for the current step, padded rows untouched."""
        rows = len(ids) + padded
        for name, layer in self.layers.items():
            x = torch.randn(rows, HIDDEN).to(self.config.lora_dtype)
            y = layer.apply(x)
            want = self.expected(name, x, [*ids, *([0] * padded)])
            torch.testing.assert_close(
                y.float(), want, rtol=2e-2, atol=2e-2 * float(want.abs().max())
            )
            assert (y[len(ids) :] == 0).all()


def test_mixed_ranks_bare_rows_and_padding(wrapper_module):
    engine = Engine(wrapper_module)
    for lora_id, rank in ((11, 8), (12, 3), (13, 1)):
        engine.adapter(lora_id, rank, seed=lora_id)
    ids = [11, 11, 0, 12, 13, 12, 11]
    engine.step(ids)
    engine.check(ids)
    engine.check(ids, padded=9)
    assert engine.wrapper.stock_calls == 0
    assert engine.wrapper._plans.rank_list[:3] == [8, 3, 1]


def test_padded_rows_of_a_longer_step_before_are_not_touched(wrapper_module):
    engine = Engine(wrapper_module)
    engine.adapter(1, 8, 1)
    engine.step([1] * 12)
    engine.check([1] * 12)
    engine.step([1, 1, 1])
    engine.check([1, 1, 1], padded=13)


def test_fewer_rows_than_the_step_has_tokens_are_vllms(wrapper_module):
    engine = Engine(wrapper_module)
    engine.adapter(1, 8, 1)
    engine.step([1] * 6)
    pooled = torch.randn(2, HIDDEN).to(engine.config.lora_dtype)
    meta = engine.wrapper.token_mapping_meta
    meta.token_indices_sorted_by_lora_ids[:2], meta.num_tokens_per_lora[0] = torch.arange(2), 2
    engine.layers["o"].apply(pooled)
    assert engine.wrapper.stock_calls == 1
    engine.check([1] * 6)
    assert engine.wrapper.stock_calls == 1


def test_steps_beyond_the_small_plan_and_back(wrapper_module):
    engine = Engine(wrapper_module, tokens=2048)
    engine.adapter(1, 4, 1)
    engine.adapter(2, 8, 2)
    for length in (700, 5, 2048, 512, 1):
        ids = [1 + (row // 3) % 2 for row in range(length)]
        engine.step(ids)
        engine.check(ids[:length])
    assert engine.wrapper.stock_calls == 0


@pytest.mark.parametrize("max_loras", [1, 2, 256])
@pytest.mark.parametrize("specialize", [False, True])
def test_any_number_of_slots(wrapper_module, max_loras, specialize):
    engine = Engine(wrapper_module, max_loras=max_loras, specialize_active_lora=specialize)
    for lora_id in range(1, min(max_loras, 40) + 1):
        engine.adapter(lora_id, 1 + lora_id % 8, lora_id)
    ids = [1 + row % min(max_loras, 40) for row in range(40)] + [0, 0]
    engine.step(ids)
    engine.check(ids)


def test_graphs_by_number_of_adapters_are_captured_with_that_number(wrapper_module):
    """vLLM makes a mapping of so many adapters before it captures a graph; without
    specialize_active_lora one graph serves all, and the number it is captured with says nothing."""
    for specialize in (True, False):
        engine = Engine(wrapper_module, max_loras=8, specialize_active_lora=specialize)
        for lora_id in range(1, 9):
            engine.adapter(lora_id, 8, lora_id)
        for rows in (1, 8, 64):
            for adapters in (1, 2, 3, 4, 8):
                ids = [1 + row % adapters for row in range(rows)]
                engine.step(ids)
                told = engine.wrapper._plans.plan(rows).adapters
                here = min(rows, adapters)
                rounded = next(n for n in (1, 2, 4, 8) if n >= here)
                assert told == (rounded if specialize else None)


def test_a_size_with_two_graphs_is_told_which_of_them_it_is(wrapper_module, monkeypatch):
    monkeypatch.setattr(vllm_graphs, "_SLOTS", {40})
    engine = Engine(wrapper_module, tokens=192, max_loras=40)
    for lora_id in range(1, 41):
        engine.adapter(lora_id, 8, lora_id)
    #   rows, adapters, and the number that chooses the kernels
    for rows, adapters, told in (
        (64, 1, 16), (64, 16, 16), (64, 17, 40), (64, 40, 40), (40, 10, 10), (40, 11, 40),
        (32, 1, None), (32, 32, None), (128, 32, 32), (128, 33, 40), (136, 1, None),
    ):  # fmt: skip
        engine.step([1 + row % adapters for row in range(rows)])
        assert engine.wrapper._plans.plan(rows).adapters == told, (rows, adapters)
    engine.step([0] * 64)
    assert engine.wrapper._plans.plan(64).adapters is None
    monkeypatch.setattr(vllm_graphs, "_SLOTS", set())
    engine.step([1] * 64)
    assert engine.wrapper._plans.plan(64).adapters is None


def test_an_adapter_beside_rows_without_is_within_the_tables_first_entries(wrapper_module):
    """What a graph of n adapters reads of vLLM's tables are n entries."""
    engine = Engine(wrapper_module, max_loras=4, specialize_active_lora=True)
    engine.adapter(1, 8, 1)
    engine.adapter(2, 8, 2)
    engine.step([0, 2, 0, 1, 2])
    meta = engine.wrapper.token_mapping_meta
    assert meta.active_lora_ids.tolist()[:3] == [0, 1, -1]
    assert meta.token_indices_sorted_by_lora_ids.tolist()[:5] == [3, 1, 4, 0, 2]
    assert meta.num_tokens_per_lora.tolist()[:3] == [1, 2, 2]
    assert meta.lora_token_start_loc.tolist()[:4] == [0, 1, 3, 5]


def test_the_heads_table_is_filled_again_only_if_it_changes(wrapper_module, monkeypatch):
    engine = Engine(wrapper_module)
    engine.adapter(1, 8, 1)
    engine.adapter(2, 8, 2, head=True)
    filled = []
    pairs_of = wrapper_module.vllm_metadata.pairs_of

    def counted(meta, slots):
        if meta is engine.wrapper.prompt_mapping_meta:
            filled.append(slots.tolist())
        return pairs_of(meta, slots)

    monkeypatch.setattr(wrapper_module.vllm_metadata, "pairs_of", counted)
    for ids in ([1, 1], [1], [0, 1], [2, 1], [2], [1], [1, 1, 1]):
        engine.step(ids)
    assert filled == [[-1, -1], [1, 0], [1], [-1]]
    assert bool(engine.wrapper.prompt_mapping_meta.no_lora_flag_cpu)


def test_adapters_never_leak_when_swapped_under_the_same_mapping(wrapper_module):
    engine = Engine(wrapper_module, max_loras=2)
    engine.adapter(1, 8, seed=1)
    engine.adapter(2, 8, seed=2)
    ids = [1, 2, 2, 1]
    engine.step(ids)
    engine.check(ids)
    # Reloaded with other weights and ranks, into exchanged slots, the mapping being the same.
    engine.manager.remove_adapter(1)
    engine.manager.remove_adapter(2)
    engine.adapter(2, 2, seed=22)
    engine.adapter(1, 5, seed=11)
    assert engine.manager.lora_index_to_id == [2, 1]
    engine.step(ids)
    engine.check(ids)


def test_an_evicted_adapters_rank_does_not_stay_with_its_slot(wrapper_module):
    engine = Engine(wrapper_module, max_loras=1)
    for seed, (lora_id, rank) in enumerate([(1, 1), (2, 8), (3, 2)]):
        engine.adapter(lora_id, rank, seed)
        engine.step([lora_id] * 3)
        engine.check([lora_id] * 3)
        engine.manager.remove_adapter(lora_id)


def test_steps_without_adapters_launch_nothing(wrapper_module, monkeypatch):
    engine = Engine(wrapper_module)
    engine.adapter(1, 8, 1)
    engine.step([1, 0])
    engine.step([0, 0, 0])
    monkeypatch.setattr(wrapper_module.ops, "add_lora", None)
    engine.check([0, 0, 0], padded=2)
    assert engine.wrapper.stock_calls == 0


def test_a_layer_without_a_kernel_goes_to_vllm_and_is_named_once(
    wrapper_module, monkeypatch, caplog
):
    engine = Engine(wrapper_module)
    engine.adapter(1, 8, 1)
    real = wrapper_module.ops.add_lora

    def missing(y, x, a, b, plan, **kwargs):
        if len(a) == 2:
            raise MissingKernelError("no kernel for gate_up.", "Install a pack.")
        return real(y, x, a, b, plan, **kwargs)

    monkeypatch.setattr(wrapper_module.ops, "add_lora", missing)
    ids = [1, 0, 1]
    engine.step(ids)
    with caplog.at_level(logging.INFO, logger="vllm.dop"):
        engine.check(ids)
        engine.check(ids)
    assert engine.wrapper.stock_calls == 2
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "no kernel for gate_up" in warnings[0]
    assert "64+64" in warnings[0]


def test_fully_sharded_and_mixed_types_stay_with_vllm(wrapper_module, caplog):
    engine = Engine(wrapper_module)
    engine.adapter(1, 8, 1)
    engine.step([1, 1])
    layer = engine.layers["o"]
    x = torch.randn(2, HIDDEN)
    with caplog.at_level(logging.WARNING, logger="vllm.dop"):
        layer.apply(x)
    assert "float32" in caplog.text
    assert engine.wrapper.stock_calls == 1
    half = [torch.zeros(4, 1, 4, HIDDEN, dtype=torch.float16)]
    whole = [torch.zeros(4, 1, 32, 8, dtype=torch.float16)]
    x = x.half()
    assert "sharded" in wrapper_module.uncovered(x, x, half, whole)
    stacks = [torch.zeros(4, 1, 8, HIDDEN, dtype=torch.float16)] * 4
    assert "4 packed" in wrapper_module.uncovered(x, x, stacks, stacks)


def test_packed_projections_of_0_24_reach_add_lora_linear(wrapper_module):
    column = sys.modules["vllm.lora.layers.column_parallel_linear"]
    engine = Engine(wrapper_module)
    engine.adapter(1, 8, 1)
    engine.step([1, 1])
    x = torch.randn(2, HIDDEN).half()
    y = column._mcp_apply(x, None, engine.layers["gate_up"])
    want = engine.expected("gate_up", x, [1, 1])
    torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))
    engine.config.fully_sharded_loras = True
    assert column._mcp_apply(x, None, engine.layers["gate_up"]) == "sharded"
    engine.config.fully_sharded_loras = False
    engine.layers["gate_up"].punica_wrapper = object()
    assert column._mcp_apply(x, None, engine.layers["gate_up"]) == "sharded"


WAYS = ("_apply_sync", "_apply_async_impl")


def capture(monkeypatch, module) -> list[str]:
    """As if a CUDA graph were captured; notes what is done with the second stream."""
    monkeypatch.setattr(module, "capturing", lambda device: True)
    return watch_beside(monkeypatch)


def watch_beside(monkeypatch) -> list[str]:
    done: list[str] = []
    for half in ("begin", "finish"):
        stock = getattr(Beside, half)

        def noted(self, *call, half=half, stock=stock):
            done.append(half)
            return stock(self, *call)

        monkeypatch.setattr(Beside, half, noted)
    return done


def rows_of(engine: Engine, count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN).to(engine.config.lora_dtype)


def set_base(layer, seed: int, done: list[str] | None = None) -> torch.Tensor:
    """Give a layer a matmul of its own; returns the weight."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(sum(layer.output_slices), HIDDEN, generator=rng)
    weight = weight.to(layer.lora_config.lora_dtype)

    def apply(base, x, bias):
        if done is not None:
            done.append("matmul")
        return torch.nn.functional.linear(x, weight, bias)

    method = fake_vllm.UnquantizedLinearMethod(apply)
    layer._get_quant_method = lambda: method
    return weight


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("asked", ["1", "0"])
@pytest.mark.parametrize("captured", [True, False])
def test_shrink_runs_beside_the_matmul_in_cuda_graphs(
    wrapper_module, monkeypatch, axes, way, asked, captured
):
    monkeypatch.setenv("DOP_VLLM_BESIDE", asked)
    engine = Engine(wrapper_module)
    engine.adapter(11, rank=8, seed=1)
    engine.adapter(12, rank=3, seed=2)
    ids = [11, 0, 12, 12, 11]
    engine.step(ids)
    done = capture(monkeypatch, wrapper_module) if captured else watch_beside(monkeypatch)
    for turn in range(3):
        for seed, (name, layer) in enumerate(engine.layers.items()):
            weight = set_base(layer, seed, done)
            x = rows_of(engine, len(ids))
            bias = torch.randn(len(weight)).to(x.dtype) if turn else None
            done.clear()
            y = getattr(layer, way)(x if axes == 2 else x[None], bias)
            assert y.shape == ((), (1,))[axes - 2] + (len(ids), len(weight))
            want = x.float() @ weight.float().T + engine.expected(name, x, ids)
            close(y.reshape(len(ids), -1), want if bias is None else want + bias.float())
            # The first call of a layer finds out whether it is covered.
            beside = turn > 0 and asked == "1" and captured
            assert done == (["begin", "matmul", "finish"] if beside else ["matmul"])
    assert engine.wrapper.stock_calls == 0


def test_kernels_are_loaded_before_a_capture_once_for_each_layer_and_size(
    wrapper_module, monkeypatch
):
    engine = Engine(wrapper_module, tokens=256)
    engine.adapter(1, rank=8, seed=1)
    warmed = []
    monkeypatch.setattr(Beside, "warm", lambda self, x, a, b, plan: warmed.append(len(x)))
    layer = engine.layers["qkv"]
    for tokens in (5, 5, 5, 7, 7, 200, 5):
        engine.step([1] * tokens)
        layer._apply_sync(rows_of(engine, tokens))
    assert warmed == [5, 7]  # the very first call finds out whether the layer is covered
    capture(monkeypatch, wrapper_module)
    engine.step([1] * 9)
    layer._apply_sync(rows_of(engine, 9))
    assert warmed == [5, 7]


def test_both_graphs_of_a_size_have_their_kernels_loaded_before(wrapper_module, monkeypatch):
    monkeypatch.setattr(vllm_graphs, "_SLOTS", {40})
    engine = Engine(wrapper_module, tokens=256, max_loras=40)
    for lora_id in range(1, 41):
        engine.adapter(lora_id, 8, lora_id)
    warmed = []
    monkeypatch.setattr(Beside, "warm", lambda self, x, a, b, plan: warmed.append(plan.adapters))
    layer = engine.layers["qkv"]
    for adapters in (40, 40, 16, 3, 40):
        engine.step([1 + row % adapters for row in range(64)])
        layer._apply_sync(rows_of(engine, 64))
    assert warmed == [40, 16]


@pytest.mark.parametrize(("tuned", "most"), [(True, 128), (False, 32)])
def test_batches_of_many_tokens_stay_on_one_stream(wrapper_module, monkeypatch, tuned, most):
    monkeypatch.setattr(Pending, "tuned", tuned)
    engine = Engine(wrapper_module, tokens=512)
    engine.adapter(1, rank=8, seed=1)
    layer = engine.layers["qkv"]
    done = capture(monkeypatch, wrapper_module)
    for tokens, finished in ((most + 1, False), (most, True), (most + 1, False)):
        engine.step([1] * tokens)
        x = rows_of(engine, tokens)
        layer._apply_sync(x)
        done.clear()
        y = layer._apply_sync(x)
        assert ("finish" in done) is finished
        assert tokens <= 128 or not done
        base = layer._get_quant_method().apply(None, x, None)
        close(y, base.float() + engine.expected("qkv", x, [1] * tokens))
    pays = wrapper_module.pays_beside
    assert [n for n in (1, 32, 33, 128, 129) if pays(n, tuned)] == [1, 32, *[33, 128] * tuned]


def test_compiled_code_sees_one_op_so_that_nothing_moves_between_the_halves(
    wrapper_module, monkeypatch
):
    engine = Engine(wrapper_module)
    engine.adapter(1, rank=8, seed=1)
    engine.step([1, 1, 1])
    layer = engine.layers["qkv"]
    done = capture(monkeypatch, wrapper_module)
    x = rows_of(engine, 3)
    weight = set_base(layer, 0, done)
    layer._apply_sync(x)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op.startswith("call")])
        return graph.forward

    done.clear()
    got = torch.compile(layer._apply_sync, fullgraph=True, backend=backend)(x)
    close(got, x.float() @ weight.float().T + engine.expected("qkv", x, [1, 1, 1]))
    assert graphs == [["dop_vllm.linear"]]
    assert done == ["begin", "matmul", "finish"]


def test_the_op_of_a_layer_takes_nothing_but_the_layers_own_tensors(wrapper_module):
    """With a tensor of the CPU beside them Inductor takes the result for one that is not aligned,
    and kernels that read it cost 0.5 to 1 us each (experiment 37)."""
    names = [a.name for a in torch.ops.dop_vllm.linear.default._schema.arguments]
    assert names == ["x", "bias", "a", "b"]


def test_code_that_was_compiled_before_finds_each_layer_by_its_stacks(wrapper_module):
    """One graph serves all layers of a shape; nothing is traced where it is loaded from disk."""
    engine = Engine(wrapper_module)
    twin = BaseLinearLayerWithLoRA(engine.config, (32,), HIDDEN)
    engine.layers["twin"] = engine.manager.modules["twin"] = twin
    twin.set_mapping(engine.wrapper)
    engine.adapter(1, rank=8, seed=1)
    engine.step([1, 1])
    x = rows_of(engine, 2)

    def check() -> None:
        for name, layer in (("o", engine.layers["o"]), ("twin", twin)):
            stacks = list(layer.lora_a_stacked), list(layer.lora_b_stacked)
            y = torch.ops.dop_vllm.linear(x, None, *stacks)
            close(y, x.float() @ weights[name].float().T + engine.expected(name, x, [1, 1]))

    weights = {name: set_base(engine.layers[name], seed) for seed, name in enumerate(("o", "twin"))}
    check()
    # Stacks that are made anew, at addresses that were another layer's.
    other = engine.layers["o"]
    twin.lora_b_stacked, other.lora_b_stacked = other.lora_b_stacked, twin.lora_b_stacked
    twin.lora_a_stacked, other.lora_a_stacked = other.lora_a_stacked, twin.lora_a_stacked
    engine.manager.remove_adapter(1)
    engine.adapter(1, rank=4, seed=2)
    engine.step([1, 1])
    check()


def test_stacks_may_be_made_after_the_layer_got_its_wrapper(wrapper_module):
    engine = Engine(wrapper_module)
    layer = engine.layers["o"]
    bare = BaseLinearLayerWithLoRA(engine.config, (32,), HIDDEN)
    del bare.lora_a_stacked, bare.lora_b_stacked
    bare.set_mapping(engine.wrapper)  # is passed over as long as it has none
    engine.adapter(1, rank=8, seed=1)
    engine.step([1])
    x = rows_of(engine, 1)
    base = layer._get_quant_method().apply(None, x, None)
    close(layer._apply_sync(x), base.float() + engine.expected("o", x, [1]))
    before = layer.lora_a_stacked, layer.lora_b_stacked  # keeps their addresses taken
    layer.create_lora_weights(HIDDEN)
    assert torch.equal(layer._apply_sync(x), base)
    engine.manager.remove_adapter(1)
    engine.adapter(1, rank=4, seed=2)
    engine.step([1])
    close(layer._apply_sync(x), base.float() + engine.expected("o", x, [1]))
    with pytest.raises(DopError):
        wrapper_module._LINEARS.of(before[1][0])
    bare.create_lora_weights(HIDDEN)
    assert wrapper_module._LINEARS.of(bare.lora_b_stacked[0]) is bare


def test_stacks_of_no_known_layer_are_an_error_that_says_so(wrapper_module):
    engine, other = Engine(wrapper_module), Engine(wrapper_module)
    layer, linears = other.layers["o"], wrapper_module._LINEARS
    stacks = list(layer.lora_a_stacked), list(layer.lora_b_stacked)
    x = rows_of(engine, 1)
    assert linears.of(stacks[1][0]) is layer
    with pytest.raises(DopError, match=r"None of the \d+ .*set_mapping.*32, 8.*DOP_VLLM_BESIDE"):
        torch.ops.dop_vllm.linear(x, None, stacks[0], [stacks[1][0].clone()])
    head = LogitsProcessorWithLoRA()
    head.set_mapping(engine.wrapper)
    assert head.punica_wrapper is engine.wrapper
    assert head not in linears
    # Another wrapper's layers are not dop's, even those that once were.
    layer.set_mapping(object())
    assert type(layer.punica_wrapper) is object
    assert layer not in linears
    assert all(each in linears for each in engine.layers.values())
    with pytest.raises(DopError):
        torch.ops.dop_vllm.linear(x, None, *stacks)


def test_neither_layers_nor_wrappers_outlive_their_engine(wrapper_module):
    engine = Engine(wrapper_module)
    engine.adapter(1, rank=8, seed=1)
    engine.step([1])
    layer = engine.layers.pop("o")
    layer._apply_sync(rows_of(engine, 1))
    stack, gone = layer.lora_b_stacked[0], weakref.ref(layer)
    del engine.manager.modules["o"], layer
    gc.collect()
    assert gone() is None
    with pytest.raises(DopError):
        wrapper_module._LINEARS.of(stack)
    handle = int(engine.wrapper._handle)
    assert wrapper_module._WRAPPERS[handle] is engine.wrapper
    del engine
    gc.collect()
    assert handle not in wrapper_module._WRAPPERS


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", ["qkv", "o"])
def test_opcheck_of_the_whole_layer(wrapper_module, monkeypatch, name, with_bias, axes):
    engine = Engine(wrapper_module)
    engine.adapter(1, rank=8, seed=1)
    engine.step([1, 0, 1])
    layer = engine.layers[name]
    weight = set_base(layer, 0)
    # What is checked are copies of the stacks, elsewhere.
    monkeypatch.setattr(wrapper_module._LINEARS, "of", lambda stack: layer)
    x, bias = rows_of(engine, 3), weight[:, 0].clone() if with_bias else None
    stacks = list(layer.lora_a_stacked), list(layer.lora_b_stacked)
    arguments = (x if axes == 2 else x[None], bias, *stacks)
    results = torch.library.opcheck(torch.ops.dop_vllm.linear.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_a_quantized_base_stays_visible_to_the_compiler(wrapper_module):
    engine = Engine(wrapper_module)
    engine.adapter(1, rank=8, seed=1)
    engine.step([1, 1, 1])
    layer = engine.layers["qkv"]
    plain, found = layer._get_quant_method(), {}
    for method in (plain, SimpleNamespace(apply=plain.apply)):
        layer._get_quant_method = lambda method=method: method
        names: list[str] = []

        def backend(graph, inputs, names=names):
            names.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
            return graph.forward

        torch._dynamo.reset()
        x = torch.ones(3, HIDDEN).to(engine.config.lora_dtype)
        found[method is plain] = torch.compile(layer._apply_sync, backend=backend)(x), names
    assert any("dop_vllm.linear" in name for name in found[True][1])
    assert not any("dop_vllm.linear" in name for name in found[False][1])
    assert any("dop_vllm.add_lora_linear" in name for name in found[False][1])
    assert torch.equal(found[True][0], found[False][0])


def test_models_compiled_for_other_ops_are_not_loaded(wrapper_module, monkeypatch):
    keys = {}
    for asked in ("0", "1"):
        monkeypatch.setenv("DOP_VLLM_BESIDE", asked)
        keys[asked] = fake_vllm.LoRAConfig().compute_hash()
    assert keys["1"] != keys["0"]
    assert "stock" not in keys.values()
    assert "stock-dop-beside" not in keys.values()  # of ops that are no more
    monkeypatch.delenv("DOP_VLLM_BESIDE")
    assert fake_vllm.LoRAConfig().compute_hash() == keys["1"]


def test_who_turns_the_second_stream_off(wrapper_module, monkeypatch):
    wanted = wrapper_module.beside_wanted
    assert wanted()
    for value in ("0", "no", " Off", "FALSE"):
        monkeypatch.setenv("DOP_VLLM_BESIDE", value)
        assert not wanted(), value
    for value in ("1", "yes", " On", "TRUE", ""):
        monkeypatch.setenv("DOP_VLLM_BESIDE", value)
        assert wanted(), value


def close(y: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


@pytest.mark.parametrize("way", WAYS)
def test_with_two_streams_what_dop_does_not_serve_is_as_without(wrapper_module, monkeypatch, way):
    engine = Engine(wrapper_module)
    engine.adapter(1, rank=8, seed=1)
    layer = engine.layers["qkv"]
    call = getattr(layer, way)
    x = rows_of(engine, 3)
    base = layer._get_quant_method().apply(None, x, None)
    engine.step([1, 1, 1])
    call(x)
    done = capture(monkeypatch, wrapper_module)
    engine.step([0, 0, 0])
    assert torch.equal(call(x), base)
    engine.step([1, 1, 1])
    meta = engine.wrapper.token_mapping_meta
    meta.token_indices_sorted_by_lora_ids[:2], meta.num_tokens_per_lora[0] = torch.arange(2), 2
    pooled = call(x[:2])  # fewer rows than the step has tokens
    assert engine.wrapper.stock_calls == 1
    close(pooled, base[:2].float() + engine.expected("qkv", x, [1, 1, 1])[:2])
    assert done == []
    engine.step([1, 1])
    mixed = call(x[:2].float())  # begin refuses it, and launch says so
    assert (engine.wrapper.stock_calls, done) == (2, ["begin"])
    close(mixed, pooled.float())
    call(x[:2].float())
    assert (engine.wrapper.stock_calls, done) == (3, ["begin"])
    layer.punica_wrapper = object()
    assert (call(x) == 12345.0).all()  # another wrapper keeps vLLM's own


def test_the_head_is_left_out_only_if_nobody_changes_it(wrapper_module):
    engine = Engine(wrapper_module)
    engine.adapter(1, 8, 1)
    engine.adapter(2, 8, 2, head=True)
    arguments = (None, None, None, None, 1.0)
    for ids, calls in (([1, 1], 0), ([1, 2], 1), ([0], 1), ([2], 2)):
        engine.step(ids)
        engine.wrapper.add_lora_logits(*arguments)
        assert engine.wrapper.logits_calls == calls, ids
    engine.manager.remove_adapter(1)
    engine.adapter(3, 8, 3, head=True)  # takes the slot of an adapter without head
    engine.step([3])
    engine.wrapper.add_lora_logits(*arguments)
    assert engine.wrapper.logits_calls == 3


def test_the_op_is_opaque_to_torch_compile(wrapper_module):
    engine = Engine(wrapper_module)
    engine.adapter(1, 8, 1)
    layer = engine.layers["qkv"]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: layer.apply(x) * 2, backend=backend, dynamic=True)
    for ids in ([1, 0], [0, 1, 1], [0, 0, 0]):
        engine.step(ids)
        x = torch.randn(len(ids), HIDDEN).half()
        want = 2 * engine.expected("qkv", x, ids)
        got = compiled(x).float()
        torch.testing.assert_close(got, want, rtol=2e-2, atol=0.02 * float(want.abs().max() + 1))
    assert len(graphs) <= 2  # nothing of a step is a constant of the graph
    assert any("add_lora_linear" in str(node.target) for node in graphs[0].graph.nodes)


def test_two_engines_in_one_process_keep_their_own_tables(wrapper_module):
    first, second = Engine(wrapper_module), Engine(wrapper_module)
    first.adapter(1, 8, 1)
    second.adapter(1, 4, 2)
    first.step([1, 0])
    second.step([0, 1])
    first.check([1, 0])
    second.check([0, 1])


def test_registering_twice_is_registering_once(wrapper_module, monkeypatch):
    platform = fake_vllm.Platform
    stock = platform.__dict__["get_punica_wrapper"]
    monkeypatch.setattr(platform, "get_punica_wrapper", stock)
    monkeypatch.delenv("DOP_VLLM", raising=False)
    plugin.register()
    once = platform.__dict__["get_punica_wrapper"]
    plugin.register()
    assert platform.__dict__["get_punica_wrapper"] is once
    assert fake_vllm.Platform().get_punica_wrapper() == plugin.WRAPPER
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert platform.get_punica_wrapper().endswith("PunicaWrapperGPU")
    monkeypatch.delenv("VLLM_BATCH_INVARIANT")
    monkeypatch.setenv("DOP_VLLM", "0")
    assert platform.get_punica_wrapper().endswith("PunicaWrapperGPU")


def test_switched_off_it_leaves_vllm_alone(wrapper_module, monkeypatch):
    platform = fake_vllm.Platform
    before = platform.__dict__["get_punica_wrapper"]
    for value in ("0", "off", "False"):
        monkeypatch.setenv("DOP_VLLM", value)
        plugin.register()
        assert platform.__dict__["get_punica_wrapper"] is before


def test_old_gpus_and_missing_operators_stay_with_vllm(monkeypatch):
    monkeypatch.delenv("DOP_VLLM", raising=False)
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    old = SimpleNamespace(has_device_capability=lambda _: False)
    assert "capability" in str(plugin.unusable(old))
    new = SimpleNamespace(has_device_capability=lambda _: True)
    assert plugin.unusable(new) is None
    monkeypatch.setitem(sys.modules, "dop.ops", None)
    assert "dop.ops" in str(plugin.unusable(new))


def test_the_entry_points_name_what_is_there():
    text = (importlib.metadata.files is not None) and __import__("pathlib").Path(__file__).parents[
        2
    ].joinpath("pyproject.toml").read_text()
    for name in ("vllm", "sglang"):
        assert f'dop = "dop.integrations.{name}:register"' in str(text)
        assert callable(importlib.import_module(f"dop.integrations.{name}").register)


def test_random_traffic_of_loads_and_evictions(wrapper_module):
    engine = Engine(wrapper_module, max_loras=3)
    rng = torch.Generator().manual_seed(0)
    serial = itertools.count(1)
    for _ in range(25):
        active = [i for i in engine.manager.lora_index_to_id if i is not None]
        if len(active) == 3 or (active and torch.rand(1, generator=rng) < 0.3):
            victim = active[int(torch.randint(len(active), (1,), generator=rng))]
            engine.manager.remove_adapter(victim)
        lora_id = next(serial)
        engine.adapter(lora_id, 1 + int(torch.randint(8, (1,), generator=rng)), seed=lora_id)
        active = [i for i in engine.manager.lora_index_to_id if i is not None]
        length = 1 + int(torch.randint(40, (1,), generator=rng))
        picks = torch.randint(len(active) + 1, (length,), generator=rng).tolist()
        ids = [0 if pick == len(active) else active[pick] for pick in picks]
        engine.step(ids)
        engine.check(ids, padded=(-length) % 8)
    assert engine.wrapper.stock_calls == 0
