"""The loop nest of a trace, for people."""

from __future__ import annotations

from dop.lowering.apply import apply_trace
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload


def loop_nest(workload: Workload, trace: Trace, target: Target, upto: int | None = None) -> str:
    """Loops and statements of the program after the first `upto` steps, indented.

    Raises:
        TraceError: the trace does not fit the workload.
    """
    del target  # the nest is the same for every device; codegen differs
    script = apply_trace(workload, trace, upto).schedule.mod.script()
    lines = []
    for line in script.splitlines():
        text = line.strip()
        if text.startswith("for "):
            lines.append(line)
        elif text.startswith("with T.sblock(") and '"root"' not in text:
            lines.append(line.replace("with T.sblock(", "").replace("):", "").replace('"', ""))
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    return "\n".join(line[indent:] for line in lines)
