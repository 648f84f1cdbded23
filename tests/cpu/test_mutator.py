"""Mutators and crossover: what they change, and that they stay within the domains."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from dop.search.crossover import cross, domains_of, half_of
from dop.search.mutator import MUTATORS
from dop.search.mutator.base import nearest, neighbour
from dop.search.mutator.structure import carry, change_sketch
from dop.search.repair import repaired
from dop.space.sketch import KINDS, Domain, Limit, Sketch

SPACE = synthetic.space()


def of_kind(kind: str) -> Sketch:
    """A sketch with two parameters of the kind beside a tile of the same half."""
    domains = (
        Domain("shrink.a", kind, (1, 2, 4, 8, 16), 4),
        Domain("shrink.b", kind, (0, 3, 7), 3),
        Domain("shrink.t", "tile", (16, 32, 64, 128), 64),
        Domain("expand.t", "tile", (16, 32), 16),
    )
    return Sketch(kind, (), domains)


def test_there_is_a_mutator_per_kind():
    assert tuple(sorted(MUTATORS)) == tuple(sorted(KINDS))
    assert all(kind == mutator.kind for kind, mutator in MUTATORS.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutations_stay_within_the_domains(kind):
    sketch, rng = of_kind(kind), random.Random(kind)
    values = sketch.default()
    for _ in range(1000):
        domain = rng.choice(sketch.domains)
        before = dict(values)
        values = MUTATORS[domain.kind].mutate(sketch, values, domain, rng)
        assert sketch.broken_limit(values) is None
        assert set(values) == set(before)
        assert values[domain.name] != before[domain.name]
        others = [n for n in values if n != domain.name and values[n] != before[n]]
        assert len(others) <= 1
        assert all(half_of(n) == half_of(domain.name) for n in others)


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_reached_and_a_lone_choice_stays(kind):
    sketch, rng = of_kind(kind), random.Random(1)
    seen, values = set(), sketch.default()
    for _ in range(300):
        values = MUTATORS[kind].mutate(sketch, values, sketch.domains[0], rng)
        seen.add(values["shrink.a"])
    assert seen == {1, 2, 4, 8, 16}
    lone = Domain("shrink.a", kind, (4,), 4)
    alone = Sketch("lone", (), (lone,))
    assert MUTATORS[kind].mutate(alone, {"shrink.a": 4}, lone, rng) == {"shrink.a": 4}


def test_near_choices_are_likelier_than_far_ones():
    domain = Domain("shrink.a", "tile", tuple(range(1, 12)), 6)
    rng = random.Random(0)
    steps = Counter(abs(neighbour(domain, 6, rng, 0.5) - 6) for _ in range(4000))
    assert 0 not in steps
    assert steps[1] > steps[2] > steps[3] > 0
    assert 0.4 < steps[1] / 4000 < 0.6


def test_mutations_do_not_touch_what_they_are_given():
    sketch = of_kind("warps")
    values = sketch.default()
    for seed in range(50):
        MUTATORS["warps"].mutate(sketch, values, sketch.domains[0], random.Random(seed))
    assert values == sketch.default()


@given(
    choices=st.sets(st.integers(0, 4096), min_size=1, max_size=12),
    value=st.integers(0, 1 << 14),
)
def test_the_nearest_choice_is_a_choice_and_itself_if_allowed(choices, value):
    domain = Domain("a.b", "tile", tuple(sorted(choices)), min(choices))
    found = nearest(domain, value)
    assert found in choices
    if value in choices:
        assert found == value


def test_a_structural_mutation_keeps_shared_parameters():
    rng = random.Random(3)
    for sketch in SPACE.sketches:
        for _ in range(100):
            values = sketch.sample(rng)
            other, changed = change_sketch(sketch, values, SPACE.sketches, rng)
            assert other.name != sketch.name
            assert {d.name for d in other.domains} == set(changed)
            for domain in other.domains:
                assert changed[domain.name] in domain.choices
                if values.get(domain.name) in domain.choices:
                    assert changed[domain.name] == values[domain.name]
    assert carry(SPACE.sketches[0], {}) == SPACE.sketches[0].default()
    alone = SPACE.sketches[0]
    assert change_sketch(alone, alone.default(), [alone], rng) == (alone, alone.default())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_crossover_joins_the_shrink_of_one_with_the_expand_of_the_other(seed):
    rng = random.Random(seed)
    left, right = rng.choice(SPACE.sketches), rng.choice(SPACE.sketches)
    a, b = left.sample(rng), right.sample(rng)
    child = cross((left, a), (right, b), SPACE.sketches, rng)
    if left.name == right.name:
        assert child is not None
    if child is None:
        return
    sketch, values = child
    assert domains_of(sketch, "shrink") == domains_of(left, "shrink")
    assert domains_of(sketch, "expand") == domains_of(right, "expand")
    assert set(values) == {d.name for d in sketch.domains}
    for domain in sketch.domains:
        half = half_of(domain.name)
        if half == "shrink":
            assert values[domain.name] == a[domain.name]
        elif half == "expand":
            assert values[domain.name] == b[domain.name]
        else:
            assert values[domain.name] in (a[domain.name], b[domain.name])
        assert values[domain.name] in domain.choices


def test_crossover_finds_a_third_sketch_where_the_halves_fit():
    def make(name: str, shrink: str, expand: str) -> Sketch:
        domains = (Domain(shrink, "tile", (1, 2), 1), Domain(expand, "tile", (1, 2), 1))
        return Sketch(name, (), domains)

    left = make("p/q", "shrink.a", "expand.a")
    right = make("r/s", "shrink.b", "expand.b")
    third = make("p/s", "shrink.a", "expand.b")
    values = ({"shrink.a": 2, "expand.a": 1}, {"shrink.b": 1, "expand.b": 2})
    rng = random.Random(0)
    assert cross((left, values[0]), (right, values[1]), [left, right], rng) is None
    child = cross((left, values[0]), (right, values[1]), [left, right, third], rng)
    assert child == (third, {"shrink.a": 2, "expand.b": 2})


TIED = replace(
    synthetic.sketch(),
    limits=(
        Limit(
            "rows beside the warps' rows", 0, lambda a: abs(a["tokens.tile"] - a["expand.warps"])
        ),
        Limit("columns of all warps", 256, lambda a: a["expand.tile"] * a["expand.warps"] // 4),
    ),
)
"""Its rows, warps and columns only move together."""


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4, 8, 16]))
def test_a_repair_keeps_what_it_should_and_is_valid(seed, rows):
    values = TIED.default() | {"tokens.tile": rows}
    found = repaired(TIED, values, frozenset({"tokens.tile"}), random.Random(seed))
    if found is not None:
        assert found["tokens.tile"] == rows
        assert TIED.broken_limit(found) is None
        assert TIED.excess(found) == 0


def test_repairs_succeed_often_and_give_up_where_nothing_helps():
    values = TIED.default() | {"tokens.tile": 16, "expand.warps": 1}
    assert TIED.excess(values) > 0
    kept = frozenset({"tokens.tile"})
    tries = [repaired(TIED, values, kept, random.Random(seed)) for seed in range(100)]
    assert sum(found is not None for found in tries) > 15  # two exact changes at least
    every = frozenset(domain.name for domain in TIED.domains)
    assert repaired(TIED, values, every, random.Random(0)) is None
