"""Which CUDA graphs vLLM captures and takes, over stand-ins for both of its runners' classes.

tests/engines/test_vllm_real.py has the real ones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest

from dop.integrations import vllm_graphs
from dop.integrations.vllm_graphs import few_adapters

SIZES = (1, 8, 32, 40, 64, 128, 136)
SLOTS = 20


@dataclass(frozen=True)
class Descriptor:
    num_tokens: int
    num_active_loras: int = 0
    mode: str = "full"


def config(slots=SLOTS, specialize=False):
    lora = SimpleNamespace(max_loras=slots, specialize_active_lora=specialize)
    return SimpleNamespace(lora_config=lora if slots else None)


def padded(tokens: int) -> int:
    return next(size for size in SIZES if size >= tokens)


def cases(lora) -> list[int]:
    return [0] if lora is None else [0, lora.max_loras + 1]


def make_dispatcher():
    class CudagraphDispatcher:
        def __init__(self, vllm_config):
            self.vllm_config = vllm_config
            self.cudagraph_keys = {"piecewise": set(), "full": set()}

        def initialize_cudagraph_keys(self, mode, uniform_decode_query_len=1):
            for name, keys in self.cudagraph_keys.items():
                for case in cases(self.vllm_config.lora_config):
                    keys.update(Descriptor(size, case, name) for size in SIZES)

        def dispatch(
            self, num_tokens, uniform_decode=False, has_lora=False, num_active_loras=0,
            valid_modes=None, invalid_modes=None,
        ):  # fmt: skip
            if num_tokens > SIZES[-1]:
                return "none", Descriptor(num_tokens)
            lora = self.vllm_config.lora_config
            case = lora.max_loras + 1 if has_lora else 0
            mode = "full" if uniform_decode else "piecewise"
            descriptor = Descriptor(padded(num_tokens), case, mode)
            assert descriptor in self.cudagraph_keys[mode]
            return mode, descriptor

    return CudagraphDispatcher


def make_manager():
    class CudaGraphManager:
        def __init__(self, vllm_config):
            self.vllm_config = vllm_config
            self._capture_descs = {}
            self._init_candidates()

        def _init_candidates(self):
            for name in ("piecewise", "full"):
                found = [
                    Descriptor(size, case, name)
                    for size in SIZES
                    for case in cases(self.vllm_config.lora_config)
                ]
                self._capture_descs[name] = sorted(found, key=lambda d: -d.num_tokens)

        def dispatch(self, num_reqs, num_tokens, uniform_token_count, num_active_loras):
            if num_tokens > SIZES[-1]:
                return Descriptor(num_tokens, num_active_loras, "none")
            case = self.vllm_config.lora_config.max_loras + 1 if num_active_loras else 0
            return Descriptor(
                padded(num_tokens), case, "full" if uniform_token_count else "piecewise"
            )

    return CudaGraphManager


class First:
    """The dispatcher behind the calls that the second runner's manager has."""

    def __init__(self, vllm_config):
        self.inner = kinds()[0](vllm_config)
        self.inner.initialize_cudagraph_keys("any", uniform_decode_query_len=1)

    @property
    def captured(self):
        return {mode: sorted(keys, key=repr) for mode, keys in self.inner.cudagraph_keys.items()}

    def dispatch(self, tokens, adapters, uniform=True):
        return self.inner.dispatch(
            num_tokens=tokens, has_lora=adapters > 0, uniform_decode=uniform,
            num_active_loras=adapters, valid_modes=None, invalid_modes=None,
        )[1]  # fmt: skip


class Second:
    def __init__(self, vllm_config):
        self.inner = kinds()[1](vllm_config)

    @property
    def captured(self):
        return self.inner._capture_descs

    def dispatch(self, tokens, adapters, uniform=True):
        return self.inner.dispatch(
            tokens, tokens, 1 if uniform else None, num_active_loras=adapters
        )


def kinds():
    return [
        getattr(sys.modules[module], name) for module, name in (vllm_graphs._V1, vllm_graphs._V2)
    ]


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """Modules with both classes."""
    monkeypatch.setattr(vllm_graphs, "_SLOTS", set())
    monkeypatch.delenv("DOP_VLLM_SPLIT", raising=False)
    for (module, name), kind in zip(
        (vllm_graphs._V1, vllm_graphs._V2), (make_dispatcher(), make_manager()), strict=True
    ):
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            made = ModuleType(".".join(parts[:end]))
            made.__path__ = []
            monkeypatch.setitem(sys.modules, made.__name__, made)
        setattr(sys.modules[module], name, kind)
    assert vllm_graphs.install() == ["CudagraphDispatcher", "CudaGraphManager"]


runners = pytest.mark.parametrize("runner", [First, Second])


def test_few_adapters_have_four_rows_each_and_leave_slots_over():
    assert [few_adapters(tokens, 64) for tokens in (32, 33, 40, 64, 128, 129)] == [
        0, 8, 10, 16, 32, 0,
    ]  # fmt: skip
    assert few_adapters(64, 17) == 16
    # No step has more adapters than slots: the first graph is for few of them already.
    assert few_adapters(64, 16) == 0


@runners
def test_sizes_between_have_a_second_graph(runner):
    made = runner(config())
    for mode, found in made.captured.items():
        again = [Descriptor(size, case, mode) for size in SIZES for case in (0, SLOTS + 1)]
        again += [Descriptor(40, 10, mode), Descriptor(64, 16, mode)]  # 32 of 128 are no slots
        assert sorted(found, key=repr) == sorted(again, key=repr)
    assert vllm_graphs.captured_few(64, SLOTS) == 16
    assert vllm_graphs.captured_few(64, SLOTS + 1) == 0


def test_the_second_runner_still_captures_large_sizes_first():
    for found in Second(config()).captured.values():
        tokens = [each.num_tokens for each in found]
        assert tokens == sorted(tokens, reverse=True)


@runners
@pytest.mark.parametrize("uniform", [True, False])
def test_a_step_takes_the_graph_of_its_adapters(runner, uniform):
    made = runner(config())
    mode = "full" if uniform else "piecewise"
    for tokens in (1, 32, 33, 40, 50, 64, 100, 128, 130):
        for adapters in (0, 1, 9, 10, 11, 16, 17, 20):
            found = made.dispatch(tokens, adapters, uniform)
            few = few_adapters(padded(tokens), SLOTS)
            many = SLOTS + 1 if adapters else 0
            case = few if 0 < adapters <= few else many
            assert found == Descriptor(padded(tokens), case, mode)
            assert found in made.captured[mode]
    assert made.dispatch(200, 3, uniform).num_tokens == 200


@runners
@pytest.mark.parametrize(
    "vllm_config", [config(slots=0), config(slots=1), config(slots=8), config(specialize=True)]
)
def test_engines_for_which_there_is_nothing_to_choose_stay_as_they_are(runner, vllm_config):
    made = runner(vllm_config)
    known = cases(vllm_config.lora_config)
    for mode, found in made.captured.items():
        assert len(found) == len(SIZES) * len(known)
        assert {each.num_active_loras for each in found} == set(known), mode
    assert not vllm_graphs._SLOTS
    if vllm_config.lora_config is not None:
        many = vllm_config.lora_config.max_loras + 1
        assert made.dispatch(64, 1).num_active_loras == many


def test_keys_that_are_made_again_have_second_ones_again():
    """vLLM makes them to estimate memory, clears them, and makes them anew."""
    made = First(config())
    before = made.captured
    for keys in made.inner.cudagraph_keys.values():
        keys.clear()
    made.inner.initialize_cudagraph_keys("any")
    assert made.captured == before
    assert made.dispatch(64, 3).num_active_loras == 16


def test_patches_are_made_once_and_only_where_there_is_something_to_patch(monkeypatch):
    first, second = kinds()
    known = (first.dispatch, second.dispatch)
    assert vllm_graphs.install() == ["CudagraphDispatcher", "CudaGraphManager"]
    assert (first.dispatch, second.dispatch) == known
    monkeypatch.setitem(sys.modules, vllm_graphs._V1[0], None)
    monkeypatch.delattr(sys.modules[vllm_graphs._V2[0]], "CudaGraphManager")
    assert vllm_graphs.install() == []


def test_they_can_be_turned_off(monkeypatch):
    first, second = make_dispatcher(), make_manager()
    monkeypatch.setattr(sys.modules[vllm_graphs._V1[0]], "CudagraphDispatcher", first)
    monkeypatch.setattr(sys.modules[vllm_graphs._V2[0]], "CudaGraphManager", second)
    monkeypatch.setenv("DOP_VLLM_SPLIT", "0")
    assert vllm_graphs.install() == []
    found = Second(config())
    assert found.dispatch(64, 1).num_active_loras == SLOTS + 1
    assert vllm_graphs.captured_few(64, SLOTS) == 0


def test_a_class_that_lost_a_method_keeps_the_other(monkeypatch):
    """A version of vLLM with another interface is left alone."""

    class CudaGraphManager:
        def dispatch(self, descriptor):
            return descriptor

    stock = CudaGraphManager.dispatch
    monkeypatch.setattr(sys.modules[vllm_graphs._V2[0]], "CudaGraphManager", CudaGraphManager)
    assert vllm_graphs.install() == ["CudagraphDispatcher"]
    assert CudaGraphManager.dispatch is stock
