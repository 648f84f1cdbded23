"""PEFT adapter folders: ranks and targets found; lies and gaps refused."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dop.config import model_shape, read_adapters, workloads_from_model
from dop.config.hf import ModelShape
from dop.config.safetensors import read_header
from dop.errors import ConfigError, DopError

MODEL = ModelShape("tiny", "gated", 64, 128, 4, 2, 16, 2)
PATHS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
Shapes = dict[str, tuple[int, ...]]


def path_of(layer: int, name: str) -> str:
    return f"base_model.model.model.layers.{layer}.{PATHS[name]}"


def lora(ranks: dict[str, int], layers: int = 2, model: ModelShape = MODEL) -> Shapes:
    """Tensors of an adapter that gives each module a rank, in every layer."""
    found: Shapes = {}
    for layer in range(layers):
        for name, rank in ranks.items():
            width_in, width_out = model.linears[name]
            found[f"{path_of(layer, name)}.lora_A.weight"] = (rank, width_in)
            found[f"{path_of(layer, name)}.lora_B.weight"] = (width_out, rank)
    return found


def header_of(shapes: Shapes) -> tuple[dict[str, Any], int]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return header, at


def save(path: Path, header: object, data_bytes: int, *, length: int | None = None) -> None:
    text = json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    path.write_bytes(prefix + text + bytes(data_bytes))


def adapter(folder: Path, shapes: Shapes, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save(folder / "adapter_model.safetensors", *header_of(shapes))
    return folder


def refused(folder: Path, model: ModelShape | None = MODEL) -> str:
    with pytest.raises(ConfigError) as caught:
        read_adapters(folder, model)
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.action
    return line


def test_one_adapter(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", lora({"q_proj": 8, "v_proj": 8}))
    found = read_adapters(folder, MODEL)
    assert found.ranks == (8,)
    assert found.targets == ("q_proj", "v_proj")
    (one,) = found.adapters
    assert one.name == "a"
    assert one.max_rank == 8
    assert len(one.ranks) == 4


def test_mixed_and_odd_ranks_of_many(tmp_path: Path) -> None:
    adapter(tmp_path / "a", lora({"q_proj": 7, "v_proj": 7}), r=7)
    adapter(
        tmp_path / "b",
        lora({"q_proj": 3, "down_proj": 33}),
        r=3,
        rank_pattern={"down_proj": 33},
        target_modules=["q_proj", "down_proj"],
    )
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").write_text("")
    found = read_adapters(tmp_path, MODEL)
    assert found.ranks == (3, 7, 33)
    assert found.targets == ("down_proj", "q_proj", "v_proj")


def test_result_drives_workloads(tmp_path: Path) -> None:
    shape = model_shape("Qwen3-0.6B")
    tensors = lora({"q_proj": 5, "down_proj": 5}, shape.layers, shape)
    folder = adapter(tmp_path, tensors, r=5, target_modules=["q_proj", "down_proj"])
    found = read_adapters(folder, shape)
    loads = workloads_from_model("Qwen3-0.6B", ranks=found.ranks, targets=found.targets)
    assert [(w.name, w.rank) for w in loads] == [("qkv_proj", 5), ("down_proj", 5)]


def test_rank_patterns_as_peft_reads_them(tmp_path: Path) -> None:
    tensors = lora({"q_proj": 8, "v_proj": 8})
    name = f"{path_of(1, 'v_proj')}.lora_"
    tensors[name + "A.weight"], tensors[name + "B.weight"] = (4, 64), (32, 4)
    for pattern in ("layers.1.self_attn.v_proj", r"model\.layers\.1\..*v_proj", "1.+v_proj"):
        adapter(tmp_path, tensors, rank_pattern={pattern: 4})
        assert read_adapters(tmp_path, MODEL).ranks == (4, 8)
    adapter(tmp_path, tensors, rank_pattern={"layers.0.self_attn.v_proj": 4})
    assert "rank 8, its config says 4" in refused(tmp_path)
    # an expression that could run for ever is not run: then both ranks are possible
    adapter(tmp_path, tensors, rank_pattern={"(a|a)*(v_proj)*": 4})
    assert read_adapters(tmp_path, MODEL).ranks == (4, 8)


@pytest.mark.parametrize(
    "targets",
    ["all-linear", r".*\.(q|v)_proj", ["self_attn.q_proj", "v_proj"], "(x+)*(q|v)_proj"],
)
def test_ways_to_name_targets(tmp_path: Path, targets: Any) -> None:
    names = PATHS if targets == "all-linear" else ("q_proj", "v_proj")
    folder = adapter(tmp_path, lora(dict.fromkeys(names, 8)), target_modules=targets)
    assert read_adapters(folder, MODEL).targets == tuple(sorted(names))


def test_modules_that_are_not_tuned_are_reported(tmp_path: Path) -> None:
    tensors = lora({"q_proj": 8, "v_proj": 8})
    for name in ("lm_head", "vision_tower.layers.0.self_attn.q_proj"):
        tensors[f"base_model.model.{name}.lora_A.weight"] = (8, 24)
        tensors[f"base_model.model.{name}.lora_B.weight"] = (24, 8)
    tensors["base_model.model.model.embed_tokens.weight"] = (10, 64)
    folder = adapter(tmp_path, tensors, target_modules=["q_proj", "v_proj", "lm_head"])
    (one,) = read_adapters(folder, MODEL).adapters
    assert one.skipped == ("lm_head", "vision_tower.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": 0}, "r of adapter"),
        ({"r": -8}, "r of adapter"),
        ({"r": None}, "r of adapter"),
        ({"r": "8"}, "r of adapter"),
        ({"r": 10**50}, "r of adapter"),
        ({"r": 16}, "rank 8, its config says 16"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": [8]}, "rank_pattern"),
        ({"rank_pattern": {"(q_proj": 8}}, "no regular expression"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"target_modules": r".*\.w1"}, "no tensors for its target"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "no tensors for its target 'o_proj'"),
        ({"target_modules": "all-linear"}, "no tensors for down_proj of layer 0"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "DoRA"),
    ],
)
def test_bad_configs(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    assert says in refused(adapter(tmp_path, lora({"q_proj": 8, "v_proj": 8}), **change))


def test_missing_and_mismatched_tensors(tmp_path: Path) -> None:
    good = lora({"q_proj": 8, "v_proj": 8})
    q0, v1 = path_of(0, "q_proj"), path_of(1, "v_proj")

    def with_(**changes: tuple[int, ...] | None) -> str:
        tensors = {**good}
        for key, shape in changes.items():
            name = {"q0A": f"{q0}.lora_A.weight", "q0B": f"{q0}.lora_B.weight",
                    "v1A": f"{v1}.lora_A.weight", "v1B": f"{v1}.lora_B.weight"}[key]  # fmt: skip
            if shape is None:
                del tensors[name]
            else:
                tensors[name] = shape
        return refused(adapter(tmp_path, tensors))

    assert "no lora_B for" in with_(v1B=None)
    assert "no tensors for v_proj of layer 1" in with_(v1A=None, v1B=None)
    assert "do not fit each other" in with_(q0A=(4, 64))
    assert "do not fit each other" in with_(q0A=(8, 64, 1))
    assert "maps 60 to 64, but tiny maps 64 to 64" in with_(q0A=(8, 60))
    assert "the rank of" in with_(q0A=(0, 64), q0B=(64, 0))
    assert "larger than the layer's width" in with_(q0A=(65, 64), q0B=(64, 65))
    assert "no tensors for q_proj of layer 1" in refused(
        adapter(tmp_path, lora({"q_proj": 8, "v_proj": 8}, layers=1))
    )
    phi3 = ModelShape("phi3", "fused", 64, 128, 4, 2, 16, 2)
    assert "which phi3 does not have" in refused(adapter(tmp_path, good), phi3)
    assert "changes layer 2" in refused(adapter(tmp_path, lora({"q_proj": 8, "v_proj": 8}, 3)))
    assert "holds no lora_A" in refused(adapter(tmp_path, {"x": (1,)}))


def test_restricted_layers_may_leave_some_out(tmp_path: Path) -> None:
    folder = adapter(tmp_path, lora({"q_proj": 8, "v_proj": 8}, layers=1), layers_to_transform=[0])
    assert read_adapters(folder, MODEL).ranks == (8,)


def test_bad_folders(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "no")
    assert "holds no PEFT adapter" in refused(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    assert "is not a folder" in refused(file)
    folder = adapter(tmp_path / "a", lora({"q_proj": 8, "v_proj": 8}))
    (folder / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refused(tmp_path)
    (folder / "adapter_model.bin").write_bytes(b"")
    (folder / "adapter_config.json").unlink()
    assert "adapter_config.json does not exist" in refused(tmp_path)
    (folder / "adapter_config.json").mkdir()
    assert "is a directory" in refused(tmp_path)
    refused(Path("a\0b"))


T = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"t": {**T, "data_offsets": [0, 14]}}, 14, "needs 12 bytes"),
        ({"t": {**T, "data_offsets": [0, 12]}}, 10, "lies at bytes 0 to 12 of 10"),
        ({"t": {**T, "data_offsets": [12, 0]}}, 12, "lies at"),
        ({"t": {**T, "data_offsets": [-12, 0]}}, 12, "has offsets"),
        ({"t": {**T, "data_offsets": [0]}}, 12, "has offsets"),
        ({"t": {**T, "data_offsets": [4, 16]}}, 16, "leaves a hole"),
        ({"t": T, "u": {**T, "data_offsets": [6, 18]}}, 18, "overlaps"),
        ({"t": T, "u": T}, 12, "overlaps"),
        ({"t": T}, 20, "end at byte 12"),
        ({"t": {**T, "dtype": "F17"}}, 12, "has type"),
        ({"t": {**T, "dtype": ["F16"]}}, 12, "has type"),
        ({"t": {**T, "shape": [2, -3]}}, 12, "has shape"),
        ({"t": {**T, "shape": [10**30, 3]}}, 12, "has shape"),
        ({"t": {**T, "shape": [1 << 61] * 8}}, 12, "needs"),
        ({"t": {**T, "shape": "6"}}, 12, "has shape"),
        ({"t": {**T, "shape": [True, 6]}}, 12, "has shape"),
        ({"t": 7}, 0, "is 7"),
        ([T], 12, "not a JSON object"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: object, data: int, says: str) -> None:
    path = tmp_path / "x.safetensors"
    save(path, header, data)
    with pytest.raises(ConfigError) as caught:
        read_header(path)
    assert says in str(caught.value)


@pytest.mark.parametrize("length", [0, 5, 10**6, 1 << 63, (1 << 64) - 1])
def test_header_lengths_that_lie(tmp_path: Path, length: int) -> None:
    save(tmp_path / "x", {"t": T}, 12, length=length)
    with pytest.raises(ConfigError):
        read_header(tmp_path / "x")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    save(tmp_path / "x", {"t": T}, 12)
    data = (tmp_path / "x").read_bytes()
    for keep in range(len(data)):
        (tmp_path / "x").write_bytes(data[:keep])
        with pytest.raises(ConfigError):
            read_header(tmp_path / "x")


def test_header_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    numpy_format = pytest.importorskip("safetensors.numpy")
    arrays = {"a": np.zeros((3, 5), np.float16), "b": np.zeros((7,), np.float32)}
    arrays["empty"] = np.zeros((0, 4), np.float32)
    numpy_format.save_file(arrays, tmp_path / "x.safetensors", {"made": "by a test"})
    found = read_header(tmp_path / "x.safetensors")
    assert {n: i.shape for n, i in found.items()} == {n: a.shape for n, a in arrays.items()}


quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@quick
@given(
    st.dictionaries(
        st.sampled_from([*CONFIG, "rank_pattern", "use_dora", "layers_to_transform"]),
        values | st.dictionaries(st.sampled_from(["q_proj", "(", "v.*"]), st.integers(1, 9)),
    )
)
def test_random_configs_never_escape(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = adapter(tmp_path, lora({"q_proj": 8, "v_proj": 8}), **change)
    try:
        ranks = read_adapters(folder, MODEL).ranks
    except DopError as error:
        ranks, line = (8,), str(error)
    else:
        line = ""
    assert ranks == (8,)
    assert "\n" not in line


@quick
@given(
    st.dictionaries(
        st.sampled_from(["t", "u", "__metadata__"]),
        values
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F16", "U8", "X"]),
                "shape": st.lists(st.integers(-1, 4), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2),
            }
        ),
    ),
    st.integers(0, 24),
    st.binary(max_size=8),
)
def test_random_headers_never_escape(
    tmp_path: Path, header: object, data: int, junk: bytes
) -> None:
    path = tmp_path / "x"
    for spoil in (False, True):
        save(path, header, data)
        if spoil:
            path.write_bytes(junk + path.read_bytes())
        try:
            total = sum(info.end - info.begin for info in read_header(path).values())
        except DopError as error:
            total, line = data, str(error)
        else:
            line = ""
            data = data if not spoil else total
        assert total == data
        assert "\n" not in line
