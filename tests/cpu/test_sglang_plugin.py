"""The SGLang plugin without a server: a stand-in for csgmv's backend, batches made up."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dop import ops
from dop.errors import MissingKernelError
from dop.integrations import sglang as plugin

SLOTS, RANK, WIDTH, OUT = 4, 8, 32, 48


class Stock:
    """csgmv's interface; its kernels in plain torch, adapter by adapter."""

    def __init__(self, max_loras_per_batch, device, server_args=None):
        self.max_loras_per_batch, self.device = max_loras_per_batch, device
        self.shrinks = self.expands = 0

    def prepare_lora_batch(
        self, forward_batch, weight_indices, lora_ranks, scalings, use_cuda_graph,
        use_prefill_cuda_graph=False,
    ):  # fmt: skip
        rows = torch.tensor(weight_indices).repeat_interleave(forward_batch.lengths)
        self.batch_info = SimpleNamespace(rows=rows, ranks=lora_ranks, scalings=scalings)

    def run_lora_a_sgemm(self, x, weights, pruned_batch_info=None, stack_num=1):
        self.shrinks += 1
        v = x.new_zeros(x.shape[0], weights.shape[1])
        for row, slot in enumerate(self.batch_info.rows.tolist()):
            rank = self.batch_info.ranks[slot]
            v[row, :rank] = weights[slot, :rank] @ x[row]
        return v

    def run_lora_b_sgemm(
        self, x, weights, output_offset, base_output=None, pruned_batch_info=None, **_
    ):
        self.expands += 1
        y = x.new_zeros(x.shape[0], weights.shape[1]) if base_output is None else base_output
        for row, slot in enumerate(self.batch_info.rows.tolist()):
            rank = self.batch_info.ranks[slot]
            scale = self.batch_info.scalings[slot]
            y[row] += scale * (weights[slot, :, :rank] @ x[row, :rank])
        return y


@pytest.fixture
def backend(monkeypatch):
    utils = ModuleType("sglang.srt.lora.utils")
    utils.generate_sequence_lengths = lambda batch, device=None: batch.lengths
    for name in ("sglang", "sglang.srt", "sglang.srt.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.lora.utils", utils)
    return plugin.make_backend(Stock)(SLOTS, "cpu", None)


def prepare(backend, slots, lengths, ranks, scalings):
    batch = SimpleNamespace(lengths=torch.tensor(lengths))
    backend.prepare_lora_batch(batch, slots, ranks, scalings, False, use_prefill_cuda_graph=False)
    return [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]


def layer(kind=torch.float16):
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(SLOTS, RANK, WIDTH, generator=rng).to(kind)
    b = torch.randn(SLOTS, OUT, RANK, generator=rng).to(kind)
    return a, b


def reference(x, a, b, rows, ranks, scalings):
    y = torch.zeros(x.shape[0], OUT)
    for row, slot in enumerate(rows):
        rank = ranks[slot]
        v = a[slot, :rank].float() @ x[row].float()
        y[row] = scalings[slot] * (b[slot, :, :rank].float() @ v)
    return y


def run(backend, x, a, b, y=None):
    shrunk = backend.run_lora_a_sgemm(x, a)
    return backend.run_lora_b_sgemm(
        x=shrunk, weights=b, output_offset=torch.tensor([0, OUT]), base_output=y
    )


RANKS, SCALINGS = [0, 8, 3, 1], [0.0, 2.0, 0.5, 1.0]


def test_mixed_ranks_scalings_and_requests_without_adapter(backend):
    a, b = layer()
    rows = prepare(backend, [1, 0, 2, 3, 1], [3, 2, 1, 4, 1], RANKS, SCALINGS)
    x = torch.randn(len(rows), WIDTH).half()
    y = torch.zeros(len(rows), OUT).half()
    out = run(backend, x, a, b, y)
    assert out is y
    want = reference(x, a, b, rows, RANKS, SCALINGS)
    torch.testing.assert_close(out.float(), want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))
    assert backend.shrinks == backend.expands == 0
    bare = [row for row, slot in enumerate(rows) if slot == 0]
    assert (out[bare] == 0).all()


def test_what_an_evicted_adapter_left_behind_its_rank_is_not_read(backend):
    a, b = layer()
    prepare(backend, [2], [4], RANKS, SCALINGS)
    x = torch.randn(4, WIDTH).half()
    before = run(backend, x, a, b)
    a[2, 3:] = 1000
    b[2, :, 3:] = 1000
    assert torch.equal(run(backend, x, a, b), before)


def test_rows_of_graph_padding_are_left_alone(backend):
    a, b = layer()
    prepare(backend, [1, 2], [1, 1], RANKS, SCALINGS)
    x = torch.randn(8, WIDTH).half()
    y = torch.full((8, OUT), 7.0).half()
    run(backend, x, a, b, y)
    assert (y[2:] == 7).all()
    assert not (y[:2] == 7).all()


def test_steps_of_any_size(backend):
    a, b = layer()
    for length in (1, 600, 9000, 3):
        rows = prepare(backend, [1, 2], [length, 1], RANKS, SCALINGS)
        x = torch.randn(len(rows), WIDTH).half()
        out = run(backend, x, a, b)
        want = reference(x[-2:], a, b, rows[-2:], RANKS, SCALINGS)
        torch.testing.assert_close(out[-2:].float(), want, rtol=3e-2, atol=3e-2 * 50)
        assert torch.allclose(out[-2:].float(), want, rtol=3e-2, atol=float(want.abs().max()) / 50)


def test_the_output_head_and_packed_projections_stay_with_sglang(backend):
    a, _ = layer()
    prepare(backend, [1], [2], RANKS, SCALINGS)
    x = torch.randn(2, WIDTH).half()
    assert torch.is_tensor(backend.run_lora_a_sgemm(x, a, pruned_batch_info=object()))
    assert torch.is_tensor(backend.run_lora_a_sgemm(x, a, stack_num=2))
    assert backend.shrinks == 2


def test_other_types_stay_with_sglang(backend):
    a, b = layer(torch.float32)
    rows = prepare(backend, [1], [2], RANKS, SCALINGS)
    x = torch.randn(2, WIDTH)
    out = run(backend, x, a, b)
    torch.testing.assert_close(out, reference(x, a, b, rows, RANKS, SCALINGS))
    assert backend.shrinks == backend.expands == 1


def test_a_missing_kernel_is_said_once_and_sglang_serves(backend, monkeypatch, caplog):
    def missing(*_, **__):
        raise MissingKernelError("no kernel.", "Install a pack.")

    monkeypatch.setattr(ops, "add_lora", missing)
    a, b = layer()
    rows = prepare(backend, [1], [2], RANKS, SCALINGS)
    x = torch.randn(2, WIDTH).half()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = run(backend, x, a, b)
    want = reference(x, a, b, rows, RANKS, SCALINGS)
    torch.testing.assert_close(out.float(), want, rtol=3e-2, atol=float(want.abs().max()) / 50)
    assert backend.expands == 2
    assert caplog.text.count("no kernel.") == 1


def test_register_replaces_the_factory_once_and_can_be_switched_off(monkeypatch):
    registry = ModuleType("sglang.srt.lora.backend.lora_registry")
    stock = registry.LORA_SUPPORTED_BACKENDS = {"csgmv": lambda: Stock, "triton": None}
    for name in ("sglang", "sglang.srt", "sglang.srt.lora", "sglang.srt.lora.backend"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    monkeypatch.setenv("DOP_SGLANG", "0")
    plugin.register()
    assert stock["csgmv"]() is Stock
    monkeypatch.delenv("DOP_SGLANG")
    plugin.register()
    once = stock["csgmv"]
    plugin.register()
    assert stock["csgmv"] is once
    assert issubclass(once(), Stock)
    assert once() is once()
    assert stock["triton"] is None
