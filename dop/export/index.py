"""The index of an exported library or pack: what is in it, from and to JSON. Standard library only.

Both forms hold the same index: a library is a folder of files, a pack the same files in one
compressed file (`dop.export.pack`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dop.dispatch.table import Table
from dop.errors import ExportError
from dop.measure.artifact import Artifact, Buffer, Launch
from dop.workload import Workload

INDEX = "index.json"
FORMAT = "dop-library"
VERSION = 2
"""2: kernels take rank and scale tables; launches may be dependent."""

DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError)
"""What reading a wrong index raises."""


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """A kernel of the index.

    Attributes:
        name: unique in the library.
        workload: what it computes.
        trace_key: as the table names it.
        file: its binary; equal binaries are one file.
        entry: its C function (CPU).
        tile_rows: rows per tile of the plan it takes; 0: the row form.
        arguments: tensors in order.
        launches: kernels in order (CUDA).
        workspaces: what the launches share (CUDA).
        sketch: name of its structure, for people.
        source: file that holds its CUDA source, "" if that is not shipped.
        source_span: offset and length of it in that file, in bytes.
        min_arch: least compute capability times ten that its source builds for (CUDA).
        transferred_from: key of the workload it was tuned for, if that differs in the dtype;
            its times in the table are those.
        scenarios: measured seconds and floor by scenario key, of those the table gives to it.
    """

    name: str
    workload: Workload
    trace_key: str
    file: str
    entry: str
    tile_rows: int
    arguments: tuple[str, ...]
    launches: tuple[Launch, ...]
    workspaces: tuple[Buffer, ...]
    sketch: str = ""
    source: str = ""
    source_span: tuple[int, int] = (0, 0)
    min_arch: int = 80
    transferred_from: str = ""
    scenarios: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Index:
    """A library's index.

    Attributes:
        kind: "cuda" or "cpu".
        table: which kernel serves which batch.
        kernels: by name.
        files: sha256 by file name.
        provenance: log, device, versions, date, as `Provenance.to_json` wrote it.
        notes: what a person should know, one line each.
    """

    kind: str
    table: Table
    kernels: Mapping[str, KernelInfo]
    files: Mapping[str, str]
    provenance: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def parse_index(data: object, where: object) -> Index:
    """Index of its JSON form.

    Args:
        data: what `json.loads` gave.
        where: path, for the message.

    Raises:
        ExportError: it is no index, is damaged, or of another version.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ExportError(f"{where} is not the index of a library.", "Export it again.")
    if data.get("version") != VERSION:
        raise ExportError(
            f"{where} has format version {data.get('version')}, this Dop reads {VERSION}.",
            "Export it again with this version of Dop, or upgrade Dop.",
        )
    try:
        kernels = {str(k["name"]): _kernel(k) for k in data["kernels"]}
        table = Table.from_json(data["table"])
        files = {str(name): str(digest) for name, digest in data["files"].items()}
        notes = tuple(str(note) for note in data.get("notes", ()))
        index = Index(str(data["kind"]), table, kernels, files, dict(data["provenance"]), notes)
    except DAMAGED as error:
        raise ExportError(
            f"{where} is damaged ({type(error).__name__}: {error}).", "Export it again."
        ) from error
    _check_whole(index, where)
    return index


def _check_whole(index: Index, where: object) -> None:
    wanted = {name for k in index.kernels.values() for name in (k.file, k.source) if name}
    if not wanted <= set(index.files):
        raise ExportError(f"{where} lacks a binary.", "Export it again.")
    known = {(k.workload.key, k.trace_key) for k in index.kernels.values()}
    for key, table in index.table.workloads.items():
        if any((key, trace) not in known for trace in table.trace_keys):
            raise ExportError(f"{where} lacks a kernel of {key}.", "Export it again.")


def describe(
    name: str,
    trace_key: str,
    sketch: str,
    artifact: Artifact,
    place: tuple[str, str],
    scenarios: Mapping[str, Mapping[str, float | None]],
) -> dict[str, Any]:
    """A kernel's part of the index.

    Args:
        name: of the kernel.
        trace_key: `Trace.key`.
        sketch: name of the structure.
        artifact: what was built.
        place: its file, and its C entry or "".
        scenarios: as `KernelInfo.scenarios`.
    """
    file, entry = place
    return {
        "name": name,
        "workload": artifact.workload_key,
        "trace": trace_key,
        "sketch": sketch,
        "file": file,
        "entry": entry,
        "tile_rows": artifact.tile_rows,
        "arguments": list(artifact.arguments),
        "launches": [_describe_launch(launch) for launch in artifact.launches],
        "workspaces": [
            {"name": space.name, "dtype": space.dtype, "elements": space.elements}
            for space in artifact.workspaces
        ],
        "scenarios": {key: dict(times) for key, times in scenarios.items()},
    }


def _describe_launch(launch: Launch) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": launch.name,
        "grid": list(launch.grid),
        "block": list(launch.block),
        "dynamic_smem_bytes": launch.dynamic_smem_bytes,
        "arguments": list(launch.arguments),
    }
    if launch.dependent:
        found["dependent"] = True
    if launch.early:  # a reader that does not know the word launches it plainly
        found["early"] = True
    return found


def _kernel(data: Mapping[str, Any]) -> KernelInfo:
    spaces = tuple(Buffer(w["name"], w["dtype"], w["elements"]) for w in data["workspaces"])
    return KernelInfo(
        name=str(data["name"]),
        workload=Workload.parse(data["workload"]),
        trace_key=str(data["trace"]),
        file=str(data["file"]),
        entry=str(data["entry"]),
        tile_rows=int(data["tile_rows"]),
        arguments=tuple(data["arguments"]),
        launches=tuple(_launch(item) for item in data["launches"]),
        workspaces=spaces,
        sketch=str(data.get("sketch", "")),
        source=str(data.get("source", "")),
        source_span=_span(data.get("source_span", (0, 0))),
        min_arch=int(data.get("min_arch", 80)),
        transferred_from=str(data.get("transferred_from", "")),
        scenarios=data.get("scenarios", {}),
    )


def _span(data: Sequence[Any]) -> tuple[int, int]:
    offset, length = data
    return int(offset), int(length)


def _launch(item: Mapping[str, Any]) -> Launch:
    return Launch(
        str(item["name"]),
        (str(item["grid"][0]), str(item["grid"][1]), str(item["grid"][2])),
        (int(item["block"][0]), int(item["block"][1]), int(item["block"][2])),
        int(item["dynamic_smem_bytes"]),
        tuple(str(name) for name in item["arguments"]),
        dependent=bool(item.get("dependent", False)),
        early=bool(item.get("early", False)),
    )


def arch_number(arch: str) -> tuple[int, str]:
    """Compute capability times ten and suffix of an architecture: "sm_90a" -> (90, "a").

    Raises:
        ExportError: it is no such name.
    """
    digits = arch.removeprefix("sm_")
    suffix = digits[-1:] if digits[-1:].isalpha() else ""
    digits = digits.removesuffix(suffix)
    if not arch.startswith("sm_") or not digits.isdecimal():
        raise ExportError(f"{arch!r} is not an architecture.", "It should read like sm_90.")
    return int(digits), suffix


def runs_on(binary: str, device: str) -> bool:
    """Whether a cubin of architecture `binary` runs on a device of architecture `device`.

    Same major version and no newer minor one; code with architecture-specific instructions
    ("a") on exactly its version, of a family ("f") within it.
    Source: CUDA C++ Programming Guide, binary compatibility.
    """
    (built, suffix), (here, _) = arch_number(binary), arch_number(device)
    if suffix == "a":
        return built == here
    return built // 10 == here // 10 and built <= here
