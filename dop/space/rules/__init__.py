"""The rules, in the order in which they are tried. A new rule is one file and one line here."""

from dop.space.rule import Rule
from dop.space.rules.cuda_columns import Columns, DirectB, ExpandInColumns
from dop.space.rules.cuda_shrink import DirectA, DirectX, SplitKShrink
from dop.space.rules.tokens import RowForm, TileForm

RULES: tuple[Rule, ...] = (
    RowForm(),
    TileForm("row_tiles", (2, 4, 8), 4, "cuda"),
    Columns(),
    ExpandInColumns(),
    DirectB(),
    SplitKShrink(),
    DirectA(),
    DirectX(),
)
"""All rules."""
