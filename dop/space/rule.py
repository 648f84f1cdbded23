"""Rules: how a sketch grows, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from dop.space.sketch import Annotation, Domain, Limit, Sketch
from dop.space.stages import Stages
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
    Param,
    PragmaStep,
    ReorderStep,
    RfactorStep,
    SplitStep,
    Step,
    StorageAlignStep,
)
from dop.target import Target
from dop.workload import Workload


@dataclass
class SketchState:
    """A sketch under construction. Stages are named here; steps get their numbers.

    Attributes:
        notes: what a rule leaves for the rules of later stages (loop positions, flags).
    """

    workload: Workload
    target: Target
    name: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    stages: Stages = field(default_factory=Stages)
    domains: tuple[Domain, ...] = ()
    limits: tuple[Limit, ...] = ()
    estimates: dict[str, Callable[[Annotation], float]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def fork(self, choice: str) -> SketchState:
        """A copy to extend, with the name of the choice taken."""
        return replace(
            self,
            name=(*self.name, choice),
            estimates=dict(self.estimates),
            notes=dict(self.notes),
        )

    def sketch(self) -> Sketch:
        """The finished sketch."""
        return Sketch(
            "/".join(self.name), self.steps, self.domains, self.limits, dict(self.estimates)
        )

    def param(
        self, name: str, kind: str, choices: Sequence[int], default: int | None = None
    ) -> Param:
        """Opens a number. A default that is not among the choices becomes the nearest one."""
        allowed = tuple(sorted(set(choices)))
        wanted = allowed[0] if default is None else default
        nearest = min(allowed, key=lambda c: (abs(c - wanted), c))
        self.domains = (*self.domains, Domain(name, kind, allowed, nearest))
        return Param(name)

    def reopen(self, name: str) -> Param:
        """A parameter that an earlier rule opened, to use again."""
        if all(domain.name != name for domain in self.domains):
            raise ValueError(f"parameter {name!r} is not open")
        return Param(name)

    def limit(self, name: str, maximum: int, value: Callable[[Annotation], int]) -> None:
        """Adds a limit that is checked before a build."""
        self.limits = (*self.limits, Limit(name, maximum, value))

    def estimate(self, name: str, value: Callable[[Annotation], float]) -> None:
        """Adds a quantity for the cost model."""
        self.estimates[name] = value

    def _add(self, step: Step) -> int:
        self.stages = self.stages.after(step)
        self.steps = (*self.steps, step)
        return len(self.steps) - 1

    def split(
        self,
        stage: str,
        loop: Num,
        lengths: Sequence[Num],
        extent: int | None = None,
        inner: bool = True,
    ) -> int:
        """SP; returns its position for FSP and FFSP."""
        return self._add(SplitStep(self.stages.index(stage), loop, extent, tuple(lengths), inner))

    def follow_split(self, stage: str, loop: int, source: int, parts: int) -> int:
        """FSP."""
        return self._add(FollowSplitStep(self.stages.index(stage), loop, source, parts))

    def follow_fused_split(
        self, stage: str, loop: int, sources: Sequence[int], level: int = 0
    ) -> int:
        """FFSP with the product as the inner part."""
        return self._add(
            FollowFusedSplitStep(self.stages.index(stage), loop, tuple(sources), level, True)
        )

    def fuse(self, stage: str, *loops: int) -> int:
        """FU."""
        return self._add(FuseStep(self.stages.index(stage), loops))

    def reorder(self, stage: str, *order: int) -> int:
        """RE: old positions in their new order."""
        return self._add(ReorderStep(self.stages.index(stage), order))

    def annotate(self, stage: str, loop: Num, kind: str, intrinsic: str = "") -> int:
        """AN by the annotation's name."""
        number = ANNOTATIONS.index(kind)
        return self._add(AnnotationStep(self.stages.index(stage), loop, number, intrinsic))

    def pragma(self, stage: str, loop: Num, name: str, value: Num | tuple[Num, ...] = 1) -> int:
        """PR."""
        return self._add(PragmaStep(self.stages.index(stage), loop, name, value))

    def compute_at(self, stage: str, target: str, loop: Num) -> int:
        """CA."""
        stages = self.stages
        return self._add(ComputeAtStep(stages.index(stage), stages.index(target), loop))

    def compute_inline(self, stage: str) -> int:
        """CI."""
        return self._add(ComputeInlineStep(self.stages.index(stage)))

    def compute_root(self, stage: str) -> int:
        """CR."""
        return self._add(ComputeRootStep(self.stages.index(stage)))

    def cache_read(self, stage: str, scope: str, reader: str) -> int:
        """CHR."""
        stages = self.stages
        return self._add(CacheReadStep(stages.index(stage), scope, (stages.index(reader),)))

    def cache_write(self, stage: str, scope: str) -> int:
        """CHW."""
        return self._add(CacheWriteStep(self.stages.index(stage), scope))

    def rfactor(self, stage: str, loop: int, axis: int = 0) -> int:
        """RF; the partial results become stage `<stage>_rf`."""
        return self._add(RfactorStep(self.stages.index(stage), loop, axis))

    def storage_align(self, stage: str, axis: int, factor: Num, offset: Num) -> int:
        """SA."""
        return self._add(StorageAlignStep(self.stages.index(stage), axis, factor, offset))


class Rule(Protocol):
    """One way to treat one stage. A new rule is one file and one line in rules/__init__.py."""

    @property
    def name(self) -> str:
        """The choice it stands for, as it appears in sketch names."""
        ...

    @property
    def stage(self) -> str:
        """The stage it treats; "tokens" for the form of the program."""
        ...

    def apply(self, state: SketchState) -> list[SketchState]:
        """The states that follow; empty if the rule does not fit."""
        ...
