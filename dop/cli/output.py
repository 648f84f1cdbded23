"""What commands print: one JSON document or text for people, never both.

Results go to standard output, progress and warnings to standard error, so that
`dop ... --json | jq` always works.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def out() -> Console:
    """Console for results: standard output, plain where that is no terminal."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def err() -> Console:
    """Console for progress and warnings: standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def emit(
    data: object,
    as_json: bool,
    human: str | RenderableType | Callable[[Console], None] | None = None,
) -> None:
    """Print a result.

    Args:
        data: what --json prints: dataclasses, mappings, sequences, paths, numbers, text.
        as_json: print one JSON document and nothing else.
        human: what a person sees instead: text (printed as it is), a rich renderable, or a
            function that prints on the console it is given. Default: the indented JSON.
    """
    if as_json or human is None:
        print(json.dumps(plain(data), indent=None if as_json else 2, allow_nan=False))
    elif isinstance(human, str):
        print(human)
    elif callable(human):
        human(out())
    else:
        out().print(human)


def note(message: str) -> None:
    """One line for people on standard error: progress, a warning, a hint."""
    print(" ".join(message.split()), file=sys.stderr, flush=True)


def plain(value: object) -> object:
    """The value in JSON's types; what is infinite or not a number becomes null."""
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a number of numpy
        return plain(value.item())
    return str(value)
