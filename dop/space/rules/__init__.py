"""The rules, in the order in which they are tried. A new rule is one file and one line here."""

from dop.space.rule import Rule
from dop.space.rules.cpu_chunks import ChunkedLaneSums, StagedX
from dop.space.rules.cpu_columns import ColumnBlocks
from dop.space.rules.cpu_lane_sums import InlineA, InlineX, RowLaneSums
from dop.space.rules.cpu_shuffled_b import InlineB, WrittenOutSums
from dop.space.rules.cpu_turned_a import (
    BlockTiles,
    BroadcastX,
    RegisterBlocks,
    RegisterSums,
    SquaresOfA,
    SquaresOfB,
    TurnedRanks,
)
from dop.space.rules.cpu_turned_b import TurnedB, VectorColumns
from dop.space.rules.cuda_columns import (
    Columns,
    DirectB,
    EarlyB,
    ExpandInColumns,
    ExpandInWideColumns,
    WideColumns,
)
from dop.space.rules.cuda_lanes import EarlyLaneB, ExpandInLanes, LaneB, LaneColumns
from dop.space.rules.cuda_one_kernel import (
    BlockColumns,
    ExpandInSteps,
    ShrinkInBlock,
    StepB,
    StreamA,
    StreamX,
)
from dop.space.rules.cuda_shrink import DirectA, DirectX, SplitKShrink
from dop.space.rules.tensor_core_cluster import ClusterA, ClusterSplitK, ClusterX
from dop.space.rules.tensor_core_expand import (
    MatrixColumns,
    MatrixExpand,
    MatrixTiles,
    StagedB,
)
from dop.space.rules.tensor_core_fused import (
    FusedA,
    FusedB,
    FusedColumns,
    FusedProduct,
    FusedShrink,
    FusedTiles,
    FusedX,
)
from dop.space.rules.tensor_core_registers import (
    RegisterB,
    RegisterColumns,
    RegisterProduct,
    SharedB,
)
from dop.space.rules.tensor_core_shrink import MatrixSplitK, PipelinedX, StagedA
from dop.space.rules.tokens import RowForm, TileForm

RULES: tuple[Rule, ...] = (
    RowForm(),
    TileForm("row_tiles", (2, 4, 8, 16), 8, "cuda"),
    WideColumns(),
    ExpandInWideColumns(),
    EarlyB(),
    Columns(),
    ExpandInColumns(),
    DirectB(),
    LaneColumns("early_lanes", True),
    LaneColumns(),
    ExpandInLanes(),
    LaneB(),
    EarlyLaneB(),
    SplitKShrink(),
    DirectA(),
    DirectX(),
    BlockColumns(),
    ExpandInSteps(),
    StepB(),
    ShrinkInBlock(),
    StreamA(),
    StreamX(),
    MatrixTiles(),
    MatrixColumns(),
    MatrixExpand(),
    StagedB(),
    MatrixSplitK(),
    StagedA(),
    PipelinedX(),
    MatrixTiles("wide_tiles", wide=True),
    MatrixTiles("small_tiles", wide=True, few=True),
    RegisterColumns(),
    RegisterProduct(),
    RegisterB(),
    SharedB(),
    ClusterSplitK(),
    ClusterSplitK("warpgroup_split_k", warpgroups=True),
    ClusterSplitK("warpgroup_rank_blocks", warpgroups=True, rank_blocks=True),
    ClusterSplitK("warpgroup_clusters", warpgroups=True, several=True),
    ClusterSplitK("warpgroup_engine", warpgroups=True, engine=True),
    ClusterA(),
    ClusterX(),
    FusedTiles(),
    FusedColumns(),
    FusedProduct(),
    FusedB(),
    FusedShrink(),
    FusedA(),
    FusedX(),
    TileForm("few_rows", (2, 4, 8), 4, "cpu"),
    TileForm("single_rows", (1,), 1, "cpu"),
    TileForm("many_rows", (16, 32, 64), 32, "cpu"),
    ColumnBlocks(2),
    ColumnBlocks(1),
    WrittenOutSums(),
    InlineB(),
    VectorColumns(),
    TurnedB(),
    RowLaneSums(),
    ChunkedLaneSums(),
    InlineA(),
    InlineX(),
    StagedX(),
    BlockTiles("flat_tiles", (1, 2, 4)),
    BlockTiles("low_tiles", (8,)),
    BlockTiles("middle_tiles", (16, 32)),
    BlockTiles("tall_tiles", (64, 128)),
    RegisterBlocks(),
    RegisterSums(),
    SquaresOfB(),
    TurnedRanks(),
    SquaresOfA(),
    BroadcastX(),
)
"""All rules."""
