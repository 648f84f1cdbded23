"""Element types as people name them."""

from __future__ import annotations

from dop.errors import ConfigError
from dop.workload import DTYPES

ALIASES = {"fp16": "float16", "bf16": "bfloat16", "half": "float16", "fp32": "float32"}


def parse_dtypes(text: str) -> tuple[str, ...]:
    """Element types of a list such as "fp16,bf16".

    Raises:
        ConfigError: one of them is unknown.
    """
    names = [part.strip().lower() for part in text.split(",")]
    found = tuple(dict.fromkeys(ALIASES.get(name, name) for name in names))
    unknown = [name for name in found if name not in DTYPES]
    if unknown:
        raise ConfigError(f"dtype {unknown[0]!r} is unknown.", "Give some of fp16, bf16, fp32.")
    return found
