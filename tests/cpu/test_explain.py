from __future__ import annotations

import dataclasses

import pytest
from export_logs import CPU
from hypothesis import given
from log_samples import SPLIT_K, record, records, small_traces, step_kinds, traces

from dop.database.explain import explain
from dop.database.record import Record
from dop.database.step_words import LoopTracker
from dop.errors import Failure
from dop.space.generate import build_space
from dop.space.step import FollowFusedSplitStep, FollowSplitStep, PragmaStep, SplitStep, Step
from dop.space.trace import Trace
from dop.target import SM_90
from dop.workload import Workload

SMALL = Workload("o", 1024, (512,), 16, "float16")


def words_of(*steps: Step) -> list[str]:
    return [step.words for step in LoopTracker(steps).walk()]


def test_every_step_names_its_loops_and_stages() -> None:
    steps = explain(record()).steps
    said = [
        "Splits loop n of length 6144 of accumulate into n.0 (the rest), n.1 (2), n.2 (128) and "
        "n.3 (4), outermost first.",
        "Reorders the loops of accumulate, outermost first: t, n.0, n.2, n.1, i, n.3.",
        "Spreads loop t of accumulate over the blocks of the grid (blockIdx.x).",
        "Vectorizes loop n.3 of accumulate: its iterations become one wide load, store or "
        "operation.",
        "Keeps the result of expand in registers, where accumulate reads it.",
        "Computes expand inside loop n.1 of accumulate, just what one iteration needs; its own "
        "loops there are t', i, n, r.",
        "Inlines gather_b: its value is computed where it is read and never stored.",
        "Splits loop k of length 4096 of shrink into k.0 (8) and k.1 (the rest), outermost first.",
        "Factors loop k.0 out of shrink's sum: shrink_rf makes one partial sum per iteration of "
        "it, shrink adds the partial sums up.",
        "Computes shrink_rf on its own, into a workspace; on a GPU it is a kernel of its own.",
        "Fuses loops s and t of shrink_rf into one, s*t.",
        "Lets the code generator unroll up to 64 steps inside loop s*t of shrink_rf.",
    ]
    assert [step.words for step in steps] == said
    assert steps[5].loops == ("t", "n.0", "n.2", "n.1", "t'", "i", "n", "r")
    assert [step.code for step in steps] == [step.code for step in SPLIT_K.steps]


def test_the_prologue_is_told_as_tiles_of_rows() -> None:
    said = words_of(SplitStep(0, 0, None, (4,)), FollowSplitStep(2, 1, 0, 1))
    assert "tiles of up to 4 rows of one adapter" in said[0]
    assert said[1] == "Tiles the rows of shrink as step 0 did those of gather_x."


def test_followed_splits_take_the_lengths_of_their_source() -> None:
    said = words_of(
        SplitStep(5, 2, 6144, (2, 128, 4)),
        FollowSplitStep(4, 2, 0, 2),
        FollowFusedSplitStep(4, 0, (0, 0), 1, True),
    )
    assert "n.0 (the rest), n.1 (2) and n.2 (512)" in said[1]
    assert "t.0 (the rest) and t.1 (16384): the product of length 1 of steps 0 and 0" in said[2]


def test_packing_gives_the_k_axis_three_loops() -> None:
    steps = (PragmaStep(2, 0, "pack_k", (32, 8)), SplitStep(2, 4, None, (8,), False))
    assert "loop g of shrink into g.0 (8)" in words_of(*steps)[1]


def test_every_pragma_of_the_spaces_has_words() -> None:
    workloads = [
        (Workload("down", 14336, (4096,), 64, "bfloat16"), SM_90),
        (Workload("down", 14336, (4096,), 16, "bfloat16", beside=True), SM_90),
        (Workload("o", 1024, (512,), 16, "float32"), CPU),
    ]
    for workload, target in workloads:
        for sketch in build_space(workload, target).sketches:
            said = words_of(*sketch.bind(sketch.default()).steps)
            assert not [words for words in said if words.startswith("Attaches pragma")]


def test_what_cannot_be_known_is_called_by_number() -> None:
    said = words_of(SplitStep(17, 3, None, (2,)), FollowSplitStep(2, 9, 4, 1))
    assert said[0].startswith("Splits loop 3 (by number, outermost is 0) of stage 17")
    assert "no earlier split" in said[1]


@given(traces | small_traces)
def test_any_trace_is_told_without_fail(trace: Trace) -> None:
    told = explain(record(trace=trace))
    assert len(told.steps) == len(trace.steps)
    assert all(step.words.endswith((".", ")")) for step in told.steps)
    assert told.text().count("\n") >= len(trace.steps)


def test_every_kind_has_its_words() -> None:
    from dop.database import step_words
    from dop.space.step import STEPS

    assert set(step_words._WORDS) == set(STEPS.values())
    assert len(step_kinds) == 14


@given(records)
def test_any_record_is_told_without_fail(made: Record) -> None:
    assert explain(made).to_json()


def test_the_header_says_what_a_person_asks_first() -> None:
    text = explain(record()).text()
    for words in (
        "x has 4096 columns, rank 16, y has 4096 + 1024 + 1024 columns",
        "tokens 32, adapters 6, uniform shares",
        "NVIDIA H200 (cuda -arch=sm_90a)",
        "10.00 us, 2.00 times its floor of 5.00 us",
        "error 1.00e-04",
        "9.00 us",
        "registers 64",
        "2023-11-14 22:13:20 UTC; dop 0.1.0, tvm 0.27.0",
        "seed 7, revision abc1234",
    ):
        assert words in text
    failed = explain(record(failure=Failure.COMPILE)).text()
    assert "failed (compile): it broke" in failed
    assert "not checked" in failed


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("T32/uniform/6/cold", "tokens 32, adapters 6, uniform shares, x and y in memory"),
        (
            "T7/recorded/4,2/1/cold",
            "tokens 7, rows per adapter 4,2, rows without adapter 1, x and y in memory",
        ),
    ],
)
def test_a_cold_batch_is_called_so(key: str, words: str) -> None:
    assert dict(explain(dataclasses.replace(record(), scenario_key=key)).header)["batch"] == words


def test_odd_fields_do_not_stop_it() -> None:
    odd = dataclasses.replace(
        record(), workload_key="?", scenario_key="?", timestamp=10**15, trace=Trace(())
    )
    assert "No steps: the plain program." in explain(odd).text()


@pytest.mark.parametrize("packed_width", [1024, 1000])
def test_the_tracked_loops_are_those_of_the_schedule(packed_width: int) -> None:
    pytest.importorskip("tvm")
    from dop.lowering.apply import Application

    workload = dataclasses.replace(SMALL, in_features=packed_width)
    for sketch in build_space(workload, SM_90).sketches[:2]:
        trace = sketch.bind(sketch.default())
        tracker = LoopTracker(trace.steps)
        app, done = Application.start(workload, trace)
        for position, step in enumerate(trace.steps):
            stage = app.stages.name(step.stage)
            told = tracker._take(position, step)
            if position >= done:
                app.apply(step)
            assert len(told.loops) == _loop_count(app.schedule, stage), (sketch.name, position)


def _loop_count(schedule: object, stage: str) -> int:
    for name in (stage, f"{stage}_update"):
        try:
            return len(schedule.get_loops(schedule.get_sblock(name)))  # type: ignore[attr-defined]
        except Exception:
            continue
    return 0  # inlined
