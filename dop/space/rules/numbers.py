"""Numbers that rules choose from."""

from __future__ import annotations

from collections.abc import Iterable


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """Powers of two from low to high, both included if they are ones."""
    return tuple(1 << e for e in range(high.bit_length()) if low <= 1 << e <= high)


def dividing(number: int, candidates: Iterable[int]) -> tuple[int, ...]:
    """The candidates that divide the number."""
    return tuple(c for c in candidates if number % c == 0)


def vector_width(number: int, element_bytes: int, load_bytes: int = 16) -> int:
    """Widest load in elements that rows of `number` elements keep aligned."""
    return max(dividing(number, powers_of_two(1, load_bytes // element_bytes)))


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def round_up(number: int, unit: int) -> int:
    """The next multiple of the unit."""
    return ceil_div(number, unit) * unit
