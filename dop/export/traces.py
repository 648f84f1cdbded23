"""What an export knows for whoever tunes next: the steps of its kernels, and of what was fastest.

An index names a trace by its key, which is all that serving needs. `traces.json` beside it holds

    {"steps": [step, ...], "traces": {trace key: [sketch, [place of each of its steps, ...]]}}

with every step once, since traces share most of theirs: those of the kernels that are shipped, and
of the fastest of each batch (`Fit.best_trace_key`), which may not be. Exports of older versions
have no such file; `add_traces` gives a pack one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dop.database.wire import Entry
from dop.errors import DopError, ExportError
from dop.export.index import DAMAGED, Index
from dop.export.pack import PackFile, add_file
from dop.export.select import Selection
from dop.export.transfer import TWINS, step_in, translated
from dop.recorded import DEFAULT_MARK
from dop.space.step import parse_step
from dop.space.trace import MAX_STEPS, Trace
from dop.workload import Workload

TRACES = "traces.json"


@dataclass(frozen=True, slots=True)
class Known:
    """A trace and the name of its sketch."""

    sketch: str
    trace: Trace


def traces_of(selection: Selection) -> bytes:
    """The file for a selection: its kernels, and the fastest of each batch."""
    found = {k.trace_key: Known(k.record.sketch, k.record.trace) for k in selection.kernels}
    return dump({**_known(selection.winners), **found})


def dump(known: Mapping[str, Known]) -> bytes:
    """The file for traces by their key; the same traces give the same bytes."""
    places: dict[str, int] = {}
    traces = {}
    for key, (sketch, trace) in sorted((k, (v.sketch, v.trace)) for k, v in known.items()):
        steps = [json.dumps(step, separators=(",", ":")) for step in trace.to_json()]
        name = sketch.removesuffix(DEFAULT_MARK)
        traces[key] = [name, [places.setdefault(step, len(places)) for step in steps]]
    text = json.dumps(traces, separators=(",", ":"))
    return f'{{"steps":[{",".join(places)}],"traces":{text}}}'.encode()


def parse(data: bytes, where: object, dtype: str = "") -> dict[str, Known]:
    """The traces of a file by their key; their steps share objects.

    Args:
        data: the file's content.
        where: path, for the message.
        dtype: 16-bit type in which they are wanted: intrinsics of the other one are renamed, and
            keys stay what they were. "": as they are.

    Raises:
        ExportError: the file is damaged.
    """
    try:
        content = json.loads(data)
        steps = [parse_step(step) for step in content["steps"]]
        if dtype in TWINS:
            steps = [step_in(step, TWINS[dtype], dtype) for step in steps]
        known = {}
        for key, (sketch, places) in content["traces"].items():
            if len(places) > MAX_STEPS or min(places, default=0) < 0:
                raise ValueError(f"the steps of {str(key)[:40]!r}")
            known[str(key)] = Known(str(sketch), Trace(tuple([steps[i] for i in places])))
        return known
    except (*DAMAGED, DopError, RecursionError) as error:
        raise ExportError(
            f"{where}: {TRACES} is damaged ({type(error).__name__}: {str(error)[:120]}).",
            "Get the file again, or export it again.",
        ) from error


def add_traces(path: Path, entries: Iterable[Entry]) -> tuple[int, int]:
    """Gives a pack its traces, for one that an older version of Dop wrote; the rest stays.

    Args:
        path: the pack.
        entries: of the log that it was made of.

    Returns:
        Of the traces that the pack's table names, how many the entries have and how many not.

    Raises:
        ExportError: the pack is damaged or cannot be written, or the entries have none of them.
    """
    index = PackFile(path).index
    wanted = _named(index)
    known = _known(e for e in entries if e.ok and e.trace_key in wanted)
    known |= _in_other_dtypes(index, known)
    found = {key: known[key] for key in wanted if key in known}
    if not found:
        raise ExportError(f"the log has no trace of {path}.", "Give the one that it was made of.")
    add_file(path, TRACES, dump(found))
    return len(found), len(wanted) - len(found)


def _known(entries: Iterable[Entry]) -> dict[str, Known]:
    """By trace key; what cannot be read any more is left out."""
    found: dict[str, Known] = {}
    for entry in entries:
        if entry.trace_key not in found:
            with contextlib.suppress(DopError):
                found[entry.trace_key] = Known(entry.sketch, entry.trace())
    return found


def _named(index: Index) -> dict[str, None]:
    """Keys that the table names, each once."""
    keys: dict[str, None] = {}
    for table in index.table.workloads.values():
        keys |= dict.fromkeys(table.trace_keys)
        keys |= dict.fromkeys(fit.best_trace_key for fit in table.fits)
    return keys


def _in_other_dtypes(index: Index, known: Mapping[str, Known]) -> dict[str, Known]:
    """What is shipped in a type that it was not tuned in, see `dop.export.transfer`."""
    found: dict[str, Known] = {}
    pairs = {(k.transferred_from, k.workload.dtype) for k in index.kernels.values()}
    for source, dtype in sorted(pair for pair in pairs if pair[0] in index.table.workloads):
        keys = index.table.workloads[source].trace_keys
        for one in (known[key] for key in keys if key in known):
            trace = translated(one.trace, Workload.parse(source).dtype, dtype)
            found[trace.key] = Known(one.sketch, trace)
    return found
