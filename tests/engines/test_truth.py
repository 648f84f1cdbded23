"""The truth that engines are judged by (tiny_llama.py): it forgives ties, and no other adapter."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from engine_process import TOKENS, requests
from tiny_llama import merged_gaps, merged_tokens, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return path


def test_its_own_tokens_have_no_gap_and_a_tie_costs_little(folder):
    asked = requests()
    tokens = merged_tokens(folder, asked)
    gaps = merged_gaps(folder, asked, tokens)
    assert max(max(found) for found in gaps) < 1e-3
    # 748 and 384 behind 123 tie by 0.001; an engine in float16 went on with the latter.
    (index,) = [i for i, answer in enumerate(tokens) if answer[:2] == [123, 748]]
    found = merged_gaps(folder, [asked[index]], [[123, 384, 998, 691, 903, 50]])
    assert asked[index]["adapter"] == "a5"
    assert 0 < found[0][1] < 0.01
    assert max(found[0]) < 0.1


def test_another_adapters_tokens_are_far_off(folder):
    asked = requests()
    tokens = merged_tokens(folder, asked)
    names = [*sorted({r["adapter"] for r in asked}), "a1b"]
    for shift in range(1, len(names)):
        moved = [
            {**r, "adapter": names[(names.index(r["adapter"]) + shift) % len(names)]} for r in asked
        ]
        for found in merged_gaps(folder, moved, tokens):
            assert len(found) == TOKENS
            assert max(found) > 1.0
