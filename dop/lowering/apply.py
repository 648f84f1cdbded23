"""A trace, step by step, as scheduling of the TensorIR program.

Every step kind is one function on `Application`. What TensorIR needs beyond the fourteen kinds is
implied by a step or rides on a pragma (PR):

- The first CHR of a stage gives its result a scope (set_scope); a further one is a cache_read.
- AN tensorize with a multiplication makes the loop's subtree a block of its own at once and
  replaces it at the end, when its operands are fragments; with a load or store of fragments the
  copy's buffer in scope "warp" gets the layout of fragments, at the end too. Any AN tensorize puts
  the program into its form for matrices (lowering/program.py), where the second CHR of shrink
  finds its stage rendered. A CHR of accumulate, the old values of y, always does.
- PR decompose_reduction: the loop in front of which the accumulator is cleared.
- PR pipeline_depth: software pipeline over the loop with that many stages; copies into shared
  memory become asynchronous (cp.async).
- PR auto_unroll_max_step, unroll_explicit: handed to the code generator as pragmas.
- PR pack_k of shrink: from the start, the k axis of gather_x, gather_a and shrink is (group, lane,
  element), so that one lane's part of it is a box (regions of CA are boxes).
- PR dependent_launch of accumulate: 1 makes the kernels behind the first one dependent launches,
  2 the first one too, 3 so that it reads A before it waits (lowering/cuda_launch.py).
- PR scaled_b of gather_b, near_rows of gather_x: forms of the program (lowering/program.py).
- PR turn of a copy: its square of that many elements becomes shuffles (intrinsics/turn.py).
- PR transpose: the last two axes of the stage's result change places (CPU: a vector of columns).

A trace begins with its prologue: an SP of gather_x's token axis, followed by FSP in shrink, expand
and accumulate, chooses the tile form of the program; without it the program has the row form.
Stages must be placed: each intermediate stage needs exactly one of CI, CA or CR.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tvm import s_tir
from tvm.script import from_source
from tvm.script import tirx as T

from dop.errors import BuildError, TraceError
from dop.lowering.program import Program
from dop.space.stages import TOKEN_AXIS, Stages, new_stage
from dop.space.step import (
    ANNOTATIONS,
    AnnotationStep,
    CacheReadStep,
    CacheWriteStep,
    ComputeAtStep,
    ComputeInlineStep,
    ComputeRootStep,
    FollowFusedSplitStep,
    FollowSplitStep,
    FuseStep,
    Num,
    PragmaStep,
    ReorderStep,
    RfactorStep,
    SplitStep,
    Step,
    StorageAlignStep,
)
from dop.space.trace import Trace
from dop.workload import Workload

PLACED_STAGES = ("gather_x", "gather_a", "shrink", "gather_b", "expand")
PRAGMAS = ("auto_unroll_max_step", "unroll_explicit")
HINTS = (
    *("block_order", "load_ahead", "streaming", "cluster"),
    *("workers", "cluster_blocks", "rank_blocks", "tile_blocks", "l2_fetch", "engine"),
    *("sums_apart", "l2_hints"),
)
"""Pragmas that a tile's intrinsic reads, see lowering/tile_kernels.py."""

TURNED_LANES = (4, 8, 16)

FORMS = ("scaled_b", "near_rows")
"""Pragmas that the program is rendered by, see lowering/program.py."""

TILE_INTRINSICS = tuple(
    f"{tile}_{kind}"
    for tile in ("register_update", "pipelined_product", "warpgroup_product", "cluster_update")
    for kind in ("f16", "bf16")
)
"""Intrinsics that stand for a kernel's whole tile. TVM checks the schedule down to their loop;
what is inside is CUDA of our own (lowering/tile_kernels.py)."""


MAX_TILE_ROWS = 256


def prologue(trace: Trace) -> tuple[int, int]:
    """Rows per tile that the trace's first steps ask for (0: row form), and how many those are.

    Raises:
        TraceError: a split of the token axis that the other stages do not follow.
    """
    first = trace.steps[0] if trace.steps else None
    if not (isinstance(first, SplitStep) and first.stage == 0 and first.iter == 0):
        return 0, 0
    if len(first.lengths) != 1 or not isinstance(first.lengths[0], int):
        raise TraceError("the token axis is split once, by the rows of a tile.")
    rows = first.lengths[0]
    if not 1 <= rows <= MAX_TILE_ROWS:
        raise TraceError(f"tiles of {rows} rows.", f"Use 1 to {MAX_TILE_ROWS}.")
    names = Stages().names
    wanted = {(names.index(s), axis) for s, axis in TOKEN_AXIS.items() if s != "gather_x"}
    followers = trace.steps[1 : 1 + len(wanted)]
    given = {(s.stage, s.iter) for s in followers if isinstance(s, FollowSplitStep)}
    if given != wanted or any(getattr(s, "src_step", 0) != 0 for s in followers):
        raise TraceError("shrink, expand and accumulate must follow the token split (FSP).")
    return rows, 1 + len(wanted)


@dataclass
class Application:
    """A schedule under construction: the program, TVM's schedule and the stage list."""

    program: Program
    trace: Trace
    schedule: Any
    stages: Stages = field(default_factory=Stages)
    placed: dict[str, str] = field(default_factory=dict)
    async_copy: bool = False
    dependent_launch: int = 0
    tiles: dict[str, tuple[int, ...]] = field(default_factory=dict)
    hints: dict[tuple[str, str], int] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    copies: list[Callable[[], None]] = field(default_factory=list)
    products: list[Callable[[], None]] = field(default_factory=list)
    fragments: set[str] = field(default_factory=set)

    @staticmethod
    def start(workload: Workload, trace: Trace) -> tuple[Application, int]:
        """The unscheduled program in the form that the prologue asks for, and the number of
        prologue steps (they are done)."""
        rows, done = prologue(trace)
        program = Program(
            *(workload, rows, _packing(trace), _wants_matrices(trace)),
            *(_runs_on_a_gpu(trace), _stages_y(trace)),
            *(_asks(trace, "scaled_b"), _asks(trace, "near_rows")),
        )
        if program.near_rows and (program.matrix or program.clamp):
            raise TraceError("near_rows is for loops of scalar rows on a CPU.")
        func = from_source(program.source(), extra_vars={"T": T})
        # The slice of a group of columns is no affine number where widths differ; TVM's checks
        # would refuse to vectorize the sum over split-K parts for that alone.
        uneven = program.matrix and len(set(workload.out_features)) > 1
        schedule = s_tir.Schedule(func, debug_mask=0, enable_check=not uneven)
        return Application(program, trace, schedule), done

    def run(self, begin: int, end: int | None = None) -> None:
        """Applies steps [begin, end).

        Raises:
            TraceError: a step does not fit; the message names its position.
        """
        for position, step in enumerate(self.trace.steps[begin:end], start=begin):
            try:
                self.apply(step)
            except TraceError as error:
                raise TraceError(f"step {position} ({step.code}): {error}") from error
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                raise TraceError(f"step {position} ({step.code}): {_reason(error)}") from error
            except Exception as error:
                raise BuildError(f"step {position} ({step.code}): {_reason(error)}") from error

    def apply(self, step: Step) -> None:
        """Applies one step."""
        _APPLY[type(step)](self, step)
        self.stages = self.stages.after(step)

    def finish(self) -> None:
        """Replaces copies of fragments and multiplications by intrinsics. TVM moves no stage past
        a tensorized one, and a product fits only once its operands are fragments."""
        for replace_copy in self.copies:
            replace_copy()
        for replace_product in self.products:
            replace_product()

    def check_placed(self) -> None:
        """Checks that every intermediate stage was placed.

        Raises:
            TraceError: a stage has no CI, CA or CR.
        """
        for name in PLACED_STAGES:
            if name not in self.placed:
                raise TraceError(f"stage {name} is not placed.", "It needs CI, CA or CR.")

    def block(self, stage: int) -> Any:
        """TVM's block of a stage number; of a tensorized stage, the outer block."""
        name = self.stages.name(stage)
        return self.schedule.get_sblock(self.blocks.get(name, name))

    def loops(self, stage: int) -> list[Any]:
        """Loops of a stage, outermost first."""
        return list(self.schedule.get_loops(self.block(stage)))

    def loop(self, stage: int, position: Num) -> Any:
        """One loop of a stage.

        Raises:
            TraceError: the stage has fewer loops, or the position is still open.
        """
        if not isinstance(position, int):
            raise TraceError(f"loop position {position} is still open.")
        loops = self.loops(stage)
        if position >= len(loops):
            name = self.stages.name(stage)
            raise TraceError(f"{name} has {len(loops)} loops, no loop {position}.")
        return loops[position]


def _split(app: Application, step: SplitStep) -> None:
    lengths = [int(n) for n in step.lengths if isinstance(n, int)]
    _do_split(app, step.stage, step.iter, lengths, step.inner_to_outer)


def _do_split(app: Application, stage: int, loop: Num, lengths: list[int], inner: bool) -> None:
    factors = [None, *lengths] if inner else [*lengths, None]
    app.schedule.split(app.loop(stage, loop), factors, preserve_unit_iters=True)


def _source_split(app: Application, position: int) -> SplitStep:
    steps = app.trace.steps
    source = steps[position] if position < len(steps) else None
    if not isinstance(source, SplitStep):
        raise TraceError(f"step {position} is no SP to follow.")
    return source


def _follow_split(app: Application, step: FollowSplitStep) -> None:
    source = _source_split(app, step.src_step)
    lengths = [int(n) for n in source.lengths if isinstance(n, int)]
    if step.n_split < len(lengths):
        keep = step.n_split - 1
        lengths = [*lengths[:keep], math.prod(lengths[keep:])]
    _do_split(app, step.stage, step.iter, lengths, source.inner_to_outer)


def _follow_fused_split(app: Application, step: FollowFusedSplitStep) -> None:
    factor = 1
    for position in step.src_steps:
        lengths = _source_split(app, position).lengths
        if step.level >= len(lengths):
            raise TraceError(f"step {position} has no length {step.level}.")
        length = lengths[step.level]
        factor *= length if isinstance(length, int) else 1
    _do_split(app, step.stage, step.iter, [factor], step.factor_or_nparts)


def _fuse(app: Application, step: FuseStep) -> None:
    loops = [app.loop(step.stage, i) for i in step.iters]
    app.schedule.fuse(*loops, preserve_unit_iters=True)


def _reorder(app: Application, step: ReorderStep) -> None:
    loops = app.loops(step.stage)
    if len(step.order) != len(loops):
        raise TraceError(f"{len(step.order)} loops reordered, the stage has {len(loops)}.")
    moved = [p for p, old in enumerate(step.order) if p != old]
    if moved:
        app.schedule.reorder(*(loops[step.order[p]] for p in range(moved[0], moved[-1] + 1)))


def _annotate(app: Application, step: AnnotationStep) -> None:
    kind = ANNOTATIONS[step.annotation]
    loop, schedule = app.loop(step.stage, step.iter), app.schedule
    if kind == "unroll":
        schedule.unroll(loop)
    elif kind == "vectorize":
        schedule.vectorize(loop)
    elif kind == "parallel":
        schedule.parallel(loop)
    elif kind == "tensorize":
        _tensorize(app, step, loop)
    elif kind != "none":
        schedule.bind(loop, kind)


def _tensorize(app: Application, step: AnnotationStep, loop: Any) -> None:
    from dop.lowering.intrinsics import layout, register

    schedule, name = app.schedule, app.stages.name(step.stage)
    if step.intrinsic in TILE_INTRINSICS:
        _tile(app, step)
        return
    intrinsic, copy = register(step.intrinsic), layout(step.intrinsic)
    if copy is None:
        schedule.blockize(loop)
        app.blocks[name] = f"{name}_o"
        app.products.append(lambda: _replace_product(app, name, intrinsic))
        return
    buffer, index_map = copy
    plain = app.blocks.get(name, name)

    def replace_copy() -> None:
        schedule.transform_layout(schedule.get_sblock(plain), (buffer, 0), index_map)
        schedule.tensorize(loop, intrinsic)
        app.blocks[name] = f"{plain}_o"

    app.fragments.add(name)
    app.copies.append(replace_copy)


def _tile(app: Application, step: AnnotationStep) -> None:
    """A kernel's whole tile becomes an intrinsic: it reads its numbers off the loops around it."""
    extents = [app.schedule.get(loop).extent for loop in app.loops(step.stage)]
    numbers = tuple(int(getattr(extent, "value", 0)) for extent in extents)
    app.tiles[step.intrinsic.rpartition("_")[0]] = numbers


def _replace_product(app: Application, name: str, intrinsic: str) -> None:
    """The multiplication, and the clearing of its accumulator where that was decomposed."""
    from dop.lowering.intrinsics import register

    schedule = app.schedule
    schedule.tensorize(schedule.get_loops(schedule.get_sblock(name))[-3], intrinsic)
    if app.blocks[name].endswith("_update"):
        clear = schedule.get_sblock(f"{name}_init")
        schedule.tensorize(schedule.get_loops(clear)[-2], register("clear"))


def _pragma(app: Application, step: PragmaStep) -> None:
    schedule, name = app.schedule, step.name
    if isinstance(step.value, int):
        app.hints[app.stages.name(step.stage), name] = step.value
    if name == "decompose_reduction":
        schedule.decompose_reduction(app.block(step.stage), app.loop(step.stage, step.iter))
        stage = app.stages.name(step.stage)
        app.blocks[stage] = f"{app.blocks.get(stage, stage)}_update"
    elif name == "pipeline_depth":
        _pipeline(app, step)
    elif name == "pack_k":
        # The program was rendered so; a second, different one would be ignored silently.
        if step.value != app.program.pack:
            raise TraceError("the k axis is packed once.")
    elif name == "dependent_launch":
        if step.value not in (0, 1, 2, 3):
            raise TraceError("dependent_launch is 0, 1, 2 or 3.")
        app.dependent_launch = int(step.value)
    elif name == "transpose":
        schedule.transform_layout(app.block(step.stage), ("write", 0), _swap_last)
    elif name == "turn":
        _turn(app, step)
    elif name in FORMS:
        pass  # the program was rendered so
    elif name in HINTS:
        if not isinstance(step.value, int):
            raise TraceError(f"{name} wants a number.")
    elif name in PRAGMAS:
        value = int(step.value) if isinstance(step.value, int) else str(step.value)
        schedule.annotate(app.loop(step.stage, step.iter), f"pragma_{name}", value)
    else:
        raise TraceError(f"pragma {name!r} is unknown.")


def _turn(app: Application, step: PragmaStep) -> None:
    from dop.lowering.intrinsics.turn import register_turn

    if not isinstance(step.value, int) or step.value not in TURNED_LANES:
        raise TraceError(f"turn wants one of {TURNED_LANES}.")
    intrinsic, loop = register_turn(step.value), app.loop(step.stage, step.iter)
    app.copies.append(lambda: app.schedule.tensorize(loop, intrinsic))


def _swap_last(*index: Any) -> list[Any]:
    *head, row, column = index
    return [*head, column, row]


def _pipeline(app: Application, step: PragmaStep) -> None:
    """Two copies in front of one consumer: the copies run depth - 1 iterations ahead."""
    if not isinstance(step.value, int):
        raise TraceError("pipeline_depth wants a number.")
    if step.value < 2:
        return
    loop = app.loop(step.stage, step.iter)
    app.schedule.annotate(loop, "software_pipeline_stage", [0, 0, step.value - 1])
    app.schedule.annotate(loop, "software_pipeline_order", [0, 1, 2])
    app.schedule.annotate(loop, "software_pipeline_async_stages", [0])
    app.async_copy = True


def _wants_matrices(trace: Trace) -> bool:
    """Whether a step uses a matrix intrinsic."""
    tensorize = ANNOTATIONS.index("tensorize")
    return any(isinstance(s, AnnotationStep) and s.annotation == tensorize for s in trace.steps)


def _runs_on_a_gpu(trace: Trace) -> bool:
    """Whether a step binds a loop to blocks."""
    kinds = (ANNOTATIONS[s.annotation] for s in trace.steps if isinstance(s, AnnotationStep))
    return any(kind.startswith("blockIdx") for kind in kinds)


def _stages_y(trace: Trace) -> bool:
    """Whether a CHR of accumulate asks for the old values of y in a stage of their own."""
    stages = Stages()
    for step in trace.steps:
        if isinstance(step, CacheReadStep) and stages.name(step.stage) == "accumulate":
            return True
        stages = stages.after(step)
    return False


def _asks(trace: Trace, name: str) -> bool:
    """Whether a pragma that the program is rendered by stands in the trace."""
    return any(isinstance(s, PragmaStep) and s.name == name for s in trace.steps)


def _packing(trace: Trace) -> tuple[int, int] | None:
    """Lanes and vector that the trace's pack_k asks for."""
    for step in trace.steps:
        if isinstance(step, PragmaStep) and step.name == "pack_k":
            value = step.value
            if not (isinstance(value, tuple) and len(value) == 2 and all(value)):
                raise TraceError("pack_k wants lanes,vector.")
            lanes, vector = (n for n in value if isinstance(n, int))
            return lanes, vector
    return None


def _storage_align(app: Application, step: StorageAlignStep) -> None:
    def align() -> None:
        app.schedule.storage_align(
            block(), 0, axis=step.iter, factor=step.factor, offset=step.offset
        )

    name = app.stages.name(step.stage)

    def block() -> Any:
        return app.schedule.get_sblock(app.blocks.get(name, name))

    if name in app.fragments:  # the intrinsic will replace the block
        app.copies.append(align)
    else:
        align()


def _place(app: Application, stage: int, how: str) -> None:
    name = app.stages.name(stage)
    if app.placed.get(name) == "CI":
        raise TraceError(f"stage {name} is inlined already.")
    app.placed[name] = how


def _compute_at(app: Application, step: ComputeAtStep) -> None:
    schedule = app.schedule
    block, loop = app.block(step.stage), app.loop(step.target_stage, step.target_iter)
    _place(app, step.stage, "CA")
    if step.stage > step.target_stage:
        schedule.reverse_compute_at(block, loop, preserve_unit_loops=True)
    else:
        # The old values of y depend on nothing: their loads go first (-2), the rest last (-1).
        index = -2 if app.stages.name(step.stage) == "accumulate_in" else -1
        schedule.compute_at(block, loop, preserve_unit_loops=True, index=index)


def _compute_inline(app: Application, step: ComputeInlineStep) -> None:
    app.schedule.compute_inline(app.block(step.stage))
    _place(app, step.stage, "CI")


def _compute_root(app: Application, step: ComputeRootStep) -> None:
    app.schedule.set_scope(app.block(step.stage), 0, "global")
    _place(app, step.stage, "CR")


def _cache_read(app: Application, step: CacheReadStep) -> None:
    schedule, name = app.schedule, app.stages.name(step.stage)
    if name not in app.stages.scoped and name != "accumulate":
        schedule.set_scope(app.block(step.stage), 0, step.scope)
        return
    new = new_stage(app.stages, step)
    rendered = {"shrink_in": app.program.matrix, "accumulate_in": app.program.reads_y_early}
    if new is not None and rendered.get(new[1], False):
        schedule.set_scope(schedule.get_sblock(new[1]), 0, step.scope)
        return
    if len(step.reader_stages) != 1:
        raise TraceError("a second CHR of a stage wants one reader.")
    reader = app.block(step.reader_stages[0])
    written = schedule.get(app.block(step.stage)).writes[0].source.name
    copy = schedule.cache_read(reader, written, step.scope)
    _rename(app, copy, step)


def _cache_write(app: Application, step: CacheWriteStep) -> None:
    copy = app.schedule.cache_write(app.block(step.stage), 0, step.scope)
    _rename(app, copy, step)


def _rfactor(app: Application, step: RfactorStep) -> None:
    part = app.schedule.rfactor(app.loop(step.stage, step.iter), step.factor_iter)
    _rename(app, part, step)


def _rename(app: Application, block: Any, step: Step) -> None:
    """Remembers how TVM named the block of a new stage."""
    new = new_stage(app.stages, step)
    if new is None:
        raise TraceError("the step adds no stage.")
    app.blocks[new[1]] = app.schedule.get(block).name_hint


_APPLY: dict[type[Step], Any] = {
    SplitStep: _split,
    FollowSplitStep: _follow_split,
    FollowFusedSplitStep: _follow_fused_split,
    FuseStep: _fuse,
    ReorderStep: _reorder,
    AnnotationStep: _annotate,
    PragmaStep: _pragma,
    StorageAlignStep: _storage_align,
    ComputeAtStep: _compute_at,
    ComputeInlineStep: _compute_inline,
    ComputeRootStep: _compute_root,
    CacheReadStep: _cache_read,
    CacheWriteStep: _cache_write,
    RfactorStep: _rfactor,
}


def _reason(error: BaseException) -> str:
    """The line of a TVM message that says what is wrong (they print whole modules)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for mark in ("Error message", "Check failed", "Error:", "error:"):
        for line in lines:
            if mark in line:
                return line[:300]
    return (lines[0] if lines else type(error).__name__)[:300]


def apply_trace(workload: Workload, trace: Trace, upto: int | None = None) -> Application:
    """The schedule after the first `upto` steps of a trace (all of them by default).

    Raises:
        TraceError: a step is malformed or does not fit the program.
        BuildError: TVM refused a step.
    """
    app, done = Application.start(workload, trace)
    app.run(done, upto)
    if upto is None:
        app.check_placed()
        app.finish()
    return app
