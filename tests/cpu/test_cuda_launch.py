"""Dependent launches: the trace decides, and the text waits behind the loads that need not wait."""

from __future__ import annotations

import dataclasses
import re

import pytest

pytest.importorskip("tvm")

from dop.errors import BuildError, TraceError
from dop.lowering.apply import apply_trace
from dop.lowering.codegen import generate
from dop.lowering.cuda_launch import order_start
from dop.space.generate import build_space
from dop.space.sketch import Sketch
from dop.space.step import PragmaStep
from dop.space.trace import Trace
from dop.target import SM_90
from dop.workload import Workload

O_PROJ = Workload("o_proj", 512, (512,), 16, "bfloat16")
WAIT, RELEASE = "dop_wait_for_predecessor();", "dop_release_successor();"
SKETCHES = [s for s in build_space(O_PROJ, SM_90).sketches if "/early_b/" in s.name]


def bodies(source: str) -> list[str]:
    """Kernels' texts, in order."""
    return re.split(r'^extern "C" __global__ [^;{]*\{', source, flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("sketch", SKETCHES, ids=lambda s: s.name)
def test_weights_and_y_are_loaded_before_the_wait(sketch: Sketch) -> None:
    trace = sketch.bind({**sketch.default(), "expand.dependent": 1})
    code = generate(O_PROJ, Trace.from_json(trace.to_json()), SM_90)
    shrink, expand = bodies(code.source)
    assert [k.dependent for k in code.kernels] == [False, True]
    assert shrink.count(RELEASE) == 1
    assert WAIT not in shrink
    assert shrink.index(RELEASE) < shrink.index("_slot_ptr")
    # Once in the early exit, once in front of the sum over v's parts.
    assert expand.count(WAIT) == 2
    assert RELEASE not in expand
    last = expand.rindex(WAIT)
    assert "v_rf_ptr" not in expand[:last]
    assert "b_ptr" not in expand[last:]
    assert "y_in_ptr" not in expand[last:]
    assert expand.index(WAIT) < expand.index("return;")


@pytest.mark.parametrize("sketch", SKETCHES, ids=lambda s: s.name)
def test_a_dependent_shrink_waits_before_it_reads(sketch: Sketch) -> None:
    code = generate(O_PROJ, sketch.bind({**sketch.default(), "expand.dependent": 2}), SM_90)
    shrink, expand = bodies(code.source)
    assert [k.dependent for k in code.kernels] == [True, True]
    # Waits, then releases, then reads; no pointer is a constant that could be read earlier.
    assert shrink.split(";")[:2] == [f"\n  {WAIT}"[:-1], f"\n  {RELEASE}"[:-1]]
    assert shrink.count(WAIT) == 1
    heads = re.findall(r"__global__ [^;{]*\{", code.source)
    assert len(heads) == 2
    assert not any("__restrict__" in head for head in heads)
    assert expand.split(";")[0].strip() == RELEASE[:-1]
    last = expand.rindex(WAIT)
    assert "v_rf_ptr" not in expand[:last]
    assert "b_ptr" not in expand[last:]


@pytest.mark.parametrize("sketch", SKETCHES, ids=lambda s: s.name)
@pytest.mark.parametrize("widths", [(512,), (256, 128, 128)])
def test_an_early_shrink_reads_its_tables_and_a_before_it_waits(
    sketch: Sketch, widths: tuple[int, ...]
) -> None:
    workload = dataclasses.replace(O_PROJ, out_features=widths)
    values = {**sketch.default(), "expand.dependent": 3}
    code = generate(workload, bind(workload, sketch.name, values), SM_90)
    shrink, expand = bodies(code.source)
    assert [(k.dependent, k.early) for k in code.kernels] == [(False, True), (True, False)]
    assert "__restrict__" not in shrink
    last = shrink.rindex(WAIT)
    before, behind = shrink[:last], shrink[last:]
    assert shrink.count(WAIT) == 2  # where there are no rows, and in front of x
    assert shrink.count(RELEASE) == behind.count(RELEASE) == 1
    assert behind.index(RELEASE) < behind.index("x_ptr")
    assert not re.search(r"\b(x|v_rf)_ptr", before)
    assert not re.search(r"\b(a|row_index|(token|tile)_\w+)_ptr", behind)
    # What is read in front of the wait is read past the L1 cache.
    reads = re.findall(r"(.{0,40})\b(?:a|row_index|(?:token|tile)_\w+?)_ptr(?:\[| \+)", before)
    assert len(reads) > 2
    assert all("dop_past_l1(" in text for text in reads)
    assert expand.startswith(f"\n  {RELEASE}")
    assert expand.count(WAIT) == 2


def bind(workload: Workload, name: str, values: dict[str, int]) -> Trace:
    """A trace of the sketch of that name, as it comes back from a log."""
    sketch = next(s for s in build_space(workload, SM_90).sketches if s.name == name)
    trace = Trace.from_json(sketch.bind(values).to_json())
    assert sketch.match(trace) == values
    return trace


def test_small_tiles_copy_a_before_they_wait() -> None:
    name = next(s.name for s in build_space(O_PROJ, SM_90).sketches if "small_tiles" in s.name)
    values = next(s for s in build_space(O_PROJ, SM_90).sketches if s.name == name).default()
    code = generate(O_PROJ, bind(O_PROJ, name, {**values, "expand.dependent": 3}), SM_90)
    shrink, expand = bodies(code.source)
    assert [(k.dependent, k.early) for k in code.kernels] == [(False, True), (True, False)]
    first = shrink.index(WAIT)
    assert "a_from[c] + step" in shrink[:first]
    assert "dop_copy(x_shared" in shrink[first:]
    assert shrink.index(RELEASE) > first
    assert "dop_dependents_may_start" not in shrink
    assert shrink.rstrip().partition("#undef DOP_COPY")[2].count(WAIT) == 1  # without a tile too
    assert "dop_table(" not in shrink.replace("dop_early_table(", "")
    assert "ld.global.cg.b32" in code.source
    assert expand.startswith(f"\n  {RELEASE}")


@pytest.mark.parametrize("form", ["wide_tiles", "one_kernel"])
def test_where_a_comes_with_x_there_is_no_early_kernel(form: str) -> None:
    sketch = next(s for s in build_space(O_PROJ, SM_90).sketches if form in s.name)
    assert 3 not in next(d.choices for d in sketch.domains if d.name == "expand.dependent")
    small = {"expand.steps": 1} if form == "one_kernel" else {}
    trace = sketch.bind({**sketch.default(), **small})
    steps = [
        PragmaStep(s.stage, s.iter, s.name, 3)
        if isinstance(s, PragmaStep) and s.name == "dependent_launch"
        else s
        for s in trace.steps
    ]
    with pytest.raises((TraceError, BuildError), match=r"step by step|behind x"):
        generate(O_PROJ, Trace(tuple(steps)), SM_90)


@pytest.mark.parametrize("value", [0, 1, 2])
def test_tiles_in_registers_wait_as_the_trace_says(value: int) -> None:
    sketch = next(s for s in build_space(O_PROJ, SM_90).sketches if s.name.startswith("wide_tiles"))
    code = generate(O_PROJ, sketch.bind({**sketch.default(), "expand.dependent": value}), SM_90)
    shrink, expand = bodies(code.source)
    assert [k.dependent for k in code.kernels] == [value > 1, value > 0]
    assert shrink.count(WAIT) == (value > 1)
    assert expand.startswith(f"\n  {RELEASE}") == (value > 1)
    if value > 1:
        assert shrink.startswith(f"\n  {WAIT}")
        assert shrink.index("dop_dependents_may_start();") > shrink.index(WAIT)
        assert "dop_table(" not in shrink.replace("dop_fresh_table(", "")


def test_one_kernel_can_wait_for_whatever_is_before_it() -> None:
    sketch = next(s for s in build_space(O_PROJ, SM_90).sketches if "one_kernel" in s.name)
    choices = next(d.choices for d in sketch.domains if d.name == "expand.dependent")
    assert choices == (0, 2)
    code = generate(
        O_PROJ, sketch.bind({**sketch.default(), "expand.steps": 1, "expand.dependent": 2}), SM_90
    )
    assert [k.dependent for k in code.kernels] == [True]
    assert bodies(code.source)[0].startswith(f"\n  {WAIT}\n  {RELEASE}")


@pytest.mark.parametrize("sketch", SKETCHES, ids=lambda s: s.name)
def test_without_the_pragma_launches_are_plain(sketch: Sketch) -> None:
    code = generate(O_PROJ, sketch.bind({**sketch.default(), "expand.dependent": 0}), SM_90)
    assert not any(k.dependent for k in code.kernels)
    assert "griddepcontrol" not in code.source
    assert WAIT not in code.source


def test_older_gpus_have_the_sketches_without_the_choice() -> None:
    sm_80 = dataclasses.replace(SM_90, arch="sm_80")
    found = [s for s in build_space(O_PROJ, sm_80).sketches if "/early_b/" in s.name]
    assert [s.name for s in found] == [s.name for s in SKETCHES]
    assert all(d.name != "expand.dependent" for s in found for d in s.domains)


def test_tables_are_read_once_side_by_side() -> None:
    sketch = SKETCHES[0]
    for body in bodies(generate(O_PROJ, sketch.bind(sketch.default()), SM_90).source):
        for table in ("slot", "rank", "scale"):
            assert len(re.findall(rf"token_{table}_ptr\[", body)) <= 1
        assert body.index("token_rank_ptr[") < body.index("return;")


def test_a_pragma_of_another_value_is_refused() -> None:
    sketch = SKETCHES[0]
    trace = sketch.bind(sketch.default())
    steps = [
        PragmaStep(s.stage, s.iter, s.name, 7)
        if isinstance(s, PragmaStep) and s.name == "dependent_launch"
        else s
        for s in trace.steps
    ]
    with pytest.raises(TraceError, match="0, 1, 2 or 3"):
        apply_trace(O_PROJ, Trace(tuple(steps)))


def test_a_kernel_that_reads_no_workspace_cannot_wait() -> None:
    kernel = 'extern "C" __global__ void {}(float* a_ptr) {{\n  a_ptr[0] = 1.0f;\n}}\n'
    source = kernel.format("first") + kernel.format("second")
    with pytest.raises(BuildError, match="nothing to wait for"):
        order_start(source, ("first", "second"), ("v",), 1)


@pytest.mark.parametrize("sketch", SKETCHES, ids=lambda s: s.name)
def test_y_is_read_past_the_l1_cache_in_front_of_the_wait(sketch: Sketch) -> None:
    trace = sketch.bind({**sketch.default(), "expand.dependent": 1})
    _, expand = bodies(generate(O_PROJ, trace, SM_90).source)
    reads = re.findall(r"(.{0,40})y_in_ptr(?:\[| \+)", expand)
    assert reads
    assert all("dop_past_l1(" in before for before in reads)
