"""Model configs: shapes of every family, shards, shipped models, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dop.config import model_shape, parse_ranks, shipped_models, workloads_from_model
from dop.config.hf import FAMILIES
from dop.errors import ConfigError, DopError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
}


def write(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def shapes(name: str | Path, **options: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    found = workloads_from_model(name, **{"ranks": (16,), **options})
    return {w.name: (w.in_features, w.out_features) for w in found}


LLAMA_8B = {
    "qkv_proj": (4096, (4096, 1024, 1024)),
    "o_proj": (4096, (4096,)),
    "gate_up_proj": (4096, (14336, 14336)),
    "down_proj": (14336, (4096,)),
}


@pytest.mark.parametrize(
    "name",
    [
        "Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B",
        "llama-3.1-8b",
        "META-LLAMA/Meta-Llama-3.1-8B-Instruct",
    ],
)
def test_shipped_by_any_spelling(name: str) -> None:
    assert shapes(name) == LLAMA_8B


@pytest.mark.parametrize(
    ("name", "qkv", "mlp", "layers"),
    [
        ("Llama-3.1-70B", (8192, (8192, 1024, 1024)), 28672, 80),
        ("Llama-3.2-1B", (2048, (2048, 512, 512)), 8192, 16),
        ("Qwen/Qwen3-8B", (4096, (4096, 1024, 1024)), 12288, 36),
        ("Qwen3-0.6B", (1024, (2048, 1024, 1024)), 3072, 28),
        ("meta-llama/Llama-2-7b-hf", (4096, (4096,) * 3), 11008, 32),
        ("Llama-2-13b-chat-hf", (5120, (5120,) * 3), 13824, 40),
    ],
)
def test_shipped_shapes(name: str, qkv: Any, mlp: int, layers: int) -> None:
    found = shapes(name)
    hidden = qkv[0]
    assert found["qkv_proj"] == qkv
    assert found["o_proj"] == (qkv[1][0], (hidden,))
    assert found["gate_up_proj"] == (hidden, (mlp, mlp))
    assert found["down_proj"] == (mlp, (hidden,))
    assert model_shape(name).layers == layers


def test_seven_models_ship() -> None:
    assert len(shipped_models()) == 7


def test_path_folder_and_file(tmp_path: Path) -> None:
    path = write(tmp_path, LLAMA)
    assert shapes(path) == shapes(tmp_path) == LLAMA_8B


def test_tensor_parallel_shards() -> None:
    assert shapes("Llama-3.1-8B", tp=4) == {
        "qkv_proj": (4096, (1024, 256, 256)),
        "o_proj": (1024, (4096,)),
        "gate_up_proj": (4096, (3584, 3584)),
        "down_proj": (3584, (4096,)),
    }
    # 16 shards of 8 key/value heads: each shard keeps one whole head
    assert shapes("Llama-3.1-8B", tp=16)["qkv_proj"] == (4096, (256, 128, 128))
    for tp in (3, 7, 24, 0, -1, 10**9):
        with pytest.raises(ConfigError):
            shapes("Llama-3.1-8B", tp=tp)


def test_fused_and_plain_families(tmp_path: Path) -> None:
    phi3 = {**LLAMA, "model_type": "phi3", "hidden_size": 3072, "num_key_value_heads": None,
            "intermediate_size": 8192}  # fmt: skip
    assert shapes(write(tmp_path, phi3)) == {
        "qkv_proj": (3072, (9216,)),
        "o_proj": (3072, (3072,)),
        "gate_up_proj": (3072, (16384,)),
        "down_proj": (8192, (3072,)),
    }
    phi = {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240,
           "num_attention_heads": 32}  # fmt: skip
    assert shapes(write(tmp_path, phi), tp=2) == {
        "qkv_proj": (2560, (1280, 1280, 1280)),
        "dense": (1280, (2560,)),
        "fc1": (2560, (5120,)),
        "fc2": (5120, (2560,)),
    }


def test_gemma_and_multimodal(tmp_path: Path) -> None:
    gemma2 = {**LLAMA, "model_type": "gemma2", "hidden_size": 3584, "num_attention_heads": 16,
              "head_dim": None}  # fmt: skip
    assert shapes(write(tmp_path, gemma2))["qkv_proj"] == (3584, (4096, 2048, 2048))
    # published gemma-3-4b-it leaves heads and head_dim to transformers' defaults
    inner = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    gemma3 = {"model_type": "gemma3", "text_config": inner, "vision_config": {}}
    assert shapes(write(tmp_path, gemma3))["qkv_proj"] == (2560, (2048, 1024, 1024))
    llava = {"model_type": "llava", "text_config": LLAMA}
    assert shapes(write(tmp_path, llava)) == LLAMA_8B


def test_targets_choose_launches() -> None:
    assert list(shapes("Llama-3.1-8B", targets=["v_proj", "q_proj"])) == ["qkv_proj"]
    assert list(shapes("Llama-3.1-8B", targets=("down_proj", "up_proj"))) == [
        "gate_up_proj",
        "down_proj",
    ]
    assert shapes("Llama-3.1-8B", targets=["all-linear"]) == LLAMA_8B
    for targets in (["w1"], []):
        with pytest.raises(ConfigError):
            shapes("Llama-3.1-8B", targets=targets)


def test_ranks() -> None:
    found = workloads_from_model("Qwen3-0.6B", ranks=(64, 7, 64), targets=["o_proj"])
    assert [w.rank for w in found] == [7, 64]
    assert parse_ranks("8, 16,64,8") == (8, 16, 64)
    for ranks in ("", "0", "-4", "a", "8,,16", "9" * 30, "1e3", "\u0663"):
        with pytest.raises(ConfigError):
            parse_ranks(ranks)
    with pytest.raises(ConfigError, match="larger than the layer's width"):
        workloads_from_model("Qwen3-0.6B", ranks=(2000,))
    with pytest.raises(ConfigError):
        workloads_from_model("Qwen3-0.6B", ranks=())
    with pytest.raises(ConfigError, match="dtype"):
        workloads_from_model("Qwen3-0.6B", ranks=(8,), dtype="int4")


@pytest.mark.parametrize("key", [k for k in LLAMA if k not in ("num_hidden_layers",)])
def test_missing_keys_are_named(tmp_path: Path, key: str) -> None:
    config = {k: v for k, v in LLAMA.items() if k != key}
    if key == "num_key_value_heads":
        config["model_type"] = "qwen2"  # for llama it means as many as heads
    with pytest.raises(ConfigError, match=key):
        shapes(write(tmp_path, config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": ["llama"]}, "does not know"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -4096}, "hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": 4096.5}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 10**4000}, "hidden_size"),
        ({"hidden_size": 4097}, "do not divide"),
        ({"num_key_value_heads": 5}, "cannot share"),
        ({"num_attention_heads": 1 << 20, "head_dim": 1 << 20}, "wider than"),
    ],
)
def test_bad_values(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shapes(write(tmp_path, {**LLAMA, **change}))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.action


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Llama-3\.1-8B"):  # the error lists what ships
        shapes("Llama-9-1T")
    for name in (tmp_path, tmp_path / "no.json", "", "\0", "x" * 5000, "../" * 3):
        with pytest.raises(ConfigError) as caught:
            shapes(name)
        assert "\n" not in str(caught.value)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, LLAMA)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so chmod proves nothing
    with pytest.raises(ConfigError, match="permission"):
        shapes(path)


def test_odd_paths_are_shown_on_one_line(tmp_path: Path) -> None:
    for name in ("jos\u00e9.json", "a\nb.json", "\udc80.json"):
        with pytest.raises(ConfigError, match="does not exist") as caught:
            shapes(tmp_path / name)
        line = str(caught.value)
        assert "\n" not in line
        assert line.encode("utf-8")
        assert ("jos\u00e9" in line) == (name[0] == "j")


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
configs = st.dictionaries(
    st.sampled_from([*LLAMA, "head_dim", "text_config", "num_experts"]),
    values | st.sampled_from([*FAMILIES]) | st.integers(1, 64) | st.lists(values, max_size=2),
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(configs, st.booleans(), st.integers(-2, 70), st.integers(-1, 9))
def test_random_configs_never_escape(
    tmp_path: Path, config: dict[str, Any], complete: bool, rank: int, tp: int
) -> None:
    path = write(tmp_path, {**LLAMA, **config} if complete else config)
    try:
        found = workloads_from_model(path, ranks=(rank,), tp=tp)
    except DopError as error:
        line = str(error)
    else:
        line = ""
        assert all(w.rank == rank for w in found)
    assert "\n" not in line
