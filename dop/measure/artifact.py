"""A built candidate: a binary and what is needed to run it. Neither TVM nor torch is imported."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import Protocol

from dop.errors import BuildError
from dop.measure.tensor_map import tensor_of
from dop.workload import Workload

SCALARS = ("tokens", "tiles", "slots")
"""Numbers of a batch that every entry takes, in this order."""

ROW_TABLES = ("token_slot", "token_rank", "token_scale")
TILE_TABLES = ("tile_slot", "tile_row0", "tile_rows", "tile_rank", "tile_scale", "row_index")
"""Tables of a plan in the order of the arguments: int32, the scales float32."""

SHIFT_BYTES = 16
"""Unit of the distances between weight stacks; stacks must be aligned to it."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch; `grid` holds expressions over tokens and tiles, see `evaluate`."""

    name: str
    grid: tuple[str, str, str]
    block: tuple[int, int, int]
    dynamic_smem_bytes: int
    arguments: tuple[str, ...]
    """Parameters: workspaces, tensors (a and b: the first slice's stacks), tokens and tiles as
    int32, shifts as int64 (see `shift_of`), maps of tensors (see tensor_map.py)."""
    dependent: bool = False
    """Programmatic dependent launch: it may start before its predecessor ends, and waits itself."""
    early: bool = False
    """It may be launched so if its tables and weights were complete before its predecessor started:
    it reads them before it waits. Launched plainly it is always right."""

    @property
    def threads(self) -> int:
        """Threads per block."""
        return self.block[0] * self.block[1] * self.block[2]


def is_pair(launches: Sequence[Launch]) -> bool:
    """Whether y is touched by the last of several launches only, and x by the others only."""
    *before, last = launches
    names = {name for one in before for name in one.arguments}
    reads_x = "x" in map(tensor_of, last.arguments)
    return bool(before) and not {"y", "y_in"} & names and not reads_x


@dataclass(frozen=True)
class Buffer:
    """A workspace: `elements` is an expression over tokens and tiles."""

    name: str
    dtype: str
    elements: str


@dataclass(frozen=True)
class Artifact:
    """A binary and how to call it.

    Attributes:
        kind: "cuda" (binary is a cubin) or "cpu" (a shared library, entry `dop_run`).
        workload_key: `Workload.key` of what it computes.
        tile_rows: rows per tile of the plan it takes, 0 for the row form.
        arguments: tensors that the caller gives, in order: x, a0.., b0.., tables, y_in, y.
        launches: kernels in order (CUDA).
        workspaces: what the launches share (CUDA).
        binary: the cubin or the library.
        source: generated code, for people and exports.
        resources: figures of the build, e.g. code_bytes.
    """

    kind: str
    workload_key: str
    tile_rows: int
    arguments: tuple[str, ...]
    launches: tuple[Launch, ...]
    workspaces: tuple[Buffer, ...]
    binary: bytes
    source: str
    resources: Mapping[str, float] = field(default_factory=dict)


class _LaunchLike(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def grid(self) -> tuple[str, str, str]: ...
    @property
    def block(self) -> tuple[int, int, int]: ...
    @property
    def dynamic_smem_bytes(self) -> int: ...
    @property
    def arguments(self) -> tuple[str, ...]: ...


class _BufferLike(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def elements(self) -> str: ...


class GeneratedLike(Protocol):
    """What a builder needs of `dop.lowering.codegen.Generated`, without importing TVM."""

    @property
    def kind(self) -> str: ...
    @property
    def workload_key(self) -> str: ...
    @property
    def tile_rows(self) -> int: ...
    @property
    def source(self) -> str: ...
    @property
    def kernels(self) -> Sequence[_LaunchLike]: ...
    @property
    def workspaces(self) -> Sequence[_BufferLike]: ...
    @property
    def object_code(self) -> bytes: ...
    @property
    def arguments(self) -> tuple[str, ...]: ...


def pack(code: GeneratedLike, binary: bytes, resources: Mapping[str, float]) -> Artifact:
    """Artifact of generated code and its binary."""
    return Artifact(
        code.kind,
        code.workload_key,
        code.tile_rows,
        tuple(tensor_shapes(Workload.parse(code.workload_key), code.tile_rows)),
        tuple(
            Launch(
                *(k.name, k.grid, k.block, k.dynamic_smem_bytes, tuple(k.arguments)),
                dependent=bool(getattr(k, "dependent", False)),
                early=bool(getattr(k, "early", False)),
            )
            for k in code.kernels
        ),
        tuple(Buffer(w.name, w.dtype, w.elements) for w in code.workspaces),
        binary,
        code.source,
        dict(resources),
    )


_NODES = (
    ast.Expression,
    ast.BinOp,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.FloorDiv,
)


@cache
def _compiled(expression: str) -> CodeType:
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise BuildError(f"{expression!r} is not a launch expression.") from error
    if not all(isinstance(node, _NODES) for node in ast.walk(tree)):
        raise BuildError(f"{expression!r} is not a launch expression.")
    return compile(tree, "<launch>", "eval")


def evaluate(expression: str, *, tokens: int, tiles: int) -> int:
    """Value of a launch expression: integers, tokens, tiles, + - * // and parentheses only.

    Raises:
        BuildError: anything else stands in the expression.
    """
    scope = {"__builtins__": {}, "tokens": tokens, "tiles": tiles}
    try:
        return int(eval(_compiled(expression), scope))
    except NameError as error:
        raise BuildError(f"{expression!r} uses more than tokens and tiles.") from error


def tensor_shapes(workload: Workload, tile_rows: int) -> dict[str, tuple[str, ...]]:
    """Shape of each tensor that a caller gives, in the order of `Artifact.arguments`; an entry
    is a number or one of SCALARS."""
    slices = range(workload.slices)
    rank, width = str(workload.rank), str(workload.in_features)
    shapes: dict[str, tuple[str, ...]] = {"x": ("tokens", width)}
    shapes |= {f"a{s}": ("slots", rank, width) for s in slices}
    shapes |= {f"b{s}": ("slots", str(workload.out_features[s]), rank) for s in slices}
    for table in TILE_TABLES if tile_rows else ROW_TABLES:
        shapes[table] = ("tiles",) if table.startswith("tile_") else ("tokens",)
    shapes["y_in"] = shapes["y"] = ("tokens", str(workload.total_out))
    return shapes


def shift_of(name: str) -> str | None:
    """Stack that a kernel's scalar locates: "a1" for "a1_shift", None for another name.

    Code addresses the stacks of all slices from the first one's, see lowering/program.py: a
    shift is the distance of the stack from a0 or b0 in groups of SHIFT_BYTES bytes.
    """
    return name.removesuffix("_shift") if name.endswith("_shift") else None
