"""`dop.ops` on a GPU: right results, CUDA graphs, no waiting, no allocation, little host time."""

import gc
import statistics
import threading
import time

import pytest
import torch

from dop import ops
from dop.ops import api, eager, launch, native, short

KINDS = [torch.bfloat16, torch.float16]
DEVICE = "cuda"
HOST_US = 8.0


def make_stacks(slots, rank, width, outs, kind=torch.bfloat16):
    def normal(*size):
        return torch.randn(*size, device=DEVICE, dtype=torch.float32).to(kind)

    a = [(normal(slots, rank, width) * width**-0.5).contiguous() for _ in outs]
    b = [(normal(slots, out, rank) * rank**-0.5).contiguous() for out in outs]
    return a, b


def make_rows(tokens, width, total, kind=torch.bfloat16):
    x = torch.randn(tokens, width, device=DEVICE).to(kind)
    return x, torch.randn(tokens, total, device=DEVICE).to(kind)


def make_ids(tokens, slots, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, slots, (tokens,), generator=g, dtype=torch.int32)


def reference(y, x, a, b, ids, ranks=None, scale=1.0):
    """float64, a segment at a time."""
    want = y.double()
    for slot in ids[ids >= 0].unique().tolist():
        rows = (ids == slot).nonzero().flatten().to(DEVICE)
        rank = a[0].shape[-2] if ranks is None else ranks[slot]
        factor = scale if isinstance(scale, float) else scale[slot]
        v = [x[rows].double() @ p[slot].double()[:rank].T for p in a]
        parts = [u @ q[slot].double()[:, :rank].T for u, q in zip(v, b, strict=True)]
        want[rows] += factor * torch.cat(parts, dim=1)
    return want


def check(y, x, a, b, ids, plan, want_ranks=None, want_scale=1.0, **options):
    before = y.clone()
    want = reference(y, x, a, b, ids.cpu(), want_ranks, want_scale)
    assert ops.add_lora(y, x, a, b, plan, **options) is y
    eps = torch.finfo(y.dtype).eps
    worst = ((y.double() - want).abs() / want.abs().clamp(min=1)).amax() if y.numel() else 0
    assert float(worst) < 4 * eps, float(worst)
    bare = (ids < 0).to(DEVICE)
    assert torch.equal(y[bare].view(torch.int16), before[bare].view(torch.int16))


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 5, 8, 16, 31, 33, 64, 100, 128, 129])
def test_ranks(kind, rank):
    a, b = make_stacks(7, rank, 256, (192, 64), kind)
    for tokens in (1, 17, 130):
        ids = make_ids(tokens, 7)
        x, y = make_rows(tokens, 256, 256, kind)
        check(y, x, a, b, ids, ops.segment_plan(ids.to(DEVICE), slots=7))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("width", "outs"),
    [(333, (65, 31)), (8, (8,)), (1, (1,)), (4096, (4096, 1024, 1024)), (77, (1000,))],
)
def test_widths(kind, width, outs):
    a, b = make_stacks(5, 16, width, outs, kind)
    for tokens in (1, 40, 600):
        ids = make_ids(tokens, 5)
        x, y = make_rows(tokens, width, sum(outs), kind)
        check(y, x, a, b, ids, ops.segment_plan(ids.to(DEVICE), slots=5))


def test_float32_too():
    a, b = make_stacks(3, 16, 128, (64,), torch.float32)
    ids = make_ids(20, 3)
    x, y = make_rows(20, 128, 64, torch.float32)
    before, want = y.clone(), reference(y, x, a, b, ids)
    ops.add_lora(y, x, a, b, ops.segment_plan(ids.to(DEVICE), slots=3))
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[ids < 0], before[ids < 0])


@pytest.mark.parametrize("adapters", [None, 1, 4, 64])
@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 128, 512, 2048])
def test_a_layer_that_packs_know(tokens, adapters):
    """Llama-3.1-8B's qkv at rank 16: served by a tuned pack where there is one."""
    if adapters is not None and adapters > tokens:
        pytest.skip("more adapters than tokens")
    outs = (4096, 1024, 1024)
    a, b = make_stacks(64, 16, 4096, outs)
    x, y = make_rows(tokens, 4096, sum(outs))
    ids = torch.randint(-1, adapters or 64, (tokens,), dtype=torch.int32)
    plan = ops.segment_plan(ids.to(DEVICE), slots=64, adapters=adapters)
    check(y, x, a, b, ids, plan)


@pytest.mark.parametrize("in_plan", [True, False])
@pytest.mark.parametrize("tokens", [3, 50, 700])
@pytest.mark.parametrize("width", [256, 4096])
def test_mixed_ranks_and_scales(width, tokens, in_plan):
    outs = (4096, 1024, 1024) if width == 4096 else (128, 64)
    ranks, scale = [16, 1, 8, 0, 5, 9], [1.0, 0.5, -2.0, 1.0, 3.0, 0.25]
    a, b = make_stacks(6, 16, width, outs)
    x, y = make_rows(tokens, width, sum(outs))
    ids = make_ids(tokens, 6)
    facts = {
        "ranks": torch.tensor(ranks, dtype=torch.int32, device=DEVICE),
        "scale": torch.tensor(scale, device=DEVICE),
    }
    plan = ops.segment_plan(ids.to(DEVICE), slots=6, **(facts if in_plan else {}))
    check(y, x, a, b, ids, plan, ranks, scale, **({} if in_plan else facts))
    check(y, x, a, b, ids, plan, ranks, scale, **({} if in_plan else facts))


def test_awkward_batches():
    a, b = make_stacks(1024, 16, 512, (256,))
    for ids in (
        torch.full((4096,), 5),
        torch.full((64,), -1),
        torch.arange(1024).flip(0),
        torch.empty(0, dtype=torch.int64),
        torch.tensor([1023, -1, 1023, 0]),
    ):
        x, y = make_rows(len(ids), 512, 256)
        check(y, x, a, b, ids, ops.segment_plan(ids.to(DEVICE), slots=1024))


def test_strided_and_misaligned_rows():
    a, b = make_stacks(4, 16, 256, (128,))
    ids = make_ids(30, 4)
    plan = ops.segment_plan(ids.to(DEVICE), slots=4)
    wide, _ = make_rows(30, 300, 1)
    _, flat = make_rows(1, 1, 30 * 128 + 1)
    _, tall = make_rows(128, 1, 30)
    check(flat[0, 1:].view(30, 128), wide[:, 7:263], a, b, ids, plan)
    check(tall.T, wide[:, :256], a, b, ids, plan)


def test_plan_kernel_makes_the_tables_of_torch():
    from dop.ops.plan import SegmentPlan, fill_by_torch, layout

    ranks = torch.tensor([4, 0, 9, 1, 16], dtype=torch.int32, device=DEVICE)
    scales = torch.rand(5, device=DEVICE)
    for tokens, slots, given in ((1, 5, True), (64, 5, True), (1000, 300, False), (5000, 5, True)):
        ids = torch.randint(-2, slots + 2, (tokens,), device=DEVICE)
        facts = {"ranks": ranks, "scale": scales} if given else {}
        plan = ops.segment_plan(ids, slots=slots, **facts)
        want = SegmentPlan(torch.zeros_like(plan.buffer), tokens, slots)
        fill_by_torch(
            want.buffer, ids, slots, ranks if given else None, scales if given else None, 1.0
        )
        used = plan.table("token_slot") >= 0
        for key, (offset, length) in layout(tokens, slots).places.items():
            name, _, rows = key.partition("/")
            got, wish = (p.buffer[offset : offset + length] for p in (plan, want))
            if name in ("token_rank", "token_scale"):
                got, wish = got[used], wish[used]
            elif name in ("tile_rank", "tile_scale"):
                full = want.table("tile_rows", int(rows)) > 0
                got, wish = got[full], wish[full]
            assert torch.equal(got, wish), (key, tokens, slots)


def capture(function):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


@pytest.mark.parametrize("facts", ["plain", "call", "plan"])
@pytest.mark.parametrize("width", [256, 4096])
@pytest.mark.parametrize("plan_inside", [True, False])
def test_graph_replayed_with_fifty_other_compositions(width, facts, plan_inside):
    outs = (4096, 1024, 1024) if width == 4096 else (128, 64)
    tokens, slots = 40, 12
    layers = [make_stacks(slots, 16, width, outs) for _ in range(3)]
    x, y0 = make_rows(tokens, width, sum(outs))
    y = y0.clone()
    ids = make_ids(tokens, slots).to(DEVICE)
    ranks = torch.randint(1, 17, (slots,), dtype=torch.int32, device=DEVICE)
    scale = torch.rand(slots, device=DEVICE)
    given = {"ranks": ranks, "scale": scale}
    in_plan, in_call = (given if facts == "plan" else {}), (given if facts == "call" else {})
    plan = ops.segment_plan(ids, slots=slots, **in_plan)

    def refill():
        ops.segment_plan(ids, slots=slots, out=plan, **in_plan)

    def step():
        if plan_inside:
            refill()
        y.copy_(y0)
        for a, b in layers:
            ops.add_lora(y, x, a, b, plan, **in_call)

    graph = capture(step)
    for seed in range(50):
        few = 1 + seed % slots
        ids.copy_(torch.randint(-1, few, (tokens,), dtype=torch.int32))
        ranks.copy_(torch.randint(1, 17, (slots,), dtype=torch.int32))
        x.normal_()
        if not plan_inside:
            refill()
        graph.replay()
        got = y.clone()
        fresh = ops.segment_plan(ids, slots=slots, **in_plan)
        want = y0.clone()
        for a, b in layers:
            ops.add_lora(want, x, a, b, fresh, **in_call)
        assert torch.equal(got.view(torch.int16), want.view(torch.int16)), seed
        # and the plan of the graph itself, used eagerly after a replay
        want.copy_(y0)
        for a, b in layers:
            ops.add_lora(want, x, a, b, plan, **in_call)
        assert torch.equal(got.view(torch.int16), want.view(torch.int16)), seed


def test_first_call_of_a_shape_inside_a_capture():
    a, b = make_stacks(3, 24, 144, (72,))
    ids = make_ids(9, 3).to(DEVICE)
    x, y0 = make_rows(9, 144, 72)
    y = y0.clone()
    plan = ops.segment_plan(ids, slots=3)
    ops.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.add_lora(y, x, a, b, plan)
    assert torch.equal(y, y0)
    graph.replay()
    want = ops.add_lora(y0.clone(), x, a, b, plan)
    assert torch.equal(y, want)


def test_two_runs_are_bit_identical():
    a, b = make_stacks(16, 64, 2048, (2048,))
    for tokens in (1, 64, 777):
        x, y = make_rows(tokens, 2048, 2048)
        plan = ops.segment_plan(make_ids(tokens, 16).to(DEVICE), slots=16)
        runs = [ops.add_lora(y.clone(), x, a, b, plan) for _ in range(5)]
        assert all(torch.equal(runs[0].view(torch.int16), r.view(torch.int16)) for r in runs)


def test_nothing_waits_for_the_device():
    a, b = make_stacks(8, 16, 512, (256, 128))
    x, y = make_rows(32, 512, 384)
    ids = make_ids(32, 8).to(DEVICE)
    ranks = torch.full((8,), 4, dtype=torch.int32, device=DEVICE)

    def everything(**given):
        plan = ops.segment_plan(ids, slots=8, ranks=[8, 4] * 4, scale=[1.0, 2.0] * 4)
        ops.add_lora(y, x, a, b, plan)
        ops.add_lora(y, x, a, b, plan, ranks=ranks, scale=0.5)
        ops.add_lora(y[:0], x[:0], a, b, ops.segment_plan(ids[:0], slots=8))
        v = ops.sgmv_shrink(x, a, plan)
        ops.sgmv_expand(y, v, b, plan, scale=2.0)
        ops.segment_plan(ids, slots=8, out=plan)
        ops.add_lora(y.T.contiguous().T, x, a, b, plan)

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()  # the very first calls too
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocations():
    return torch.cuda.memory_stats()["allocation.all.allocated"]


def test_no_allocation_after_warm_up():
    layers = [make_stacks(8, 16, 512, outs) for outs in ((256, 128, 128), (512,), (1024, 1024))]
    rows = [make_rows(32, 512, sum(t.shape[1] for t in b)) for _, b in layers]
    ids = make_ids(32, 8).to(DEVICE)
    plan = ops.segment_plan(ids, slots=8)

    def step():
        ops.segment_plan(ids, slots=8, out=plan)
        for (a, b), (x, y) in zip(layers, rows, strict=True):
            ops.add_lora(y, x, a, b, plan)

    step()
    before = allocations()
    for _ in range(10):
        step()
    assert allocations() == before


def test_warmup_leaves_nothing_to_do():
    a, b = make_stacks(64, 16, 4096, (4096, 1024, 1024))
    x, y = make_rows(16, 4096, 6144)
    plan = ops.segment_plan(make_ids(16, 64).to(DEVICE), slots=64)
    ops.forget()
    choices = ops.warmup((a, b), tokens=(1, 16, 64), slots=64)
    assert [c.tokens for c in choices] == [64, 16, 1]
    assert str(choices[0])
    loaded, before = len(launch._LOADED), allocations()
    ops.add_lora(y, x, a, b, plan)
    assert allocations() == before
    assert len(launch._LOADED) == loaded


def host_us(call, calls=200, rounds=25):
    """Median host time of a call; the GPU is idle before each round and its queue never full."""
    for _ in range(calls):
        call()
    found = []
    gc.disable()
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - begin) / calls * 1e6)
    gc.enable()
    return statistics.median(found)


@pytest.fixture(params=["compiled", "kept", "ctypes"])
def way(request, monkeypatch):
    """How kernels are launched; "kept": calls that come again are graphs."""
    if request.param != "ctypes":
        if not native.reads_tensors():
            pytest.skip("dop.ops._launch is not built, or torch is older than 2.10")
    else:
        monkeypatch.setattr(native, "EXTENSION", None)
        monkeypatch.setattr(api, "_short_path", short.short_path(short.Surroundings()))
    monkeypatch.setenv("DOP_GRAPHS", str(int(request.param == "kept")))
    launch.driver.cache_clear()
    ops.forget()
    yield request.param
    ops.forget()
    launch.driver.cache_clear()


@pytest.mark.timed
@pytest.mark.parametrize("outs", [(4096,), (14336, 14336), (4096, 1024, 1024)], ids=str)
def test_host_time_of_an_eager_call(outs, record_property, monkeypatch, way):
    a, b = make_stacks(8, 16, 4096, outs)
    x, y = make_rows(1, 4096, sum(outs))
    plan = ops.segment_plan(torch.zeros(1, dtype=torch.int32, device=DEVICE), slots=8)
    if len(outs) == 1:
        a, b = a[0], b[0]
    ops.add_lora(y, x, a, b, plan)

    def long_path(*_):
        raise AssertionError("a later call took the long path")

    monkeypatch.setattr("dop.ops.eager.add_lora", long_path)
    took = host_us(lambda: ops.add_lora(y, x, a, b, plan))
    record_property("host_us", took)
    print(f"\nadd_lora {outs}, {way}: {took:.2f} us on the host")
    if way != "ctypes":
        assert took <= HOST_US


@pytest.mark.timed
def test_host_time_of_the_driver_alone(record_property):
    """The two launches of an `add_lora` without what stands before them: the floor of its time
    where it is not kept as a graph."""
    from dop.ops.stacks import STACKS

    a, b = make_stacks(8, 16, 4096, (4096,))
    x, y = make_rows(1, 4096, 4096)
    plan = ops.segment_plan(torch.zeros(1, dtype=torch.int32, device=DEVICE), slots=8)
    ops.forget()
    ops.add_lora(y, x, a[0], b[0], plan)
    (block,) = launch.LOCAL.blocks.values()
    words, tables = STACKS[id(a[0])].words, plan.words[block.tile_rows]
    x_at, y_at, run = x.data_ptr(), y.data_ptr(), block.call.run
    took = host_us(lambda: run(x_at, y_at, words, tables))
    record_property("host_us", took)
    print(f"\n{len(block.starts)} launches, {native.description()}: {took:.2f} us on the host")
    assert took <= HOST_US


def test_both_ways_give_the_same_bits(way):
    """Against the long path, with everything that a call can be given."""
    a, b = make_stacks(6, 16, 512, (256, 128))
    x, y0 = make_rows(40, 512, 384)
    ids = make_ids(40, 6).to(DEVICE)
    facts = {
        "ranks": torch.tensor([16, 1, 8, 0, 5, 9], dtype=torch.int32, device=DEVICE),
        "scale": torch.rand(6, device=DEVICE),
    }
    plan = ops.segment_plan(ids, slots=6)
    for given in ({}, facts, {"scale": 0.5}):
        call = {"scale": 1.0, "ranks": None} | given
        want = eager.add_lora(y0.clone(), x, a, b, plan, **call)
        for _ in range(2):
            assert torch.equal(ops.add_lora(y0.clone(), x, a, b, plan, **given), want)
    b[1].data = torch.randn_like(b[1])
    want = eager.add_lora(y0.clone(), x, a, b, plan, 1.0, None)
    assert torch.equal(ops.add_lora(y0.clone(), x, a, b, plan), want)
    x.data = torch.randn_like(x)
    want = eager.add_lora(y0.clone(), x, a, b, plan, 1.0, None)
    assert torch.equal(ops.add_lora(y0.clone(), x, a, b, plan), want)


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_calls_that_come_again(way, tokens):
    """Layer after layer, step after step: values, x, y, weights, plan and stream change meanwhile,
    and kernels of others stand between the calls."""
    layers = [make_stacks(6, 16, 512, (256, 128)) for _ in range(3)]
    wide = torch.randn(512, 384, device=DEVICE, dtype=torch.bfloat16)
    x, y = make_rows(tokens, 512, 384)
    other = torch.cuda.Stream()
    for step in range(12):
        ids = make_ids(tokens, 6, seed=step // 6).to(DEVICE)
        if step % 6 == 0:
            plan = ops.segment_plan(ids, slots=6)
        if step == 7:
            layers[1][0][0].data = torch.randn_like(layers[1][0][0])
        if step == 8:
            x.data = torch.randn_like(x)
        stream = other if step in (4, 5, 10) else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for a, b in layers:
                a[1].mul_(1.01)
                torch.mm(x, wide, out=y)
                want = eager.add_lora(y.clone(), x, a, b, plan, 1.0, None)
                ops.add_lora(y, x, a, b, plan)
                assert torch.equal(y, want), step
                x.add_(0.125)
        torch.cuda.current_stream().wait_stream(stream)


def test_streams_and_threads(way):
    a, b = make_stacks(8, 16, 1024, (1024,))
    x, y0 = make_rows(64, 1024, 1024)
    plan = ops.segment_plan(make_ids(64, 8).to(DEVICE), slots=8)
    want = ops.add_lora(y0.clone(), x, a, b, plan)
    torch.cuda.synchronize()
    results, errors = [], []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                mine = [ops.add_lora(y0.clone(), x, a, b, plan) for _ in range(30)]
                torch.cuda.current_stream().synchronize()
            results.extend(mine)
        except Exception as error:  # reported below, in the main thread
            errors.append(error)

    pool = [threading.Thread(target=work) for _ in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert not errors
    assert len(results) == 120
    assert all(torch.equal(r, want) for r in results)


def test_halves():
    a, b = make_stacks(6, 12, 256, (128, 64))
    x, y = make_rows(50, 256, 192)
    ids, ranks = make_ids(50, 6), [12, 1, 5, 8, 3, 12]
    plan = ops.segment_plan(ids.to(DEVICE), slots=6, ranks=ranks)
    v = ops.sgmv_shrink(x, a, plan)
    assert not v[:, (ids < 0).to(DEVICE)].any()
    assert not v[:, (ids == 1).to(DEVICE), 1:].any()
    want = reference(y, x, a, b, ids, ranks, 0.5)
    ops.sgmv_expand(y, v, b, plan, scale=0.5)
    torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2)


def test_opcheck_and_compile():
    a, b = make_stacks(4, 8, 64, (32, 16))
    x, y = make_rows(12, 64, 48)
    ids = make_ids(12, 4).to(DEVICE)
    plan = ops.segment_plan(ids, slots=4)
    facts = (plan.buffer, 12, 4, -1, None, None, 1.0)
    results = torch.library.opcheck(torch.ops.dop.add_lora.default, (y, x, a, b, *facts))
    assert set(results.values()) == {"SUCCESS"}
    results = torch.library.opcheck(torch.ops.dop.segment_plan.default, (ids, 4, None, None, 1.0))
    assert set(results.values()) == {"SUCCESS"}

    def layer(y, x, ids):
        plan = ops.segment_plan(ids, slots=4, scale=0.5)
        y = y * 2
        return ops.add_lora(y, x + 1, a, b, plan) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(y, x, ids), layer(y, x, ids))
    torch.testing.assert_close(compiled(y[:5], x[:5], ids[:5]), layer(y[:5], x[:5], ids[:5]))


def test_bad_ids_touch_nothing():
    a, b = make_stacks(3, 16, 128, (64,))
    x, y = make_rows(6, 128, 64)
    ids = torch.tensor([0, 3, -7, 1 << 30, -(1 << 31), 2], dtype=torch.int32)
    plan = ops.segment_plan(ids.to(DEVICE), slots=3)
    known = torch.where((ids >= 0) & (ids < 3), ids, -1)
    check(y, x, a, b, known, plan)
    torch.cuda.synchronize()


@pytest.mark.parametrize("kind", [*KINDS, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rank", [1, 16, 37])
def test_punica_signature(kind, transposed, rank):
    layers, width, out, ends = 3, 200, 131, [0, 4, 4, 5, 30, 31]
    sizes = (layers, rank, width) if transposed else (layers, width, rank)
    a = [(torch.randn(*sizes, device=DEVICE) * width**-0.5).to(kind) for _ in range(5)]
    b = [(torch.randn(layers, rank, out, device=DEVICE) * rank**-0.5).to(kind) for _ in range(5)]
    pointers = [torch.tensor([t.data_ptr() for t in s], device=DEVICE) for s in (a, b)]
    x, y = make_rows(31, width, out, kind)
    want = y.double()
    for i in range(5):
        rows, down = slice(ends[i], ends[i + 1]), a[i][2].double()
        want[rows] += x[rows].double() @ (down.T if transposed else down) @ b[i][2].double()
    s = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    call = ops.add_lora_sgmv_custom_cutlass if transposed else ops.add_lora_sgmv_cutlass
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(y, x, *pointers, s, 2, rank)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    eps = torch.finfo(kind).eps
    assert float(((y.double() - want).abs() / want.abs().clamp(min=1)).max()) < 8 * eps
