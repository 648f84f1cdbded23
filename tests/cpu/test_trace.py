from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_samples import SPLIT_K, json_values, traces

from dop.errors import TraceError
from dop.space.step import ComputeInlineStep, FuseStep
from dop.space.trace import MAX_STEPS, Trace


@given(traces)
def test_round_trip(trace: Trace) -> None:
    back = Trace.from_json(trace.to_json())
    assert back == trace
    assert back.key == trace.key


@given(json_values | st.lists(json_values, max_size=5))
def test_any_json_is_a_trace_or_a_trace_error(value: object) -> None:
    try:
        trace = Trace.from_json(value)
    except TraceError:
        return
    assert Trace.from_json(trace.to_json()) == trace


def test_the_error_names_the_position() -> None:
    with pytest.raises(TraceError, match=r"step 1: .*0 is not a length"):
        Trace.from_json([["CI", 0], ["SP", 0, 0, None, [0], 1]])


def test_too_many_steps() -> None:
    with pytest.raises(TraceError, match=str(MAX_STEPS)):
        Trace.from_json([["CI", 0]] * (MAX_STEPS + 1))


def test_the_key_depends_on_every_step_and_their_order() -> None:
    a, b = ComputeInlineStep(1), FuseStep(2, (0, 1))
    keys = {Trace(steps).key for steps in ((a,), (b,), (a, b), (b, a), ())}
    assert len(keys) == 5
    assert SPLIT_K.key == Trace(SPLIT_K.steps).key
    assert len(SPLIT_K.key) == 16
