"""The vLLM plugin over a stand-in for vLLM (fake_vllm.py) with dop.ops on the CPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import logging
import sys
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from fake_vllm import BaseLinearLayerWithLoRA, LogitsProcessorWithLoRA, Mapping

from dop.errors import MissingKernelError
from dop.integrations import vllm as plugin
from dop.ops.beside import Beside

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


class Engine:
    """A wrapper, three layers and a manager, as the engine's worker builds them."""

    def __init__(self, module, tokens: int = 64, **changes):
        self.config = fake_vllm.config(**changes)
        self.wrapper = module.DopPunicaWrapper(tokens, 8, "cpu", lora_config=self.config)
        self.layers = {
            name: BaseLinearLayerWithLoRA(self.wrapper, self.config, widths, HIDDEN)
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


def test_graphs_by_number_of_adapters_are_captured_with_that_number(wrapper_module, caplog):
    """vLLM makes a mapping of so many adapters before it captures a graph; without
    specialize_active_lora one graph serves all, and the number it is captured with says nothing."""
    vllm_logger = logging.getLogger("vllm")
    vllm_logger.propagate = True
    for specialize in (True, False):
        caplog.clear()
        with caplog.at_level(logging.INFO, "vllm.dop"):
            engine = Engine(wrapper_module, max_loras=8, specialize_active_lora=specialize)
        assert ("--specialize-active-lora" in caplog.text) is not specialize
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("asked", [True, False])
def test_shrink_of_packed_projections_leaves_the_stream(
    wrapper_module, monkeypatch, axes, way, asked
):
    monkeypatch.setenv("DOP_VLLM_BESIDE", str(int(asked)))
    engine = Engine(wrapper_module)
    engine.adapter(11, rank=8, seed=1)
    engine.adapter(12, rank=3, seed=2)
    ids = [11, 0, 12, 12, 11]
    engine.step(ids)
    begun = []
    begin = Beside.begin
    monkeypatch.setattr(
        Beside, "begin", lambda self, *call, **more: begun.append(1) or begin(self, *call, **more)
    )
    for turn in range(3):
        for name, layer in engine.layers.items():
            x = torch.randn(len(ids), HIDDEN).to(engine.config.lora_dtype)
            rows = x if axes == 2 else x[None]
            base = layer._get_quant_method().apply(None, rows, None)
            y = getattr(layer, way)(rows)
            assert y.shape == base.shape
            want = base.reshape(len(ids), -1).float() + engine.expected(name, x, ids)
            close(y.reshape(len(ids), -1), want)
        # The first call of a layer finds out whether it is covered; "o" has one projection.
        assert len(begun) == 2 * turn * asked
    assert engine.wrapper.stock_calls == 0


def test_compiled_code_starts_shrink_in_front_of_the_matmul(wrapper_module, monkeypatch):
    monkeypatch.setenv("DOP_VLLM_BESIDE", "1")
    engine = Engine(wrapper_module)
    engine.adapter(1, rank=8, seed=1)
    engine.step([1, 1, 1])
    layer = engine.layers["qkv"]
    weight = torch.randn(sum(layer.output_slices), HIDDEN).to(engine.config.lora_dtype)
    method = SimpleNamespace(apply=lambda base, x, bias: torch.nn.functional.linear(x, weight))
    layer._get_quant_method = lambda: method
    x = torch.randn(3, HIDDEN).to(engine.config.lora_dtype)
    layer._apply_sync(x)
    order = []

    def backend(graph, inputs):
        order.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    got = torch.compile(layer._apply_sync, fullgraph=True, backend=backend)(x)
    want = x.float() @ weight.float().T + engine.expected("qkv", x, [1, 1, 1])
    close(got, want)
    begun, finished = (
        next(i for i, name in enumerate(order) if f"dop_vllm.{half}" in name)
        for half in ("begin", "finish")
    )
    matmul = next(i for i, name in enumerate(order) if "linear" in name)
    assert begun < matmul < finished


def test_models_compiled_for_one_stream_are_not_loaded_for_two(wrapper_module, monkeypatch):
    keys = set()
    for asked in ("0", "1"):
        monkeypatch.setenv("DOP_VLLM_BESIDE", asked)
        keys.add(fake_vllm.LoRAConfig().compute_hash())
    assert len(keys) == 2


def test_where_a_second_stream_pays(wrapper_module):
    pays = wrapper_module.pays_beside
    qkv, gate_up = (4096, (4096, 1024, 1024)), (4096, (14336, 14336))
    assert [n for n in (1, 32, 64, 128, 129) if pays(n, *qkv)] == [1, 32]
    assert [n for n in (1, 32, 64, 128, 129) if pays(n, *gate_up)] == [1, 32, 64, 128]
    assert not any(pays(n, 14336, (4096,)) for n in (1, 32, 64, 128))


def close(y: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


@pytest.mark.parametrize("way", WAYS)
def test_with_two_streams_what_dop_does_not_serve_is_as_without(wrapper_module, monkeypatch, way):
    monkeypatch.setenv("DOP_VLLM_BESIDE", "1")
    engine = Engine(wrapper_module)
    engine.adapter(1, rank=8, seed=1)
    layer = engine.layers["qkv"]
    call = getattr(layer, way)
    x = torch.randn(3, HIDDEN).to(engine.config.lora_dtype)
    base = layer._get_quant_method().apply(None, x, None)
    engine.step([1, 1, 1])
    call(x)
    engine.step([0, 0, 0])
    assert torch.equal(call(x), base)
    engine.step([1, 1, 1])
    meta = engine.wrapper.token_mapping_meta
    meta.token_indices_sorted_by_lora_ids[:2], meta.num_tokens_per_lora[0] = torch.arange(2), 2
    pooled = call(x[:2])  # fewer rows than the step has tokens
    assert engine.wrapper.stock_calls == 1
    close(pooled, base[:2].float() + engine.expected("qkv", x, [1, 1, 1])[:2])
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
