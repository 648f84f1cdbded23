"""The plugin in a real vLLM engine on a GPU: a tiny Llama with random weights.

    PYTHONPATH=<unpacked vllm>:. python -m pytest -q tests/engines/test_vllm_gpu.py

Every engine runs in a process of its own (`engine_process.py`). Stock and dop see the same model,
adapters and requests; the truth is the adapter merged into the base weights in float32. float16
by default: with bfloat16 a random model's near ties fall either way, and texts part for good.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("vllm") is None or not torch.cuda.is_available():
    pytest.skip("needs vLLM and a GPU", allow_module_level=True)

HERE = Path(__file__).parent
SECONDS = 280


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from tiny_llama import write_model

    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return path


def run(folder: Path, arm: str, **settings: object) -> dict:
    """Answers of one engine process."""
    out = folder / f"{arm}-{abs(hash(json.dumps(settings, sort_keys=True)))}.json"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CACHE_ROOT": str(folder / f"cache-{arm}"),
        "DOP_VLLM": str(int(arm == "dop")),
        "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE.parents[1]), str(HERE)]),
    }
    command = [sys.executable, str(HERE / "engine_process.py"), str(folder), str(out)]
    done = subprocess.run(
        [*command, json.dumps(settings)],
        env=environment, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    answer = json.loads(out.read_text())
    answer["log"] = done.stdout + done.stderr
    return answer


def share_equal(left: list, right: list) -> float:
    pairs = [(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.fixture(scope="module")
def answers(folder) -> dict[str, dict]:
    return {arm: run(folder, arm, eager=False) for arm in ("stock", "dop")}


def test_the_plugin_serves_every_layer(answers):
    assert "DopPunicaWrapper" in answers["dop"]["log"]
    assert answers["dop"]["served"] >= 4
    assert answers["dop"]["stock_reasons"] == []
    assert "DopPunicaWrapper" not in answers["stock"]["log"]


def test_tokens_equal_the_merged_models_at_least_as_often_as_stock(answers, folder):
    from tiny_llama import merged_tokens

    want = merged_tokens(folder, answers["dop"]["requests"])
    stock = share_equal(answers["stock"]["tokens"], want)
    dop = share_equal(answers["dop"]["tokens"], want)
    print(f"equal to the merged model: stock {stock:.3f}, dop {dop:.3f}")
    assert dop >= stock - 0.03  # a tie between two logits falls either way
    assert dop > 0.8


def test_first_tokens_logprobs_are_those_of_stock(answers):
    for mine, theirs in zip(answers["dop"]["logprobs"], answers["stock"]["logprobs"], strict=True):
        assert abs(mine - theirs) < 0.05


def test_swapped_adapters_never_leak(answers, folder):
    """Loaded, evicted, loaded again with other weights under the same id: the new weights' tokens,
    whatever was in the slots before."""
    from tiny_llama import merged_tokens

    swapped = answers["dop"]["swapped"]
    want = merged_tokens(folder, swapped["requests"])
    assert share_equal(swapped["before"], want) < 0.5
    for moment in ("fresh", "again"):
        assert share_equal(swapped[moment], want) > 0.8, moment


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"eager": True}, 0.85),
        ({"eager": False, "specialize": True, "max_loras": 2}, 0.85),
        ({"eager": False, "max_loras": 1}, 0.85),
        ({"eager": False, "dtype": "bfloat16"}, 0.4),
    ],
    ids=["eager", "specialize", "one slot", "bfloat16"],
)
def test_other_settings_give_the_same_tokens(answers, folder, settings, share):
    found = run(folder, "dop", **settings)
    assert found["stock_reasons"] == []
    assert share_equal(found["tokens"], answers["dop"]["tokens"]) > share


def test_memory_does_not_grow_with_requests(answers):
    assert answers["dop"]["memory_growth_bytes"] < 8 << 20
