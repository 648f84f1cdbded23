"""Model config to workloads: the launches of SGMV that one layer of a model makes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from dop.config.files import MAX_SIZE, brief, parse_json, read_object, show, unreadable, whole
from dop.errors import ConfigError
from dop.workload import Workload

MAX_TP = 1024
MAX_RANKS = 64


@dataclass(frozen=True, slots=True)
class _Family:
    """How a model family names its linears, and what its config may leave out.

    Attributes:
        layout: "gated" (q, k, v, o, gate, up, down), "fused" (one adapter over qkv, one over
            gate_up) or "plain" (q, k, v, dense, fc1, fc2).
        defaults: what transformers assumes for keys that published configs leave out.
    """

    layout: str = "gated"
    defaults: Mapping[str, int] | None = None


_SAME_AS_HEADS = 0
"""In `_Family.defaults`: as many key/value heads as query heads."""

_GROUPED = _Family(defaults={"num_key_value_heads": _SAME_AS_HEADS})
_GEMMA3 = _Family(defaults={"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256})
FAMILIES: Mapping[str, _Family] = {
    "llama": _GROUPED,
    "mistral": _Family(),
    "qwen2": _Family(),
    "qwen2_vl": _Family(),
    "qwen2_vl_text": _Family(),
    "qwen2_5_vl": _Family(),
    "qwen2_5_vl_text": _Family(),
    "qwen3": _Family(defaults={"head_dim": 128}),
    "qwen3_vl_text": _Family(defaults={"head_dim": 128}),
    "gemma": _Family(defaults={"head_dim": 256}),
    "gemma2": _Family(defaults={"head_dim": 256}),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "phi": _Family("plain", {"num_key_value_heads": _SAME_AS_HEADS}),
    "phi3": _Family("fused", {"num_key_value_heads": _SAME_AS_HEADS}),
}
"""model_type -> family. Source: the configuration classes of transformers 4.5x."""

FUSED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "gated": {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "o_proj": ("o_proj",),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
    },
    "fused": {name: (name,) for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")},
    "plain": {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "dense": ("dense",),
        "fc1": ("fc1",),
        "fc2": ("fc2",),
    },
}
"""layout -> launch -> the modules that adapters name, in the order of y's columns."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides its SGMV shapes.

    Attributes:
        name: what the user asked for.
        layout: a key of FUSED.
        hidden, intermediate: widths of the residual stream and of the MLP.
        heads, kv_heads, head_dim: of attention.
        layers: number of decoder layers; 0 if the config does not say.
    """

    name: str
    layout: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Module name -> (in_features, out_features), unsharded, as adapters see them."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up, down = (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        if self.layout == "fused":
            return {
                "qkv_proj": (self.hidden, q + 2 * kv),
                "o_proj": (q, self.hidden),
                "gate_up_proj": (self.hidden, 2 * self.intermediate),
                "down_proj": down,
            }
        attention = {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
        }
        if self.layout == "plain":
            return {**attention, "dense": (q, self.hidden), "fc1": up, "fc2": down}
        mlp = {"gate_proj": up, "up_proj": up, "down_proj": down}
        return {**attention, "o_proj": (q, self.hidden), **mlp}

    @property
    def fused(self) -> Mapping[str, tuple[str, ...]]:
        """Launch -> modules it serves."""
        return FUSED[self.layout]

    def sharded(self, tp: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Launch -> (in_features, width of each slice) on one of `tp` GPUs.

        qkv and gate_up are split by columns, o and down by rows; key/value heads are
        replicated where there are fewer of them than GPUs. Source: vLLM's linear layers.

        Raises:
            ConfigError: `tp` does not divide the heads or the MLP.
        """
        whole(tp, "--tp", high=MAX_TP)
        kv_ok = tp % self.kv_heads == 0 if tp > self.kv_heads else self.kv_heads % tp == 0
        if self.heads % tp or self.intermediate % tp or not kv_ok:
            raise ConfigError(
                f"--tp {tp} does not divide {self.name}: {self.heads} heads, {self.kv_heads} "
                f"key/value heads, MLP width {self.intermediate}.",
                "Give a --tp that divides them.",
            )
        q = self.heads // tp * self.head_dim
        kv = max(1, self.kv_heads // tp) * self.head_dim
        mlp = self.intermediate // tp
        if self.layout == "fused":
            return {
                "qkv_proj": (self.hidden, (q + 2 * kv,)),
                "o_proj": (q, (self.hidden,)),
                "gate_up_proj": (self.hidden, (2 * mlp,)),
                "down_proj": (mlp, (self.hidden,)),
            }
        qkv, out, down = (self.hidden, (q, kv, kv)), (q, (self.hidden,)), (mlp, (self.hidden,))
        if self.layout == "plain":
            return {"qkv_proj": qkv, "dense": out, "fc1": (self.hidden, (mlp,)), "fc2": down}
        gate_up = (self.hidden, (mlp, mlp))
        return {"qkv_proj": qkv, "o_proj": out, "gate_up_proj": gate_up, "down_proj": down}


def workloads_from_model(
    name_or_path: str | Path,
    *,
    ranks: Iterable[int],
    tp: int = 1,
    dtype: str = "bfloat16",
    targets: Collection[str] | None = None,
) -> list[Workload]:
    """Workloads of one layer of a model, rank by rank, fused as serving engines fuse them.

    Args:
        name_or_path: a shipped model's name, a config.json, or the folder that holds one.
        ranks: ranks of the weight stacks.
        tp: number of tensor-parallel shards; the shapes are those of one shard.
        dtype: element type of the weights and activations.
        targets: modules that adapters touch ("q_proj", "qkv_proj", "all-linear"); all if None.
            A fused launch serves all its slices as soon as one of them is a target.

    Raises:
        ConfigError: the model, a rank, `tp` or a target cannot be used; the line says why.
    """
    shape = model_shape(name_or_path)
    return workloads_of(shape, ranks=ranks, tp=tp, dtype=dtype, targets=targets)


def workloads_of(
    shape: ModelShape,
    *,
    ranks: Iterable[int],
    tp: int = 1,
    dtype: str = "bfloat16",
    targets: Collection[str] | None = None,
) -> list[Workload]:
    """As `workloads_from_model`, of a shape that has been read already."""
    wanted = _launches(shape, targets)
    launches = shape.sharded(tp)
    return [
        Workload(name, launches[name][0], launches[name][1], rank, dtype)
        for rank in parse_ranks(ranks)
        for name in wanted
    ]


def layers_of(workloads: Sequence[Workload], layers: Sequence[str], model: str) -> list[Workload]:
    """The workloads of some layers, named such as "down" or "down_proj".

    Raises:
        ConfigError: there is no such layer.
    """
    names = list(dict.fromkeys(workload.name for workload in workloads))
    wanted = set()
    for layer in map(str.strip, layers):
        mine = {layer, f"{layer}_proj"} & set(names)
        if not mine:
            raise ConfigError(
                f"{model} has no layer {layer!r}.", f"Its layers: {', '.join(names)}."
            )
        wanted |= mine
    return [workload for workload in workloads if workload.name in wanted]


def parse_ranks(ranks: str | Iterable[int]) -> tuple[int, ...]:
    """Distinct ranks in rising order, of numbers or of a list such as "8,16,64".

    Raises:
        ConfigError: nothing there, or something that is not a rank.
    """
    found: set[int] = set()
    for item in ranks.split(",") if isinstance(ranks, str) else ranks:
        value: object = item
        if isinstance(item, str):
            text = item.strip()
            value = int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text
        found.add(whole(value, "a rank"))
    if not found:
        raise ConfigError("no ranks are given.", "Give --ranks 8,16 or --adapters DIR.")
    if len(found) > MAX_RANKS:
        raise ConfigError(f"{len(found)} different ranks.", f"Give at most {MAX_RANKS}.")
    return tuple(sorted(found))


def shipped_models() -> tuple[str, ...]:
    """Names of the models whose configs come with the package."""
    folder = resources.files("dop") / "models"
    names = (Path(entry.name) for entry in folder.iterdir())
    return tuple(sorted(name.stem for name in names if name.suffix == ".json"))


def model_shape(name_or_path: str | Path) -> ModelShape:
    """Shape of a shipped model (by name) or of a config.json (by path, or its folder).

    A path that exists wins over a name. Names ignore case, the owner ("meta-llama/", "Qwen/"),
    and variants that share their shapes ("-Instruct", "-hf").

    Raises:
        ConfigError: no such model, or a config that cannot be used.
    """
    text = str(name_or_path)
    path = Path(text)
    try:
        found = (path / "config.json").is_file() or path.is_file()
        folder = path.is_dir()
    except (OSError, ValueError) as error:
        unreadable(path, error)
    if not found and (shipped := _shipped(text)) is not None:
        return shipped
    if folder:
        path = path / "config.json"
    elif not found and not text.endswith(".json"):
        raise ConfigError(
            f"{brief(text, 200)} is neither a file nor a model that ships with Dop.",
            f"Give the path of a config.json, or one of {', '.join(shipped_models())}.",
        )
    return parse_config(read_object(path, "model's config.json"), show(path))


def parse_config(config: Mapping[str, object], name: str) -> ModelShape:
    """Shape of the content of a config.json; of its "text_config" if it has one.

    Raises:
        ConfigError: a needed key is missing or makes no sense, or the architecture is unknown.
    """
    outer = config.get("model_type")
    text = config.get("text_config")
    if isinstance(text, dict):
        config = text
    kind = config.get("model_type", outer)
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        what = "no model_type" if kind is None else f"model_type {brief(kind)}"
        raise ConfigError(
            f"{name} has {what}, which Dop does not know.", f"It knows {', '.join(FAMILIES)}."
        )
    _refuse_experts(config, name)
    value = _Reader(config, name, family.defaults or {})
    hidden, heads = value("hidden_size"), value("num_attention_heads")
    kv_heads = value("num_key_value_heads") or heads
    shape = ModelShape(
        name=name,
        layout=family.layout,
        hidden=hidden,
        intermediate=value("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(value, hidden, heads),
        layers=value("num_hidden_layers") if "num_hidden_layers" in config else 0,
    )
    if heads % kv_heads:
        raise ConfigError(
            f"{name}: {heads} heads cannot share {kv_heads} key/value heads.",
            "Check num_attention_heads and num_key_value_heads.",
        )
    if heads * shape.head_dim > MAX_SIZE:
        raise ConfigError(
            f"{name}: {heads} heads of {shape.head_dim} are wider than any model.",
            "Check num_attention_heads and head_dim.",
        )
    return shape


@dataclass(frozen=True, slots=True)
class _Reader:
    """Looks up sizes in a config, with the family's defaults and errors that name the key."""

    config: Mapping[str, object]
    name: str
    defaults: Mapping[str, int]

    def __call__(self, key: str) -> int:
        value = self.config.get(key)
        if value is None:
            if key in self.defaults:
                return self.defaults[key]
            raise ConfigError(
                f"{self.name} has no {key}.", "Give the complete config.json of the model."
            )
        return whole(value, f"{key} in {self.name}")


def _head_dim(value: _Reader, hidden: int, heads: int) -> int:
    if value.config.get("head_dim") is not None or "head_dim" in value.defaults:
        return value("head_dim")
    if hidden % heads:
        raise ConfigError(
            f"{value.name} has no head_dim, and {heads} heads do not divide {hidden}.",
            "Add head_dim, or check hidden_size and num_attention_heads.",
        )
    return hidden // heads


def _refuse_experts(config: Mapping[str, object], name: str) -> None:
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise ConfigError(
                f"{name} is a mixture of experts ({key}).", "Dop tunes dense models; give one."
            )


def _launches(shape: ModelShape, targets: Collection[str] | None) -> list[str]:
    """Launches that serve the target modules, in the order of the layer."""
    if isinstance(targets, str):
        targets = [targets]
    if targets is None or "all-linear" in targets:
        return list(shape.fused)
    known = {*shape.fused, *shape.linears}
    for target in targets:
        if target not in known:
            raise ConfigError(
                f"{shape.name} has no module {brief(target)} to tune.",
                f"Choose from {', '.join(shape.linears)}.",
            )
    wanted = [n for n, parts in shape.fused.items() if n in targets or set(parts) & set(targets)]
    if not wanted:
        raise ConfigError("no target modules are given.", "Give at least one, or leave it out.")
    return wanted


def _shipped(name: str) -> ModelShape | None:
    """The shipped config that a name stands for, if any."""
    wanted = _plain_name(name)
    for known in shipped_models():
        if wanted == _plain_name(known):
            file = resources.files("dop") / "models" / f"{known}.json"
            content = parse_json(file.read_bytes(), known)
            assert isinstance(content, dict)  # our own file
            return parse_config(content, known)
    return None


def _plain_name(name: str) -> str:
    """Name without owner, case, and endings that do not change shapes."""
    plain = re.sub(r"^(meta-llama|qwen)/", "", name.strip().lower())
    return re.sub(r"(-instruct|-chat|-base)?(-hf)?$", "", plain.removeprefix("meta-"))
