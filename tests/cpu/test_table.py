"""The dispatch table: covered with few kernels, honest about its regret, whole for every batch."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import subprocess
import sys

import pytest
from export_logs import record, records_of, write_log

from dop.database.jsonl import read_log
from dop.dispatch.cover import build_table
from dop.dispatch.holdout import holdout
from dop.dispatch.table import Row, Table, WorkloadTable
from dop.errors import ConfigError, ExportError, Failure
from dop.scenario import MIXES, Scenario, named
from dop.space.step import SplitStep
from dop.space.trace import Trace
from dop.target import SM_90
from dop.workload import Workload

WORKLOAD = Workload("o", 512, (512,), 16, "bfloat16")


def trace(number: int) -> Trace:
    """Traces that differ; the table never looks inside."""
    return Trace((SplitStep(0, 0, 512, (number,), True),))


TRACES = {name: trace(2 + i) for i, name in enumerate("abcdefgh")}


def table_of(tmp_path, records, **options):
    contents = read_log(write_log(tmp_path / "log.jsonl", records))
    return build_table(contents.entries, device=SM_90.device_name, target_key=SM_90.key, **options)


def name_of(key: str) -> str:
    return next(name for name, t in TRACES.items() if t.key == key)


def test_few_kernels_within_the_regret(tmp_path):
    times = {
        "T8/distinct/8": {"a": 10.0, "b": 10.4, "c": 20.0},
        "T8/identical/1": {"a": 8.0, "b": 5.2, "c": 5.0},
        "T32/distinct/32": {"a": 30.0, "b": 31.0, "c": 60.0},
    }
    built = table_of(tmp_path, records_of(WORKLOAD, TRACES, times))
    found = built.table.workloads[WORKLOAD.key]
    assert [name_of(t) for t in found.trace_keys] == ["b"]  # 4 % everywhere: one kernel will do
    assert found.worst_regret == pytest.approx(0.04)
    exact = table_of(tmp_path / "exact", records_of(WORKLOAD, TRACES, times), max_regret=0.0)
    winners = exact.table.workloads[WORKLOAD.key]
    # each winner, and b: of 8 tokens with unknown segments it loses 4 %, a and c 60 % and more
    assert {name_of(t) for t in winners.trace_keys} == {"a", "b", "c"}
    assert name_of(winners.choose(8)) == "b"
    assert winners.row(8).worst == pytest.approx(0.04)
    assert {name_of(f.trace_key) for f in winners.fits} == {"a", "c"}
    assert winners.worst_regret == 0
    assert {k for _, k in built.entries} == set(found.trace_keys)


def test_random_logs_keep_the_regret_and_serve_every_batch(tmp_path):
    rng = random.Random(5)
    scenarios = [named(m, t) for t in (1, 8, 32, 128) for m in MIXES]
    times = {
        s.key: {name: 5.0 + 20 * rng.random() for name in TRACES} for s in scenarios if s.tokens > 1
    }
    built = table_of(tmp_path, records_of(WORKLOAD, TRACES, times))
    found = built.table.workloads[WORKLOAD.key]
    assert found.worst_regret <= 0.05
    assert {f.scenario_key for f in found.fits} == set(times)
    for fit in found.fits:
        best = min(times[fit.scenario_key].values())
        assert fit.best_s == pytest.approx(best * 1e-6)
        assert times[fit.scenario_key][name_of(fit.trace_key)] <= 1.05 * best
    for tokens, adapters in itertools.product((1, 2, 7, 9, 33, 5000), (None, 1, 3, 4000)):
        assert found.choose(tokens, adapters) in found.trace_keys


def test_scenarios_that_look_alike_get_one_kernel_and_tell_its_regret(tmp_path):
    # Both have 32 tokens and 6 adapters: a dispatcher sees 5.33 rows per segment in each.
    skewed = named("skewed", 32)
    recorded = Scenario("recorded", (27, 1, 1, 1, 1, 1))
    assert named("uniform", 32).adapters == recorded.adapters
    times = {"T32/uniform/6": {"a": 10.0, "b": 12.0}, recorded.key: {"a": 14.0, "b": 10.0}}
    found = table_of(tmp_path, records_of(WORKLOAD, TRACES, times)).table.workloads[WORKLOAD.key]
    assert [name_of(t) for t in found.trace_keys] == ["b"]
    assert sorted(round(f.regret, 3) for f in found.fits) == [0.0, 0.2]
    assert skewed.tokens == 32


def test_nearest_bucket_and_segment_length(tmp_path):
    times = {
        "T8/distinct/8": {"a": 1.0, "b": 9.0, "c": 9.0, "d": 9.0},
        "T8/identical/1": {"a": 9.0, "b": 1.0, "c": 9.0, "d": 9.0},
        "T128/distinct/128": {"a": 9.0, "b": 9.0, "c": 1.0, "d": 9.0},
        "T128/identical/1": {"a": 9.0, "b": 9.0, "c": 9.0, "d": 1.0},
    }
    found = table_of(tmp_path, records_of(WORKLOAD, TRACES, times)).table.workloads[WORKLOAD.key]
    picks = {
        (8, 8): "a",
        (1, 1): "a",  # below the smallest bucket: the smallest
        (8, 4): "a",  # 2 rows: nearer to 1 than to 8 on a log scale
        (8, 2): "b",  # 4 rows: nearer to 8
        (8, 1): "b",
        (9, 9): "a",  # not measured: times lie between, and a is still the faster one
        (60, 60): "a",
        (80, 80): "c",
        (60, 1): "b",
        (80, 1): "d",
        (128, 1): "d",
        (4096, 4096): "c",  # beyond the largest: the largest
        (4096, 1): "d",
    }
    assert {batch: name_of(found.choose(*batch)) for batch in picks} == picks
    assert found.choose(8) in found.trace_keys
    with pytest.raises(ConfigError):
        found.choose(0, 1)
    with pytest.raises(ConfigError):
        found.choose_by_rows(8, math.nan)


def test_buckets_between_come_from_interpolated_times(tmp_path):
    rising, steep = {8: 10.0, 32: 40.0, 128: 160.0}, {8: 20.0, 32: 26.0, 128: 50.0}
    mixes = {"distinct": 1.0, "identical": 0.5}
    times = {
        named(mix, tokens).key: {"a": factor * rising[tokens], "b": factor * steep[tokens]}
        for tokens in rising
        for mix, factor in mixes.items()
    }
    contents = read_log(write_log(tmp_path / "l.jsonl", records_of(WORKLOAD, TRACES, times)))
    found = build_table(
        contents.entries, device=SM_90.device_name, target_key=SM_90.key
    ).table.workloads[WORKLOAD.key]
    assert found.between == (16,)  # where the others would only repeat their neighbour
    # a is linear: 1.25 us a token; b crosses it at 18 tokens
    for tokens, name in ((12, "a"), (16, "a"), (17, "b"), (24, "b"), (64, "b"), (1024, "b")):
        for adapters in (tokens, 1, None):
            assert name_of(found.choose(tokens, adapters)) == name, (tokens, adapters)
    losses = {loss.rule: loss for loss in holdout([found], contents.entries)}
    assert losses["interpolated"].worst == 0  # 32 from 8 and 128: 26 against 40
    assert losses["next smaller bucket"].worst == pytest.approx(40 / 26 - 1)
    assert losses["interpolated"].batches == 2


def test_one_bucket_has_nothing_between(tmp_path):
    times = {"T8/distinct/8": {"a": 10.0}, "T8/identical/1": {"a": 8.0}}
    found = table_of(tmp_path, records_of(WORKLOAD, TRACES, times)).table.workloads[WORKLOAD.key]
    assert found.between == ()
    assert found.bucket(1) == found.bucket(5000) == 8


def test_unknown_segments_take_a_compromise_that_wins_nowhere(tmp_path):
    # c is best in no batch, but loses 10 % at most; a and b lose 100 %
    times = {
        "T8/distinct/8": {"a": 10.0, "b": 20.0, "c": 11.0},
        "T8/identical/1": {"a": 20.0, "b": 10.0, "c": 11.0},
    }
    found = table_of(tmp_path, records_of(WORKLOAD, TRACES, times)).table.workloads[WORKLOAD.key]
    row = found.row(8)
    assert name_of(row.trace_key) == "c"
    assert row.worst == pytest.approx(0.1)
    assert row.worst_scenario in times
    assert found.worst_regret == 0


def test_unknown_hint_takes_the_smallest_worst_case(tmp_path):
    times = {
        "T8/distinct/8": {"a": 10.0, "b": 11.0},
        "T8/identical/1": {"a": 40.0, "b": 10.0},
    }
    found = table_of(tmp_path, records_of(WORKLOAD, TRACES, times)).table.workloads[WORKLOAD.key]
    assert name_of(found.choose(8, 8)) == "a"
    assert name_of(found.choose(8, None)) == "b"


def test_wrong_and_failed_records_are_never_chosen(tmp_path):
    scenario = named("distinct", 8)
    records = [
        record(WORKLOAD, scenario, TRACES["a"], 1e-6, accuracy=0.5),
        record(WORKLOAD, scenario, TRACES["b"], 1e-6, failure=Failure.CORRECTNESS),
        record(WORKLOAD, scenario, Trace(TRACES["c"].steps * 2), 9e-6),
    ]
    found = table_of(tmp_path, records).table.workloads[WORKLOAD.key]
    assert found.choose(8, 8) == records[2].trace.key
    with pytest.raises(ExportError, match="no usable record"):
        table_of(tmp_path / "bad", records[:2])


def test_a_broken_trace_is_passed_over(tmp_path):
    scenario = named("distinct", 8)
    broken = Trace((SplitStep(77, 0, 512, (2,), True),))  # a stage that does not exist
    records = [
        record(WORKLOAD, scenario, broken, 1e-6),
        record(WORKLOAD, scenario, TRACES["a"], 5e-6),
    ]
    found = table_of(tmp_path, records).table.workloads[WORKLOAD.key]
    assert found.choose(8) == TRACES["a"].key
    assert found.worst_regret == 0  # judged against what can be used


def test_other_devices_do_not_count(tmp_path):
    from dataclasses import replace

    scenario = named("distinct", 8)
    other = replace(SM_90, device_name="another GPU")
    records = [
        record(WORKLOAD, scenario, TRACES["a"], 5e-6),
        record(WORKLOAD, scenario, TRACES["b"], 1e-6, target=other),
    ]
    found = table_of(tmp_path, records).table.workloads[WORKLOAD.key]
    assert found.choose(8) == TRACES["a"].key


def test_json_round_trip_and_text(tmp_path):
    times = {
        "T8/distinct/8": {"a": 10.0, "b": 20.0},
        "T8/identical/1": {"a": 40.0, "b": 10.0},
    }
    table = table_of(tmp_path, records_of(WORKLOAD, TRACES, times)).table
    assert Table.from_json(json.loads(json.dumps(table.to_json()))) == table
    text = table.text()
    assert WORKLOAD.key in text
    assert "T8/identical/1" in text
    assert "0.0%" in text
    for damaged in ({}, [], {"device": "d", "target": "t", "workloads": {"k": {"rows": [[1]]}}}):
        with pytest.raises(ExportError, match="damaged"):
            Table.from_json(damaged)


def test_a_table_must_be_whole():
    with pytest.raises(ExportError, match="every batch"):
        WorkloadTable("k", (Row(8, 0.0, "t"), Row(8, 4.0, "t")))
    with pytest.raises(ExportError, match="order"):
        WorkloadTable("k", (Row(8, math.inf, "t"), Row(1, math.inf, "t")))


def test_tables_load_without_the_tuner():
    code = (
        "import sys; import dop.dispatch.table; "
        "print([m for m in ('tvm', 'torch', 'orjson', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_few_slots_bound_an_unknown_batch(tmp_path):
    """a is best where every row has its own adapter, c for long segments, b is a compromise."""
    times = {
        "T64/distinct/64": {"a": 10.0, "b": 13.0, "c": 30.0},
        "T64/uniform/8": {"a": 20.0, "b": 13.0, "c": 12.0},
        "T64/identical/1": {"a": 30.0, "b": 13.0, "c": 10.0},
    }
    built = table_of(tmp_path, records_of(WORKLOAD, TRACES, times))
    found = built.table.workloads[WORKLOAD.key]

    def asked(*batch):
        row = found.row(*batch)
        return name_of(row.trace_key), None if row.worst is None else round(row.worst, 6)

    unknown = ("b", 0.3)
    assert asked(64) == asked(64, None, None) == unknown
    assert asked(64, None, 64) == asked(64, None, 1000) == unknown  # slots say nothing
    assert asked(64, None, 40) == unknown  # 1.6 rows on average: still near all distinct
    assert asked(64, None, 22) == ("c", 0.0)  # 2.9 rows: nearer to 8 than to 1
    assert asked(64, None, 1) == ("c", 0.0)
    assert asked(40, None, 3) == ("c", 0.0)  # fewer tokens, same bucket
    assert asked(64, 64, None)[0] == "a"
    assert asked(64, 64, 1)[0] == "c"  # a hint cannot exceed the slots

    again = Table.from_json(json.loads(json.dumps(built.table.to_json())))
    assert again.workloads[WORKLOAD.key].bounds == found.bounds
    assert "8 or more" not in built.table.text()
    assert "2.82843 or more" in built.table.text()


def test_a_bound_takes_the_smallest_mean_loss_of_what_is_left(tmp_path):
    rng = random.Random(9)
    scenarios = [named(mix, tokens) for tokens in (8, 64) for mix in MIXES]
    times = {s.key: {name: 5.0 + 20 * rng.random() for name in TRACES} for s in scenarios}
    built = table_of(tmp_path, records_of(WORKLOAD, TRACES, times), max_regret=0.0)
    found = built.table.workloads[WORKLOAD.key]
    shipped = [name_of(key) for key in found.trace_keys]
    for bound in found.bounds:
        if bound.tokens in found.between:
            continue
        left = [
            s for s in scenarios
            if s.tokens == bound.tokens and s.tokens / s.adapters >= bound.rows_from
        ]  # fmt: skip
        lost: dict[str, dict[float, float]] = {name: {} for name in shipped}
        for name, by_rows in lost.items():
            for s in left:  # scenarios of the same rows are one cell
                ratio = times[s.key][name] / min(times[s.key].values())
                rows = s.tokens / s.adapters
                by_rows[rows] = max(ratio, by_rows.get(rows, 0.0))
        mean = {name: statistics.geometric_mean(by.values()) for name, by in lost.items()}
        chosen = name_of(bound.trace_key)
        assert mean[chosen] == pytest.approx(min(mean.values()))
        assert bound.worst == pytest.approx(max(lost[chosen].values()) - 1)


def test_batches_that_a_hint_does_not_tell_apart_share_a_kernel(tmp_path):
    """11 and 12 adapters are both told as 16; the kernel is good for equal shares and others."""
    times = {
        "T128/uniform/12": {"a": 10.0, "b": 14.0, "c": 10.4},
        "T128/skewed/11": {"a": 13.0, "b": 10.0, "c": 10.6},
        "T128/identical/1": {"a": 8.0, "b": 8.0, "c": 5.0},
    }
    found = table_of(tmp_path, records_of(WORKLOAD, TRACES, times), max_regret=0.0).table
    table = found.workloads[WORKLOAD.key]
    for adapters in (11, 12, 16):
        assert name_of(table.choose(128, adapters)) == "c"
    worst = {fit.scenario_key: fit.regret for fit in table.fits}
    assert worst == {
        "T128/uniform/12": pytest.approx(0.04),
        "T128/skewed/11": pytest.approx(0.06),
        "T128/identical/1": 0,
    }


def test_batches_that_no_kernel_serves_together_stay_apart(tmp_path):
    times = {
        "T128/uniform/12": {"a": 10.0, "b": 14.0, "c": 11.6},
        "T128/skewed/11": {"a": 13.0, "b": 10.0, "c": 11.6},
    }
    found = table_of(tmp_path, records_of(WORKLOAD, TRACES, times), max_regret=0.0).table
    table = found.workloads[WORKLOAD.key]
    assert [name_of(table.choose(128, n)) for n in (16, 12, 11, 1)] == ["a", "a", "b", "b"]
    strangers = {"T128/uniform/12": {"a": 10.0}, "T128/skewed/11": {"b": 10.0}}
    found = table_of(tmp_path / "s", records_of(WORKLOAD, TRACES, strangers)).table
    table = found.workloads[WORKLOAD.key]
    assert [name_of(table.choose(128, n)) for n in (16, 12, 11, 1)] == ["a", "a", "b", "b"]


def test_a_batch_and_its_cold_twin_get_the_kernel_that_loses_least_in_the_worse_of_both(tmp_path):
    times = {
        "T512/identical/1": {"a": 21.5, "b": 21.9, "c": 24.0},
        "T512/identical/1/cold": {"a": 31.1, "b": 27.7, "c": 27.6},
        "T512/uniform/23": {"a": 30.0, "b": 40.0, "c": 40.0},
    }
    exact = {"max_regret": 0.0}
    found = table_of(tmp_path, records_of(WORKLOAD, TRACES, times), **exact).table
    table = found.workloads[WORKLOAD.key]
    assert [name_of(table.choose(512, n)) for n in (1, 23)] == ["b", "a"]
    worst = {fit.scenario_key: fit.regret for fit in table.fits}
    assert worst["T512/identical/1"] == pytest.approx(21.9 / 21.5 - 1)
    assert worst["T512/identical/1/cold"] == pytest.approx(27.7 / 27.6 - 1)
    assert "T512/identical/1/cold" in found.text()
    assert Table.from_json(found.to_json()) == found
    del times["T512/identical/1/cold"]
    warm = table_of(tmp_path / "w", records_of(WORKLOAD, TRACES, times), **exact).table
    assert name_of(warm.workloads[WORKLOAD.key].choose(512, 1)) == "a"


@pytest.mark.parametrize(
    ("cold", "chosen"),
    [
        ({"b": 11.4, "c": 9.0}, "b"),  # b loses 14 % of the warm one, c 40 %
        ({"b": 11.4, "c": 8.0}, "c"),
        ({"c": 8.0}, "a"),  # a run that ended early
    ],
    ids=str,
)
def test_a_cold_twin_that_few_kernels_were_measured_under_does_not_decide(tmp_path, cold, chosen):
    warm = {"a": 10.0, "b": 11.4, "c": 14.0}
    times = {"T512/identical/1": warm, "T512/identical/1/cold": cold}
    found = table_of(tmp_path, records_of(WORKLOAD, TRACES, times), max_regret=0.0).table
    assert name_of(found.workloads[WORKLOAD.key].choose(512, 1)) == chosen


@pytest.mark.parametrize("names", ["abc", "bca", "cab"])
def test_a_cold_twin_does_not_decide_between_strangers(tmp_path, names):
    """Batches of one place in the table that no kernel was measured under both of."""
    first, second, cold = names
    times = {
        "T512/identical/1": {first: 10.0},
        "T512/recorded/512/0": {second: 10.0},
        "T512/identical/1/cold": {cold: 8.0},
    }
    found = table_of(tmp_path, records_of(WORKLOAD, TRACES, times), max_regret=0.0).table
    assert name_of(found.workloads[WORKLOAD.key].choose(512, 1)) != cold


def test_only_near_batches_of_a_token_count_are_taken_together(tmp_path):
    """4, 5.3 and 6.4 rows: the first two; the last is near the second only."""
    times = {
        "T32/skewed/8": {"a": 10.0, "b": 12.0, "c": 10.4},
        "T32/uniform/6": {"a": 12.0, "b": 10.0, "c": 10.4},
        "T32/recorded/8,8,8,4,4/0": {"a": 10.0, "b": 10.8, "c": 10.7},
        "T64/uniform/8": {"a": 12.0, "b": 10.0, "c": 10.7},
    }
    found = table_of(tmp_path, records_of(WORKLOAD, TRACES, times), max_regret=0.0).table
    table = found.workloads[WORKLOAD.key]
    assert [name_of(table.choose(32, n)) for n in (8, 6, 5)] == ["c", "c", "a"]
    assert name_of(table.choose(64, 8)) == "b"


def test_a_table_without_bounds_still_serves(tmp_path):
    """Packs of before have none."""
    times = {"T8/distinct/8": {"a": 1.0}, "T8/identical/1": {"a": 2.0}}
    data = table_of(tmp_path, records_of(WORKLOAD, TRACES, times)).table.to_json()
    for table in data["workloads"].values():
        del table["bounds"]
    assert name_of(Table.from_json(data).choose(WORKLOAD.key, 8, None, 2)) == "a"
