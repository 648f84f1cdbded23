"""Form of the program: a row per tile, or tiles of several rows of one segment."""

from __future__ import annotations

from dataclasses import dataclass

from dop.space.rule import SketchState
from dop.space.stages import TOKEN_AXIS


@dataclass(frozen=True)
class RowForm:
    """Row form: every token is a tile of its own, addressed directly (CUDA decode)."""

    name: str = "rows"
    stage: str = "tokens"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != "cuda":
            return []
        new = state.fork(self.name)
        new.notes["rows"] = 1
        return [new]


@dataclass(frozen=True)
class TileForm:
    """Tile form: the ragged token axis is split (SP), the other stages follow (FSP)."""

    name: str
    choices: tuple[int, ...]
    default: int
    kind: str
    stage: str = "tokens"

    def apply(self, state: SketchState) -> list[SketchState]:
        if state.target.kind != self.kind:
            return []
        new = state.fork(self.name)
        rows = new.param("tokens.tile_rows", "tile", self.choices, self.default)
        source = new.split("gather_x", TOKEN_AXIS["gather_x"], [rows])
        for stage, axis in TOKEN_AXIS.items():
            if stage != "gather_x":
                new.follow_split(stage, axis, source, 1)
        new.notes["tiled"] = 1
        return [new]
