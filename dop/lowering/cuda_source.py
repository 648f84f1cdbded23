"""TVM's CUDA text made ready to ship: guarded, 64-bit weight offsets, honest about aliasing."""

from __future__ import annotations

import re

from dop.errors import BuildError
from dop.lowering.program import Program

_HEAD = re.compile(
    r'extern "C" __global__ void (?:\w*__cluster_dims__\([^)]*\) )?(?:__launch_bounds__\(\d+\) )?'
    r"(\w+)\(([^)]*)\)\s*(\{|;)"
)


def signatures(source: str) -> list[tuple[str, tuple[str, ...]]]:
    """Kernels defined in the source with the names of their parameters, in order."""
    found = []
    for match in _HEAD.finditer(source):
        if match[3] == "{":
            parameters = [p.split()[-1].lstrip("*") for p in match[2].split(",") if p.strip()]
            found.append((match[1], tuple(re.sub(r"_ptr$", "", p) for p in parameters)))
    return found


def finish(source: str, program: Program, kernels: tuple[str, ...]) -> str:
    """The source with what TVM cannot express.

    - Kernels return at once for tiles without rows (tokens without adapter): the grid depends on
      the token count only, so there are such tiles.
    - Offsets into weight stacks are computed in 64 bits.
    - A caller without ranks or scales gives null pointers for their tables.
    - y and y_in are one array, so neither is __restrict__; every element is read and written by
      one thread only.

    Raises:
        BuildError: the text is not of the form that these edits expect.
    """
    slot = f"{program.slot_table}_ptr"
    # TVM writes a vector's operands down in variables of their types: offsets would lose bits.
    if re.search(rf"\bu?int\d? \w+ = .*(?:_shift\b|\b{slot}\[)", source):
        raise BuildError("a weight load is neither a vector nor a scalar.", "Use another width.")
    source = re.sub(r"\bint ([ab]\d_shift)\b", r"long long \1", source)
    source = re.sub(rf"(?<!\w){slot}\[", f"(long long){slot}[", source)
    # TVM's cp.async helper takes its source offset as an int.
    source = re.sub(r"\bint src_off\b", "long long src_off", source)
    source = re.sub(r"\* __restrict__ (y_ptr|y_in_ptr)", r"* \1", source)
    source = _optional(source)
    table, empty = (slot, "< 0") if not program.tile_rows else ("tile_rows_ptr", "<= 0")
    for name in kernels:
        source = _guard(source, name, f"  if ({table}[blockIdx.x] {empty}) return;\n")
    return source


_OPTIONAL = {"rank": "1073741824", "scale": "1.0f"}
"""What stands for a table that the caller did not give: no limit, no factor."""


def _optional(source: str) -> str:
    """Reads of the rank and scale tables, which may be null.

    Raises:
        BuildError: a table is read in another way than element by element.
    """
    for what, default in _OPTIONAL.items():
        name = rf"(?:token|tile)_{what}_ptr"
        source = re.sub(rf"\b({name})\[([^\[\]]*)\]", rf"(\1 ? \1[\2] : {default})", source)
        if re.search(rf"\({name}\b(?! \?)|{name} [+-]", source):
            raise BuildError(f"a table of {what}s is read as a vector.", "Use another width.")
    return source


def _guard(source: str, kernel: str, guard: str) -> str:
    for match in _HEAD.finditer(source):
        if match[1] == kernel and match[3] == "{":
            table = guard[guard.index("(") + 1 : guard.index("[")]
            if f" {table}" not in match[2]:
                raise BuildError(f"kernel {kernel} does not take {table}.")
            return source[: match.end()] + "\n" + guard + source[match.end() :].lstrip("\n")
    raise BuildError(f"kernel {kernel} is not in the source.")
