"""SGMV before any scheduling, as TensorIR.

The program is rendered as TVMScript text, so that a person can read what is scheduled. Six stages:

    gather_x    xg[t, i, k]    = x[row(t, i), k]
    gather_a    ag[s, t, r, k] = A_s[slot(t), r, k]
    shrink      v[s, t, i, r]  = sum_k xg * ag                      (fp32)
    gather_b    bg[t, n, r]    = B_s(n)[slot(t), n - offset, r]
    expand      d[t, i, n]     = sum_r scale(t) * [r < rank(t)] v[s(n), t, i, r] * bg   (fp32)
    accumulate  y[row(t, i), n] = y_in[row(t, i), n] + d

Tokens, tiles and slots are symbolic: one binary serves every batch. Two forms:

- row form (tile_rows = 0): tile t is token t, i has extent 1 and `token_slot` names its adapter;
  rows of tokens without adapter (-1) must be skipped by the kernel (codegen guards its entry).
- tile form: tile t is up to `tile_rows` rows of one segment: `row_index[tile_row0[t] + i]` for
  i < `tile_rows[t]`; rows behind that read as zero and are not written.

Rank and scale of the tile's adapter stand beside its slot (`token_rank`, `token_scale`, or
`tile_...`), so that no load waits for another. Elements of v behind the adapter's rank count as
zero, so what stands behind it in A and B has no influence (as long as it is finite). On a GPU
(`clamp`) the loads behind it are turned back to the last element in use: an adapter of rank 8 in
a stack of rank 64 moves the bytes of rank 8, and the loads stay unconditional.

For tensor cores (`matrix`) the rank axis is padded with zeros to a multiple of 16, and two copies
are stages of their own: v in the operands' type, and the rows of y that a tile updates. The second
one exists without tensor cores too where a trace stages y (`stage_y`):

    shrink_in      vc[t, g, i, r] = scale(t) * [r < rank(t)] v[s(g), t, i, r]
                   g: columns in groups that no slice border cuts
    accumulate_in  yc[t, i, n]    = y_in[row(t, i), n]

The weight stacks of all slices are addressed from the first slice's: `a` is A_0 as a flat array and
A_s begins `a{s}_shift` groups of 16 bytes behind it (the stacks are separate allocations). So a
slice is a number and not a branch, and loads stay vectors. Offsets are 32 bits wide here; codegen
widens them to 64 bits in CUDA source (on a CPU, stacks out of their reach are refused).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dop.workload import Workload

Axes = dict[str, int | str]
"""Loops of a stage with their extents: a number or the name of a symbol."""

TABLES_ROW = ("token_slot", "token_rank", "token_scale")
TABLES_TILE = ("tile_slot", "tile_row0", "tile_rows", "tile_rank", "tile_scale", "row_index")
FLOAT_TABLES = ("token_scale", "tile_scale")
"""Tables of float32; the others hold int32."""


def shift_names(slices: int) -> tuple[str, ...]:
    """Names of the scalar arguments that locate the stacks of slices 1 and up."""
    return tuple(f"{stack}{s}_shift" for stack in "ab" for s in range(1, slices))


@dataclass(frozen=True, slots=True)
class Program:
    """A workload in one of the two forms.

    Attributes:
        workload: shapes and types.
        tile_rows: rows of a tile; 0 for the row form.
        pack: (lanes, vector) if the k axis is written as (group, lane, element), else None.
        matrix: the form for tensor cores: padded rank, v converted in a stage of its own.
        clamp: loads of A and B behind the adapter's rank are turned back to its last element.
        stage_y: the old values of y are read in a stage of their own.
        scaled_b: rank and scale of the adapter are applied to bg instead of v, which pays where a
            copy of B serves many rows.
        near_rows: rows behind a tile's end repeat its last one instead of being zero, so that x is
            loaded without a condition; what they make of v is never used. An empty tile reads the
            row that its tile_row0 names, which must be one of the batch.
    """

    workload: Workload
    tile_rows: int
    pack: tuple[int, int] | None = None
    matrix: bool = False
    clamp: bool = False
    stage_y: bool = False
    scaled_b: bool = False
    near_rows: bool = False

    @property
    def reads_y_early(self) -> bool:
        """Whether there is a stage accumulate_in."""
        return self.matrix or self.stage_y

    @property
    def rank(self) -> int:
        """Extent of the rank axis."""
        return -(-self.workload.rank // 16) * 16 if self.matrix else self.workload.rank

    @property
    def _k(self) -> tuple[Axes, str, str]:
        """The k axis: its loops, the index in gathered buffers and the column of x and A."""
        k = self.workload.in_features
        if self.pack is None:
            return {"k": k}, "vk", "vk"
        lanes, vector = self.pack
        groups = -(-k // (lanes * vector))
        column = f"vg * {lanes * vector} + vl * {vector} + ve"
        return {"g": groups, "l": lanes, "e": vector}, "vg, vl, ve", column

    @property
    def _k_guard(self) -> str:
        """Condition under which a packed element exists, or nothing if all do. It is the same for
        all elements of a vector, so that loads stay vectors."""
        if self.pack is None or self.workload.in_features % math.prod(self.pack) == 0:
            return ""
        lanes, vector = self.pack
        inner = f"vg * {lanes * vector} + vl * {vector}"
        if self.workload.in_features % vector:
            inner += " + ve"
        return f"{inner} < {self.workload.in_features}"

    @property
    def rows(self) -> int:
        """Extent of the row axis i."""
        return max(self.tile_rows, 1)

    @property
    def tiles(self) -> str:
        """Name of the symbolic number of tiles."""
        return "tiles" if self.tile_rows else "tokens"

    @property
    def tables(self) -> tuple[str, ...]:
        """Table arguments in order, see FLOAT_TABLES for their types."""
        return TABLES_TILE if self.tile_rows else TABLES_ROW

    @property
    def tensors(self) -> tuple[str, ...]:
        """Tensor arguments in order; a and b are the first slice's stacks."""
        return ("x", "a", "b", *self.tables, "y_in", "y")

    @property
    def shifts(self) -> tuple[str, ...]:
        """Scalar arguments behind the tensors (int32 here, int64 in CUDA source): where the other
        slices' stacks begin, in groups of 16 bytes from the first one."""
        return shift_names(self.workload.slices)

    @property
    def arguments(self) -> tuple[str, ...]:
        """All arguments in order."""
        return (*self.tensors, *self.shifts)

    @property
    def slot_table(self) -> str:
        """Name of the table that holds each tile's slot."""
        return self.tables[0]

    @property
    def _adapter_rank(self) -> str:
        """The adapter's rank; a caller may say more than the stack has, for a full one."""
        rank = f"{'tile' if self.tile_rows else 'token'}_rank[vt]"
        return rank if self.rank == self.workload.rank else f"T.min({rank}, {self.workload.rank})"

    @property
    def _adapter_scale(self) -> str:
        return f"{'tile' if self.tile_rows else 'token'}_scale[vt]"

    def source(self) -> str:
        """The program as TVMScript (without imports; T is tvm.script.tirx)."""
        lines = [
            "@T.prim_func(s_tir=True)",
            f"def main({', '.join(self._parameters())}):",
            '    T.func_attr({"global_symbol": "main", "tirx.noalias": True})',
            "    tokens = T.int32()",
            "    a_size = T.int32()",
            "    b_size = T.int32()",
        ]
        if self.tile_rows:
            lines.append("    tiles = T.int32()")
        lines += [f"    {line}" for line in self._buffers()]
        for stage in (
            self._gather_x(),
            self._gather_a(),
            self._shrink(),
            self._gather_b(),
            self._convert_v() if self.matrix else [],
            self._expand(),
            self._gather_y() if self.reads_y_early else [],
            self._accumulate(),
        ):
            lines += [f"    {line}" for line in stage]
        return "\n".join(lines) + "\n"

    def _parameters(self) -> list[str]:
        tensors = [f"{name}_h: T.handle" for name in self.tensors]
        return tensors + [f"{name}: T.int32" for name in self.shifts]

    def _buffers(self) -> list[str]:
        w, dtype, t = self.workload, self.workload.dtype, self.tiles
        shapes = {"x": (f"tokens, {w.in_features}", dtype)}
        shapes |= {"a": ("a_size,", dtype), "b": ("b_size,", dtype)}
        for table in self.tables:
            kind = "float32" if table in FLOAT_TABLES else "int32"
            shapes[table] = ("tokens," if table == "row_index" else f"{t},", kind)
        shapes["y_in"] = shapes["y"] = (f"tokens, {w.total_out}", dtype)
        matched = [
            f'{name} = T.match_buffer({name}_h, ({shapes[name][0]}), "{shapes[name][1]}")'
            for name in self.tensors
        ]
        k = ", ".join(map(str, self._k[0].values()))
        inner = {
            "xg": (f"{t}, {self.rows}, {k}", dtype),
            "ag": (f"{w.slices}, {t}, {self.rank}, {k}", dtype),
            "v": (f"{w.slices}, {t}, {self.rows}, {self.rank}", "float32"),
            "bg": (f"{t}, {w.total_out}, {self.rank}", "float32" if self.scaled_b else dtype),
            "d": (f"{t}, {self.rows}, {w.total_out}", "float32"),
        }
        if self.matrix:
            groups = w.total_out // self._group
            inner["vc"] = (f"{t}, {groups}, {self.rows}, {self.rank}", dtype)
        if self.reads_y_early:
            inner["yc"] = (f"{t}, {self.rows}, {w.total_out}", dtype)
        allocated = [
            f'{name} = T.sblock_alloc_buffer(({shape}), "{kind}")'
            for name, (shape, kind) in inner.items()
        ]
        return matched + allocated

    @property
    def _row(self) -> str:
        return "row_index[tile_row0[vt] + vi]" if self.tile_rows else "vt"

    def _gather_x(self) -> list[str]:
        w = self.workload
        loops, index, column = self._k
        guards = [self._k_guard] if self._k_guard else []
        row = self._row
        if self.tile_rows and self.near_rows:
            row = "row_index[tile_row0[vt] + T.max(T.min(vi, tile_rows[vt] - 1), 0)]"
        elif self.tile_rows:
            guards.append("vi < tile_rows[vt]")
        if self.matrix:
            # An asynchronous copy takes its condition as an operand: it always needs an address.
            row = "row_index[T.min(tile_row0[vt] + vi, tokens - 1)]"
        value = f"x[{row}, {column}]"
        for guard in guards:
            value = f'T.if_then_else({guard}, {value}, T.cast(0, "{w.dtype}"))'
        axes = {"t": self.tiles, "i": self.rows, **loops}
        return _stage("gather_x", axes, "S" * len(axes), [f"xg[vt, vi, {index}] = {value}"])

    def _stack(self, name: str, before: dict[int, str], offset: str, sizes: list[int]) -> str:
        """Element of a weight stack: the slice's begin, the slot's matrix, the offset in it.

        Factors of 8 stay visible behind every choice, so that TVM sees aligned vector loads.
        `before` says of each slice when an element lies in front of it. It is written with "<":
        TVM drops a vector's lanes from `64 * block + lane < 2048`, but not from its negation.
        """
        unit = math.gcd(8, *sizes)
        shift, size = "0", str(sizes[0] // unit)
        for s, condition in before.items():
            shift = f"T.Select({condition}, {shift}, {name}{s}_shift)"
            if sizes[s] != sizes[0]:
                size = f"T.Select({condition}, {size}, {sizes[s] // unit})"
        first = f"{shift} * {16 // self.workload.element_bytes} + " if before else ""
        return f"{name}[{first}{self.slot_table}[vt] * {size} * {unit} + {offset}]"

    def _gather_a(self) -> list[str]:
        w = self.workload
        before = {s: f"vs < {s}" for s in range(1, w.slices)}
        loops, index, column = self._k
        sizes = [w.rank * w.in_features] * w.slices
        row = f"T.min(vr, {self._adapter_rank} - 1)" if self.clamp else "vr"
        value = self._stack("a", before, f"({row} * {w.in_features} + {column})", sizes)
        if self._k_guard:
            value = f'T.if_then_else({self._k_guard}, {value}, T.cast(0, "{w.dtype}"))'
        value = self._padded(value)
        axes = {"s": w.slices, "t": self.tiles, "r": self.rank, **loops}
        return _stage("gather_a", axes, "S" * len(axes), [f"ag[vs, vt, vr, {index}] = {value}"])

    def _padded(self, value: str) -> str:
        """The element, or zero behind the last rank."""
        if self.clamp or self.rank == self.workload.rank:
            return value
        zero = f'T.cast(0, "{self.workload.dtype}")'
        return f"T.if_then_else(vr < {self.workload.rank}, {value}, {zero})"

    @property
    def _group(self) -> int:
        """Columns of y that surely belong to one slice."""
        return math.gcd(*self.workload.out_features)

    def _convert_v(self) -> list[str]:
        w = self.workload
        if len(set(w.out_features)) == 1:
            slice_of = "vg"
        else:
            # Quotients, not comparisons: TVM then sees that a block's columns have one slice.
            slice_of = " + ".join(f"T.min(vg // {o // self._group}, 1)" for o in w.offsets[1:])
        axes: dict[str, int | str] = {
            "t": self.tiles,
            "g": w.total_out // self._group,
            "i": self.rows,
            "r": self.rank,
        }
        v = self._masked(f"v[{slice_of}, vt, vi, vr]")
        value = f'T.cast({v}, "{w.dtype}")'
        return _stage("shrink_in", axes, "SSSS", [f"vc[vt, vg, vi, vr] = {value}"])

    def _shrink(self) -> list[str]:
        w = self.workload
        loops, index, _ = self._k
        axes: Axes = {
            "s": w.slices,
            "t": self.tiles,
            "i": self.rows,
            "r": self.rank,
            **loops,
        }
        x, a = f"xg[vt, vi, {index}]", f"ag[vs, vt, vr, {index}]"
        product = f'T.cast({x}, "float32") * T.cast({a}, "float32")'
        kinds = "SSSS" + "R" * len(loops)
        return _stage("shrink", axes, kinds, _sum("v[vs, vt, vi, vr]", product))

    def _gather_b(self) -> list[str]:
        w = self.workload
        before = {s: f"vn < {o}" for s, o in enumerate(w.offsets) if s}
        first = "0"
        for s in range(1, w.slices):
            first = f"T.Select({before[s]}, {first}, {w.offsets[s]})"
        sizes = [width * w.rank for width in w.out_features]
        column = "vr"
        if self.clamp:
            # In whole groups of 8, so that loads along the rank stay vectors. The last group is a
            # shift: of two quotients TVM makes the quotient of the lesser dividend, and then does
            # not see any more that the elements of a narrower load lie side by side.
            unit = math.gcd(8, w.rank)
            last = f"T.shift_right({self._adapter_rank} - 1, {unit.bit_length() - 1})"
            group = f"T.min(vr // {unit}, {last})"
            column = f"{group} * {unit} + vr % {unit}"
        offset = f"((vn - {first}) * {w.rank} + {column})"
        value = self._padded(self._stack("b", before, offset, sizes))
        if self.scaled_b:
            factor = f"T.Select(vr < {self._adapter_rank}, {self._adapter_scale}, T.float32(0))"
            value = f'T.cast({value}, "float32") * {factor}'
        axes: Axes = {"t": self.tiles, "n": w.total_out, "r": self.rank}
        return _stage("gather_b", axes, "SSS", [f"bg[vt, vn, vr] = {value}"])

    def _expand(self) -> list[str]:
        w = self.workload
        slice_of = " + ".join(f'(1 - T.cast(vn < {o}, "int32"))' for o in w.offsets[1:]) or "0"
        axes: Axes = {"t": self.tiles, "i": self.rows, "n": w.total_out, "r": self.rank}
        v = f"v[{slice_of}, vt, vi, vr]"
        if not self.scaled_b:
            v = self._masked(v)
        if self.matrix:
            v = f'T.cast(vc[vt, vn // {self._group}, vi, vr], "float32")'
        product = f'{v} * T.cast(bg[vt, vn, vr], "float32")'
        return _stage("expand", axes, "SSSR", _sum("d[vt, vi, vn]", product))

    def _masked(self, v: str) -> str:
        """An element of v times the adapter's scale, or zero behind its rank.

        The scale is here and not in accumulate, whose loads TVM may turn into vectors of eight
        floats: it cannot broadcast a number to those.
        """
        inside = f"vr < {self._adapter_rank}"
        if self.clamp:  # v is finite there: a factor, for TVM makes a branch of a choice of loads
            return f'{v} * (T.cast({inside}, "float32") * {self._adapter_scale})'
        return f"T.Select({inside}, {v} * {self._adapter_scale}, T.float32(0))"

    def _gather_y(self) -> list[str]:
        w = self.workload
        value = f"y_in[{self._row}, vn]"
        if self.tile_rows:
            value = f'T.if_then_else(vi < tile_rows[vt], {value}, T.cast(0, "{w.dtype}"))'
        axes: dict[str, int | str] = {"t": self.tiles, "i": self.rows, "n": w.total_out}
        return _stage("accumulate_in", axes, "SSS", [f"yc[vt, vi, vn] = {value}"])

    def _accumulate(self) -> list[str]:
        w, row = self.workload, self._row
        y = "yc[vt, vi, vn]" if self.reads_y_early else f"y_in[{row}, vn]"
        total = f'T.cast({y}, "float32") + d[vt, vi, vn]'
        body = [f'y[{row}, vn] = T.cast({total}, "{w.dtype}")']
        if self.tile_rows:
            body = ["if vi < tile_rows[vt]:", f"    {body[0]}"]
        axes: Axes = {"t": self.tiles, "i": self.rows, "n": w.total_out}
        return _stage("accumulate", axes, "SSS", body)


def _stage(name: str, axes: Axes, kinds: str, body: list[str]) -> list[str]:
    loops = ", ".join(axes)
    return [
        f"for {loops} in T.grid({', '.join(map(str, axes.values()))}):",
        f'    with T.sblock("{name}"):',
        f'        {", ".join(f"v{a}" for a in axes)} = T.axis.remap("{kinds}", [{loops}])',
        *(f"        {line}" for line in body),
    ]


def _sum(target: str, product: str) -> list[str]:
    return ["with T.init():", f"    {target} = T.float32(0)", f"{target} = {target} + {product}"]
