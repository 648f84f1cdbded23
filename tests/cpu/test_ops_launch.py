"""The short path to the driver, with a driver of Python: packing, caching, the long way."""

import fake_driver
import pytest
import torch
from sgmv_reference import reference, rows, stacks

from dop import ops
from dop.measure.cuda_driver import CudaError
from dop.ops import eager, launch
from dop.ops.plan import fill_by_torch
from dop.ops.stacks import STACKS

SLOTS, RANK, WIDTH = 6, 8, 32
IDS = [3, -1, 0, 0, 5, 3, 3, 1, -1, 0, 5, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
TOKENS = len(IDS)


@pytest.fixture(autouse=True)
def whole_plans(monkeypatch):
    """Here the CPU stands in for a GPU, which reads the tables of tiles too."""
    monkeypatch.setattr(eager, "fill", fill_by_torch)


@pytest.fixture(params=fake_driver.WAYS)
def way(request, monkeypatch):
    """How kernels are launched."""
    fake_driver.choose_way(monkeypatch, request.param)
    return request.param


@pytest.fixture(params=[(0, (16,)), (0, (16, 8, 4)), (16, (16,)), (16, (16, 4))], ids=str)
def case(request, monkeypatch, way):
    tile_rows, outs = request.param
    driver = fake_driver.install(monkeypatch, (len(outs), RANK, WIDTH, outs, SLOTS), tile_rows)
    a, b = stacks(SLOTS, RANK, WIDTH, outs)
    x, y = rows(TOKENS, WIDTH, sum(outs))
    return driver, a, b, x, y


def make_plan(ids=IDS, **options):
    return ops.segment_plan(torch.tensor(ids, dtype=torch.int32), slots=SLOTS, **options)


def near(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def refuse(*_):
    raise AssertionError("the long path")


def test_first_and_later_calls_are_right_and_later_ones_short(case, monkeypatch):
    driver, a, b, x, y = case
    plan = make_plan()
    want = reference(y, x, a, b, IDS)
    assert ops.add_lora(y, x, a, b, plan) is y
    near(y, want)
    monkeypatch.setattr(eager, "add_lora", refuse)
    for seed in (5, 6):
        x, y = rows(TOKENS, WIDTH, y.shape[1], seed=seed)
        before, want = y.clone(), reference(y, x, a, b, IDS)
        ops.add_lora(y, x, tuple(a), tuple(b), plan)
        near(y, want)
        assert torch.equal(y[1], before[1])
    assert driver.loads == 1
    assert len(driver.launches) == 6


def test_launch_parameters(case):
    driver, a, b, x, y = case
    ops.add_lora(y, x, a, b, make_plan())
    (name, shrink, stream, dependent), (second, expand, _, late) = driver.launches
    tiles = TOKENS if driver.functions[0].grid[0] == "tokens" else TOKENS // 16 + SLOTS
    assert (name, shrink, stream, dependent) == (
        "shrink", (tiles, 8, 1, 128, 1, 1, 64 << 10), fake_driver.STREAM, False,
    )  # fmt: skip
    assert (second, expand, late) == ("expand", (2 * TOKENS, 1, 1, 256, 1, 1, 0), True)


def test_another_plan_other_weights_and_one_tensor_stay_short(case, monkeypatch):
    _, a, b, x, y = case
    c, d = stacks(SLOTS, RANK, WIDTH, [t.shape[1] for t in b], seed=9)
    for weights in ((a, b), (c, d)):
        ops.add_lora(y.clone(), x, *weights, make_plan())
    monkeypatch.setattr(eager, "add_lora", refuse)
    ids = [(i * 5) % 7 - 1 for i in range(TOKENS)]
    plan = make_plan(ids, ranks=[8, 3, 1, 2, 5, 7], scale=[1.0, 2.0, 0.5, 3.0, 1.0, -1.0])
    for weights in ((a, b), (c, d)):
        if len(a) == 1:
            weights = (weights[0][0], weights[1][0])
        got = ops.add_lora(y.clone(), x, *weights, plan)
        lists = [[w] if isinstance(w, torch.Tensor) else w for w in weights]
        want = reference(y, x, *lists, ids, [8, 3, 1, 2, 5, 7], [1.0, 2.0, 0.5, 3.0, 1.0, -1.0])
        near(got, want)


def test_ranks_and_scale_of_the_call(case, monkeypatch):
    _, a, b, x, y = case
    plan = make_plan(scale=2.0, ranks=[8] * SLOTS)
    ops.add_lora(y.clone(), x, a, b, plan)
    monkeypatch.setattr(eager, "add_lora", refuse)
    ranks = torch.tensor([8, 3, 1, 2, 5, 0], dtype=torch.int32)
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, -1.0])
    for _ in range(2):
        got = ops.add_lora(y.clone(), x, a, b, plan, ranks=ranks, scale=scale)
        near(got, reference(y, x, a, b, IDS, ranks, 2 * scale))
    near(ops.add_lora(y.clone(), x, a, b, plan, scale=0.5), reference(y, x, a, b, IDS))
    ranks[0] = 2  # in place: what was derived from it before must not be used again
    got = ops.add_lora(y.clone(), x, a, b, plan, ranks=ranks, scale=scale)
    near(got, reference(y, x, a, b, IDS, ranks, 2 * scale))
    ids = [0] * TOKENS
    refilled = make_plan(ids, scale=2.0, out=plan)
    got = ops.add_lora(y.clone(), x, a, b, refilled, ranks=ranks, scale=scale)
    near(got, reference(y, x, a, b, ids, ranks, 2 * scale))


def test_derived_tables_are_shared_by_layers(case, monkeypatch):
    _, a, b, x, y = case
    plan = make_plan()
    ranks = torch.full((SLOTS,), 4, dtype=torch.int32)
    ops.add_lora(y, x, a, b, plan, ranks=ranks)
    monkeypatch.setattr("dop.ops.derived._gather", refuse)
    ops.add_lora(y, x, a, b, plan, ranks=ranks)
    with pytest.raises(AssertionError, match="long path"):
        ops.add_lora(y, x, a, b, plan, ranks=ranks, scale=3.0)


def test_strided_and_misaligned_rows_are_copied(case):
    _, a, b, _, y = case
    wide = torch.randn(TOKENS, WIDTH + 3)
    room = torch.randn(TOKENS * y.shape[1] + 1)
    plan = make_plan()
    for x, target in (
        (wide[:, 1:-2], torch.randn(y.shape[1], TOKENS).T),
        (wide[:, :-3], room[1:].view(TOKENS, -1)),
    ):
        want = reference(target, x, a, b, IDS)
        before = target.clone()
        assert ops.add_lora(target, x, a, b, plan) is target
        near(target, want)
        assert torch.equal(target[8], before[8])


def test_moved_weights_are_looked_at_again(case):
    _, a, b, x, y = case
    plan = make_plan()
    ops.add_lora(y.clone(), x, a, b, plan)
    a[0].data = torch.randn(SLOTS, RANK, WIDTH)
    near(ops.add_lora(y.clone(), x, a, b, plan), reference(y, x, a, b, IDS))
    b[-1] = torch.randn_like(b[-1])
    near(ops.add_lora(y.clone(), x, a, b, plan), reference(y, x, a, b, IDS))


def test_weights_are_not_kept_alive():
    a, b = stacks(2, 4, 8, (8,))
    plan = ops.segment_plan(torch.tensor([0]), slots=2)
    ops.add_lora(torch.zeros(1, 8), torch.zeros(1, 8), a, b, plan)
    key = id(a[0])
    assert key in STACKS
    del a
    assert key not in STACKS


def test_one_a_with_two_b_leaves_nothing_behind():
    import weakref

    a, b = stacks(2, 4, 8, (8,))
    other = torch.randn(2, 8, 4)
    x, y = rows(1, 8, 8)
    plan = ops.segment_plan(torch.tensor([0]), slots=2)
    ops.add_lora(y.clone(), x, a, b, plan)
    before = len(weakref.finalize._registry)
    for _ in range(5):
        for up in (b[0], other):
            got = ops.add_lora(y.clone(), x, a[0], up, plan)
            near(got, reference(y, x, a, [up], [0]))
    assert len(weakref.finalize._registry) == before
    key = id(a[0])
    del a
    assert key not in STACKS


def test_capture_takes_workspaces_of_its_own_and_keeps_no_block(case, monkeypatch):
    _, a, b, x, y = case
    plan = make_plan()
    ops.add_lora(y.clone(), x, a, b, plan)
    kept = dict(launch.LOCAL.blocks)
    fake_driver.set_surroundings(monkeypatch, capturing=True)
    asked = []
    real = launch.Room.at_least
    monkeypatch.setattr(
        launch.Room, "at_least", lambda self, *args: asked.append(self) or real(self, *args)
    )
    near(ops.add_lora(y.clone(), x, a, b, plan), reference(y, x, a, b, IDS))
    assert launch.LOCAL.blocks == kept
    assert asked
    assert asked[0] not in launch.LOCAL.rooms.values()


def test_workspace_is_made_once_and_grows(case):
    _, a, b, x, y = case
    room = launch.LOCAL.rooms
    for _ in range(3):
        ops.add_lora(y.clone(), x, a, b, make_plan())
    (only,) = room.values()
    first = only._held
    assert first.numel() >= TOKENS * (3 * 64 * 4 + 6)
    ids = IDS * 3
    x3, y3 = rows(len(ids), WIDTH, y.shape[1])
    near(ops.add_lora(y3.clone(), x3, a, b, make_plan(ids)), reference(y3, x3, a, b, ids))
    assert only._held.numel() >= 2 * first.numel()
    near(ops.add_lora(y.clone(), x, a, b, make_plan()), reference(y, x, a, b, IDS))


def test_a_refused_launch_is_an_error(case):
    driver, a, b, x, y = case
    plan = make_plan()
    ops.add_lora(y.clone(), x, a, b, plan)
    driver.code = 1
    with pytest.raises(CudaError):
        ops.add_lora(y.clone(), x, a, b, plan)


def test_threads_have_blocks_of_their_own(case):
    import threading

    _, a, b, x, y = case
    plan, found = make_plan(), []
    ops.add_lora(y.clone(), x, a, b, plan)

    def work():
        for _ in range(20):
            found.append(ops.add_lora(y.clone(), x, a, b, plan))

    pool = [threading.Thread(target=work) for _ in range(3)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    want = reference(y, x, a, b, IDS)
    assert len(found) == 60
    for got in found:
        near(got, want)


def test_empty_batch_launches_nothing(case):
    driver, a, b, x, y = case
    ops.add_lora(y[:0], x[:0], a, b, make_plan([]))
    assert not driver.launches


def test_every_shipped_kernel_finds_its_arguments(monkeypatch):
    from dop import packs
    from dop.ops.shapes import shape_of
    from dop.ops.sources import Search, pack_kernel
    from dop.ops.warm import _TORCH_TYPES

    monkeypatch.setattr(launch, "driver", lambda: fake_driver.FakeDriver(()))
    monkeypatch.setattr(launch, "has_dependent_launches", lambda device: True, raising=False)
    for entry in packs.shipped():
        library = packs._open(entry.path)
        for info in library.kernels.values():
            w = info.workload
            shape = shape_of(w.in_features, w.out_features, w.rank, _TORCH_TYPES[w.dtype], 0)
            kernel = pack_kernel(library, info, Search(shape, 8, 64, None))
            workspace = torch.empty(launch.workspace_bytes(kernel, 8, 64), dtype=torch.uint8)
            functions = range(1, len(kernel.launches) + 1)
            block = launch.Block(kernel, functions, shape, (8, 64), 0, workspace)
            assert len(block.starts) == len(kernel.launches)


@pytest.mark.parametrize("outs", [(64,), (64, 8, 8)])
def test_generic_kernels_find_their_arguments(monkeypatch, outs):
    from types import SimpleNamespace

    from dop.ops.generic import kernels
    from dop.ops.shapes import shape_of
    from dop.ops.sources import Search

    gpu = SimpleNamespace(capability=90, multiprocessors=132)
    monkeypatch.setattr(kernels, "device", lambda ordinal: gpu)
    monkeypatch.setattr(launch, "driver", lambda: fake_driver.FakeDriver(()))
    monkeypatch.setattr(launch, "has_dependent_launches", lambda device: True, raising=False)
    shape = shape_of(64, outs, 5, torch.bfloat16, 0)
    for tokens in (1, 8, 300):
        search = Search(shape, tokens, 16, None)
        for make in (kernels.kernel, kernels.shrink_kernel, kernels.expand_kernel):
            kernel = make(search)
            workspace = torch.empty(launch.workspace_bytes(kernel, tokens, 16), dtype=torch.uint8)
            functions = range(1, len(kernel.launches) + 1)
            launch.Block(kernel, functions, shape, (tokens, 16), 0, workspace)
