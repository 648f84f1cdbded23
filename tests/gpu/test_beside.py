"""Shrink on a second stream beside other work: the same bits as add_lora, eager and in a graph."""

from __future__ import annotations

from functools import partial

import pytest

torch = pytest.importorskip("torch")

from dop import ops  # noqa: E402
from dop.integrations.step_plan import StepPlans  # noqa: E402
from dop.integrations.vllm_graphs import few_adapters  # noqa: E402
from dop.ops import eager  # noqa: E402
from dop.ops.beside import Beside  # noqa: E402

BLOCK_FOR = eager.block_for

SLOTS, WIDTH, OUTS = 16, 4096, (4096, 1024, 1024)
ROUNDS = 20


def layer(rank: int, seed: int):
    rng = torch.Generator("cuda").manual_seed(seed)

    def make(*size):
        return torch.randn(*size, generator=rng, device="cuda", dtype=torch.bfloat16) / 64

    a = [make(SLOTS, rank, WIDTH) for _ in OUTS]
    return a, [make(SLOTS, n, rank) for n in OUTS], make(sum(OUTS), WIDTH)


def both_ways(x, layers, plan, beside):
    """Three layers in a row on the same workspace: y of two streams and of one."""
    found = []
    for a, b, weight in layers:
        pending = beside.begin(x, a, b, plan)
        y = torch.nn.functional.linear(x, weight)
        beside.finish(pending, y)
        want = torch.nn.functional.linear(x, weight)
        ops.add_lora(want, x, a, b, plan)
        found.append((y, want))
    return found


@pytest.fixture(params=["kernels of add_lora", "kernels of their own"])
def same_kernels(request, monkeypatch):
    """Whether calls in two pieces are made with the kernels that serve the call alone."""
    if request.param == "kernels of add_lora":
        monkeypatch.setattr(eager, "block_for", lambda s, p, beside=False: BLOCK_FOR(s, p))
    return request.param == "kernels of add_lora"


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize(("tokens", "adapters"), [(1, 1), (8, 3), (64, 64), (64, 1), (300, 4)])
@pytest.mark.parametrize("captured", [False, True])
def test_same_bits(rank, tokens, adapters, captured, same_kernels):
    layers = [layer(rank, seed) for seed in range(3)]
    beside = Beside(torch.cuda.Stream())
    x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    ids = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    plan = ops.segment_plan(ids, slots=SLOTS)
    found = both_ways(x, layers, plan, beside)
    graph = None
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = both_ways(x, layers, plan, beside)
    for seed in range(ROUNDS):
        rng = torch.Generator("cuda").manual_seed(seed)
        ids.random_(-1, min(adapters, SLOTS), generator=rng)
        x.normal_(generator=rng)
        ops.segment_plan(ids, slots=SLOTS, out=plan)
        again = both_ways(x, layers, plan, beside)
        if graph is None:
            found = both_ways(x, layers, plan, beside)
        else:
            graph.replay()
        torch.cuda.synchronize()
        for (y, want), (second, _) in zip(found, again, strict=True):
            assert torch.equal(y, second)
            if same_kernels:
                assert torch.equal(y, want)
            else:
                torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)


def compositions(tokens: int, slots: int):
    """Batches of every kind: adapters of a row, of many, of both, none at all."""
    rng = torch.Generator().manual_seed(tokens)
    yield torch.arange(tokens) % slots
    yield torch.zeros(tokens)
    yield torch.arange(tokens) % 8
    yield torch.full((tokens,), -1)
    for _ in range(ROUNDS):
        few = torch.randint(-1, slots, (tokens,), generator=rng)
        many = torch.randint(-1, 5, (tokens,), generator=rng)
        yield torch.where(
            torch.rand(tokens, generator=rng) < torch.rand(1, generator=rng), few, many
        )


@pytest.mark.parametrize("tokens", [40, 64, 128])
def test_graphs_for_few_and_for_many_adapters_serve_any_composition(tokens):
    """Captured with one batch each, replayed with others: the bits of the same call outside of it,
    and what `add_lora` makes of them. Rows without an adapter keep theirs."""
    slots = 64
    rng = torch.Generator("cuda").manual_seed(0)

    def make(*size):
        return torch.randn(*size, generator=rng, device="cuda", dtype=torch.bfloat16) / 64

    layers = [
        ([make(slots, 16, WIDTH) for _ in OUTS], [make(slots, n, 16) for n in OUTS],
         make(sum(OUTS), WIDTH))
        for _ in range(3)
    ]  # fmt: skip
    beside = Beside(torch.cuda.Stream())
    plans = StepPlans(1024, slots, 16, "cuda", small=128, few=partial(few_adapters, slots=slots))
    x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    captured, kernels = {}, set()
    for adapters in (few_adapters(tokens, slots), min(tokens, slots)):
        plans.update(torch.arange(tokens, dtype=torch.int32) % adapters)
        plan = plans.plan(tokens)
        assert plan.adapters == adapters
        kernels.add(beside.begin(x, *layers[0][:2], plan).block.kernel.name)
        both_ways(x, layers, plan, beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = both_ways(x, layers, plans.plan(tokens), beside)
        captured[adapters] = graph, plan, found
    if tokens == 64 and "H100" in torch.cuda.get_device_name():
        assert len(kernels) == 2  # the pack has some for it; of 128 rows, one may be best for both
    for ids in compositions(tokens, slots):
        plans.update(ids.int())
        plans.plan(tokens)  # fills the tables that graphs read
        x.normal_()
        for graph, plan, found in captured.values():
            again = both_ways(x, layers, plan, beside)
            graph.replay()
            torch.cuda.synchronize()
            for (y, want), (second, _), (_, _, weight) in zip(found, again, layers, strict=True):
                assert torch.equal(y, second)
                torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)
                bare = torch.nn.functional.linear(x, weight)[ids < 0]
                assert torch.equal(y[ids < 0], bare)
