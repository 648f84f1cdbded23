"""Tensor-core candidates on a real GPU: right for every shape, for full, short and missing rows."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("tvm")
torch = pytest.importorskip("torch")

from dop import ops  # noqa: E402
from dop.lowering.codegen import generate  # noqa: E402
from dop.measure import tensor_map  # noqa: E402
from dop.measure.base import Job  # noqa: E402
from dop.measure.compile_cuda import compile_cuda  # noqa: E402
from dop.measure.local import Limits, LocalMeasurer  # noqa: E402
from dop.ops import launch, native, sources  # noqa: E402
from dop.ops.beside import Beside  # noqa: E402
from dop.ops.launch import DeviceKernel  # noqa: E402
from dop.ops.plan import SegmentPlan  # noqa: E402
from dop.ops.sources import Choice  # noqa: E402
from dop.scenario import Scenario, named  # noqa: E402
from dop.space.generate import build_space  # noqa: E402
from dop.space.sketch import Candidate  # noqa: E402
from dop.space.trace import Trace  # noqa: E402
from dop.workload import Workload  # noqa: E402

WORKLOADS = (
    Workload("qkv", 4096, (4096, 1024, 1024), 13, "float16"),
    Workload("gate_up", 2048, (2048, 2048), 8, "bfloat16"),
    Workload("o", 4096, (4096,), 64, "bfloat16"),
    Workload("narrow", 896, (896, 128, 128), 48, "bfloat16"),
)
SCENARIOS = (
    named("distinct", 8),
    named("skewed", 100),
    Scenario("recorded", (130, 33, 17, 16, 1), 3),
)
SAMPLES = 4
DRAWS = 400


SKETCHES = ("matrix_tiles/", "wide_tiles/", "small_tiles/")


def candidates(workload: Workload, target: object) -> list[Candidate]:
    """The defaults of the tensor-core sketches, where they are valid, and a few random ones."""
    found = []
    for sketch in build_space(workload, target).sketches:  # type: ignore[arg-type]
        if not sketch.name.startswith(SKETCHES):
            continue
        rng = random.Random(workload.rank)
        draws = (sketch.default(), *(sketch.sample(rng) for _ in range(DRAWS)))
        valid = [values for values in draws if sketch.broken_limit(values) is None]
        found += [Candidate.of(sketch, values) for values in valid[: SAMPLES + 1]]
    return found


@pytest.fixture(scope="module")
def results(gpu_target):
    jobs = [
        Job(candidate.trace, workload, SCENARIOS)
        for workload in WORKLOADS
        for candidate in candidates(workload, gpu_target)
    ]
    limits = Limits(build_s=120.0, prepare_s=120.0, run_s=5.0)
    with LocalMeasurer(gpu_target, limits=limits) as measurer:
        found = list(measurer.measure(jobs))
    assert len(found) == len(jobs) * len(SCENARIOS)
    return found


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.key)
def test_right_for_every_batch(results, workload, gpu_target):
    mine = [(job, s, m) for job, s, m in results if job.workload == workload]
    given = candidates(workload, gpu_target)
    found = {prefix for c in given for prefix in SKETCHES if c.sketch.name.startswith(prefix)}
    assert len(found) == (1 if workload.rank % 8 else len(SKETCHES))
    assert len(mine) == len(given) * len(SCENARIOS)
    for job, scenario, m in mine:
        assert m.ok, f"{scenario.key} {job.trace.key}: {m.message}"
        assert m.accuracy < 1e-2


def test_no_candidate_uses_local_memory_by_default(results):
    firsts = {job.workload: m for job, _, m in reversed(results)}
    assert all(m.resources["spill_bytes"] == 0 for m in firsts.values())


# Kernels whose copies the copy engine makes: shrink alone, whose maps of x and A are made for every
# call, and one kernel for both halves, which has maps of B and y too.

ENGINE = (
    (Workload("o", 4096, (4096,), 128, "bfloat16"), {}),
    (Workload("qkv", 4096, (4096, 1024, 1024), 64, "float16"), {}),
    (Workload("o", 2048, (2048,), 128, "bfloat16"), {"shrink.rank_blocks": 2}),
    (Workload("up", 2048, (2048, 2048), 56, "bfloat16"), {"tokens.tile_rows": 128}),
)
FUSED = (
    (Workload("down", 14336, (4096,), 128, "bfloat16"), {"tokens.tile_rows": 80, "split_k": 4}),
    (Workload("qkv", 4096, (4096, 1024, 1024), 64, "float16"), {"tokens.tile_rows": 48}),
    (
        Workload("o", 4096, (4096,), 128, "bfloat16"),
        {"split_k": 16, "tokens.tile_rows": 16, "sums_apart": 1, "l2_hints": 1},
    ),
    (Workload("up", 2048, (2048, 2048), 192, "bfloat16"), {"split_k": 4, "tokens.tile_rows": 32}),
    (Workload("o", 1024, (1024,), 256, "float16"), {"split_k": 1, "tokens.tile_rows": 64}),
    (Workload("down", 14336, (4096,), 32, "bfloat16"), {"tokens.tile_rows": 80, "split_k": 4}),
    (Workload("qkv", 4096, (4096, 1024, 1024), 40, "float16"), {"tokens.tile_rows": 32}),
)
CASES = (*ENGINE, *FUSED)
SLOTS, TOKENS = 8, 333


def engine_traces(case: int, target: object) -> dict[int, Trace]:
    """A trace of the sketch for each value of dependent_launch."""
    workload, wanted = CASES[case]
    if target.arch != "sm_90a":  # type: ignore[attr-defined]
        pytest.skip("the kernels are for sm_90a")
    sketches = build_space(workload, target).sketches  # type: ignore[arg-type]
    if case >= len(ENGINE):
        sketch = next(s for s in sketches if s.name.startswith("fused_tiles/"))
        numbers = {n if "." in n else f"shrink.{n}": value for n, value in wanted.items()}
        both = {n: {**sketch.default(), **numbers, "expand.dependent": n} for n in (0, 2)}
        for one in both.values():
            assert sketch.broken_limit(one) is None, sketch.broken_limit(one)
        return {n: Candidate.of(sketch, one).trace for n, one in both.items()}
    sketch = next(s for s in sketches if "/warpgroup_engine/" in s.name)
    values = {**sketch.default(), "expand.column_warps": 1, **wanted}
    if wanted.get("shrink.rank_blocks"):
        values["shrink.rank_warps"] = max(values["shrink.rank_warps"], 2)
    if wanted.get("tokens.tile_rows"):
        values["shrink.row_warps"] = wanted["tokens.tile_rows"] // 16
    found = {n: {**values, "expand.dependent": n} for n in (0, 1, 2)}
    for one in found.values():
        assert sketch.broken_limit(one) is None, sketch.broken_limit(one)
    return {n: Candidate.of(sketch, one).trace for n, one in found.items()}


def test_engine_kernels_in_the_tuner_s_runner(gpu_target):
    """Rows that lie one behind the other (one adapter) and others, which the runner shuffles; its
    batches of few rows have tiles without any, and mixed ranks."""
    scenarios = (named("identical", 300), *SCENARIOS)
    jobs = [
        Job(trace, workload, scenarios)
        for case, (workload, _) in enumerate(CASES)
        for trace in engine_traces(case, gpu_target).values()
    ]
    with LocalMeasurer(gpu_target, limits=Limits(120.0, 120.0, 5.0)) as measurer:
        found = list(measurer.measure(jobs))
    assert len(found) == len(jobs) * len(scenarios)
    for job, scenario, m in found:
        assert m.ok, f"{job.workload.key} {scenario.key}: {m.message}"
        assert m.accuracy < 1e-2
        assert m.resources["spill_bytes"] == 0


class EngineCase:
    """A layer that a kernel with maps serves; what lies beyond an adapter's rank in A is NaN, and
    in B too where one kernel does both halves."""

    def __init__(
        self, case: int, dependent: int, target: object, patch: pytest.MonkeyPatch
    ) -> None:
        self.workload = w = CASES[case][0]
        trace = engine_traces(case, target)[dependent]
        made = compile_cuda(generate(w, trace, target), "sm_90a")  # type: ignore[arg-type]
        assert any(tensor_map.parse(name) for name in made.launches[0].arguments)
        kernel = DeviceKernel(
            *("engine", "test", "", made.tile_rows, made.launches, made.workspaces),
            lambda: made.binary,
        )
        launch.forget()
        patch.setattr(sources, "choose", lambda *_: Choice("key", "cuda", TOKENS, None, kernel, ""))
        self.kind = getattr(torch, w.dtype)
        self.generator = torch.Generator("cuda").manual_seed(case)
        self.ranks = [w.rank, w.rank - 3, 1, 0, 16, w.rank, 7, 2]
        self.scales = torch.tensor([1.0, -1.0, 2.0, 1.0, 0.5, 1.0, -2.0, 3.0]).cuda()
        self.a = [self.some(SLOTS, w.rank, w.in_features) for _ in w.out_features]
        self.b = [self.some(SLOTS, out, w.rank) for out in w.out_features]
        for slot, rank in enumerate(self.ranks):
            for stack in self.a:
                stack[slot, max(rank, 1) :] = float("nan")  # 0 counts as 1, of scale 0
            for stack in self.b if case >= len(ENGINE) else ():
                stack[slot, :, max(rank, 1) :] = float("nan")
        self.y = self.some(TOKENS, w.total_out)
        ordered = torch.arange(TOKENS).mul(SLOTS - 1).div(TOKENS, rounding_mode="floor")
        mixed = torch.randint(-1, SLOTS - 2, (TOKENS,), generator=torch.Generator().manual_seed(1))
        few = torch.where(torch.arange(TOKENS) < 5, 6, -1)
        self.ids = {"in order": ordered, "mixed": mixed, "few": few, "one": ordered * 0}

    def some(self, *size: int) -> torch.Tensor:
        drawn = torch.randn(*size, device="cuda", generator=self.generator)
        return (drawn * size[-1] ** -0.5).to(self.kind)

    def x(self) -> torch.Tensor:
        return (self.some(TOKENS, self.workload.in_features) * 64).to(self.kind)

    def plan(self, ids: torch.Tensor, out: SegmentPlan | None = None) -> SegmentPlan:
        ids = ids.int().cuda()
        return ops.segment_plan(ids, slots=SLOTS, ranks=self.ranks, scale=self.scales, out=out)

    def check(self, got: torch.Tensor, x: torch.Tensor, ids: torch.Tensor) -> None:
        want, ids = self.y.double(), ids.cuda()
        for slot, rank in enumerate(self.ranks):
            mine = ids == slot
            inputs = x[mine].double() * float(self.scales[slot])
            parts = [
                inputs @ a[slot, :rank].double().T @ b[slot, :, :rank].double().T
                for a, b in zip(self.a, self.b, strict=True)
            ]
            want[mine] += torch.cat(parts, dim=1)
        assert torch.equal(got[ids < 0], self.y[ids < 0])
        error = (got.double() - want).abs().max() / want.abs().max()
        assert float(error) < 1e-2, float(error)


@pytest.fixture(params=["compiled", "ctypes"])
def way(request, monkeypatch):
    if request.param == "ctypes":
        monkeypatch.setattr(native, "EXTENSION", None)
    elif native.EXTENSION is None:
        pytest.skip("dop.ops._launch is not built")
    yield
    launch.forget()


@pytest.mark.parametrize("dependent", [0, 2])
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.usefixtures("way")
@torch.no_grad()
def test_engine_kernels_in_the_operator(gpu_target, monkeypatch, case, dependent):
    layer = EngineCase(case, dependent, gpu_target, monkeypatch)
    kept = []  # so that every x lies elsewhere
    for ids in layer.ids.values():
        plan = layer.plan(ids)
        for _ in range(3):
            kept.append(layer.x())
            got = ops.add_lora(layer.y.clone(), kept[-1], layer.a, layer.b, plan)
            layer.check(got, kept[-1], ids)
    beside = Beside(torch.cuda.Stream())
    plan, x = layer.plan(layer.ids["mixed"]), kept[0]
    pending = beside.begin(x, layer.a, layer.b, plan)
    layer.check(beside.finish(pending, layer.y.clone()), x, layer.ids["mixed"])


@pytest.mark.parametrize("dependent", [0, 2])
@pytest.mark.parametrize("case", [1, len(ENGINE) + 1])
@pytest.mark.usefixtures("way")
@torch.no_grad()
def test_engine_kernels_in_a_graph(gpu_target, monkeypatch, case, dependent):
    """A graph keeps the maps of its capture: tensors where they were, other rows, ranks and ids."""
    layer = EngineCase(case, dependent, gpu_target, monkeypatch)
    x, y = layer.x(), layer.y.clone()
    plan = layer.plan(layer.ids["mixed"])
    ops.add_lora(y, x, layer.a, layer.b, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.add_lora(y, x, layer.a, layer.b, plan)
    for ids in (*layer.ids.values(), *layer.ids.values()):
        x.copy_(layer.x())
        y.copy_(layer.y)
        layer.plan(ids, out=plan)
        graph.replay()
        layer.check(y, x, ids)
