"""Tuning the engines' own kernels: spaces, log, search on a made-up cost, selection."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from dop.effort import effort_of
from dop.engine_kernels import log
from dop.engine_kernels.run_sglang import batch_info
from dop.engine_kernels.space import build_space, options
from dop.engine_kernels.task import EngineTask, chunk_of, scenarios_of, tasks_of
from dop.engine_kernels.timing import mappings
from dop.engine_kernels.tune import tune_engine
from dop.errors import ConfigError, Failure, LogError
from dop.measurement import Measurement
from dop.scenario import named
from dop.space.trace import Trace
from dop.target import SM_90
from dop.workload import Workload

QKV = Workload("qkv_proj", 4096, (4096, 1024, 1024), 16, "bfloat16")
DOWN = Workload("down_proj", 14336, (4096,), 16, "bfloat16")
O_PROJ = Workload("o_proj", 4096, (4096,), 16, "bfloat16")


def test_tasks_are_the_engines_lookups_each_once():
    tasks = tasks_of("vllm", [QKV, DOWN, O_PROJ], 64)
    assert len({t.shape_key for t in tasks}) == len(tasks)
    expand = [t for t in tasks if t.kernel == "expand" and t.add_inputs]
    assert [(t.workload.slices, t.long_side) for t in expand] == [(3, 4096), (1, 4096)]
    assert sum(t.kernel == "shrink" for t in tasks) == 3
    chunks = {t.chunk for t in tasks_of("sglang", [QKV], 8)}
    assert chunks == {16, 32, 128}


def test_tasks_refuse_nonsense():
    with pytest.raises(ConfigError):
        EngineTask("tgi", "shrink", QKV, 4)
    with pytest.raises(ConfigError):
        EngineTask("vllm", "shrink", QKV, 0)
    with pytest.raises(ConfigError):
        EngineTask("sglang", "shrink", QKV, 8)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("rank", [1, 8, 16, 64, 256])
def test_candidates_round_trip_through_their_trace(engine, rank):
    rng = random.Random(0)
    for task in tasks_of(engine, [Workload("x", 896, (4864, 4864), rank, "float16")], 8):
        space = build_space(task, SM_90)
        for candidate in [*space.defaults(), *(space.sample(rng) for _ in range(20))]:
            again = Trace.from_json(json.loads(json.dumps(candidate.trace.to_json())))
            assert space.match(again).annotation == candidate.annotation


def test_the_first_default_is_what_vllm_uses_untuned():
    shrink, expand = tasks_of("vllm", [O_PROJ], 64)[:2]
    first = options(shrink, build_space(shrink, SM_90).defaults()[0].values)
    assert (first["block_m"], first["block_n"], first["block_k"], first["split_k"]) == (
        32, 16, 256, 64,
    )  # fmt: skip
    first = options(expand, build_space(expand, SM_90).defaults()[0].values)
    assert (first["block_m"], first["block_n"], first["num_warps"]) == (64, 64, 4)


def test_scenarios_follow_sglangs_chunks_and_the_slots():
    task = next(t for t in tasks_of("sglang", [QKV], 8) if t.chunk == 32)
    found = scenarios_of(task, (1, 32, 64, 128, 2048))
    assert {s.tokens for s in found} == {64, 128}
    assert all(s.adapters <= 8 for s in found)
    assert [chunk_of(t) for t in (1, 63, 64, 255, 256)] == [16, 16, 32, 32, 128]


class MadeUp:
    """A runner whose best point is known: 64-wide blocks, 4 warps, as few splits as possible."""

    def __init__(self) -> None:
        self.versions = {"triton": "3.6.0"}
        self.calls = 0

    def measure(self, task, chosen, scenarios):
        self.calls += 1
        if chosen.get("split_k") == 32:
            return [Measurement.failed(Failure.CORRECTNESS, "off") for _ in scenarios]
        distance = abs(chosen["block_k"] - 64) / 64 + abs(chosen["num_warps"] - 4)
        return [
            Measurement((1e-6 * (1 + distance + chosen.get("split_k", 1) / 16) * s.tokens,))
            for s in scenarios
        ]


def run(tmp_path, trials, runner=None):
    task = tasks_of("vllm", [O_PROJ], 8)[0]
    runner = runner or MadeUp()
    path = tmp_path / "log.jsonl"
    found = tune_engine(
        [task], runner=runner, target=SM_90, tokens=(1, 8), path=path,
        effort=effort_of("quick"), trials=trials, budget_s=60.0,
    )  # fmt: skip
    return task, path, found[0], runner


def test_search_improves_on_the_default_and_logs_every_batch(tmp_path):
    task, path, outcome, runner = run(tmp_path, 24)
    records, skipped = log.read(path)
    assert skipped == 0
    assert outcome.trials == runner.calls == 24
    assert len(records) == 24 * len(scenarios_of(task, (1, 8)))
    assert outcome.gain > 2
    chosen = log.best(records, 8)
    assert chosen is not None
    assert chosen["split_k"] != 32
    assert chosen["num_warps"] == 4


def test_a_second_run_goes_on_where_the_first_ended(tmp_path):
    _, path, _, _ = run(tmp_path, 10)
    before = {r.trace for r in log.read(path)[0]}
    _, path, outcome, runner = run(tmp_path, 6)
    assert runner.calls == 6
    assert len({r.trace for r in log.read(path)[0]}) == len(before) + 6
    assert outcome.gain > 1


def record(tokens, options, seconds, failure=Failure.NONE):
    task = tasks_of("vllm", [O_PROJ], 8)[0]
    scenario = named("distinct", tokens) if tokens < 9 else named("uniform", tokens)
    found = Measurement((seconds,)) if seconds else Measurement.failed(failure, "no")
    return log.EngineRecord(task, scenario, options, Trace(()), found, "gpu", {}, 0.0)


def test_best_is_right_under_every_batch_of_its_tokens():
    good, fast = {"block_m": 16}, {"block_m": 32}
    records = [record(8, good, 2e-6), record(8, fast, 1e-6)]
    assert log.best(records, 8) == fast
    other = dataclasses.replace(records[1], scenario=named("identical", 8))
    wrong = dataclasses.replace(
        other, measurement=Measurement.failed(Failure.CORRECTNESS, "off by 2")
    )
    fine = dataclasses.replace(records[0], scenario=named("identical", 8))
    assert log.best([*records, fine, wrong], 8) == good
    assert log.best(records, 16) is None


def test_log_lines_survive_damage(tmp_path):
    path = tmp_path / "log.jsonl"
    log.append(path, [record(8, {"block_m": 16}, 1e-6)])
    whole = path.read_text()
    path.write_text(whole + '{"v": "v0.6"}\nnonsense\n' + whole[: len(whole) // 2])
    log.append(path, [record(8, {"block_m": 32}, 1e-6)])
    records, skipped = log.read(path)
    assert [r.options["block_m"] for r in records] == [16, 32]
    assert skipped == 3
    with pytest.raises(LogError):
        log.read(tmp_path / "missing")


def test_one_device_must_be_named_if_there_are_several():
    first = record(8, {"block_m": 16}, 1e-6)
    second = dataclasses.replace(first, device="other")
    assert log.one_device([first], None)[1] == "gpu"
    with pytest.raises(ConfigError, match="--device"):
        log.one_device([first, second], None)
    assert log.one_device([first, second], "other") == ([second], "other")


def test_csgmv_batches_are_chunks_of_one_adapter_in_sorted_order():
    info = batch_info([1, 0, 1, 1, 0, 2], 3, 16, 2, "cpu")
    assert info.permutation.tolist() == [1, 4, 0, 2, 3, 5]
    assert info.seg_indptr.tolist() == [0, 2, 4, 5, 6]
    assert info.weight_indices.tolist() == [0, 1, 1, 2]
    assert info.num_segments == 4


def test_calls_rotate_over_slots():
    maps = mappings(named("identical", 4), 8)
    assert len(maps) == 8
    assert len({tuple(m) for m in maps}) == 8
    assert all(len(set(m)) == 1 for m in maps)
