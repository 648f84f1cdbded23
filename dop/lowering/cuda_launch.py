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

Every block of a dependent kernel waits, one without rows too. If none did, the kernel could end
before its predecessor, and a later kernel would no longer be ordered behind that one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dop.errors import BuildError

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

"""
"""Without effect on GPUs before Hopper, where kernels are launched one after the other."""

_KERNEL = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\([^)]*\) \{\n(.*?)^\}\n',
    re.MULTILINE | re.DOTALL,
)
_ENTRY = re.compile(
    r"\((?P<null>(?:token|tile)_(?:rank|scale))_ptr \? "
    r"(?P=null)_ptr\[\(\(int\)blockIdx\.x\)\] : (?P<default>[\w.]+)\)"
    r"|\b(?P<plain>(?:token|tile)_(?:slot|row0|rows|rank|scale))_ptr"
    r"\[(?:\(\(int\)blockIdx\.x\)|blockIdx\.x)\]"
)
"""An entry of the block's tile: of a table that may be null, or of another one."""


def order_start(
    source: str, kernels: Sequence[str], workspaces: Sequence[str], dependent: int
) -> tuple[str, frozenset[str]]:
    """The source with both edits, and the kernels to launch as dependent ones.

    Args:
        kernels: names in the order of their launches.
        workspaces: what kernels hand to later ones.
        dependent: value of PR dependent_launch; 0: plain launches.

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
            body = _waiting(body, name, workspaces)
            waiting.add(name)
            # Workspaces change while the kernel runs, so they are no constants to it. And loads of
            # constants would move behind the wait: compilers keep only the others in their place.
            head = head.replace(" __restrict__", "")
        if dependent and name != kernels[-1]:
            body = RELEASE + body
        parts += [source[end : match.start()], head, body]
        end = match.end(2)
    source = "".join([*parts, source[end:]])
    if waiting:
        first = source.index('extern "C" __global__')
        source = source[:first] + HELPERS + source[first:]
    return source, frozenset(waiting)


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
    return "".join([*lines, body])


def _waiting(body: str, name: str, workspaces: Sequence[str]) -> str:
    """The body of a dependent kernel: it waits before it reads a workspace or leaves early."""
    lines = body.splitlines(keepends=True)
    pattern = re.compile(rf"\b(?:{'|'.join(workspaces)})_ptr\b")
    reads = [i for i, line in enumerate(lines) if pattern.search(line)]
    if not workspaces or not reads:
        raise BuildError(f"kernel {name} reads no workspace, so it has nothing to wait for.")
    at = reads[0]
    while at and (lines[at].startswith("   ") or lines[at].startswith("  }")):
        at -= 1  # to the statement of the body itself, which every thread comes to
    lines.insert(at, WAIT)
    leave = re.compile(r"^  if \((.*)\) return;\n$")
    for i, line in enumerate(lines[:at]):
        match = leave.match(line)
        if match:
            lines[i] = f"  if ({match[1]}) {{\n  {WAIT}    return;\n  }}\n"
    return "".join(lines)
