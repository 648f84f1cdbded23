"""Steps in plain words: what each does to which loop of which stage. No TVM needed.

The loops are tracked as lowering/apply.py's scheduler would hold them, by name only: a stage starts
with its axes, a split of k gives k.0 and k.1, a fusion of t and s gives t*s. Where a name cannot be
known (a step that would not apply) the loop is called by its number instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

from dop.errors import TraceError
from dop.space.stages import INITIAL, Stages, new_stage
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

AXES = {
    "gather_x": "tik",
    "gather_a": "strk",
    "shrink": "stirk",
    "gather_b": "tnr",
    "expand": "tinr",
    "accumulate": "tin",
}
"""Loops of the stages before any step, outermost first, as in lowering/program.py."""

SUMMED = {"shrink": "k", "expand": "r"}
"""The axis that a stage sums over."""

_ANNOTATION_WORDS = {
    "none": "it is a plain loop again",
    "unroll": "its iterations are written out one after the other",
    "vectorize": "its iterations become one wide load, store or operation",
    "parallel": "its iterations run on the CPU's threads",
    "vthread": "its iterations become virtual threads, interleaved in one thread",
    "tensorize": "it and everything inside become one hardware instruction",
}

_SCOPE_WORDS = {
    "local": "registers",
    "shared": "shared memory",
    "shared.dyn": "dynamic shared memory",
    "warp": "registers shared by a warp",
    "global": "a workspace in global memory",
}


@dataclass
class _Stage:
    """Loop names of one stage; `axes` are what its loops are made of anew when it is moved."""

    loops: list[str] = field(default_factory=list)
    axes: list[str] = field(default_factory=list)
    summed: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class StepWords:
    """One step in words.

    Attributes:
        position: index in the trace.
        code: its code, e.g. "SP".
        stage: name of the stage that it changes.
        words: one sentence.
        loops: the stage's loops after it, outermost first; empty if they are not known.
    """

    position: int
    code: str
    stage: str
    words: str
    loops: tuple[str, ...]


@dataclass
class LoopTracker:
    """Follows a trace and says what each step does. It never fails: what does not fit is said."""

    steps: tuple[Step, ...]
    stages: Stages = field(default_factory=Stages)
    known: dict[str, _Stage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        packed = any(isinstance(s, PragmaStep) and s.name == "pack_k" for s in self.steps)
        for name in INITIAL:
            axes = [part for axis in AXES[name] for part in _axis_parts(axis, packed)]
            summed = set(_axis_parts(SUMMED[name], packed)) if name in SUMMED else set()
            self.known[name] = _Stage(list(axes), axes, summed)

    def walk(self) -> list[StepWords]:
        """All steps in words, in order."""
        return [self._take(position, step) for position, step in enumerate(self.steps)]

    def _take(self, position: int, step: Step) -> StepWords:
        stage = self.name(step.stage)
        words = _WORDS[type(step)](self, position, step)
        try:
            self.stages = self.stages.after(step)
        except TraceError as error:
            words += f" (This cannot apply: {error.cause})"
        changed = self.known.get(stage)
        return StepWords(position, step.code, stage, words, tuple(changed.loops if changed else ()))

    def name(self, stage: int) -> str:
        """Name of a stage, or its number if there is no such stage."""
        names = self.stages.names
        return names[stage] if 0 <= stage < len(names) else f"stage {stage}"

    def stage(self, stage: int) -> _Stage | None:
        """What is known of a stage."""
        return self.known.get(self.name(stage))

    def loop(self, stage: int, position: Num) -> str:
        """A loop in words: by name if it is known, else by number."""
        found = self.stage(stage)
        if found and isinstance(position, int) and position < len(found.loops):
            return f"loop {found.loops[position]}"
        return f"loop {position} (by number, outermost is 0)"

    def replace(self, stage: int, begin: int, count: int, new: list[str]) -> bool:
        """Puts `new` in place of `count` loops; false if there are not that many."""
        found = self.stage(stage)
        if found is None or begin + count > len(found.loops):
            return False
        if set(found.loops[begin : begin + count]) & found.summed:
            found.summed |= set(new)
        found.loops[begin : begin + count] = new
        return True

    def is_prologue(self, position: int) -> bool:
        """Whether the step belongs to the token split that the program already has."""
        first = self.steps[0] if self.steps else None
        if not (isinstance(first, SplitStep) and first.stage == 0 and first.iter == 0):
            return False
        return position == 0 or all(
            isinstance(s, FollowSplitStep) and s.src_step == 0 for s in self.steps[1 : position + 1]
        )


def _axis_parts(axis: str, packed: bool) -> tuple[str, ...]:
    """Loops of an axis before any step: a packed k is three from the start."""
    return ("g", "l", "e") if packed and axis == "k" else (axis,)


def _split_parts(
    tracker: LoopTracker, stage: int, loop: Num, lengths: list[str], inner: bool
) -> str:
    """Splits in the tracker; returns "into k.0, k.1 (32) and k.2 (8)"."""
    found = tracker.stage(stage)
    base = f"loop{loop}"
    if found and isinstance(loop, int) and loop < len(found.loops):
        base = found.loops[loop]
        base = f"({base})" if "*" in base else base
    names = [f"{base}.{n}" for n in range(len(lengths) + 1)]
    if isinstance(loop, int):
        tracker.replace(stage, loop, 1, names)
    open_part = 0 if inner else len(lengths)
    sizes = list(lengths)
    sizes.insert(open_part, "the rest")
    return "into " + _join([f"{n} ({size})" for n, size in zip(names, sizes, strict=True)])


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _say_split(tracker: LoopTracker, position: int, step: SplitStep) -> str:
    if tracker.is_prologue(position):
        return (
            f"Works on tiles of up to {_product(step.lengths)} rows of one adapter: the ragged "
            "token axis becomes loops t (tiles) and i (rows of a tile)."
        )
    where = tracker.loop(step.stage, step.iter)
    lengths = [str(n) for n in step.lengths]
    parts = _split_parts(tracker, step.stage, step.iter, lengths, step.inner_to_outer)
    of = f" of length {step.extent}" if step.extent else ""
    return f"Splits {where}{of} of {tracker.name(step.stage)} {parts}, outermost first."


def _product(lengths: tuple[Num, ...]) -> str:
    numbers = [n for n in lengths if isinstance(n, int)]
    return str(math.prod(numbers)) if len(numbers) == len(lengths) else "*".join(map(str, lengths))


def _say_follow_split(tracker: LoopTracker, position: int, step: FollowSplitStep) -> str:
    name = tracker.name(step.stage)
    if tracker.is_prologue(position):
        return f"Tiles the rows of {name} as step 0 did those of {tracker.name(0)}."
    where = tracker.loop(step.stage, step.iter)
    source = tracker.steps[step.src_step] if step.src_step < position else None
    if not isinstance(source, SplitStep):
        return f"Splits {where} of {name} as step {step.src_step} did, which is no earlier split."
    lengths = list(source.lengths)
    if step.n_split < len(lengths):
        keep = max(step.n_split - 1, 0)
        texts = [*map(str, lengths[:keep]), _product(tuple(lengths[keep:]))]
    else:
        texts = [str(n) for n in lengths]
    parts = _split_parts(tracker, step.stage, step.iter, texts, source.inner_to_outer)
    return f"Splits {where} of {name} {parts}, with the lengths of step {step.src_step}."


def _say_follow_fused(tracker: LoopTracker, position: int, step: FollowFusedSplitStep) -> str:
    name, where = tracker.name(step.stage), tracker.loop(step.stage, step.iter)
    lengths: list[Num] = []
    for source in step.src_steps:
        found = tracker.steps[source] if source < position else None
        if isinstance(found, SplitStep) and step.level < len(found.lengths):
            lengths.append(found.lengths[step.level])
    known = len(lengths) == len(step.src_steps)
    size = _product(tuple(lengths)) if known else "?"
    parts = _split_parts(tracker, step.stage, step.iter, [size], step.factor_or_nparts)
    sources = _join([str(n) for n in step.src_steps]) if step.src_steps else "none"
    noun = "step" if len(step.src_steps) == 1 else "steps"
    what = f"length {step.level} of {noun} {sources}"
    product = what if len(step.src_steps) == 1 else f"the product of {what}"
    return f"Splits {where} of {name} {parts}: {product}."


def _say_fuse(tracker: LoopTracker, position: int, step: FuseStep) -> str:
    found = tracker.stage(step.stage)
    loops = [tracker.loop(step.stage, n).removeprefix("loop ") for n in step.iters]
    fused = "*".join(loops)
    if found and step.iters and step.iters[-1] < len(found.loops):
        tracker.replace(step.stage, step.iters[0], len(step.iters), [fused])
    return f"Fuses loops {_join(loops)} of {tracker.name(step.stage)} into one, {fused}."


def _say_reorder(tracker: LoopTracker, position: int, step: ReorderStep) -> str:
    found, name = tracker.stage(step.stage), tracker.name(step.stage)
    if found is None or len(step.order) != len(found.loops):
        order = ", ".join(map(str, step.order))
        return f"Reorders the loops of {name}: their old numbers are now {order}."
    found.loops[:] = [found.loops[n] for n in step.order]
    return f"Reorders the loops of {name}, outermost first: {', '.join(found.loops)}."


def _say_annotate(tracker: LoopTracker, position: int, step: AnnotationStep) -> str:
    where = f"{tracker.loop(step.stage, step.iter)} of {tracker.name(step.stage)}"
    kind = ANNOTATIONS[step.annotation] if step.annotation < len(ANNOTATIONS) else "none"
    if kind.startswith("blockIdx"):
        return f"Spreads {where} over the blocks of the grid ({kind})."
    if kind.startswith("threadIdx"):
        return f"Spreads {where} over the threads of a block ({kind})."
    if kind == "tensorize":
        return f"Tensorizes {where}: {_ANNOTATION_WORDS[kind]}, {step.intrinsic or 'unnamed'}."
    verb = {"none": "Unmarks", "vthread": "Interleaves", "parallel": "Parallelizes"}.get(
        kind, f"{kind.capitalize()}s"
    )
    return f"{verb} {where}: {_ANNOTATION_WORDS[kind]}."


def _say_pragma(tracker: LoopTracker, position: int, step: PragmaStep) -> str:
    where = f"{tracker.loop(step.stage, step.iter)} of {tracker.name(step.stage)}"
    value = ", ".join(map(str, step.value)) if isinstance(step.value, tuple) else str(step.value)
    if step.name == "decompose_reduction":
        return f"Clears the accumulator in front of {where}."
    if step.name == "pipeline_depth":
        if step.value in (0, 1):
            return f"Leaves {where} without a software pipeline."
        return (
            f"Pipelines {where} in {value} stages: loads for later iterations run while this one "
            "computes."
        )
    if step.name == "pack_k":
        return (
            "Walks the columns of x as loops g (groups), l (lanes) and e (elements) in gather_x, "
            f"gather_a and shrink; lanes and elements are {value}, a lane's elements adjoin."
        )
    if step.name == "auto_unroll_max_step":
        return f"Lets the code generator unroll up to {value} steps inside {where}."
    if step.name == "unroll_explicit":
        how = (
            "writes unrolled code out itself" if step.value else "leaves unrolling to the compiler"
        )
        return f"In {where} the code generator {how}."
    if step.name == "dependent_launch":
        return _DEPENDENT_WORDS.get(step.value, f"Launches dependent kernels in a way {value}.")
    if step.name == "turn":
        return f"Turns squares of {value} x {value} elements in registers at {where}."
    if step.name in _FORM_WORDS:
        return _FORM_WORDS[step.name]
    if step.name == "load_ahead" and tracker.name(step.stage) == "gather_b" and step.value == 2:
        return "Loads all of B before it waits for v."
    if step.name in _HINT_WORDS:
        off, on = _HINT_WORDS[step.name]
        return (on if step.value or not off else off).format(value=value, where=where)
    return f"Attaches pragma {step.name} = {value} to {where}."


_FORM_WORDS = {
    "near_rows": "Has rows behind a tile's end repeat its last one, so that x needs no condition.",
    "scaled_b": "Applies the adapter's rank and scale to the copy of B instead of every v.",
    "transpose": "Lets the last two axes of the stage's result change places.",
}
"""Pragmas that say something of the whole stage."""

_HINT_WORDS = {
    "block_order": (
        "Neighbouring blocks have neighbouring tiles.",
        "Neighbouring blocks have neighbouring columns of one tile.",
    ),
    "cluster": ("", "Blocks along {where} form clusters, whose blocks add up their sums of v."),
    "cluster_blocks": ("", "A cluster has {value} blocks."),
    "engine": ("", "The copy engine brings x and A, on four warps of its own."),
    "l2_fetch": (
        "L2 reads what copies of x and A want.",
        "L2 reads {value} bytes of memory at a time for copies of x and A.",
    ),
    "l2_hints": ("", "L2 is told to keep A and to forget x and y."),
    "load_ahead": ("Loads nothing ahead at {where}.", "Loads {value} steps ahead at {where}."),
    "rank_blocks": ("", "{value} blocks share the ranks of a tile."),
    "streaming": (
        "y stays in the caches.",
        "y is marked as used once, so that caches drop it first.",
    ),
    "sums_apart": (
        "The sums' place is that of the last steps' x and A.",
        "The sums have a place of their own in shared memory.",
    ),
    "tile_blocks": ("The grid has as many tiles as expand's.", "The grid has {value} tiles."),
    "workers": ("", "Blocks go on to later tiles: {value} tiles beyond those that are full."),
}
"""Pragmas of the block-level intrinsics: what 0 says, if anything, and what other values say."""

_DEPENDENT_WORDS: dict[object, str] = {
    0: "Launches kernels one after the other.",
    1: "Launches the second kernel as a dependent of the first: it loads what does not depend on v "
    "while the first still runs, then waits.",
    2: "Launches every kernel as a dependent of the one before it in the stream: the first waits "
    "before it reads anything, the second before it reads v.",
    3: "Launches every kernel as a dependent of the one before it in the stream: the first reads "
    "its tables and A and then waits, the second waits before it reads v.",
}


def _say_align(tracker: LoopTracker, position: int, step: StorageAlignStep) -> str:
    return (
        f"Pads the buffer of {tracker.name(step.stage)}: the stride of dimension {step.iter} "
        f"becomes a multiple of {step.factor} plus {step.offset} elements, which avoids "
        "bank conflicts."
    )


def _say_compute_at(tracker: LoopTracker, position: int, step: ComputeAtStep) -> str:
    name, target = tracker.name(step.stage), tracker.name(step.target_stage)
    where = tracker.loop(step.target_stage, step.target_iter)
    mine, theirs = tracker.stage(step.stage), tracker.stage(step.target_stage)
    words = f"Computes {name} inside {where} of {target}, just what one iteration needs"
    at = step.target_iter
    if mine and theirs and isinstance(at, int) and at < len(theirs.loops):
        outer = theirs.loops[: at + 1]
        own = _own_axes(mine.axes, outer)
        mine.loops[:] = [*outer, *own]
        return f"{words}; its own loops there are {', '.join(own) or 'none'}."
    if mine:
        mine.loops.clear()
    return f"{words}."


def _own_axes(axes: list[str], outer: list[str]) -> list[str]:
    """The stage's own loops behind the consumer's: a name that is taken gets a prime."""
    taken, own = set(outer), []
    for axis in axes:
        while axis in taken:
            axis += "'"
        taken.add(axis)
        own.append(axis)
    return own


def _say_inline(tracker: LoopTracker, position: int, step: ComputeInlineStep) -> str:
    found = tracker.stage(step.stage)
    if found:
        found.loops.clear()
    return (
        f"Inlines {tracker.name(step.stage)}: its value is computed where it is read and never "
        "stored."
    )


def _say_root(tracker: LoopTracker, position: int, step: ComputeRootStep) -> str:
    return (
        f"Computes {tracker.name(step.stage)} on its own, into a workspace; on a GPU it is a "
        "kernel of its own."
    )


def _say_cache_read(tracker: LoopTracker, position: int, step: CacheReadStep) -> str:
    name = tracker.name(step.stage)
    readers = _join([tracker.name(n) for n in step.reader_stages]) if step.reader_stages else "it"
    scope = _SCOPE_WORDS.get(step.scope, step.scope)
    new = _added(tracker, step)
    source = tracker.stage(step.stage)
    if new is None:
        return f"Keeps the result of {name} in {scope}, where {readers} reads it."
    if source:
        tracker.known[new] = _Stage(list(source.axes), list(source.axes))
    return f"Adds {new}: a copy of {name}'s result in {scope}, from which {readers} reads."


def _added(tracker: LoopTracker, step: Step) -> str | None:
    """Name of the stage that a step adds, if it adds one."""
    try:
        new = new_stage(tracker.stages, step)
    except TraceError:
        return None
    return new[1] if new else None


def _say_cache_write(tracker: LoopTracker, position: int, step: CacheWriteStep) -> str:
    name = tracker.name(step.stage)
    scope = _SCOPE_WORDS.get(step.scope, step.scope)
    new = _added(tracker, step)
    source = tracker.stage(step.stage)
    if source and new:
        axes = [axis for axis in source.axes if axis not in source.summed]
        tracker.known[new] = _Stage(list(axes), axes)
    return f"Lets {name} compute into {scope}; the new stage {new or 'behind it'} writes it out."


def _say_rfactor(tracker: LoopTracker, position: int, step: RfactorStep) -> str:
    name, where = tracker.name(step.stage), tracker.loop(step.stage, step.iter)
    new = _added(tracker, step) or "a new stage"
    found = tracker.stage(step.stage)
    if found and step.iter < len(found.loops):
        factor = found.loops[step.iter]
        spatial = [axis for axis in found.axes if axis not in found.summed]
        summed = [x for x in found.loops if x in found.summed and x != factor]
        rest = [x for x in found.loops if x not in summed]
        part = _Stage(list(found.loops), [factor, *spatial, *summed], set(summed))
        tracker.known[new] = part
        # The stage keeps its other loops and now sums over the factored one alone.
        found.loops[:] = rest
        found.axes = [factor, *spatial]
        found.summed = {factor}
    return (
        f"Factors {where} out of {name}'s sum: {new} makes one partial sum per iteration of it, "
        f"{name} adds the partial sums up."
    )


_Say = Callable[[LoopTracker, int, Step], str]
S = TypeVar("S", bound=Step)


def _as_step(say: Callable[[LoopTracker, int, S], str]) -> _Say:
    return cast(_Say, say)


_WORDS: dict[type[Step], _Say] = {
    AnnotationStep: _as_step(_say_annotate),
    FuseStep: _as_step(_say_fuse),
    PragmaStep: _as_step(_say_pragma),
    ReorderStep: _as_step(_say_reorder),
    SplitStep: _as_step(_say_split),
    FollowSplitStep: _as_step(_say_follow_split),
    FollowFusedSplitStep: _as_step(_say_follow_fused),
    StorageAlignStep: _as_step(_say_align),
    ComputeAtStep: _as_step(_say_compute_at),
    ComputeInlineStep: _as_step(_say_inline),
    ComputeRootStep: _as_step(_say_root),
    CacheReadStep: _as_step(_say_cache_read),
    CacheWriteStep: _as_step(_say_cache_write),
    RfactorStep: _as_step(_say_rfactor),
}
