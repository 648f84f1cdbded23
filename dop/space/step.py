"""The fourteen transformation steps: frozen, printable values and their JSON form.

The wire form is the auto-scheduler's: a list whose first element is the step's code. A stage is
an index into the list of stages at that point of the trace (stages.py), an iterator an index into
the stage's loops, outermost first. Where a number is wanted a sketch may hold a `Param` instead:
its value comes from an annotation (sketch.py). Only steps without parameters go to a log.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dop.errors import TraceError

JsonScalar = str | int | float | bool | None
Json = JsonScalar | list["Json"]


@dataclass(frozen=True, slots=True)
class Param:
    """A number left open by a sketch.

    Attributes:
        name: "<half>.<what>", for example "shrink.split_k"; the half is what crossover swaps.
        offset: added to the parameter's value, for loop positions behind a chosen one.
    """

    name: str
    offset: int = 0

    def value(self, values: Mapping[str, int]) -> int:
        """The number for an annotation; a KeyError names a missing parameter."""
        return values[self.name] + self.offset

    def __str__(self) -> str:
        return f"${self.name}{self.offset:+d}" if self.offset else f"${self.name}"


Num = int | Param

ANNOTATIONS: tuple[str, ...] = (
    "none",
    "unroll",
    "vectorize",
    "parallel",
    "vthread",
    "blockIdx.x",
    "threadIdx.x",
    "blockIdx.y",
    "threadIdx.y",
    "blockIdx.z",
    "threadIdx.z",
    "tensorize",
)
"""Names of the auto-scheduler's annotation numbers; an AN step holds the index."""

SCOPES = ("local", "shared", "shared.dyn", "warp", "global")
"""Storage scopes that CHR and CHW may name."""


@dataclass(frozen=True, slots=True)
class Step:
    """Base of the steps: `stage` is what it changes."""

    stage: int
    code: ClassVar[str] = ""

    def to_json(self) -> list[Json]:
        """The step as the list that is written to a log.

        Raises:
            TraceError: a number is still open.
        """
        return [self.code, *(_to_json(self, f.name) for f in dataclasses.fields(self))]

    def params(self) -> tuple[str, ...]:
        """Names of the numbers that are still open."""
        return tuple(p.name for f in dataclasses.fields(self) for p in _open(getattr(self, f.name)))

    def bind(self, values: Mapping[str, int]) -> Step:
        """This step with its parameters replaced; a KeyError names a missing one."""
        changes = {
            f.name: _bound(getattr(self, f.name), values)
            for f in dataclasses.fields(self)
            if any(True for _ in _open(getattr(self, f.name)))
        }
        return dataclasses.replace(self, **changes) if changes else self  # type: ignore[arg-type]


def _open(value: object) -> tuple[Param, ...]:
    if isinstance(value, Param):
        return (value,)
    if isinstance(value, tuple):
        return tuple(v for v in value if isinstance(v, Param))
    return ()


def _bound(value: object, values: Mapping[str, int]) -> object:
    if isinstance(value, Param):
        return value.value(values)
    if isinstance(value, tuple):
        return tuple(v.value(values) if isinstance(v, Param) else v for v in value)
    return value


def _to_json(step: Step, field: str) -> Json:
    value = getattr(step, field)
    if _open(value):
        raise TraceError(f"{step.code} step still has open numbers {step.params()}.")
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, bool):
        return int(value)
    return value  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class AnnotationStep(Step):
    """AN: mark a loop. `annotation` indexes ANNOTATIONS; tensorize names its intrinsic."""

    code: ClassVar[str] = "AN"
    iter: Num
    annotation: int
    intrinsic: str = ""

    def to_json(self) -> list[Json]:
        head: list[Json] = [self.code, self.stage, _to_json(self, "iter"), self.annotation]
        return [*head, self.intrinsic] if self.intrinsic else head


@dataclass(frozen=True, slots=True)
class FuseStep(Step):
    """FU: fuse consecutive loops into one."""

    code: ClassVar[str] = "FU"
    iters: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PragmaStep(Step):
    """PR: attach a pragma, written `name$value`, to a loop. lowering/apply.py lists the names."""

    code: ClassVar[str] = "PR"
    iter: Num
    name: str
    value: Num | tuple[Num, ...] | str = 0

    def __post_init__(self) -> None:
        """One spelling per pragma, the one that the log gives back: "8", (8,) and 8 are 8."""
        if not self.name or "$" in self.name:
            raise TraceError(f"{self.name!r} is not a pragma's name.")
        if not self.params():
            object.__setattr__(self, "value", _pragma_value(self._text()))

    def _text(self) -> str:
        return ",".join(map(str, self.value)) if isinstance(self.value, tuple) else str(self.value)

    def to_json(self) -> list[Json]:
        if self.params():
            raise TraceError(f"PR step still has open numbers {self.params()}.")
        return [self.code, self.stage, _to_json(self, "iter"), f"{self.name}${self._text()}"]


@dataclass(frozen=True, slots=True)
class ReorderStep(Step):
    """RE: reorder a stage's loops; `order` lists the old positions in their new order."""

    code: ClassVar[str] = "RE"
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SplitStep(Step):
    """SP: split a loop. `lengths` are the inner parts (inner_to_outer) or the outer ones."""

    code: ClassVar[str] = "SP"
    iter: Num
    extent: int | None
    lengths: tuple[Num, ...]
    inner_to_outer: bool = True


@dataclass(frozen=True, slots=True)
class FollowSplitStep(Step):
    """FSP: split as the SP at position `src_step` of the trace did, into `n_split` + 1 parts."""

    code: ClassVar[str] = "FSP"
    iter: int
    src_step: int
    n_split: int


@dataclass(frozen=True, slots=True)
class FollowFusedSplitStep(Step):
    """FFSP: split in two by the product of the `level`-th lengths of several earlier splits.

    The product is the inner part if `factor_or_nparts`, else the outer part.
    """

    code: ClassVar[str] = "FFSP"
    iter: int
    src_steps: tuple[int, ...]
    level: int
    factor_or_nparts: bool = True


@dataclass(frozen=True, slots=True)
class StorageAlignStep(Step):
    """SA: pad the stage's buffer so that dimension `iter` has stride factor * n + offset."""

    code: ClassVar[str] = "SA"
    iter: int
    factor: Num
    offset: Num


@dataclass(frozen=True, slots=True)
class ComputeAtStep(Step):
    """CA: compute the stage inside loop `target_iter` of `target_stage`."""

    code: ClassVar[str] = "CA"
    target_stage: int
    target_iter: Num


@dataclass(frozen=True, slots=True)
class ComputeInlineStep(Step):
    """CI: inline the stage into its consumers."""

    code: ClassVar[str] = "CI"


@dataclass(frozen=True, slots=True)
class ComputeRootStep(Step):
    """CR: compute the stage on its own, into a workspace; on a GPU, in its own kernel."""

    code: ClassVar[str] = "CR"


@dataclass(frozen=True, slots=True)
class CacheReadStep(Step):
    """CHR: stage what `reader_stages` read of this stage in `scope`."""

    code: ClassVar[str] = "CHR"
    scope: str
    reader_stages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CacheWriteStep(Step):
    """CHW: compute into `scope`, then copy out in a new stage."""

    code: ClassVar[str] = "CHW"
    scope: str


@dataclass(frozen=True, slots=True)
class RfactorStep(Step):
    """RF: factor the reduction loop `iter` out into a new stage, as dimension `factor_iter`."""

    code: ClassVar[str] = "RF"
    iter: int
    factor_iter: int


STEPS: dict[str, type[Step]] = {
    kind.code: kind
    for kind in (
        AnnotationStep,
        FuseStep,
        PragmaStep,
        ReorderStep,
        SplitStep,
        FollowSplitStep,
        FollowFusedSplitStep,
        StorageAlignStep,
        ComputeAtStep,
        ComputeInlineStep,
        ComputeRootStep,
        CacheReadStep,
        CacheWriteStep,
        RfactorStep,
    )
}
"""Every kind of step by its code."""

MAX_INDEX = 1 << 31


def parse_step(data: object) -> Step:
    """Step of its JSON form. Reads data only; nothing is evaluated.

    Raises:
        TraceError: the list is not a step; the message names the element.
    """
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        raise TraceError(f"{_short(data)} is not a step.", "A step is a list led by its code.")
    kind = STEPS.get(data[0])
    if kind is None:
        raise TraceError(f"step code {_short(data[0])} is unknown.", f"Known: {', '.join(STEPS)}.")
    try:
        return _READERS[data[0]](data[1:])
    except (TypeError, ValueError, IndexError) as error:
        raise TraceError(f"{_short(data)} is not a valid {data[0]} step: {error}.") from error


def _short(data: object) -> str:
    # reprlib: a list nested a thousand deep must not exhaust the stack, nor a long one the memory.
    text = reprlib.repr(data)
    return text if len(text) <= 80 else text[:77] + "..."


def _int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_INDEX:
        raise ValueError(f"{_short(value)} is not an index")
    return value


def _ints(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{_short(value)} is not a list of indices")
    return tuple(_int(v) for v in value)


def _positive(value: object) -> int:
    number = _int(value)
    if number < 1:
        raise ValueError("0 is not a length")
    return number


def _flag(value: object) -> bool:
    if isinstance(value, float) or value not in (0, 1):
        raise ValueError(f"{_short(value)} is not 0 or 1")
    return bool(value)


def _scope(value: object) -> str:
    if value not in SCOPES:
        raise ValueError(f"{_short(value)} is not a storage scope")
    return str(value)


def _arity(data: list[object], low: int, high: int | None = None) -> list[object]:
    if not low <= len(data) <= (high or low):
        raise ValueError(f"{len(data)} fields, {low} wanted")
    return data


def _read_an(data: list[object]) -> Step:
    stage, loop, kind, *rest = _arity(data, 3, 4)
    annotation = _int(kind)
    if annotation >= len(ANNOTATIONS):
        raise ValueError(f"annotation {annotation} is unknown")
    if rest and not isinstance(rest[0], str):
        raise ValueError("the intrinsic's name is not a string")
    return AnnotationStep(_int(stage), _int(loop), annotation, str(rest[0]) if rest else "")


def _read_fu(data: list[object]) -> Step:
    stage, loops = _arity(data, 2)
    iters = _ints(loops)
    if len(iters) < 2 or any(b - a != 1 for a, b in itertools.pairwise(iters)):
        raise ValueError("the fused loops are not consecutive")
    return FuseStep(_int(stage), iters)


def _read_pr(data: list[object]) -> Step:
    stage, loop, text = _arity(data, 3)
    if not isinstance(text, str) or text.find("$") < 1:
        raise ValueError("the pragma is not name$value")
    name, _, value = text.partition("$")
    return PragmaStep(_int(stage), _int(loop), name, _pragma_value(value))


_PRAGMA_NUMBER = re.compile("0|-?[1-9][0-9]{0,18}")


def _pragma_value(text: str) -> int | tuple[int, ...] | str:
    parts = text.split(",")
    if all(_PRAGMA_NUMBER.fullmatch(part) for part in parts):
        numbers = tuple(int(p) for p in parts)
        return numbers[0] if len(numbers) == 1 else numbers
    return text


def _read_re(data: list[object]) -> Step:
    stage, order = _arity(data, 2)
    positions = _ints(order)
    if sorted(positions) != list(range(len(positions))):
        raise ValueError("the order is not a permutation")
    return ReorderStep(_int(stage), positions)


def _read_sp(data: list[object]) -> Step:
    stage, loop, extent, lengths, inner = _arity(data, 5)
    if not isinstance(lengths, list) or not lengths:
        raise ValueError("a split needs lengths")
    parts = tuple(_positive(v) for v in lengths)
    whole = None if extent is None else _positive(extent)
    return SplitStep(_int(stage), _int(loop), whole, parts, _flag(inner))


def _read_fsp(data: list[object]) -> Step:
    stage, loop, source, parts = _arity(data, 4)
    return FollowSplitStep(_int(stage), _int(loop), _int(source), _positive(parts))


def _read_ffsp(data: list[object]) -> Step:
    stage, loop, sources, level, inner = _arity(data, 5)
    return FollowFusedSplitStep(_int(stage), _int(loop), _ints(sources), _int(level), _flag(inner))


def _read_sa(data: list[object]) -> Step:
    stage, axis, factor, offset = _arity(data, 4)
    return StorageAlignStep(_int(stage), _int(axis), _positive(factor), _int(offset))


def _read_ca(data: list[object]) -> Step:
    stage, target, loop = _arity(data, 3)
    return ComputeAtStep(_int(stage), _int(target), _int(loop))


def _read_ci(data: list[object]) -> Step:
    return ComputeInlineStep(_int(_arity(data, 1)[0]))


def _read_cr(data: list[object]) -> Step:
    return ComputeRootStep(_int(_arity(data, 1)[0]))


def _read_chr(data: list[object]) -> Step:
    stage, scope, readers = _arity(data, 3)
    return CacheReadStep(_int(stage), _scope(scope), _ints(readers))


def _read_chw(data: list[object]) -> Step:
    stage, scope = _arity(data, 2)
    return CacheWriteStep(_int(stage), _scope(scope))


def _read_rf(data: list[object]) -> Step:
    stage, loop, axis = _arity(data, 3)
    return RfactorStep(_int(stage), _int(loop), _int(axis))


_READERS = {
    "AN": _read_an,
    "FU": _read_fu,
    "PR": _read_pr,
    "RE": _read_re,
    "SP": _read_sp,
    "FSP": _read_fsp,
    "FFSP": _read_ffsp,
    "SA": _read_sa,
    "CA": _read_ca,
    "CI": _read_ci,
    "CR": _read_cr,
    "CHR": _read_chr,
    "CHW": _read_chw,
    "RF": _read_rf,
}
