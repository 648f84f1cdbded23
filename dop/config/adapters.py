"""PEFT adapter folders: which ranks and which modules there are to tune for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from dop.config.files import brief, read_object, show, unreadable, whole
from dop.config.hf import ModelShape
from dop.config.peft_patterns import rank_of, target_pattern, unmatched_targets
from dop.config.safetensors import TensorInfo, read_header
from dop.errors import ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_ADAPTERS = 10_000

_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d{1,6})\.(?:.*\.)?([^.]+)")
_NOT_TEXT = re.compile(r"(?:^|\.)(?:vision|visual|audio|multi_modal|speech|image)[^.]*\.")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter: the rank of each module it changes.

    Attributes:
        name: its folder's name.
        ranks: module path ("model.layers.0.self_attn.q_proj") -> rank.
        shapes: module path -> (in_features, out_features).
        skipped: modules outside of the decoder's linears (lm_head, a vision tower, ...), which
            Dop does not tune.
    """

    name: str
    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]
    skipped: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the modules it changes, without their paths: ("k_proj", "q_proj")."""
        return tuple(sorted({_leaf(module) for module in self.ranks}))

    @property
    def max_rank(self) -> int:
        """Largest rank of its modules: the rank of the slot it needs."""
        return max(self.ranks.values())


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """The adapters of a folder, and what to tune for them."""

    adapters: tuple[Adapter, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Distinct ranks of all modules of all adapters, rising: the ranks to tune."""
        return tuple(sorted({r for adapter in self.adapters for r in adapter.ranks.values()}))

    @property
    def targets(self) -> tuple[str, ...]:
        """Modules that some adapter changes: the `targets` of `workloads_from_model`."""
        return tuple(sorted({name for adapter in self.adapters for name in adapter.targets}))


def read_adapters(directory: str | Path, model: ModelShape | None = None) -> AdapterSet:
    """Adapters of a folder that is one PEFT adapter, or whose subfolders are.

    Reads each adapter_config.json and the header of each adapter_model.safetensors, never the
    weights. With `model`, every shape is checked against the model's (unsharded) layers.

    Raises:
        ConfigError: no adapter there, a file that cannot be read or lies, tensors that are
            missing or do not fit the config or the model. The line names the adapter.
    """
    root = Path(directory)
    try:
        if not root.is_dir():
            if root.exists():
                raise ConfigError(f"{show(root)} is not a folder.", "Give the adapters' folder.")
            raise ConfigError(f"{show(root)} does not exist.", "Check --adapters.")
        here = _is_adapter(root)
        found = [root] if here else sorted(d for d in root.iterdir() if d.is_dir())
        folders = found if here else [d for d in found if _is_adapter(d)]
    except (OSError, ValueError) as error:
        unreadable(root, error)
    if not folders:
        raise ConfigError(
            f"{show(root)} holds no PEFT adapter.",
            f"Give a folder with {CONFIG}, or with subfolders that have one.",
        )
    if len(folders) > MAX_ADAPTERS:
        raise ConfigError(f"{show(root)} holds {len(folders)} adapters.", "Give fewer.")
    return AdapterSet(tuple(_read_one(folder, model) for folder in folders))


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CONFIG, WEIGHTS, "adapter_model.bin"))


def _read_one(folder: Path, model: ModelShape | None) -> Adapter:
    where = f"adapter {show(folder)}"
    config = read_object(folder / CONFIG, "PEFT adapter config")
    _check_kind(config, where)
    rank = whole(config.get("r"), f"r of {where}")
    if not (folder / WEIGHTS).exists():
        raise ConfigError(
            f"{where} has no {WEIGHTS}.",
            "Save it with safe_serialization=True; Dop does not open pickled weights.",
        )
    tensors = read_header(folder / WEIGHTS)
    pairs = _pairs(tensors, where)
    modules = {m: pair for m, pair in pairs.items() if _tunable(m)}
    if not modules:
        raise ConfigError(f"{where} changes no linear layer of a decoder.", "Leave it out.")
    for module, (a, b) in modules.items():
        _check_pair(module, a, b, where)
        _check_rank(module, a[0], rank, config, where)
        if model is not None:
            _check_model(module, a[1], b[0], model, where)
    _check_complete(modules, pairs, config, model, where)
    return Adapter(
        folder.name,
        {m: a[0] for m, (a, _) in modules.items()},
        {m: (a[1], b[0]) for m, (a, b) in modules.items()},
        tuple(sorted(set(pairs) - set(modules))),
    )


def _check_kind(config: Mapping[str, object], where: str) -> None:
    """Refuse what is no plain low-rank product."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(
            f"{where} has peft_type {brief(kind)}.", "Dop serves LoRA adapters; leave it out."
        )
    if config.get("use_dora"):
        raise ConfigError(
            f"{where} uses DoRA, which is no plain low-rank product.",
            "Train it without use_dora, or leave it out.",
        )


def _pairs(
    tensors: Mapping[str, TensorInfo], where: str
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Module -> shapes of its A and B."""
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in tensors.items():
        if "lora_magnitude_vector" in name:
            raise ConfigError(f"{where} holds DoRA tensors.", "Leave it out.")
        match = _TENSOR.fullmatch(name)
        if match is None:
            continue
        module, side = match[1], match[2]
        if side in sides.setdefault(module, {}):
            raise ConfigError(
                f"{where} holds lora_{side} of {brief(module)} twice.", "Keep one adapter a file."
            )
        sides[module][side] = info.shape
    if not sides:
        raise ConfigError(f"{where} holds no lora_A and lora_B tensors.", "Save it again.")
    for module, shapes in sides.items():
        if missing := {"A", "B"} - set(shapes):
            raise ConfigError(
                f"{where} has no lora_{missing.pop()} for {brief(module, 120)}.",
                "The weights are incomplete; save or download it again.",
            )
    return {module: (shapes["A"], shapes["B"]) for module, shapes in sides.items()}


def _tunable(module: str) -> bool:
    """Whether a module belongs to a decoder layer, and to no tower for images or sound."""
    return _NOT_TEXT.search(module) is None and _LAYER.fullmatch(module) is not None


def _check_pair(module: str, a: tuple[int, ...], b: tuple[int, ...], where: str) -> None:
    what = f"{brief(module, 120)} of {where}"
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise ConfigError(
            f"{what} has lora_A {list(a)} and lora_B {list(b)}, which do not fit each other.",
            "They should be [rank, in] and [out, rank].",
        )
    rank = whole(a[0], f"the rank of {what}")
    width = min(whole(a[1], f"the input width of {what}"), whole(b[0], f"the width of {what}"))
    if rank > width:
        raise ConfigError(
            f"{what} has rank {rank}, larger than the layer's width {width}.",
            "A low-rank adapter cannot have that rank; check the adapter.",
        )


def _check_rank(
    module: str, rank: int, default: int, config: Mapping[str, object], where: str
) -> None:
    allowed = rank_of(module, default, config.get("rank_pattern"), where)
    if rank not in allowed:
        raise ConfigError(
            f"{brief(module, 120)} of {where} has rank {rank}, its config says "
            f"{' or '.join(map(str, sorted(allowed)))}.",
            f"{CONFIG} and {WEIGHTS} do not belong together; save it again.",
        )


def _check_model(module: str, width_in: int, width_out: int, model: ModelShape, where: str) -> None:
    expected = model.linears.get(_leaf(module))
    if expected is None:
        raise ConfigError(
            f"{where} changes {brief(module, 120)}, which {model.name} does not have.",
            "The adapter was trained for another model; check --model and --adapters.",
        )
    if (width_in, width_out) != expected:
        raise ConfigError(
            f"{brief(module, 120)} of {where} maps {width_in} to {width_out}, but "
            f"{model.name} maps {expected[0]} to {expected[1]}.",
            "The adapter was trained for another model; check --model and --adapters.",
        )
    layer = _layer(module)
    if model.layers and layer >= model.layers:
        raise ConfigError(
            f"{where} changes layer {layer}, but {model.name} has {model.layers} layers.",
            "The adapter was trained for another model; check --model and --adapters.",
        )


def _check_complete(
    modules: Collection[str],
    tensors: Collection[str],
    config: Mapping[str, object],
    model: ModelShape | None,
    where: str,
) -> None:
    """Every target has tensors, in every layer (unless the config restricts the layers)."""
    targets = target_pattern(config.get("target_modules"), where)
    names = {_leaf(module) for module in modules}
    if missing := unmatched_targets(targets, tensors):
        raise ConfigError(
            f"{where} has no tensors for its target {brief(missing[0])}.",
            "The weights are incomplete; save or download it again.",
        )
    if isinstance(targets, str):  # a regex, or all-linear: it may name only some layers
        if targets == "all-linear" and model is not None:
            names |= set(model.linears)
        elif targets != "all-linear":
            return
    elif any("." in target for target in targets):
        return
    if any(config.get(key) for key in ("layers_to_transform", "exclude_modules")):
        return
    layers = {_layer(module) for module in modules}
    if model is not None and model.layers:
        layers = set(range(model.layers))
    present = {(_layer(module), _leaf(module)) for module in modules}
    for layer in sorted(layers):
        for name in sorted(names):
            if (layer, name) not in present:
                raise ConfigError(
                    f"{where} has no tensors for {name} of layer {layer}.",
                    "The weights are incomplete, or for another model; check both.",
                )


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _layer(module: str) -> int:
    match = _LAYER.fullmatch(module)
    assert match is not None  # only modules that `_tunable` let through
    return int(match[1])
