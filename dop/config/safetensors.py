"""The header of a safetensors file: names, types and shapes, checked against the file's size.

Only the header is read, never the weights. Source: the safetensors format's README: 8 bytes
with the header's length (little endian), the header (JSON), then the tensors without holes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dop.config.files import brief, parse_json, show, unreadable
from dop.errors import ConfigError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Type, shape and place of one tensor; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor name -> what the header says, once it is known to agree with the file.

    Raises:
        ConfigError: the file cannot be read, or its header lies: length beyond the file, no
            JSON, offsets outside of the file, holes, overlaps, or sizes that are not
            dtype x shape.
    """
    header, data_bytes = _raw_header(path)
    content = parse_json(header, f"the header of {show(path)}")
    if not isinstance(content, dict):
        _lies(path, "it is not a JSON object")
    tensors = {
        name: _tensor(path, name, value, data_bytes)
        for name, value in content.items()
        if name != "__metadata__"
    }
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            kind = "overlaps the tensor before it" if info.begin < end else "leaves a hole"
            _lies(path, f"tensor {brief(name)} {kind} at byte {info.begin}")
        end = info.end
    if end != data_bytes:
        _lies(path, f"the tensors end at byte {end}, the data at byte {data_bytes}")
    return tensors


def _raw_header(path: Path) -> tuple[bytes, int]:
    """The header's bytes, and how many bytes of data follow it."""
    try:
        if not path.is_file() and path.exists():
            raise ConfigError(f"{show(path)} is not a file.", "Give a safetensors file.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                _lies(path, f"the file has {len(prefix)} bytes")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES or 8 + length > size:
                _lies(path, f"it claims {length} bytes in a file of {size}")
            return file.read(length), size - 8 - length
    except (OSError, ValueError) as error:
        unreadable(path, error)


def _tensor(path: Path, name: str, value: object, data_bytes: int) -> TensorInfo:
    what = f"tensor {brief(name)}"
    if not isinstance(value, dict):
        _lies(path, f"{what} is {brief(value)}")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _lies(path, f"{what} has type {brief(dtype)}")
    if (extents := _sizes(shape)) is None or len(extents) > 8:
        _lies(path, f"{what} has shape {brief(shape)}")
    if (span := _sizes(offsets)) is None or len(span) != 2:
        _lies(path, f"{what} has offsets {brief(offsets)}")
    begin, end = span
    if not begin <= end <= data_bytes:
        _lies(path, f"{what} lies at bytes {begin} to {end} of {data_bytes}")
    needed = DTYPE_BYTES[dtype]
    for extent in extents:
        needed *= extent
    if end - begin != needed:
        _lies(path, f"{what} needs {needed} bytes ({dtype} {extents}) and has {end - begin}")
    return TensorInfo(dtype, tuple(extents), begin, end)


def _sizes(value: object) -> list[int] | None:
    """The value as a list of sizes that fit a file, or None."""
    if not isinstance(value, list):
        return None
    sizes = [n for n in value if isinstance(n, int) and not isinstance(n, bool)]
    fit = len(sizes) == len(value) and all(0 <= n < 1 << 62 for n in sizes)
    return sizes if fit else None


def _lies(path: Path, what: str) -> NoReturn:
    raise ConfigError(
        f"The safetensors header of {show(path)} is wrong: {what}.",
        "The file is damaged or cut off; save or download the adapter again.",
    )
