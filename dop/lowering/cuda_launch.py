"""What a CUDA kernel does first: reads its tile's tables, and waits for the kernel before it.

Two edits of the generated text, kernel by kernel:

- The tables' entries of the tile (slot, rank, scale, ...) are read once, side by side, before the
  first branch. As generated, the scale would be read at the end, and the rank after the slot.
- Programmatic dependent launch (PR dependent_launch): a kernel that reads a workspace may start
  while the one that fills it still runs. It waits (griddepcontrol.wait) in front of the first
  statement that reads a workspace, so what stands before that statement, the loads of weights and
  of y, overlaps with its predecessor. The first kernel lets the next one start at once
  (griddepcontrol.launch_dependents): what its own predecessors wrote is complete by then, since
  it was launched without the attribute.
- With value 2 the first kernel is a dependent launch too, whatever comes before it: it waits
  before it reads anything and releases its successor behind the wait, so by the time that one
  starts, everything before the pair is complete, as with value 1. Later kernels release at once, in
  front of their own wait: only the next launch overlaps with them. The workspace stays safe: the
  next call's first kernel writes it behind its wait, thus after the end of the kernel that reads
  it, however early that one released. A program of one kernel knows value 2 only.
- With value 3 the first kernel reads its tables and A in front of its wait, and waits in front of
  the first statement that reads x or writes v; it releases behind the wait, as with value 2. Such
  a kernel is *early*: launched plainly it is right behind anything, and it may be launched as a
  dependent one by a caller who knows that the tables and A were complete before its predecessor
  started (dop/ops/settled.py says how the operator knows).

Why that is enough, whatever stands in between. Let F be a plain launch behind the last write of
the tables and of A. F starts when everything before it is complete and in the L2 cache. A
dependent launch starts when all blocks of its predecessor have released it or ended, so they have
started: by induction every kernel behind F starts after F has, however early the ones between
them release. An early kernel behind F therefore finds the tables and A complete.

What a kernel reads of y, A or a table in front of its wait was complete before it started, but
only behind the wait does the L1 cache surely forget what it held of them before: they are read
past it (ld.global.cg), A and the tables where the kernel is an early one.

Every block of a dependent kernel waits, one without rows too. If none did, the kernel could end
before its predecessor, and a later kernel would no longer be ordered behind that one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dop.errors import BuildError
from dop.space.early import EARLY

WAIT = "  dop_wait_for_predecessor();\n"
RELEASE = "  dop_release_successor();\n"
HELPERS = """\
__device__ void dop_wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ void dop_release_successor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
template <int bytes> struct dop_word;
template <> struct dop_word<2> { typedef unsigned short type; };
template <> struct dop_word<4> { typedef unsigned int type; };
template <> struct dop_word<8> { typedef uint2 type; };
template <> struct dop_word<16> { typedef uint4 type; };
template <typename T>
__device__ __forceinline__ T dop_past_l1(const T* at) {
  typedef typename dop_word<sizeof(T)>::type word;
  const word value = __ldcg(reinterpret_cast<const word*>(at));
  return *reinterpret_cast<const T*>(&value);
}

"""
"""Without effect on GPUs before Hopper, where kernels are launched one after the other."""

_KERNEL = re.compile(
    r'^extern "C" __global__ void (?:\w*__cluster_dims__\([^)]*\) )?'
    r"(?:__launch_bounds__\(\d+\) )?(\w+)\([^)]*\) \{\n(.*?)^\}\n",
    re.MULTILINE | re.DOTALL,
)
_ENTRY = re.compile(
    r"\((?P<null>(?:token|tile)_(?:rank|scale))_ptr \? "
    r"(?P=null)_ptr\[\(\(int\)blockIdx\.x\)\] : (?P<default>[\w.]+)\)"
    r"|\b(?P<plain>(?:token|tile)_(?:slot|row0|rows|rank|scale))_ptr"
    r"\[(?:\(\(int\)blockIdx\.x\)|blockIdx\.x)\]"
)
"""An entry of the block's tile: of a table that may be null, or of another one."""

_GUARD = "  if (tile_rows_here <= 0) return;\n"
_ROW = re.compile(r"\brow_index_ptr\[\(?tile_row0_here(?: \+ (\d+)\))?\]")
"""The token of a row whose number in the tile is known."""


def order_start(
    source: str, kernels: Sequence[str], workspaces: Sequence[str], dependent: int
) -> tuple[str, frozenset[str]]:
    """The source with both edits, and the kernels to launch as dependent ones; an early one is not
    among them.

    Args:
        kernels: names in the order of their launches.
        workspaces: what kernels hand to later ones.
        dependent: value of PR dependent_launch; 0: plain launches; 1: all but the first wait;
            2: the first one too, before it reads anything; 3: before it reads x.

    Raises:
        BuildError: the text is not of the form that these edits expect.
    """
    bodies = {m[1]: m for m in _KERNEL.finditer(source)}
    if set(bodies) != set(kernels):
        raise BuildError(f"kernels {sorted(set(kernels) - set(bodies))} are not in the source.")
    waiting: set[str] = set()
    parts, end = [], 0
    for match in sorted(bodies.values(), key=lambda m: m.start()):
        name, head = match[1], source[match.start() : match.start(2)]
        body = _tables_first(match[2])
        if dependent and name != kernels[0]:
            body = _past_l1(_waiting(body, name, workspaces), "y_in")
            waiting.add(name)
        if dependent == EARLY and name == kernels[0]:
            body = _early(body, name, workspaces)
            waiting.add(name)
        elif dependent > 1 or (dependent and name != kernels[-1]):
            body = RELEASE + body
        if dependent == 2 and name == kernels[0]:
            body = WAIT + body
            waiting.add(name)
        if name in waiting:
            # Workspaces change while the kernel runs, so they are no constants to it. And loads of
            # constants would move across the wait: compilers keep only the others in their place.
            head = head.replace(" __restrict__", "")
        parts += [source[end : match.start()], head, body]
        end = match.end(2)
    source = "".join([*parts, source[end:]])
    if waiting:
        first = source.index('extern "C" __global__')
        source = source[:first] + HELPERS + source[first:]
    return source, frozenset(waiting) - (set(kernels[:1]) if dependent == EARLY else set())


def wait_first(kernel: str) -> str:
    """A kernel, as text, that releases its successor by itself: it waits before it reads anything.

    Raises:
        BuildError: the text holds no kernel.
    """
    head, body = _head_and_body(kernel, "wait in")
    return head.replace(" __restrict__", "") + WAIT + body


def loads_in_place(kernel: str) -> str:
    """A kernel, as text, with a wait of its own, which no load of a constant may pass.

    Raises:
        BuildError: the text holds no kernel.
    """
    head, body = _head_and_body(kernel, "wait in")
    return head.replace(" __restrict__", "") + body


def release_first(kernel: str) -> str:
    """A kernel, as text, that lets its successor start at once.

    Raises:
        BuildError: the text holds no kernel.
    """
    head, body = _head_and_body(kernel, "release from")
    return head + RELEASE + body


def _head_and_body(kernel: str, purpose: str) -> tuple[str, str]:
    """Cut in front of the first statement."""
    match = _KERNEL.search(kernel)
    if not match:
        raise BuildError(f"there is no kernel to {purpose}.")
    return kernel[: match.start(2)], kernel[match.start(2) :]


def _tables_first(body: str) -> str:
    """The body with its tile's entries in variables, read before anything else."""
    found: dict[str, str] = {}

    def entry(match: re.Match[str]) -> str:
        name = match["null"] or match["plain"]
        value = f"{name}_ptr[blockIdx.x]"
        if match["null"]:
            value = f"{name}_ptr ? {value} : {match['default']}"
        if found.setdefault(name, value) != value:
            raise BuildError(f"table {name} is read in two ways.")
        return f"{name}_here"

    body = _ENTRY.sub(entry, body)
    if not found:
        return body
    lines, operands = [], []
    for name, value in found.items():
        real = name.endswith("_scale")
        lines.append(f"  const {'float' if real else 'int'} {name}_here = {value};\n")
        operands.append(f'"{"f" if real else "r"}"({name}_here)')
    # An empty statement that uses them: no compiler moves the loads behind a branch.
    lines.append(f'  asm volatile("" :: {", ".join(operands)});\n')
    return "".join([*lines, _rows_first(body)])


def _rows_first(body: str) -> str:
    """The body of a tile's kernel with the tokens of its rows read side by side behind the guard.

    As generated, each row's token is read where its row of x or y is, behind a branch, and again
    behind every store that might change the table.
    """
    rows = sorted({int(m[1] or 0) for m in _ROW.finditer(body)})
    if not rows or _GUARD not in body:
        return body
    lines = [
        f"  const int row_{i}_here = {i} < tile_rows_here ? "
        f"row_index_ptr[tile_row0_here + {i}] : 0;\n"
        for i in rows
    ]
    operands = ", ".join(f'"r"(row_{i}_here)' for i in rows)
    lines.append(f'  asm volatile("" :: {operands});\n')
    body = _ROW.sub(lambda m: f"row_{int(m[1] or 0)}_here", body)
    return body.replace(_GUARD, _GUARD + "".join(lines), 1)


def _past_l1(body: str, names: str) -> str:
    """The body with its loads of some arrays (alternatives of a pattern) going to the L2 cache."""
    vector = re.compile(rf"\*\((\w+)\*\)(?=\((?:{names})_ptr \+)")
    body = vector.sub(r"dop_past_l1((const \1*)", body)
    body = _closed(body, re.compile(r"dop_past_l1\(\(const \w+\*\)(?=\()"), "(", ")")
    body = re.sub(rf"\b({names})_ptr(?=\[)", r"dop_past_l1(&\1_ptr", body)
    return _closed(body, re.compile(rf"dop_past_l1\(&(?:{names})_ptr(?=\[)"), "[", "]")


def _closed(body: str, head: re.Pattern[str], opening: str, closing: str) -> str:
    """The body with a parenthesis behind the bracket that follows each match of `head`."""
    parts, done = [], 0
    for match in head.finditer(body):
        depth, at = 0, match.end()
        while True:
            depth += (body[at] == opening) - (body[at] == closing)
            at += 1
            if depth == 0:
                break
        parts += [body[done:at], ")"]
        done = at
    return "".join([*parts, body[done:]])


_BEFORE_THE_WAIT = r"a|row_index|(?:token|tile)_\w+?"
"""What an early kernel reads in front of its wait."""


def _early(body: str, name: str, workspaces: Sequence[str]) -> str:
    """The body of an early kernel: it waits before it reads x, writes or leaves, then releases."""
    body = _past_l1(body, _BEFORE_THE_WAIT)
    body = _waiting(body, name, ("x", "y", "y_in", *workspaces), WAIT + RELEASE)
    if re.search(r"\ba_ptr\b", body[body.rindex(WAIT) :]):
        raise BuildError(f"kernel {name} reads A behind x, so it cannot wait between them.")
    return body


def _waiting(body: str, name: str, arrays: Sequence[str], wait: str = WAIT) -> str:
    """The body of a dependent kernel: it waits before it touches one of the arrays or leaves."""
    lines = body.splitlines(keepends=True)
    pattern = re.compile(rf"\b(?:{'|'.join(arrays)})_ptr\b")
    reads = [i for i, line in enumerate(lines) if pattern.search(line)]
    if not arrays or not reads:
        raise BuildError(f"kernel {name} reads no workspace, so it has nothing to wait for.")
    at = reads[0]
    while at and (lines[at].startswith("   ") or lines[at].startswith("  }")):
        at -= 1  # to the statement of the body itself, which every thread comes to
    lines.insert(at, wait)
    leave = re.compile(r"^  if \((.*)\) return;\n$")
    for i, line in enumerate(lines[:at]):
        match = leave.match(line)
        if match:
            lines[i] = f"  if ({match[1]}) {{\n  {WAIT}    return;\n  }}\n"
    return "".join(lines)
