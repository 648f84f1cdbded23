"""Batch compositions: how many tokens, and which adapter each of them uses."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cached_property

from dop.errors import ConfigError

MIXES = ("distinct", "uniform", "skewed", "identical")
"""The four named mixes of Punica's benchmark."""

NO_ADAPTER = -1

COLD = "/cold"
"""How the key of a batch ends whose x and y come from memory."""

DECODE_ROWS = 256
"""Most rows of a batch whose rows are requests that decode, each where it arrived. What is larger
holds prompts, whose rows lie one behind the other. Engines decode so many requests at once by
default (vLLM's max_num_seqs)."""


@dataclass(frozen=True)
class Scenario:
    """One batch composition.

    Attributes:
        mix: one of MIXES, or "recorded" for lengths that came from a traffic file.
        segments: rows of each segment, longest first; every segment is one adapter.
        bare_rows: rows that use no adapter (id -1).
        weight: share of the traffic that looks like this (any positive scale).
        cold: x and y come from memory, not the cache, and there are no slots but the adapters'.
    """

    mix: str
    segments: tuple[int, ...]
    bare_rows: int = 0
    weight: float = 1.0
    cold: bool = False

    def __post_init__(self) -> None:
        if self.mix not in (*MIXES, "recorded"):
            raise ConfigError(f"mix {self.mix!r} is unknown.", f"Use one of {', '.join(MIXES)}.")
        if any(rows < 1 for rows in self.segments) or self.bare_rows < 0:
            raise ConfigError(
                f"segment lengths {self.segments[:8]} and {self.bare_rows} bare rows.",
                "Every segment needs at least one row, and counts cannot be negative.",
            )
        if self.tokens < 1:
            raise ConfigError("a batch without rows.", "Give at least one token.")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ConfigError(f"weight {self.weight}.", "Give a positive, finite weight.")

    @cached_property
    def tokens(self) -> int:
        """Rows of the batch."""
        return sum(self.segments) + self.bare_rows

    @property
    def rows_are_requests(self) -> bool:
        """Whether each row is a request of its own, so that an adapter's rows lie apart."""
        return self.tokens <= DECODE_ROWS

    @property
    def adapters(self) -> int:
        """Number of adapters in use."""
        return len(self.segments)

    @cached_property
    def key(self) -> str:
        """Short name in the log, e.g. "T32/uniform/6"; recorded ones carry their lengths, cold ones
        end in COLD."""
        end = COLD if self.cold else ""
        if self.mix == "recorded":
            lengths = ",".join(map(str, self.segments))
            return f"T{self.tokens}/recorded/{lengths}/{self.bare_rows}{end}"
        return f"T{self.tokens}/{self.mix}/{self.adapters}{end}"

    @staticmethod
    def parse(key: str) -> Scenario:
        """Scenario of a key.

        Raises:
            ConfigError: the key is not of the form that `key` writes.
        """
        try:
            head, mix, *rest = key.removesuffix(COLD).split("/")
            tokens = int(head.removeprefix("T"))
            if mix == "recorded":
                lengths = tuple(int(n) for n in rest[0].split(",") if n)
                scenario = Scenario(mix, lengths, int(rest[1]))
            else:
                scenario = named(mix, tokens)
            scenario = replace(scenario, cold=key.endswith(COLD))
        except (ValueError, IndexError) as error:
            raise ConfigError(
                f"{key!r} is not a scenario key.", "It should read like T32/uniform/6."
            ) from error
        if scenario.key != key:
            raise ConfigError(f"{key!r} does not name a {mix} batch.", f"Use {scenario.key!r}.")
        return scenario

    def token_to_adapter(self, seed: int = 0) -> list[int]:
        """Adapter of each row, as requests arrive: adapter ids 0..adapters-1, or -1. An adapter's
        rows are one prompt unless `rows_are_requests`."""
        runs = [(a, rows) for a, rows in enumerate(self.segments)]
        if self.bare_rows:
            runs.append((NO_ADAPTER, self.bare_rows))
        if self.rows_are_requests:
            runs = [(a, 1) for a, rows in runs for _ in range(rows)]
        random.Random(seed).shuffle(runs)
        return [a for a, rows in runs for _ in range(rows)]


@dataclass(frozen=True)
class Shuffled(Scenario):
    """A batch each of whose rows is a request, however many there are."""

    @property
    def rows_are_requests(self) -> bool:
        """Always."""
        return True


def short_key(key: str, width: int) -> str:
    """A key in at most `width` characters: a long list of lengths is cut, COLD behind it is not."""
    if len(key) <= width:
        return key
    end = f"...{COLD}" if key.endswith(COLD) else "..."
    return key[: width - len(end)] + end


def named(mix: str, tokens: int, weight: float = 1.0) -> Scenario:
    """The named mix for a number of tokens.

    distinct: every row its own adapter. uniform: ceil(sqrt(tokens)) adapters with equal
    shares. skewed: shares fall by 1.5 from adapter to adapter. identical: one adapter.
    Source: Punica's text-generation benchmark (the four popularity distributions).
    """
    if tokens < 1:
        raise ConfigError(f"{tokens} tokens.", "Give at least one token.")
    if mix == "distinct":
        segments = [1] * tokens
    elif mix == "identical":
        segments = [tokens]
    elif mix == "uniform":
        adapters = math.ceil(math.sqrt(tokens))
        share, extra = divmod(tokens, adapters)
        segments = [share + (i < extra) for i in range(adapters)]
    elif mix == "skewed":
        segments = _skewed(tokens)
    else:
        raise ConfigError(f"mix {mix!r} is unknown.", f"Use one of {', '.join(MIXES)}.")
    return Scenario(mix, tuple(sorted(segments, reverse=True)), 0, weight)


def _skewed(tokens: int, ratio: float = 1.5) -> list[int]:
    """Segment lengths that fall geometrically: the largest first, at least one row each."""
    segments = []
    left = tokens
    while left > 0:
        rows = max(1, math.ceil(left * (1 - 1 / ratio)))
        segments.append(rows)
        left -= rows
    return segments
