"""Lowering: every sketch lowers, a trace's JSON gives the same code, and bad traces are refused."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from dop.errors import BuildError, DopError, TraceError
from dop.lowering.apply import apply_trace
from dop.lowering.codegen import SCALARS, evaluate, generate
from dop.lowering.cuda_source import finish
from dop.lowering.nest import loop_nest
from dop.lowering.program import Program
from dop.measure.tensor_map import tensor_of, wanted
from dop.space.generate import build_space
from dop.space.sketch import Candidate
from dop.space.step import (
    ComputeRootStep,
    FollowSplitStep,
    PragmaStep,
    ReorderStep,
    SplitStep,
)
from dop.space.trace import Trace
from dop.target import SM_90, Target
from dop.workload import Workload

QKV = Workload("qkv_proj", 512, (512, 128, 128), 16, "bfloat16")
CPU = Target("cpu", "x86-64-v3", "test CPU", 2, 1, 0, 16, 32 << 20, 32)


def _candidates() -> list[tuple[Target, Workload, Candidate]]:
    plain = Workload("qkv_proj", 256, (256, 64), 16, "float32")
    found = []
    for target, workload in ((SM_90, QKV), (CPU, plain)):
        found += [(target, workload, c) for c in build_space(workload, target).defaults()]
    return found


CANDIDATES = _candidates()


@pytest.mark.parametrize(
    ("target", "workload", "candidate"),
    CANDIDATES,
    ids=[f"{t.kind}-{c.sketch.name}" for t, _, c in CANDIDATES],
)
def test_json_round_trip_gives_the_same_binary(
    target: Target, workload: Workload, candidate: Candidate
) -> None:
    again = Trace.from_json(candidate.trace.to_json())
    assert again == candidate.trace
    first, second = (generate(workload, t, target) for t in (candidate.trace, again))
    assert first.object_code == second.object_code
    # LLVM's text lists alias metadata in the order of addresses; on CUDA the text is the program.
    assert target.kind == "cpu" or first.source == second.source
    assert first.kernels == second.kernels
    assert first.source


@pytest.mark.parametrize(
    "candidate", [c for t, _, c in CANDIDATES if t.kind == "cuda"], ids=lambda c: c.sketch.name
)
def test_cuda_launches_are_complete(candidate: Candidate) -> None:
    code = generate(QKV, candidate.trace, SM_90)
    known = {*code.arguments, *(w.name for w in code.workspaces), *SCALARS}
    for kernel in code.kernels:
        maps = {name for name in kernel.arguments if wanted([name])}
        assert {tensor_of(name)[0] for name in maps} <= known  # b1's is of the stack that b locates
        assert set(kernel.arguments) - maps <= known
        for tokens in (1, 7, 4096):
            assert all(evaluate(e, tokens=tokens, tiles=tokens) > 0 for e in kernel.grid)
    # The table that a kernel leaves at once by, for tiles without rows, is read first.
    table = "tile_rows" if code.tile_rows else "token_slot"
    read = (f"{table}_ptr[blockIdx.x]", f"_table({table}_ptr + ")  # TVM's text, intrinsics'
    assert sum(code.source.count(text) for text in read) >= len(code.kernels)
    # y and y_in are the same array.
    assert "__restrict__ y_ptr" not in code.source
    assert "__restrict__ y_in_ptr" not in code.source


def test_every_step_kind_is_used_by_some_sketch() -> None:
    used = {step.code for _, _, c in CANDIDATES for step in c.sketch.steps}
    every = [
        "AN",
        "FU",
        "PR",
        "RE",
        "SP",
        "FSP",
        "FFSP",
        "SA",
        "CA",
        "CI",
        "CR",
        "CHR",
        "CHW",
        "RF",
    ]
    assert used == set(every)


def _with(steps: tuple[object, ...]) -> Trace:
    return Trace(steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trace", "cause"),
    [
        (Trace(()), "not placed"),
        (_with((SplitStep(0, 0, None, (4,)),)), "must follow"),
        (_with((SplitStep(0, 0, None, (100000,)),)), "rows"),
        (_with((ReorderStep(2, (0, 1)),)), "loops reordered"),
        (_with((SplitStep(2, 17, None, (4,)),)), "no loop 17"),
        (_with((FollowSplitStep(2, 0, 9, 1),)), "no SP"),
        (_with((PragmaStep(2, 0, "rm_rf", 1),)), "unknown"),
        (_with((ComputeRootStep(40),)), "does not exist"),
    ],
)
def test_bad_traces_are_refused(trace: Trace, cause: str) -> None:
    with pytest.raises(DopError, match=cause) as caught:
        generate(QKV, trace, SM_90)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["shrink", "expand"])
def test_a_stage_without_its_placement_is_refused(stage: str) -> None:
    """CR and CA are not decoration: without its placement a stage is refused."""
    trace = CANDIDATES[0][2].trace
    app = apply_trace(QKV, trace)
    assert stage in app.placed
    app.placed.pop(stage)
    with pytest.raises(TraceError, match=f"{stage} is not placed"):
        app.check_placed()


@pytest.mark.parametrize("text", ["__import__('os')", "tokens.real", "tokens ** 9", "slots", "f()"])
def test_launch_expressions_are_only_arithmetic(text: str) -> None:
    with pytest.raises((BuildError, NameError)):
        evaluate(text, tokens=1, tiles=1)


def test_launch_expression_values() -> None:
    assert evaluate("(tokens + 3) // 4 * 2 - 1", tokens=9, tiles=1) == 5
    assert evaluate("tiles", tokens=9, tiles=4) == 4


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("pack", [None, (32, 8)])
def test_program_text(rows: int, pack: tuple[int, int] | None) -> None:
    program = Program(Workload("odd", 1000, (520, 77), 13, "bfloat16"), rows, pack)
    text = program.source()
    assert ("tile_rows" in text) is bool(rows)
    # 1000 is no multiple of 32 * 8: the packed axis is guarded, the plain one needs no guard.
    assert ("< 1000" in text) is (pack is not None)
    assert program.arguments[-2:] == ("a1_shift", "b1_shift")


def test_loop_nest_shows_stages_and_loops() -> None:
    target, workload, candidate = CANDIDATES[0]
    before = loop_nest(workload, candidate.trace, target, 0)
    after = loop_nest(workload, candidate.trace, target)
    assert "shrink" in before
    assert "thread_binding" not in before
    assert "blockIdx.x" in after


@pytest.mark.parametrize(
    "line",
    [
        "int v_ = (blockIdx.y < 16) ? 0 : b1_shift;",
        "int2 v__13 = make_int2(a1_shift * 8, a1_shift * 8);",
        "int4 v__2 = make_int4(token_slot_ptr[0], token_slot_ptr[0], 0, 0);",
    ],
)
def test_a_weights_offset_in_32_bits_is_refused(line: str) -> None:
    program = Program(QKV, 0)
    assert "v__3" in finish("  int2 v__3 = make_int2(v__1 - 1, v__1 - 1);\n", program, ())
    with pytest.raises(BuildError, match="neither a vector nor a scalar"):
        finish(f"  {line}\n", program, ())


@pytest.mark.parametrize(("rank", "bounded"), [(8, True), (16, False)])
def test_a_padded_rank_never_reads_behind_the_stack(rank, bounded):
    """Without a table of ranks every rank looks full: the padding must not reach the next slot."""
    workload = Workload("w", 4096, (4096,), rank, "bfloat16")
    text = Program(workload, 16, matrix=True, clamp=True).source()
    reads = text.count("tile_rank[vt]")
    assert reads >= 3
    assert text.count(f"T.min(tile_rank[vt], {rank})") == (reads if bounded else 0)
