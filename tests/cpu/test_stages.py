from __future__ import annotations

import pytest
from hypothesis import given
from log_samples import small_traces

from dop.errors import TraceError
from dop.space.stages import INITIAL, Stages, new_stage
from dop.space.step import CacheReadStep, CacheWriteStep, ComputeInlineStep, RfactorStep
from dop.space.trace import Trace


def test_names_and_indices() -> None:
    stages = Stages()
    assert [stages.name(stages.index(name)) for name in INITIAL] == list(INITIAL)
    with pytest.raises(TraceError, match="stage 6"):
        stages.name(6)
    with pytest.raises(TraceError, match="gather_y"):
        stages.index("gather_y")


def test_rfactor_puts_the_partial_sums_before_the_stage() -> None:
    stages = Stages().after(RfactorStep(2, 4, 0))
    assert stages.names[2:4] == ("shrink_rf", "shrink")
    twice = stages.after(RfactorStep(2, 4, 0))
    assert twice.names[2:5] == ("shrink_rf_rf", "shrink_rf", "shrink")


def test_cache_write_adds_the_copy_behind_the_stage() -> None:
    assert Stages().after(CacheWriteStep(4, "local")).names[4:6] == ("expand", "expand_out")


def test_the_first_cache_read_only_gives_a_scope() -> None:
    step = CacheReadStep(1, "shared", (2,))
    once = Stages().after(step)
    assert once.names == INITIAL
    assert once.after(step).names[1:3] == ("gather_a", "gather_a_in")


def test_other_steps_leave_the_list() -> None:
    assert new_stage(Stages(), ComputeInlineStep(0)) is None


@given(small_traces)
def test_walking_any_trace_keeps_names_unique_or_fails_clearly(trace: Trace) -> None:
    stages = Stages()
    for step in trace.steps:
        before = len(stages.names)
        try:
            stages = stages.after(step)
        except TraceError:
            return
        assert len(stages.names) in (before, before + 1)
