"""Reading a JSON file that somebody else wrote, without trusting it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from dop.errors import ConfigError

MAX_JSON_BYTES = 64 << 20
"""Larger files are refused: no config or histogram needs it."""

MAX_SIZE = 1 << 24
"""Upper bound of any width, head count or rank: far above every model."""


def read_bytes(path: Path, what: str, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """Content of a regular file of at most `limit` bytes.

    Raises:
        ConfigError: it is missing, a directory, unreadable, or too large.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"{show(path)} is a directory.", f"Give the {what} itself.")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{show(path)} is not a regular file.", f"Give a {what}.")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        unreadable(path, error)
    if len(data) > limit:
        raise ConfigError(
            f"{show(path)} is larger than {limit >> 20} MiB.", f"That is no {what}; check the path."
        )
    return data


def unreadable(path: Path, error: Exception) -> NoReturn:
    """Turn what the operating system said about a path into a ConfigError."""
    if isinstance(error, FileNotFoundError):
        raise ConfigError(f"{show(path)} does not exist.", "Check the path.") from error
    if isinstance(error, PermissionError):
        raise ConfigError(
            f"{show(path)} may not be read (permission denied).",
            "Change its permissions or give another path.",
        ) from error
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    raise ConfigError(f"{show(path)} cannot be read ({reason}).", "Check the path.") from error


def parse_json(data: bytes, where: str) -> object:
    """JSON value of UTF-8 bytes; NaN, infinities and repeated keys are refused.

    Raises:
        ConfigError: not UTF-8, not JSON, nested too deeply, or with numbers of absurd length.
    """
    try:
        return json.loads(
            data.decode("utf-8-sig"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_keys,
        )
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is not UTF-8 text (byte {error.start}).", "Save it as JSON in UTF-8."
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply.", "Check that file.") from error
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{where} is not valid JSON ({reason}).", "Correct that place, or write it again."
        ) from error


def read_object(path: Path, what: str) -> Mapping[str, object]:
    """The JSON object in a file.

    Raises:
        ConfigError: as `read_bytes` and `parse_json`, or the value is not an object.
    """
    value = parse_json(read_bytes(path, what), show(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{show(path)} holds no JSON object.", f"Give a {what}.")
    return value


def whole(value: object, name: str, *, low: int = 1, high: int = MAX_SIZE) -> int:
    """`value` as an integer of [low, high]; 16.0 counts as 16, true does not count as 1.

    Raises:
        ConfigError: it is anything else; `name` says which value of which file.
    """
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {brief(value)}.", f"Give a whole number from {low} up.")
    if not low <= value <= high:
        raise ConfigError(f"{name} is {brief(value)}.", f"Give a number from {low} to {high}.")
    return value


def brief(value: object, width: int = 60) -> str:
    """One short line that shows a value, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, dict):
        return "an object"
    text = " ".join(ascii(value).split())
    return text if len(text) <= width else text[: width - 3] + "..."


def show(path: Path) -> str:
    """A path for an error line: printable, on one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {brief(twice)} appears twice")
    return found
