"""The batches that `bench_sgmv` measures: their shapes, adapters, floors and order.

A case is one group of slices of a layer under one batch. Decode batches have one row per request;
prefill batches share their rows among four requests, as an engine's prefill does. The mixes say how
requests share adapters; they are those of Punica's benchmark. Standard library only.
"""

from __future__ import annotations

import fnmatch
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dop.errors import ConfigError
from dop.scenario import MIXES
from dop.workload import Workload

DECODE_TOKENS = (1, 8, 16, 32, 64, 128)
PREFILL_TOKENS = (512, 2048, 8192)
WIDEST_DECODE = 256
"""More rows than that are a prefill."""
PREFILL_REQUESTS = 4
FIRST = (1, 16, 64, 2048)
"""Tokens that are measured first: a run that ends early has these."""
SKEW = 1.5

TYPICAL_BYTES_PER_US = 3.0e6
SHORTEST_US = 8.0
GRAPH_US = 2500.0
MOST_CALLS = 20
FEWEST_CALLS = 3
"""A graph holds calls for about GRAPH_US, guessed from the floor."""


def requests_per_adapter(mix: str, requests: int) -> list[int]:
    """Requests of each adapter, most first.

    distinct: one each. uniform: ceil(sqrt(n)) adapters with equal shares. skewed: each adapter has
    1.5 times the requests of the next (Zipf). identical: one adapter.
    """
    if mix == "identical":
        return [requests]
    if mix == "distinct":
        return [1] * requests
    if mix == "uniform":
        adapters = math.ceil(math.sqrt(requests))
        share, extra = divmod(requests, adapters)
        return [share + (i < extra) for i in range(adapters)]
    shares: list[int] = []
    size = 1.0
    while sum(shares) + int(size) < requests:
        shares.append(int(size))
        size *= SKEW
    return sorted([*shares, requests - sum(shares)], reverse=True)


@dataclass(frozen=True)
class Case:
    """One group of slices under one batch.

    Attributes:
        workload: shapes, rank and element type.
        tokens: rows of x and y.
        mix: one of MIXES.
        least_slots: slots of the weight stacks, if more than the batch needs: an engine has as many
            as it may serve; 0 for the next power of two of the adapters in use.
    """

    workload: Workload
    tokens: int
    mix: str
    least_slots: int = 0

    @property
    def kind(self) -> str:
        """decode or prefill."""
        return "decode" if self.tokens <= WIDEST_DECODE else "prefill"

    @property
    def layer(self) -> str:
        """Short name of the group of slices: qkv, o, gate_up, down, ..."""
        return self.workload.name.removesuffix("_proj")

    @property
    def key(self) -> str:
        """Name of the case, e.g. decode:T64:distinct:qkv:r16:tight."""
        mode = "server" if self.least_slots else "tight"
        return f"{self.kind}:T{self.tokens}:{self.mix}:{self.layer}:r{self.workload.rank}:{mode}"

    @property
    def requests(self) -> int:
        """Requests of the batch."""
        return self.tokens if self.kind == "decode" else min(PREFILL_REQUESTS, self.tokens)

    @cached_property
    def shares(self) -> list[int]:
        """Requests of each adapter in use, most first."""
        return requests_per_adapter(self.mix, self.requests)

    @property
    def active(self) -> int:
        """Adapters in use."""
        return len(self.shares)

    @property
    def slots(self) -> int:
        """Adapters that the weight stacks hold."""
        return max(self.least_slots, 1 << (self.active - 1).bit_length())

    @cached_property
    def request_slots(self) -> list[int]:
        """Slot of each request: adapters are shuffled over requests and over slots."""
        rng = random.Random(f"{self.tokens}/{self.mix}/{self.slots}")
        ids = [adapter for adapter, count in enumerate(self.shares) for _ in range(count)]
        rng.shuffle(ids)
        slots = rng.sample(range(self.slots), self.active)
        return [slots[adapter] for adapter in ids]

    @property
    def request_rows(self) -> list[int]:
        """Rows of each request."""
        share, extra = divmod(self.tokens, self.requests)
        return [share + (i < extra) for i in range(self.requests)]

    @cached_property
    def token_slots(self) -> list[int]:
        """Slot of each row."""
        pairs = zip(self.request_slots, self.request_rows, strict=True)
        return [slot for slot, rows in pairs for _ in range(rows)]

    @property
    def floor_bytes(self) -> int:
        """Bytes that must move: x, y in and out, and each adapter in use once."""
        return self.workload.min_bytes(self.tokens, self.active)

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of one set of tensors: a, b, x, y."""
        w = self.workload
        return {
            "a": self.slots * w.slices * w.rank * w.in_features,
            "b": self.slots * w.total_out * w.rank,
            "x": self.tokens * w.in_features,
            "y": self.tokens * w.total_out,
        }

    @property
    def calls(self) -> int:
        """Calls of one graph, each with weights of its own."""
        guess = max(SHORTEST_US, 2.5 * self.floor_bytes / TYPICAL_BYTES_PER_US)
        return int(min(MOST_CALLS, max(FEWEST_CALLS, GRAPH_US / guess)))


def build_cases(
    workloads: Sequence[Workload],
    tokens: Sequence[int] = DECODE_TOKENS + PREFILL_TOKENS,
    mixes: Sequence[str] = MIXES,
    patterns: Sequence[str] = (),
    least_slots: int = 0,
) -> list[Case]:
    """Cases in the order of measuring: decode before prefill, FIRST before the others.

    Args:
        workloads: one per group of slices and rank.
        tokens: batch sizes.
        mixes: named mixes; a batch of one request has one.
        patterns: keep the cases whose key holds or matches one of these.
        least_slots: see Case.

    Raises:
        ConfigError: a mix is unknown, or no case is left.
    """
    if unknown := [mix for mix in mixes if mix not in MIXES]:
        raise ConfigError(f"mix {unknown[0]!r} is unknown.", f"Use {', '.join(MIXES)}.")
    if any(count < 1 for count in tokens):
        raise ConfigError(f"tokens {list(tokens)}.", "Give batch sizes of 1 or more.")
    cases = []
    for count in sorted(set(tokens), key=lambda t: (t > WIDEST_DECODE, t not in FIRST, t)):
        for workload in sorted(workloads, key=lambda w: w.rank):
            for mix in mixes if count > 1 else ("distinct",):
                cases.append(Case(workload, count, mix, least_slots))
    kept = [case for case in cases if not patterns or _matches(case.key, patterns)]
    if not kept:
        raise ConfigError(f"no case matches {', '.join(patterns)}.", "Keys: " + cases[0].key)
    return kept


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(pattern in key or fnmatch.fnmatch(key, pattern) for pattern in patterns)
