"""The few shapes that the report's charts are made of, as inline SVG that follows the page's theme.

Written by hand because a report has a hundred small panels: matplotlib takes 0.1 s for each, this
takes a millisecond. Coordinates are pixels at the page's full width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

INK, MUTED, GRID = "var(--ink)", "var(--muted)", "var(--grid)"

FONT = 12.0
CHARACTER = 6.7
"""Width reserved per character of a label, in pixels: a wide system font at FONT pixels."""


WIDE = 700.0
"""A wider drawing scrolls on a narrow screen rather than becoming unreadable."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to pixels, along a logarithmic or a linear axis.

    Attributes:
        low, high: the values at the ends; positive and different where `log`.
        start, end: their pixels.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the ends, at most `most` of them."""
        if not self.log:
            return _even(self.low, self.high, most)
        return log_ticks(self.low, self.high, most)


def _even(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    step: float = 10.0 ** math.floor(math.log10(rough))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= most)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high] for a logarithmic axis, at most `most`."""
    found: list[float] = []
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**e for e in decades for m in mantissas]
        found = [v for v in found if low * 0.999 <= v <= high * 1.001]
        if len(found) <= most:
            break
    if len(found) > most:
        return found[:: math.ceil(len(found) / most)]
    # In a narrow range even steps read better than one power of ten.
    return found if len(found) >= 3 else _even(low, high, min(most, 5))


def format_us(value: float) -> str:
    """A number with three figures: 0.43, 4.31, 43.1, 431, 4,310."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1 or value == 0 else f"{value:.2g}"


@dataclass(slots=True)
class Canvas:
    """A drawing of a fixed size in pixels that the page scales to its width."""

    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = GRID, width: float = 1.0
    ) -> None:
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'style="stroke:{colour};stroke-width:{width:g}"/>'
        )

    def rect(
        self, x: float, y: float, width: float, height: float, colour: str, title: str = ""
    ) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" '
            f'style="fill:{colour}">{_title(title)}</rect>'
        )

    def dot(
        self, x: float, y: float, radius: float, colour: str, opacity: float = 1.0, title: str = ""
    ) -> None:
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" '
            f'style="fill:{colour};opacity:{opacity:g}">{_title(title)}</circle>'
        )

    def ring(self, x: float, y: float, radius: float, colour: str, title: str = "") -> None:
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" '
            f'style="fill:var(--bg);stroke:{colour};stroke-width:1.4">{_title(title)}</circle>'
        )

    def path(self, points: Sequence[tuple[float, float]], colour: str, title: str = "") -> None:
        """Straight lines from point to point."""
        data = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(
            f'<path d="M{data}" style="fill:none;stroke:{colour};stroke-width:2;'
            f'stroke-linejoin:round">{_title(title)}</path>'
        )

    def dots(self, points: Sequence[tuple[float, float]], colour: str, radius: float) -> None:
        """Many equal dots in one element."""
        data = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
        self.parts.append(
            f'<path d="{data}" style="fill:none;stroke:{colour};stroke-width:{2 * radius:g};'
            'stroke-linecap:round;stroke-opacity:.6"/>'
        )

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", colour: str = MUTED
    ) -> None:
        """Text whose middle is at height y."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y + 0.35 * FONT:.1f}" style="fill:{colour};'
            f'text-anchor:{anchor}">{escape(text)}</text>'
        )

    def x_axis(
        self, scale: Scale, top: float, bottom: float, label: str = "", most: int = 6
    ) -> None:
        """Grid lines from top to bottom, their values below, the label below those."""
        for value in scale.ticks(most):
            x = scale(value)
            self.line(x, top, x, bottom)
            self.text(x, bottom + 11, format_us(value), "middle")
        if label:
            self.text((scale.start + scale.end) / 2, bottom + 29, label, "middle")

    def y_axis(
        self, scale: Scale, left: float, right: float, label: str = "", most: int = 5
    ) -> None:
        """Grid lines from left to right, their values to the left; the label above the axis."""
        for value in scale.ticks(most):
            y = scale(value)
            self.line(left, y, right, y)
            self.text(left - 6, y, format_us(value), "end")
        if label:
            self.text(left - 6, min(scale.start, scale.end) - 13, label, "end")

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str]]) -> None:
        """Coloured squares with names, side by side."""
        for colour, name in entries:
            self.rect(x, y - 5, 10, 10, colour)
            self.text(x + 15, y, name)
            x += 15 + text_width(name) + 20

    def svg(self, label: str) -> str:
        """The element, as wide as what holds it, at most its own size."""
        wide = " class=wide" if self.width > WIDE else ""
        return (
            f'<svg role="img" aria-label="{escape(label)}"{wide} '
            f'viewBox="0 0 {self.width:g} {self.height:g}" '
            f'style="max-width:{self.width:g}px" font-size="{FONT:g}">'
            + "".join(self.parts)
            + "</svg>"
        )


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def text_width(text: str) -> float:
    """Pixels that a label may take."""
    return CHARACTER * len(text)


def shorten(text: str, most: int) -> str:
    """The text on one line with at most `most` characters; the end is what tells names apart."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else "\N{HORIZONTAL ELLIPSIS}" + text[1 - most :]
