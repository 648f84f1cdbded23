"""The CPU path: link, load without TVM, run, time. The code generator is a C one (fake_codegen)."""

import ctypes
import statistics
import subprocess
import sys
from pathlib import Path

import fake_codegen
import numpy as np
import pytest

from dop.database.record import Record
from dop.errors import BuildError, Failure
from dop.measure.accuracy import reference
from dop.measure.artifact import SCALARS, evaluate, pack, tensor_shapes
from dop.measure.base import Job, Measurer
from dop.measure.compile_cpu import CompilerError, compile_cpu, link
from dop.measure.inputs import mixed_facts
from dop.measure.local import LocalMeasurer, build_all
from dop.measure.plan import make_plan
from dop.measure.replay import RecordedMeasurer
from dop.measure.runner_cpu import Library
from dop.measure.tensors_cpu import aligned, pointers
from dop.measure.timer import TimerSettings, collect, spread, time_calls
from dop.measurement import Measurement
from dop.scenario import Scenario, named
from dop.target import Target
from dop.workload import Workload

TARGET = Target("cpu", "generic", "test", 2, 1, 0, 16, 1 << 20, 32)
WORKLOAD = Workload("kv", 96, (40, 24), 4, "float32")
FAST = TimerSettings(repeats=5, min_sample_s=2e-4)


def artifact(tile_rows):
    return compile_cpu(
        fake_codegen.generate(WORKLOAD, fake_codegen.trace("tile_rows", tile_rows), TARGET)
    )


def inputs(token_slot, tile_rows, slots=6):
    """Tensors by name, in one arena per stack as the code wants it."""
    rng = np.random.default_rng(3)
    plan = make_plan(token_slot, tile_rows, facts=mixed_facts(WORKLOAD, slots))
    shapes = tensor_shapes(WORKLOAD, tile_rows)
    sizes = dict(zip(SCALARS, (plan.tokens, plan.tiles, slots), strict=True))
    arena = aligned((1 << 18,), np.float32)
    named_arrays, start = {}, 0
    for name, shape in shapes.items():
        numbers = tuple(sizes[d] if d in sizes else int(d) for d in shape)
        count = int(np.prod(numbers))
        if name in plan.tables:
            table = aligned((count,), plan.tables[name].dtype.type)
            table[:] = plan.tables[name]
            named_arrays[name] = table
        else:
            part = arena[start : start + count].reshape(numbers)
            part[...] = rng.standard_normal(numbers, np.float32)
            named_arrays[name] = part
            start += -(-count // 16) * 16
    named_arrays["y_in"] = named_arrays["y"]
    return named_arrays, (ctypes.c_int64 * 3)(*sizes.values())


@pytest.mark.parametrize("tile_rows", [0, 1, 4, 16])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_library_computes_sgmv(tile_rows, threads):
    token_slot = [5, 0, -1, 5, 5, 2, -1, 0, 5, 5]
    arrays, scalars = inputs(token_slot, tile_rows)
    before = arrays["y"].copy()
    a, b = [arrays["a0"], arrays["a1"]], [arrays["b0"], arrays["b1"]]
    facts = mixed_facts(WORKLOAD, len(a[0]))
    want = reference(arrays["x"], a, b, before, np.array(token_slot, np.int32), facts)
    built = artifact(tile_rows)
    with Library(built.binary, [-1] * threads) as library:
        assert library.threads == threads
        assert library.lib.dop_run(pointers([arrays[n] for n in built.arguments]), scalars) == 0
    np.testing.assert_allclose(arrays["y"], want, rtol=1e-4, atol=1e-4)
    assert np.array_equal(arrays["y"][2], before[2])


def test_wrong_arguments_are_refused_not_run():
    arrays, scalars = inputs([0, 1], 0)
    built = artifact(0)
    with Library(built.binary, [-1]) as library:
        shifted = dict(arrays, x=arrays["x"].reshape(-1)[1:])
        code = library.lib.dop_run(pointers([shifted[n] for n in built.arguments]), scalars)
        assert "aligned" in library.error(code)
        good = pointers([arrays[n] for n in built.arguments])
        far = (ctypes.c_void_p * len(good))(*good)
        far[built.arguments.index("a1")] = good[built.arguments.index("a0")] + (8 << 30)
        assert "too far" in library.error(library.lib.dop_run(far, scalars))


def test_loads_and_runs_in_a_process_without_tvm_torch_or_numpy(tmp_path):
    built = artifact(0)
    path = tmp_path / "k.so"
    path.write_bytes(built.binary)
    needed = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
    assert "tvm" not in needed
    script = f"""
import ctypes, sys
lib = ctypes.CDLL({str(path)!r})
assert lib.dop_threads(2, None) == 2
def buffer(count):
    raw = (ctypes.c_char * (4 * count + 64))()
    return raw, ctypes.addressof(raw) + -ctypes.addressof(raw) % 64
raw, base = buffer(1 << 16)
args = (ctypes.c_void_p * {len(built.arguments)})(*[base] * {len(built.arguments)})
assert lib.dop_run(args, (ctypes.c_int64 * 3)(1, 1, 1)) == 0
lib.dop_shutdown()
assert not [m for m in ("tvm", "torch", "numpy") if m in sys.modules]
print("ran")
"""
    command = [sys.executable, "-I", "-S", "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "ran\n"


def test_one_library_holds_several_kernels():
    codes = {
        f"entry_{n}": fake_codegen.generate(WORKLOAD, fake_codegen.trace("tile_rows", n), TARGET)
        for n in (0, 4)
    }
    with Library(link(codes, strip=True), [-1, -1]) as library:
        for name, code in codes.items():
            arrays, scalars = inputs([1, 1, 2], code.tile_rows)
            order = tensor_shapes(WORKLOAD, code.tile_rows)
            before = arrays["y"].copy()
            assert getattr(library.lib, name)(pointers([arrays[n] for n in order]), scalars) == 0
            assert not np.array_equal(arrays["y"], before)


def test_the_entry_names_an_argument_that_it_cannot_give():
    code = fake_codegen.generate(WORKLOAD, fake_codegen.trace(), TARGET)
    code = fake_codegen.Code(code.workload_key, 0, "", code.object_code, ("x", "bias"))
    with pytest.raises(CompilerError, match="bias"):
        compile_cpu(code)


def test_launch_expressions_are_arithmetic_only():
    assert evaluate("(tiles * 3 + 7) // 2 - tokens", tokens=4, tiles=5) == 7
    for text in ("__import__('os')", "tokens.real", "[1][0]", "tokens ** 99", "x", "1 +", "f(2)"):
        with pytest.raises(BuildError):
            evaluate(text, tokens=1, tiles=1)


def test_local_measurer_measures_every_scenario_once_in_order():
    scenarios = (named("uniform", 8), named("identical", 1), Scenario("recorded", (3, 2), 2))
    jobs = [Job(fake_codegen.trace("tile_rows", n), WORKLOAD, scenarios) for n in (0, 1, 4)]
    with LocalMeasurer(TARGET, generate="fake_codegen:generate", timer=FAST) as measurer:
        typed: Measurer = measurer
        results = list(typed.measure(jobs))
        assert measurer.rss_bytes() < 1 << 30
    assert sorted((j.trace.key, s.key) for j, s, _ in results) == sorted(
        (j.trace.key, s.key) for j in jobs for s in scenarios
    )
    for _, _, m in results:
        assert m.ok, m.message
        assert len(m.seconds) >= 2
        assert 0 <= m.accuracy < 1e-5
        assert 0 < m.floor_s < m.median_s * 10
        assert m.cost_s > 0
        assert m.resources["code_bytes"] > 0


def test_build_all_gives_artifacts_in_order_or_raises():
    jobs = [Job(fake_codegen.trace("tile_rows", n), WORKLOAD, ()) for n in (4, 0)]
    built = build_all(TARGET, jobs, builders=1, generate="fake_codegen:generate")
    assert [a.tile_rows for a in built] == [4, 0]
    bad = [Job(fake_codegen.trace("build_error", 0), WORKLOAD, ())]
    with pytest.raises(BuildError, match="planted"):
        build_all(TARGET, bad, builders=1, generate="fake_codegen:generate")


def test_replay_answers_from_tables_and_logs():
    scenario, trace = named("identical", 4), fake_codegen.trace("tile_rows", 4)
    seen = Measurement((2e-6,), accuracy=0.0)
    job = Job(trace, WORKLOAD, (scenario, named("distinct", 4)))
    table = {(trace.key, scenario.key): seen}
    with RecordedMeasurer(table) as measurer:
        (_, _, first), (_, _, second) = measurer.measure([job])
    assert first is seen
    assert second.failure is Failure.UNKNOWN
    record = Record(WORKLOAD.key, "t", (), scenario.key, "d", trace, seen, 0)
    (_, _, again), _ = RecordedMeasurer.from_records([record]).measure([job])
    assert again is seen
    other = Job(trace, Workload("x", 96, (40,), 4, "float32"), (scenario,))
    ((_, _, none),) = RecordedMeasurer.from_records([record]).measure([other])
    assert not none.ok


@pytest.mark.parametrize("call_s", [1e-7, 1e-5, 1.5e-3, 1e-2])
def test_samples_are_long_enough_and_within_the_budget(call_s):
    runs = []

    def run(count):
        runs.append(count)
        return count * call_s

    settings = TimerSettings(repeats=9, min_sample_s=2e-3)
    seconds = time_calls(run, settings, None)
    assert all(s == pytest.approx(call_s) for s in seconds)
    assert runs[-1] * call_s >= settings.min_sample_s * 0.7
    assert sum(runs[-len(seconds) :]) * call_s <= settings.budget_s + runs[-1] * call_s


def test_a_candidate_far_behind_is_sampled_less():
    settings = TimerSettings(repeats=9, min_sample_s=2e-3)
    assert len(collect(lambda: 1e-3, 1, settings, None)) == 9
    assert len(collect(lambda: 1e-3, 1, settings, 0.9e-3)) == 9
    assert len(collect(lambda: 1e-3, 1, settings, 0.1e-3)) == settings.tiers[0][1]
    assert len(collect(lambda: 1.0, 1, settings, None)) == 1


def test_the_closer_to_the_best_the_more_samples():
    settings = TimerSettings(repeats=21, min_sample_s=0.0, tiers=((1.5, 3), (1.1, 7)))
    for ratio, wanted in ((2.0, 3), (1.6, 3), (1.3, 7), (1.05, 21), (0.5, 21)):
        assert len(collect(lambda ratio=ratio: ratio * 1e-4, 1, settings, 1e-4)) == wanted
    # One slow sample does not decide: the fastest counts.
    samples = iter([2e-4, *[1e-4] * 30])
    assert len(collect(lambda: next(samples), 1, settings, 1e-4)) == 21
    assert len(collect(lambda: 1.0, 1, settings, None)) == 1  # the budget


def test_samples_that_disagree_are_taken_again():
    settings = TimerSettings(repeats=21, min_sample_s=0.0, tiers=((1.5, 3),), agree=0.1)
    late = iter([9e-4, 2e-4, 9e-4, *[2e-4] * 30])  # the host was held up
    found = collect(lambda: next(late), 1, settings, 1e-4)
    assert 3 < len(found) < 21
    assert statistics.median(found) == 2e-4


def test_spread_is_the_quartile_distance():
    assert spread((1.0, 1.0, 1.0, 1.0)) == 0.0
    assert spread((1.0, 2.0, 3.0, 4.0)) > 0.5


def test_pack_keeps_what_a_runner_needs():
    code = fake_codegen.generate(WORKLOAD, fake_codegen.trace("tile_rows", 4), TARGET)
    packed = pack(code, b"binary", {"code_bytes": 6.0})
    assert packed.binary == b"binary"
    assert packed.arguments == tuple(tensor_shapes(WORKLOAD, 4))
    assert Path(fake_codegen.__file__).exists()
