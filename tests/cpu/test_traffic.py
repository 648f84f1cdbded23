"""Traffic files and scenarios: what is accepted, merged, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dop.config import bucketize, default_scenarios, read_traffic
from dop.config.traffic import BUCKETS
from dop.errors import ConfigError, DopError
from dop.scenario import MIXES, Scenario, Shuffled, named, short_key


def write(folder: Path, batches: Any, **extra: Any) -> Path:
    path = folder / "traffic.json"
    path.write_text(json.dumps({"version": 1, "batches": batches, **extra}))
    return path


def test_documented_example(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [
            {"tokens": 32, "segments": [4, 20, 8], "bare": 0, "count": 120},
            {"tokens": 64, "mix": "uniform", "count": 5},
        ],
    )
    first, second = read_traffic(path)
    assert first == Scenario("recorded", (20, 8, 4), 0, 120.0)
    assert second == named("uniform", 64, 5.0)


def test_duplicates_merge_and_named_compositions_take_their_name(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [
            {"tokens": 4, "segments": [1, 1, 1, 1], "count": 2},
            {"tokens": 4, "mix": "distinct", "count": 3.5},
            {"segments": [3, 1], "bare": 2},
            {"tokens": 6, "segments": [1, 3], "bare": 2, "count": 1},
            {"tokens": 9, "segments": [], "bare": 9, "count": 1},
            {"tokens": 5, "mix": "identical", "count": 0},
            {"tokens": 1, "mix": "skewed", "count": 1},
        ],
    )
    found = {s.key: s.weight for s in read_traffic(path)}
    assert found == {
        "T4/distinct/4": 5.5,
        "T6/recorded/3,1/2": 2.0,
        "T9/recorded//9": 1.0,
        "T1/identical/1": 1.0,
    }
    assert all(Scenario.parse(key).key == key for key in found)


COLD_KEYS = (
    "T512/identical/1/cold",
    "T512/recorded/128,128,128,128/0/cold",
    "T9/recorded//9/cold",
    "T1/identical/1/cold",
)


@pytest.mark.parametrize("key", COLD_KEYS)
def test_a_cold_batch_is_its_twin_but_for_the_end_of_its_key(key: str) -> None:
    cold, warm = Scenario.parse(key), Scenario.parse(key.removesuffix("/cold"))
    assert (cold.key, cold.cold, warm.cold) == (key, True, False)
    assert cold != warm
    assert replace(cold, cold=False) == warm
    assert cold.token_to_adapter() == warm.token_to_adapter()
    shuffled = Shuffled(warm.mix, warm.segments, warm.bare_rows, cold=True)
    assert (shuffled.key, replace(shuffled, cold=False).key) == (key, warm.key)


def test_keys_of_batches_that_are_not_cold_are_what_they_were() -> None:
    batches = (named("uniform", 32), named("identical", 1), Scenario("recorded", (4, 2), 1))
    assert [s.key for s in batches] == ["T32/uniform/6", "T1/identical/1", "T7/recorded/4,2/1"]
    assert [Scenario.parse(s.key) for s in batches] == list(batches)


@pytest.mark.parametrize(
    "key",
    [
        "T32/uniform/6/cold/cold",
        "T32/uniform/6/Cold",
        "T32/uniform/6/hot",
        "T32/uniform/6/",
        "T32/uniform/cold/6",
        "T32/uniform/cold",
        "T32/cold",
        "/cold",
        "T7/recorded/4,2/cold",
        "T7/recorded/cold",
        "T7/recorded/4,2/cold/1",
        "T7/recorded/4,2/1/cold/",
    ],
)
def test_what_is_no_key_of_a_cold_batch_is_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        Scenario.parse(key)


def test_keys_are_cut_but_for_what_says_that_they_are_cold() -> None:
    warm = Scenario("recorded", (128,) * 16)
    cold = replace(warm, cold=True)
    assert short_key("T512/identical/1/cold", 24) == "T512/identical/1/cold"
    assert short_key(warm.key, 24) == "T2048/recorded/128,12..."
    assert short_key(cold.key, 24) == "T2048/recorded/1.../cold"


def test_a_representative_stays_cold() -> None:
    batches = [replace(named("uniform", n), cold=True) for n in (1024, 1025, 1, 2)]
    found = bucketize(batches, 2)
    assert [s.cold for s in found] == [True, True]
    assert sum(s.weight for s in found) == 4


def test_mix_with_bare_rows(tmp_path: Path) -> None:
    (got,) = read_traffic(write(tmp_path, [{"tokens": 10, "mix": "distinct", "bare": 6}]))
    assert got == Scenario("recorded", (1, 1, 1, 1), 6, 1.0)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"tokens": 4, "mix": "uniform", "count": -1}, "count of batch 0"),
        ({"tokens": 4, "mix": "uniform", "count": True}, "count of batch 0"),
        ({"tokens": 4, "mix": "uniform", "count": "3"}, "count of batch 0"),
        ({"tokens": 4, "mix": "uniform", "count": 10**400}, "count of batch 0"),
        ({"tokens": 4, "mix": "uniform", "count": 0}, "every count is 0"),
        ({"tokens": 5, "segments": [2, 2]}, "add up to 4"),
        ({"tokens": 4, "segments": [5, -1]}, "a segment of batch 0"),
        ({"tokens": 4, "segments": [4, 0]}, "a segment of batch 0"),
        ({"tokens": 4, "segments": [2.5, 1.5]}, "a segment of batch 0"),
        ({"tokens": 4, "segments": [True] * 4}, "a segment of batch 0"),
        ({"tokens": 4, "segments": "4"}, "segments of batch 0"),
        ({"tokens": 4, "segments": [4], "bare": -1}, "bare of batch 0"),
        ({"tokens": 4, "mix": "uniform", "bare": 5}, "5 bare rows"),
        ({"tokens": 4, "mix": "popular"}, "mix of batch 0"),
        ({"tokens": 4, "mix": ["uniform"]}, "mix of batch 0"),
        ({"tokens": 4}, "either segments or a mix"),
        ({"tokens": 4, "mix": "uniform", "segments": [4]}, "either segments or a mix"),
        ({"tokens": 0, "mix": "uniform"}, "tokens of batch 0"),
        ({"tokens": 10**30, "mix": "uniform"}, "tokens of batch 0"),
        ({"mix": "uniform"}, "tokens of batch 0"),
        ({"segments": []}, "the rows of batch 0"),
        ({"tokens": 4, "mix": "uniform", "cuont": 1}, "unknown key 'cuont'"),
        (7, "batch 0"),
    ],
)
def test_bad_entries_name_themselves(tmp_path: Path, entry: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_traffic(write(tmp_path, [entry]))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.action


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[]", "no JSON object"),
        (b"{}", "version"),
        (b'{"version": 2, "batches": []}', "version 2"),
        (b'{"version": 1, "batches": []}', "lists no batches"),
        (b'{"version": 1, "batches": [{"tokens": 4, "mix": "uniform", "count": NaN}]}', "NaN"),
        (b'{"version": 1, "version": 1}', "appears twice"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"version": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"version": 1e999}', "version inf"),
    ],
)
def test_bad_files(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_traffic(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_traffic(tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="is a directory"):
        read_traffic(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_traffic("a\0b")


def test_default_scenarios_hold_each_composition_once() -> None:
    found = default_scenarios()
    compositions = [s.segments for s in found]
    assert len(set(compositions)) == len(compositions)
    assert [s.mix for s in found if s.tokens == 1] == ["identical"]
    assert {s.tokens for s in found} == set(BUCKETS)
    assert {s.mix for s in found if s.tokens == 32} == set(MIXES)
    assert [s.mix for s in default_scenarios((2,))] == ["distinct", "identical"]
    with pytest.raises(ConfigError):
        default_scenarios(())
    with pytest.raises(ConfigError):
        default_scenarios((0,))
    with pytest.raises(ConfigError):
        default_scenarios((8,), ("popular",))


def histogram(n: int) -> list[Scenario]:
    return [Scenario("recorded", (k + 1, 1), k % 3, 1.0 + k % 7) for k in range(n)]


def test_bucketize_keeps_weight_and_covers_the_range() -> None:
    scenarios = [*histogram(500), named("identical", 2048, 1.0)]
    for limit in (1, 2, 8, 32):
        few = bucketize(scenarios, limit)
        assert len(few) == limit
        assert sum(s.weight for s in few) == pytest.approx(sum(s.weight for s in scenarios))
        assert {(s.segments, s.bare_rows) for s in few} <= {
            (s.segments, s.bare_rows) for s in scenarios
        }
    tokens = [s.tokens for s in bucketize(scenarios, 8)]
    assert min(tokens) <= 8
    assert max(tokens) >= 400
    assert bucketize(scenarios[:3], 5) == tuple(sorted(scenarios[:3], key=lambda s: -s.weight))
    with pytest.raises(ConfigError):
        bucketize(scenarios, 0)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["uniform", "distinct", "recorded"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["tokens", "segments", "mix", "bare", "count", "version", "batches"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(st.lists(json_values, max_size=4))
def test_random_batches_never_escape(tmp_path: Path, batches: Any) -> None:
    try:
        scenarios = read_traffic(write(tmp_path, batches))
    except DopError as error:
        line = str(error)
    else:
        line = ""
        assert scenarios
    assert "\n" not in line


@quick
@given(st.binary(max_size=64))
def test_random_bytes_never_escape(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(data)
    with pytest.raises(DopError):
        read_traffic(path)


@quick
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=20),
    st.integers(0, 50),
    st.floats(0.001, 1e9),
)
def test_good_entries_round_trip(
    tmp_path: Path, segments: list[int], bare: int, count: float
) -> None:
    entry = {"segments": segments, "bare": bare, "count": count}
    (got,) = read_traffic(write(tmp_path, [entry]))
    assert sorted(got.segments) == sorted(segments)
    assert (got.bare_rows, got.weight) == (bare, count)
    assert Scenario.parse(got.key).segments == got.segments
