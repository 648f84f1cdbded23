"""The plugin over real vLLM classes, without an engine or GPU kernels of vLLM, on the GPU if any.

Runs wherever `import vllm.lora.model_manager` works (also a vLLM without its binaries).
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from sources import load_file, package_folder
from torch import nn

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode
from vllm.lora.layers import (
    LoRAMapping,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper import punica_gpu
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.utils import torch_utils

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""vLLM registers its operators for one kind of device alone."""
HIDDEN, SLOTS, RANK = 32, 3, 8
CONFIG = SimpleNamespace(
    max_loras=SLOTS,
    max_lora_rank=RANK,
    fully_sharded_loras=False,
    specialize_active_lora=False,
    lora_dtype=torch.float16,
)


@pytest.fixture(autouse=True)
def metadata(monkeypatch):
    """vLLM imports its metadata class only where Triton is; it needs none. Nor does it a GPU."""
    monkeypatch.setattr(torch_utils, "PIN_MEMORY", torch.cuda.is_available())
    if not hasattr(punica_gpu, "LoRAKernelMeta"):
        path = package_folder("vllm") / "lora/ops/triton_ops/lora_kernel_metadata.py"
        module = load_file(path, "lora_kernel_metadata")
        monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", module.LoRAKernelMeta, raising=False)


@pytest.fixture(params=["0", "1"], autouse=True)
def streams(monkeypatch, request):
    """Without the second stream, and with it."""
    monkeypatch.setenv("DOP_VLLM_BESIDE", request.param)
    return request.param


def plain_layer(kind, wrapper, widths):
    """A layer of vLLM's class without its parallel base layer: the base adds nothing."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer._enable_aux_cuda_stream = False
    layer.lora_config = CONFIG
    layer.set_mapping(wrapper)
    layer.tp_size, layer.tp_rank, layer.n_slices = 1, 0, len(widths)
    layer.output_slices = widths
    total = sum(widths)
    quant = UnquantizedLinearMethod()
    quant.apply = lambda _, x, bias: x.new_zeros(x.shape[0], total)
    # Its forward decides which way packed projections take.
    layer.base_layer = MergedColumnParallelLinear.__new__(MergedColumnParallelLinear)
    nn.Module.__init__(layer.base_layer)
    layer.base_layer.quant_method = quant
    layer.lora_a_stacked = tuple(
        torch.zeros(SLOTS, 1, RANK, HIDDEN, dtype=torch.float16, device=DEVICE) for _ in widths
    )
    layer.lora_b_stacked = tuple(
        torch.zeros(SLOTS, 1, width, RANK, dtype=torch.float16, device=DEVICE) for width in widths
    )
    return layer


def build(manager_class=LoRAModelManager):
    from dop.integrations.vllm_wrapper import DopPunicaWrapper

    wrapper = DopPunicaWrapper(64, 8, torch.device(DEVICE), lora_config=CONFIG)
    manager = manager_class.__new__(manager_class)
    manager.lora_config, manager.is_pooling_model, manager.supports_mm = CONFIG, False, False
    manager.punica_wrapper_mapping = {"language_model": wrapper}
    manager.lora_index_to_id = [None] * SLOTS
    manager.vocab_size, manager._last_mapping = 100, None
    manager._registered_adapters, manager._active_adapters = {}, {}
    manager._classification_head = manager._last_slot_layout = None  # of 0.33
    manager.modules = {
        "qkv_proj": plain_layer(MergedQKVParallelLinearWithLoRA, wrapper, (48, 16, 16)),
        "gate_up_proj": plain_layer(MergedColumnParallelLinearWithLoRA, wrapper, (64, 64)),
        "o_proj": plain_layer(RowParallelLinearWithLoRA, wrapper, (32,)),
    }
    return manager, wrapper


def adapter(manager, lora_id, rank, seed):
    rng = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=rng).half()

    weights = {}
    for name, layer in manager.modules.items():
        a = [random(rank, HIDDEN) for _ in layer.output_slices]
        b = [random(width, rank) for width in layer.output_slices]
        if len(a) == 1:
            weights[name] = LoRALayerWeights(name, rank, rank, a[0], b[0])
        else:
            weights[name] = PackedLoRALayerWeights(name, rank, [rank] * len(a), a, b)
    manager._registered_adapters[lora_id] = LoRAModel(lora_id, rank, weights)
    assert manager.activate_adapter(lora_id)


def check(manager, ids, padded=3):
    for name, layer in manager.modules.items():
        x = torch.randn(len(ids) + padded, HIDDEN).half().to(DEVICE)
        got = layer.apply(x).float().cpu()
        want = torch.zeros_like(got)
        for row, lora_id in enumerate(ids):
            if lora_id > 0:
                weights = manager._registered_adapters[lora_id].loras[name]
                a, b = weights.lora_a, weights.lora_b
                pairs = [(a, b)] if torch.is_tensor(a) else zip(a, b, strict=True)
                parts = [x[row].float().cpu() @ u.float().T @ v.float().T for u, v in pairs]
                want[row] = torch.cat(parts)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


def test_vllms_layers_and_manager_through_dop(monkeypatch):
    manager, wrapper = build()
    monkeypatch.setattr(punica_gpu.PunicaWrapperGPU, "add_lora_linear", None)  # never vLLM's own
    monkeypatch.setattr(punica_gpu.PunicaWrapperGPU, "add_shrink", None)
    adapter(manager, 7, 8, 1)
    adapter(manager, 8, 3, 2)
    ids = (7, 7, 0, 8, 8, 7)
    manager.set_adapter_mapping(LoRAMapping(ids, ids))
    check(manager, ids)
    assert wrapper._plans.rank_list == [8, 3, 8]
    assert wrapper._headless == {0, 1}


def test_reloaded_under_the_same_mapping(monkeypatch):
    manager, _ = build()
    ids = (1, 2, 2)
    adapter(manager, 1, 8, 1)
    adapter(manager, 2, 8, 2)
    manager.set_adapter_mapping(LoRAMapping(ids, ids))
    check(manager, ids)
    for lora_id in (1, 2):
        manager.remove_adapter(lora_id)
    adapter(manager, 2, 2, 22)
    adapter(manager, 1, 5, 11)
    assert manager.lora_index_to_id == [2, 1, None]
    manager.set_adapter_mapping(LoRAMapping(ids, ids))
    check(manager, ids)


def test_compiled_by_inductor_nothing_of_a_step_stays_in_the_code():
    manager, _ = build()
    adapter(manager, 1, 8, 1)
    adapter(manager, 2, 3, 2)
    layers = list(manager.modules.values())

    def forward(x):
        return [layer.apply(2 * x) for layer in layers]

    compiled = torch.compile(forward, fullgraph=True)
    for ids in ((1, 2, 2, 0), (2, 1, 0, 0), (0, 0, 0, 0), (2, 2, 2, 1)):
        manager.set_adapter_mapping(LoRAMapping(ids, ids))
        x = torch.randn(len(ids), HIDDEN).half().to(DEVICE)
        for got, want in zip(compiled(x), forward(x), strict=True):
            assert torch.equal(got, want)
            assert bool(want.any()) == any(ids)


def rows_by_slot(meta, tokens):
    """What vLLM's kernels find in the tables: slot -> its tokens, in the tables' order."""
    found = {}
    for place, slot in enumerate(meta.active_lora_ids.tolist()):
        count = int(meta.num_tokens_per_lora[place])
        start = int(meta.lora_token_start_loc[place])
        if count:
            found[slot] = meta.token_indices_sorted_by_lora_ids[start : start + count].tolist()
            assert int(meta.lora_token_start_loc[place + 1]) == start + count
            assert {int(meta.token_lora_mapping[:tokens][t]) for t in found[slot]} == {slot}
    return found


def test_the_metadata_that_vllms_own_kernels_read_is_the_same():
    from dop.integrations import vllm_metadata

    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 7, 64):
        for captured in ([SLOTS + 1], [1, 2, 4]):
            metas = [
                punica_gpu.LoRAKernelMeta.make(SLOTS, 64, "cpu", captured_lora_counts=captured)
                for _ in range(2)
            ]
            assert vllm_metadata.is_known(metas[0])
            vllm_metadata.join(metas[1])
            for meta in metas:
                meta.token_lora_mapping.fill_(9)
                meta.token_indices_sorted_by_lora_ids.fill_(9)
            slots = torch.randint(-1, SLOTS, (tokens,), generator=generator, dtype=torch.int32)
            for given in (slots, torch.full_like(slots, -1), torch.full_like(slots, 1)):
                metas[0].prepare_tensors(given)
                vllm_metadata.fill(metas[1], given)
                assert rows_by_slot(metas[0], tokens) == rows_by_slot(metas[1], tokens)
                for name in vllm_metadata.FIELDS[5:-1]:
                    assert torch.equal(getattr(metas[0], name), getattr(metas[1], name)), name
                used = rows_by_slot(metas[1], tokens)
                assert list(used) == sorted(used, key=lambda slot: (slot < 0, slot))


def test_the_indices_that_vllms_embeddings_read_are_the_same():
    from dop.integrations import vllm_metadata
    from dop.integrations.step_plan import slots_of

    wrappers = [punica_gpu.PunicaWrapperGPU(64, 8, "cpu", lora_config=CONFIG) for _ in range(2)]
    assert vllm_metadata.is_known_base(wrappers[1])
    ids, slot_of = [7, None, 5], {7: 0, 5: 2}
    for tokens, samples in (((7, 7, 0, 5), (7, 5)), ((0,) * 64, (0,) * 8), ((5,), (5,))):
        mapping = LoRAMapping(tokens, samples)
        wrappers[0]._update_base_metadata(mapping, ids, SLOTS + 1, 100)
        slots = [slots_of(each, slot_of) for each in (tokens, samples)]
        vllm_metadata.fill_base(wrappers[1], *slots, 100, SLOTS)
        assert wrappers[0].indices_len == wrappers[1].indices_len
        for name, length in zip(
            vllm_metadata.BASE_FIELDS[:4], wrappers[0].indices_len, strict=True
        ):
            stock, mine = (getattr(w, name)[..., :length] for w in wrappers)
            assert torch.equal(stock, mine), name


def test_models_compiled_without_the_plugin_are_not_loaded_from_disk(streams):
    from vllm.config.lora import LoRAConfig

    import dop.integrations.vllm_wrapper  # noqa: F401 - patches the hash

    config = LoRAConfig(max_lora_rank=8)
    assert config.compute_hash().endswith("-dop-layer" if streams == "1" else "-dop")
    assert config.compute_hash() != LoRAConfig(max_lora_rank=16).compute_hash()


def test_the_lru_manager_activates_through_the_patch():
    assert hasattr(LoRAModelManager.activate_adapter, "stock")
    assert "activate_adapter" in vars(LRUCacheLoRAModelManager)


class Side:
    """A worker over vLLM's own manager; adapters are made when it loads them."""

    def __init__(self, patched: bool, loaded: int = 5):
        from vllm.lora.model_manager import LoRALRUCache
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

        manager, _ = build(LRUCacheLoRAModelManager)
        manager.lora_config = SimpleNamespace(**{**vars(CONFIG), "max_cpu_loras": loaded})
        manager._registered_adapters = LoRALRUCache(loaded, manager.deactivate_adapter)
        manager._active_adapters = LoRALRUCache(SLOTS, manager._deactivate_adapter)
        manager.add_adapter = self._add
        self.manager, self.loads = manager, 0
        self.spare, _ = build()
        self.worker = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
        self.worker._adapter_manager, self.worker._load_adapter = manager, self._load
        apply = LRUCacheWorkerLoRAManager._apply_adapters
        self._apply = apply if patched else apply.stock

    def _load(self, request):
        """Other weights each time; the same on both sides."""
        self.loads += 1
        number = request.lora_int_id
        adapter(self.spare, number, 1 + self.loads % RANK, 100 * number + self.loads)
        model = self.spare._registered_adapters[number]
        self.spare.remove_adapter(number)
        return model

    def _add(self, model):
        self.manager._registered_adapters[model.id] = model
        return True

    def step(self, requests):
        self._apply(self.worker, requests)


def steps(seed: int, count: int, adapters: int):
    """Sets of requests; some are to be loaded again in place."""
    draw = random.Random(seed)
    for _ in range(count):
        numbers = draw.sample(range(1, adapters + 1), draw.randint(0, SLOTS))
        again = draw.random() < 0.1
        yield {LoRARequest(f"a{n}", n, "path", load_inplace=again) for n in numbers}


@pytest.mark.parametrize("seed", range(3))
def test_a_steps_adapters_are_loaded_placed_and_marked_as_vllm_does(seed):
    """Random steps through vLLM's own worker and through the patched one."""
    stock, mine = Side(patched=False), Side(patched=True)
    for requests in steps(seed, 40, adapters=7):
        for side in (stock, mine):
            side.step(requests)
        for name in ("_registered_adapters", "_active_adapters"):
            orders = [list(getattr(side.manager, name).order) for side in (stock, mine)]
            assert orders[0] == orders[1], name
        assert stock.manager.lora_index_to_id == mine.manager.lora_index_to_id
        assert stock.loads == mine.loads
    assert mine.loads > 7


@pytest.mark.parametrize(("seed", "adapters"), [(5, 4), (6, 9), (7, 50)])
def test_adapters_that_come_and_go_through_the_worker_never_leak(seed, adapters):
    """Every token's result is that of its adapter's newest weights."""
    side, draw = Side(patched=True), random.Random(seed)
    for requests in steps(seed, 60, adapters):
        side.step(requests)
        numbers = [0, *(each.lora_int_id for each in requests)]
        ids = tuple(draw.choice(numbers) for _ in range(draw.randint(1, 9)))
        side.manager.set_adapter_mapping(LoRAMapping(ids, ids))
        check(side.manager, ids)
    assert side.loads > adapters


def capture_hook(lora_utils, config, wrapper):
    """What vLLM calls in front of a capture: its own mappings of so many adapters."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    class Runner(LoRAModelRunnerMixin):
        lora_manager = object()

        def _set_active_loras(self, samples, tokens, requests, *rest):
            wrapper.update_metadata(
                LoRAMapping(tokens, samples), list(range(1, 65)), 65, vocab_size=100
            )

    return lora_utils.create_lora_capture_hook(config, Runner())


def test_graphs_by_number_of_adapters_choose_kernels_for_that_number():
    """vLLM's own list of graphs and its own mappings for capturing them."""
    lora_utils = pytest.importorskip("vllm.v1.worker.gpu.lora_utils")
    from dop.integrations.vllm_wrapper import DopPunicaWrapper

    config = SimpleNamespace(**{**vars(CONFIG), "max_loras": 64, "specialize_active_lora": True})
    wrapper = DopPunicaWrapper(128, 64, torch.device(DEVICE), lora_config=config)

    compilation = SimpleNamespace(cudagraph_specialize_lora=True)
    counts = lora_utils.get_lora_capture_cases(config, compilation)
    assert counts == [0, 1, 2, 4, 8, 16, 32, 64, 65]
    capture = capture_hook(lora_utils, config, wrapper)
    for tokens in (1, 8, 32, 64):
        for count in counts:
            capture(count, tokens, tokens)
            told = wrapper._plans.plan(tokens).adapters
            assert told == (min(count, 64, tokens) or None), (tokens, count)
            assert wrapper._no_adapter is (count == 0)


@pytest.fixture
def many_slots(monkeypatch):
    """A configuration of 64 slots, as both of vLLM's runners read it."""
    from dop.integrations import vllm_graphs, vllm_wrapper  # noqa: F401  (it patches)

    monkeypatch.setattr(vllm_graphs, "_SLOTS", set())
    lora = SimpleNamespace(**{**vars(CONFIG), "max_loras": 64})
    mode = CUDAGraphMode.FULL_AND_PIECEWISE
    return SimpleNamespace(
        lora_config=lora,
        scheduler_config=SimpleNamespace(max_num_seqs=64),
        parallel_config=SimpleNamespace(data_parallel_size=1, tensor_parallel_size=1),
        speculative_config=None,
        num_speculative_tokens=0,
        compilation_config=SimpleNamespace(
            cudagraph_mode=mode,
            cudagraph_capture_sizes=[1, 8, 32, 40, 64, 128],
            max_cudagraph_capture_size=128,
            cudagraph_specialize_lora=True,
            compile_sizes=[],
            is_attention_compiled_piecewise=lambda: True,
            adjust_cudagraph_sizes_for_spec_decode=lambda *_: None,
        ),
    )


def expected_case(tokens: int, adapters: int) -> int:
    size = next(n for n in (1, 8, 32, 40, 64, 128) if n >= tokens)
    few = size // 4 if size > 32 else 0
    return adapters and (few if adapters <= few else 65)


@pytest.mark.parametrize("uniform", [True, False])
def test_the_first_runners_steps_of_few_adapters_have_graphs_of_their_own(many_slots, uniform):
    dispatcher_module = pytest.importorskip("vllm.v1.cudagraph_dispatcher")
    mode = many_slots.compilation_config.cudagraph_mode
    dispatcher = dispatcher_module.CudagraphDispatcher(many_slots)
    dispatcher.initialize_cudagraph_keys(mode, uniform_decode_query_len=1)
    captured = {d for _, descriptors in dispatcher.get_capture_descs() for d in descriptors}
    for tokens in (1, 8, 32, 33, 40, 50, 64):
        for adapters in (0, 1, 8, 10, 11, 16, 17, 32, 64):
            _, found = dispatcher.dispatch(
                num_tokens=tokens, uniform_decode=uniform, has_lora=adapters > 0,
                num_active_loras=adapters,
            )  # fmt: skip
            assert found in captured
            assert found.num_active_loras == expected_case(tokens, adapters)
    # As it is captured: vLLM asks for the very descriptor.
    for mode, descriptors in dispatcher.get_capture_descs():
        for one in descriptors:
            assert dispatcher.dispatch(
                num_tokens=one.num_tokens, uniform_decode=one.uniform, has_lora=one.has_lora,
                num_active_loras=one.num_active_loras,
                valid_modes={mode, CUDAGraphMode.NONE},
            ) == (mode, one)  # fmt: skip


@pytest.mark.parametrize("uniform", [1, None])
def test_the_second_runners_steps_of_few_adapters_have_graphs_of_their_own(
    many_slots, uniform, monkeypatch
):
    module = pytest.importorskip("vllm.v1.worker.gpu.cudagraph_utils")
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(module, "get_pp_group", lambda: group)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(module, "current_platform", platform)
    monkeypatch.setattr(module, "is_breakable_cudagraph_enabled", lambda: False)
    mode = many_slots.compilation_config.cudagraph_mode
    manager = module.ModelCudaGraphManager(many_slots, torch.device(DEVICE), mode, 1, [0, 65])
    manager._graphs_captured = True
    captured = {d for descriptors in manager._capture_descs.values() for d in descriptors}
    assert {d.num_active_loras for d in captured} == {0, 10, 16, 32, 65}
    for tokens in (1, 8, 32, 33, 40, 50, 64):
        for adapters in (0, 1, 8, 10, 11, 16, 17, 32, 64):
            found = manager.dispatch(tokens, tokens, uniform, num_active_loras=adapters)
            assert found in captured
            assert found.num_active_loras == expected_case(tokens, adapters)


def test_graphs_for_few_adapters_are_captured_with_kernels_for_few(many_slots):
    """vLLM's own mappings for capturing a graph tell the wrapper which it is."""
    lora_utils = pytest.importorskip("vllm.v1.worker.gpu.lora_utils")
    from dop.integrations import vllm_graphs
    from dop.integrations.vllm_wrapper import DopPunicaWrapper

    vllm_graphs._SLOTS.add(64)
    wrapper = DopPunicaWrapper(128, 64, torch.device(DEVICE), lora_config=many_slots.lora_config)

    capture = capture_hook(lora_utils, many_slots.lora_config, wrapper)
    for tokens, cases in ((8, {65: None}), (32, {65: None}), (64, {16: 16, 65: 64})):
        for count, told in {0: None, **cases}.items():
            capture(count, tokens, tokens)
            assert wrapper._plans.plan(tokens).adapters == told, (tokens, count)
