"""A step's adapters over a stand-in for vLLM's worker and its two caches."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from dataclasses import dataclass
from types import ModuleType

import pytest

from dop.integrations import vllm_adapters

SLOTS, LOADED = 4, 6


@dataclass(frozen=True)
class Request:
    lora_int_id: int
    load_inplace: bool = False


class Cache(OrderedDict):
    """What vLLM's LRUCache has of this: the last entry was used last."""

    def touch(self, key):
        if key in self:
            self.move_to_end(key)


class Manager:
    def __init__(self):
        self._registered_adapters, self._active_adapters = Cache(), Cache()


def make_worker():
    """A worker class of its own: patches stay with a class."""

    class LRUCacheWorkerLoRAManager:
        """As vLLM's: load what is missing, give it a slot, note its use in both caches."""

        def __init__(self):
            self._adapter_manager = Manager()
            self.loads: list[int] = []
            self.stock_steps = 0

        def _apply_adapters(self, requests):
            self.stock_steps += 1
            for request in requests:
                if request is not None:
                    self.add_adapter(request)

        def add_adapter(self, request):
            loaded, active = vars(self._adapter_manager).values()
            adapter = request.lora_int_id
            if adapter not in loaded or request.load_inplace:
                self.loads.append(adapter)
                loaded.pop(adapter, None)
                active.pop(adapter, None)
                if len(loaded) == LOADED:
                    active.pop(loaded.popitem(last=False)[0], None)
                loaded[adapter] = None
            loaded.touch(adapter)
            if adapter not in active and len(active) == SLOTS:
                active.popitem(last=False)
            active.setdefault(adapter)
            active.touch(adapter)

        @property
        def state(self):
            return [list(cache) for cache in vars(self._adapter_manager).values()]

    return LRUCacheWorkerLoRAManager


@pytest.fixture
def worker(monkeypatch):
    """A patched worker."""
    module = ModuleType("vllm.lora.worker_manager")
    module.LRUCacheWorkerLoRAManager = make_worker()
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.lora.worker_manager", module)
    assert vllm_adapters.install()
    return module.LRUCacheWorkerLoRAManager()


def requests_of(*adapters):
    return [Request(adapter) for adapter in adapters]


def test_adapters_in_their_slots_are_marked_and_nothing_else(worker):
    worker._apply_adapters(requests_of(1, 2, 3))
    assert worker.stock_steps == 1
    worker._apply_adapters([*requests_of(2, 1), None])
    assert worker.stock_steps == 1
    assert worker.state == [[3, 2, 1], [3, 2, 1]]


def test_one_that_is_not_loaded_takes_vllms_way_with_all(worker):
    worker._apply_adapters(requests_of(1, 2))
    worker._apply_adapters(requests_of(1, 5))
    assert (worker.stock_steps, worker.loads) == (2, [1, 2, 5])


def test_one_that_lost_its_slot_takes_vllms_way(worker):
    worker._apply_adapters(requests_of(1, 2, 3, 4))
    worker._apply_adapters(requests_of(5))
    assert worker.state == [[1, 2, 3, 4, 5], [2, 3, 4, 5]]
    worker._apply_adapters(requests_of(1))
    assert worker.stock_steps == 3
    assert worker.state == [[2, 3, 4, 5, 1], [3, 4, 5, 1]]
    assert worker.loads == [1, 2, 3, 4, 5]


def test_one_to_be_loaded_again_is_loaded_again(worker):
    worker._apply_adapters(requests_of(1, 2))
    worker._apply_adapters([Request(2), Request(1, load_inplace=True)])
    assert worker.loads == [1, 2, 1]


@pytest.mark.parametrize("seed", range(20))
def test_random_steps_leave_both_caches_as_vllm_does(worker, seed):
    plain = make_worker()()
    draw = random.Random(seed)
    for _ in range(60):
        adapters = draw.sample(range(1, 9), draw.randint(0, SLOTS))
        step = [Request(adapter, draw.random() < 0.02) for adapter in adapters]
        for each in (worker, plain):
            each._apply_adapters(step)
        assert worker.state == plain.state
        assert worker.loads == plain.loads
    assert worker.stock_steps < plain.stock_steps == 60


def test_other_versions_keep_their_own_way(worker, monkeypatch):
    stock = type(worker)._apply_adapters.stock
    assert vllm_adapters.install()
    assert type(worker)._apply_adapters.stock is stock
    worker._apply_adapters(requests_of(1))
    worker._adapter_manager._active_adapters = {1: None}
    assert not vllm_adapters.mark_used(worker._adapter_manager, requests_of(1))
    assert not vllm_adapters.mark_used(object(), requests_of(1))
    monkeypatch.delattr(type(worker), "_apply_adapters")
    assert not vllm_adapters.install()
    monkeypatch.setitem(sys.modules, "vllm.lora.worker_manager", None)
    assert not vllm_adapters.install()
