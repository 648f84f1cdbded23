"""The stages of SGMV and how steps change their list, without TVM.

Stage numbers in a trace are positions in this list at that moment, as in the auto-scheduler:
a step that adds a stage shifts the numbers behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dop.errors import TraceError
from dop.space.step import CacheReadStep, CacheWriteStep, RfactorStep, Step

INITIAL = ("gather_x", "gather_a", "shrink", "gather_b", "expand", "accumulate")
"""The stages before any step, in order of computation."""

TOKEN_AXIS = {"gather_x": 0, "shrink": 1, "expand": 0, "accumulate": 0}
"""Position of the ragged token axis in the stages that split it into tiles of rows."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Names of the stages, in order of computation, and which of them have a scope already."""

    names: tuple[str, ...] = INITIAL
    scoped: frozenset[str] = frozenset()

    def name(self, stage: int) -> str:
        """Name of a stage number.

        Raises:
            TraceError: there is no such stage at this point of the trace.
        """
        if not 0 <= stage < len(self.names):
            raise TraceError(f"stage {stage} does not exist; the trace has {len(self.names)}.")
        return self.names[stage]

    def index(self, name: str) -> int:
        """Number of a stage.

        Raises:
            TraceError: no stage has that name.
        """
        if name not in self.names:
            raise TraceError(f"stage {name!r} does not exist; there are {', '.join(self.names)}.")
        return self.names.index(name)

    def after(self, step: Step) -> Stages:
        """The list once `step` was applied."""
        new = new_stage(self, step)
        scoped = self.scoped
        if isinstance(step, CacheReadStep):
            scoped |= {self.name(step.stage)}
        if new is None:
            return Stages(self.names, scoped)
        position, name = new
        if isinstance(step, CacheReadStep):
            scoped |= {name}
        return Stages((*self.names[:position], name, *self.names[position:]), scoped)


def new_stage(stages: Stages, step: Step) -> tuple[int, str] | None:
    """Position and name of the stage that a step adds, or None.

    RF puts the partial results before the stage, CHW the copy behind it. The first CHR of a stage
    only moves its result to the scope, where its readers find it; a further one adds a copy behind.
    CHR of accumulate, the last stage, is about what it reads: y's old values, in a stage before it.
    """
    if isinstance(step, CacheReadStep) and stages.name(step.stage) == "accumulate":
        return step.stage, "accumulate_in"
    if isinstance(step, RfactorStep):
        return step.stage, f"{stages.name(step.stage)}_rf"
    if isinstance(step, CacheWriteStep):
        return step.stage + 1, f"{stages.name(step.stage)}_out"
    if isinstance(step, CacheReadStep) and stages.name(step.stage) in stages.scoped:
        return step.stage + 1, f"{stages.name(step.stage)}_in"
    return None
