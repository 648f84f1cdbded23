"""Traffic: a JSON histogram of batch compositions, or the named mixes times token buckets.

The file:

    {"version": 1,
     "batches": [
       {"tokens": 32, "segments": [20, 8, 4], "bare": 0, "count": 120},
       {"tokens": 64, "mix": "uniform", "count": 5}]}

Each entry is one kind of batch, seen `count` times (any non-negative number; 0 is left out;
default 1). `tokens` are its rows. Either `segments` lists the rows of each adapter, in any
order, or `mix` names one of distinct, uniform, skewed, identical. `bare` rows (default 0) use
no adapter; segments and bare rows together must add up to `tokens`, which may be left out
where `segments` are given. Entries of the same composition are merged: their counts add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dop.config.files import brief, read_object, show, whole
from dop.errors import ConfigError
from dop.scenario import MIXES, Scenario, named

VERSION = 1
BUCKETS = (1, 8, 16, 32, 64, 128, 2048)
"""Tokens of the default scenarios: decode batches, and a prefill of 2048."""

MAX_TOKENS = 1 << 17
"""Largest batch; engines' limit on batched tokens stays below it."""

MAX_ENTRIES = 100_000
_KEYS = frozenset({"tokens", "segments", "mix", "bare", "count"})
_Composition = tuple[str, tuple[int, ...], int]


def read_traffic(path: str | Path) -> tuple[Scenario, ...]:
    """Scenarios of a traffic file, most frequent first; weights are the counts.

    A recorded composition that equals a named mix takes that mix's name, so that it shares its
    records.

    Raises:
        ConfigError: the file cannot be read, or an entry makes no sense; the line names it.
    """
    path = Path(path)
    content = read_object(path, "traffic file")
    where = show(path)
    if content.get("version") != VERSION or isinstance(content.get("version"), bool):
        raise ConfigError(
            f"{where} has version {brief(content.get('version'))}.", f'Write "version": {VERSION}.'
        )
    entries = content.get("batches")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{where} lists no batches.", 'Give a non-empty list "batches".')
    if len(entries) > MAX_ENTRIES:
        raise ConfigError(
            f"{where} lists {len(entries)} batches.", f"Merge them into {MAX_ENTRIES} or fewer."
        )
    counts: dict[_Composition, float] = {}
    for index, entry in enumerate(entries):
        composition, count = _entry(entry, f"batch {index} of {where}")
        if count > 0:
            counts[composition] = counts.get(composition, 0.0) + count
    if not counts:
        raise ConfigError(f"{where}: every count is 0.", "Give at least one batch that was seen.")
    if not math.isfinite(sum(counts.values())):
        raise ConfigError(f"{where}: the counts add up to infinity.", "Give smaller counts.")
    return _by_weight(Scenario(*composition, count) for composition, count in counts.items())


def default_scenarios(
    buckets: Sequence[int] = BUCKETS, mixes: Sequence[str] = MIXES
) -> tuple[Scenario, ...]:
    """Every mix at every bucket, without those that are the same composition.

    One token is always "identical"; elsewhere the first mix of `mixes` names a composition.
    """
    found: dict[tuple[int, ...], Scenario] = {}
    for tokens in buckets:
        whole(tokens, "a token bucket", high=MAX_TOKENS)
        for mix in ("identical",) if tokens == 1 else mixes:
            scenario = named(mix, tokens)
            found.setdefault(scenario.segments, scenario)
    if not found:
        raise ConfigError("no token buckets or no mixes.", "Give at least one of each.")
    return tuple(found.values())


def bucketize(scenarios: Sequence[Scenario], limit: int) -> tuple[Scenario, ...]:
    """At most `limit` representatives of a histogram, most frequent first; weights add up.

    Every representative is a batch that was really seen. The first is the most frequent one;
    each next is the scenario with the largest weight x squared distance to its nearest
    representative so far (greedy k-means++ without the dice), so that both frequent and
    unusual batches are covered. The rest give their weight to their nearest representative.
    Distance is taken on logarithms (base 2) of tokens, adapters, the longest segment and the
    bare rows: 8 against 16 tokens counts as 1024 against 2048.
    """
    whole(limit, "the number of scenarios")
    if len(scenarios) <= limit:
        return _by_weight(scenarios)
    points = [_point(s) for s in scenarios]
    first = max(range(len(points)), key=lambda i: scenarios[i].weight)
    chosen = [first]
    nearest = [0] * len(points)
    distance = [_squared(p, points[first]) for p in points]
    while len(chosen) < limit:
        worst = max(range(len(points)), key=lambda i: scenarios[i].weight * distance[i])
        if distance[worst] == 0:
            break
        for i, point in enumerate(points):
            gap = _squared(point, points[worst])
            if gap < distance[i]:
                distance[i], nearest[i] = gap, len(chosen)
        chosen.append(worst)
    weights = [0.0] * len(chosen)
    for i, scenario in enumerate(scenarios):
        weights[nearest[i]] += scenario.weight
    return _by_weight(_reweighed(scenarios[i], w) for i, w in zip(chosen, weights, strict=True))


def left_out(
    scenarios: Iterable[Scenario], chosen: Sequence[Scenario]
) -> tuple[tuple[Scenario, Scenario], ...]:
    """Batches that are not among the representatives, with the nearest one that stands for each;
    most frequent first."""
    kept = {s.key for s in chosen}
    points = [_point(s) for s in chosen]
    found = []
    for scenario in _by_weight(s for s in scenarios if s.key not in kept):
        point = _point(scenario)
        nearest = min(range(len(points)), key=lambda i: _squared(point, points[i]))
        found.append((scenario, chosen[nearest]))
    return tuple(found)


def _entry(entry: object, where: str) -> tuple[_Composition, float]:
    """Composition and count of one entry of the file."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is {brief(entry)}.", "Give an object.")
    if unknown := set(entry) - _KEYS:
        raise ConfigError(
            f"{where} has an unknown key {brief(min(unknown))}.",
            f"Use {', '.join(sorted(_KEYS))}.",
        )
    count = _count(entry.get("count", 1), where)
    bare = whole(entry.get("bare", 0), f"bare of {where}", low=0, high=MAX_TOKENS)
    if ("mix" in entry) == ("segments" in entry):
        raise ConfigError(f"{where} needs either segments or a mix.", "Give one of the two.")
    if "mix" in entry:
        return _of_mix(entry, bare, where), count
    return _of_segments(entry, bare, where), count


def _of_mix(entry: Mapping[str, object], bare: int, where: str) -> _Composition:
    tokens = whole(entry.get("tokens"), f"tokens of {where}", high=MAX_TOKENS)
    mix = entry["mix"]
    if not isinstance(mix, str) or mix not in MIXES:
        raise ConfigError(f"mix of {where} is {brief(mix)}.", f"Use one of {', '.join(MIXES)}.")
    if bare > tokens:
        raise ConfigError(f"{where} has {bare} bare rows of {tokens} tokens.", "Correct one.")
    segments = named(mix, tokens - bare).segments if tokens > bare else ()
    return _named_or_recorded(segments, bare)


def _of_segments(entry: Mapping[str, object], bare: int, where: str) -> _Composition:
    lengths = entry["segments"]
    if not isinstance(lengths, list):
        raise ConfigError(f"segments of {where} is {brief(lengths)}.", "Give a list of rows.")
    if len(lengths) > MAX_TOKENS:
        raise ConfigError(f"{where} has {len(lengths)} segments.", f"At most {MAX_TOKENS} count.")
    name = f"a segment of {where}"
    segments = tuple(sorted((whole(n, name, high=MAX_TOKENS) for n in lengths), reverse=True))
    total = sum(segments) + bare
    if "tokens" in entry:
        tokens = whole(entry["tokens"], f"tokens of {where}", high=MAX_TOKENS)
        if tokens != total:
            raise ConfigError(
                f"{where} has {tokens} tokens, but segments and bare rows add up to {total}.",
                "Correct one of them.",
            )
    whole(total, f"the rows of {where}", high=MAX_TOKENS)
    return _named_or_recorded(segments, bare)


def _named_or_recorded(segments: tuple[int, ...], bare: int) -> _Composition:
    """The composition, under the name of the mix that makes it if there is one."""
    if not bare and segments:
        for mix in ("identical", *MIXES):
            if named(mix, sum(segments)).segments == segments:
                return mix, segments, 0
    return "recorded", segments, bare


def _count(value: object, where: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(value)
        count = float(value)
        if not (math.isfinite(count) and count >= 0):
            raise ValueError(value)
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"count of {where} is {brief(value)}.", "Give how often it was seen, 0 or more."
        ) from error
    return count


def _by_weight(scenarios: Iterable[Scenario]) -> tuple[Scenario, ...]:
    return tuple(sorted(scenarios, key=lambda s: (-s.weight, s.tokens, s.key)))


def _reweighed(scenario: Scenario, weight: float) -> Scenario:
    return replace(scenario, weight=weight)


def _point(s: Scenario) -> tuple[float, ...]:
    longest = max(s.segments, default=0)
    return tuple(math.log2(1 + n) for n in (s.tokens, s.adapters, longest, s.bare_rows))


def _squared(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
