from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_samples import json_values, step_kinds

from dop.errors import TraceError
from dop.space.step import (
    STEPS,
    Param,
    PragmaStep,
    SplitStep,
    Step,
    parse_step,
)


def test_fourteen_kinds_all_with_samples() -> None:
    assert len(STEPS) == 14
    assert set(step_kinds) == set(STEPS)


@pytest.mark.parametrize("code", sorted(step_kinds))
@given(data=st.data())
def test_round_trip(code: str, data: st.DataObject) -> None:
    step = data.draw(step_kinds[code])
    wire = json.loads(json.dumps(step.to_json()))
    assert wire[0] == code
    assert parse_step(wire) == step


@given(json_values)
def test_any_json_is_a_step_or_a_trace_error(value: object) -> None:
    try:
        step = parse_step(value)
    except TraceError:
        return
    assert isinstance(step, Step)


@given(st.sampled_from(sorted(STEPS)), st.lists(json_values, max_size=6))
def test_any_fields_are_a_step_or_a_trace_error(code: str, fields: list[object]) -> None:
    try:
        step = parse_step([code, *fields])
    except TraceError:
        return
    assert parse_step(step.to_json()) == step


@pytest.mark.parametrize(
    "wire",
    [
        ["SP", 0, 0, None, [], 1],
        ["SP", 0, 0, None, [0], 1],
        ["SP", 0, 0, None, [4], 1.0],
        ["SP", -1, 0, None, [4], 1],
        ["SP", True, 0, None, [4], 1],
        ["SP", 2**31, 0, None, [4], 1],
        ["FU", 0, [1, 3]],
        ["FU", 0, [1]],
        ["RE", 0, [0, 2]],
        ["AN", 0, 0, 12],
        ["AN", 0, 0, 2, 7],
        ["PR", 0, 0, "nothing"],
        ["PR", 0, 0, "$8"],
        ["CHR", 0, "disk", []],
        ["CI"],
        ["CI", 0, 1],
        ["XX", 0],
        [],
        "SP",
    ],
)
def test_malformed_steps_are_refused(wire: object) -> None:
    with pytest.raises(TraceError):
        parse_step(wire)


def test_deep_nesting_does_not_exhaust_the_stack() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TraceError):
        parse_step(["SP", 0, deep, None, [1], 1])


def test_a_pragma_has_one_spelling() -> None:
    assert PragmaStep(0, 0, "unroll", "8") == PragmaStep(0, 0, "unroll", (8,))
    assert PragmaStep(0, 0, "unroll", "8").value == 8
    assert PragmaStep(0, 0, "pack_k", "32,8").value == (32, 8)
    assert PragmaStep(0, 0, "pack_k", "032").value == "032"


def test_open_numbers_cannot_be_written_and_are_bound() -> None:
    step = SplitStep(0, 1, None, (Param("shrink.tile"), 8))
    assert step.params() == ("shrink.tile",)
    with pytest.raises(TraceError):
        step.to_json()
    assert step.bind({"shrink.tile": 4}) == SplitStep(0, 1, None, (4, 8))
    with pytest.raises(KeyError):
        step.bind({})
    pragma = PragmaStep(0, 0, "depth", Param("shrink.depth"))
    assert pragma.bind({"shrink.depth": 3}).to_json() == ["PR", 0, 0, "depth$3"]
