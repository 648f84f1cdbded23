"""Records and files for the tests of the log."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from hypothesis import strategies as st

from dop.database.record import Record
from dop.errors import Failure
from dop.measurement import Measurement
from dop.space.step import (
    ANNOTATIONS,
    SCOPES,
    AnnotationStep,
    CacheReadStep,
    CacheWriteStep,
    ComputeAtStep,
    ComputeInlineStep,
    ComputeRootStep,
    FollowFusedSplitStep,
    FollowSplitStep,
    FuseStep,
    PragmaStep,
    ReorderStep,
    RfactorStep,
    SplitStep,
    Step,
    StorageAlignStep,
)
from dop.space.trace import Trace

WORKLOAD = "sgmv/float16/r16/4096->4096+1024+1024"

# A trace whose steps do to the loops what they say (tests of explain check the names).
SPLIT_K = Trace(
    (
        SplitStep(5, 2, 6144, (2, 128, 4)),
        ReorderStep(5, (0, 2, 4, 3, 1, 5)),
        AnnotationStep(5, 0, ANNOTATIONS.index("blockIdx.x")),
        AnnotationStep(5, 5, ANNOTATIONS.index("vectorize")),
        CacheReadStep(4, "local", (5,)),
        ComputeAtStep(4, 5, 3),
        ComputeInlineStep(3),
        SplitStep(2, 4, 4096, (8,), False),
        RfactorStep(2, 4, 0),
        ComputeRootStep(2),
        FuseStep(2, (0, 1)),
        PragmaStep(2, 0, "auto_unroll_max_step", 64),
    )
)


def record(
    *,
    us: float = 10.0,
    trace: Trace = SPLIT_K,
    scenario: str = "T32/uniform/6",
    failure: Failure = Failure.NONE,
    accuracy: float | None = 1e-4,
    timestamp: int = 1_700_000_000,
    message: str = "it broke",
    **changes: Any,
) -> Record:
    if failure is Failure.NONE:
        seconds = (us * 1e-6, us * 1.1e-6, us * 0.9e-6)
        measurement = Measurement(
            seconds, accuracy=accuracy, floor_s=5e-6, resources={"registers": 64}, cost_s=0.5
        )
    else:
        measurement = Measurement.failed(failure, message, 0.25)
    made = Record(
        workload_key=WORKLOAD,
        target_key="cuda -arch=sm_90a",
        hardware_params=(132, 16, 64, 232448, 65536, 1024, 8, 32),
        scenario_key=scenario,
        device_name="NVIDIA H200",
        trace=trace,
        measurement=measurement,
        timestamp=timestamp,
        sketch="rows/columns/split_k",
        versions={"dop": "0.1.0", "tvm": "0.27.0"},
        seed=7,
        revision="abc1234",
        predicted_s=9e-6,
    )
    return dataclasses.replace(made, **changes)


def varied_trace(rng: random.Random, steps: int = 60) -> Trace:
    """Steps of every kind; valid one by one, not as a schedule."""
    made: list[Step] = [SplitStep(0, 0, None, (rng.choice((2, 4, 8)),))]
    while len(made) < steps:
        made.append(
            rng.choice(
                (
                    AnnotationStep(2, rng.randrange(9), rng.randrange(1, 12)),
                    SplitStep(2, 4, 4096, (rng.choice((1, 2, 4)), 32, 8)),
                    FollowSplitStep(2, 1, 0, 1),
                    FuseStep(2, (1, 2, 3)),
                    ReorderStep(2, (1, 0, 6, 3, 4, 2, 5, 7)),
                    PragmaStep(1, 0, "pack_k", (32, 8)),
                    ComputeAtStep(1, 3, 4),
                    ComputeInlineStep(1),
                )
            )
        )
    return Trace(tuple(made))


index = st.integers(0, 2**31 - 1)
small = st.integers(0, 40)
positive = st.integers(1, 2**31 - 1)
word = st.text(st.characters(codec="utf-8", exclude_characters="$"), min_size=1, max_size=12)
pragma_values = st.one_of(
    st.integers(-(10**9), 10**9),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.lists(st.integers(-9, 999), min_size=1, max_size=4).map(tuple),
)

step_kinds: dict[str, st.SearchStrategy[Step]] = {
    "AN": st.builds(
        AnnotationStep,
        index,
        index,
        st.integers(0, len(ANNOTATIONS) - 1),
        st.text(st.characters(codec="utf-8"), max_size=8),
    ),
    "FU": st.builds(
        lambda stage, first, count: FuseStep(stage, tuple(range(first, first + count))),
        index,
        small,
        st.integers(2, 6),
    ),
    "PR": st.builds(PragmaStep, index, index, word, pragma_values),
    "RE": st.builds(
        ReorderStep,
        index,
        st.integers(0, 8).flatmap(lambda n: st.permutations(range(n))).map(tuple),
    ),
    "SP": st.builds(
        SplitStep,
        index,
        index,
        st.none() | positive,
        st.lists(positive, min_size=1, max_size=4).map(tuple),
        st.booleans(),
    ),
    "FSP": st.builds(FollowSplitStep, index, index, index, positive),
    "FFSP": st.builds(
        FollowFusedSplitStep,
        index,
        index,
        st.lists(index, max_size=3).map(tuple),
        index,
        st.booleans(),
    ),
    "SA": st.builds(StorageAlignStep, index, index, positive, index),
    "CA": st.builds(ComputeAtStep, index, index, index),
    "CI": st.builds(ComputeInlineStep, index),
    "CR": st.builds(ComputeRootStep, index),
    "CHR": st.builds(
        CacheReadStep, index, st.sampled_from(SCOPES), st.lists(index, max_size=3).map(tuple)
    ),
    "CHW": st.builds(CacheWriteStep, index, st.sampled_from(SCOPES)),
    "RF": st.builds(RfactorStep, index, index, index),
}
"""Every kind of step, with any content that its reader accepts."""

small_steps = st.one_of(
    st.builds(AnnotationStep, small, small, st.integers(0, len(ANNOTATIONS) - 1)),
    st.builds(SplitStep, small, small, st.none(), st.just((2, 4)), st.booleans()),
    st.builds(FollowSplitStep, small, small, small, st.integers(1, 3)),
    st.builds(FollowFusedSplitStep, small, small, st.lists(small, max_size=2).map(tuple), small),
    st.builds(ComputeAtStep, small, small, small),
    st.builds(ComputeInlineStep, small),
    st.builds(
        CacheReadStep, small, st.sampled_from(SCOPES), st.lists(small, max_size=2).map(tuple)
    ),
    st.builds(CacheWriteStep, small, st.sampled_from(SCOPES)),
    st.builds(RfactorStep, small, small, small),
    st.builds(PragmaStep, small, small, word, pragma_values),
    step_kinds["RE"],
    step_kinds["FU"],
)
"""Steps whose stages and loops often exist."""

traces = st.lists(st.one_of(*step_kinds.values()), max_size=20).map(lambda s: Trace(tuple(s)))
small_traces = st.lists(small_steps, max_size=25).map(lambda s: Trace(tuple(s)))

texts = st.text(st.characters(codec="utf-8"), max_size=30)
times = st.floats(min_value=5e-324, allow_nan=False)  # denormal to infinity
optional_floats = st.none() | st.floats(allow_nan=False)

measurements = st.one_of(
    st.builds(
        Measurement,
        st.lists(times, min_size=1, max_size=5).map(tuple),
        accuracy=optional_floats,
        floor_s=optional_floats,
        resources=st.dictionaries(texts, st.floats(allow_nan=False) | st.integers(0, 2**40)),
        cost_s=st.floats(0, 1e300),
    ),
    st.builds(
        Measurement,
        st.just(()),
        st.sampled_from([f for f in Failure if f]),
        texts,
        accuracy=optional_floats,
    ),
)

records = st.builds(
    Record,
    workload_key=texts,
    target_key=texts,
    hardware_params=st.lists(st.integers(-(2**31), 2**31), max_size=8).map(tuple),
    scenario_key=texts,
    device_name=texts,
    trace=traces,
    measurement=measurements,
    timestamp=st.integers(0, 2**40),
    sketch=texts,
    versions=st.dictionaries(texts, texts, max_size=3),
    seed=st.integers(-(2**63), 2**63 - 1),
    revision=texts,
    predicted_s=optional_floats,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(sorted(step_kinds)),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=25,
)
