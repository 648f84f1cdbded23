"""From the options of `dop tune` to what is tuned: target, families, budget, log path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dop.config import (
    BUCKETS,
    ModelShape,
    bucketize,
    default_scenarios,
    layers_of,
    left_out,
    model_shape,
    parse_ranks,
    read_adapters,
    read_traffic,
    workloads_of,
)
from dop.errors import ConfigError
from dop.family import Family
from dop.scenario import MIXES, Scenario
from dop.target import Target
from dop.workload import Workload

DEFAULT_RANKS = (16,)
CPU_BUCKETS = (1, 8, 32, 128)
"""Tokens of the default scenarios on a CPU."""
MIXES_BY_DEFAULT = ("distinct", "uniform", "identical")
WIDEST_DISTINCT = 256
"""Largest default batch in which every row has its own adapter: a prefill does not look so."""
TRAFFIC_SCENARIOS = 32
"""Representatives that a traffic file is reduced to; what it leaves out, `dop tune` says."""

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Request:
    """Options as they were given; None where they were not."""

    model: str
    adapters: Path | None = None
    ranks: str | None = None
    tp: int = 1
    traffic: Path | None = None
    dtype: str | None = None
    tokens: str | None = None
    mix: str | None = None
    beside: bool = False
    layers: str | None = None
    cold: bool = False

    def families(self, target: Target) -> list[Family]:
        """One family per distinct workload of the model, ranks and adapters.

        Raises:
            ConfigError: an option or a file it names cannot be used.
        """
        shape = model_shape(self.model)
        ranks, targets = self._adapters(shape)
        dtype = self.dtype or ("float32" if target.kind == "cpu" else "bfloat16")
        found = workloads_of(shape, ranks=ranks, tp=self.tp, dtype=dtype, targets=targets)
        if self.layers is not None:
            found = layers_of(found, self.layers.split(","), self.model)
        if self.beside:
            if target.kind == "cpu":
                raise ConfigError(
                    "--beside tunes for a second stream of a GPU, and this is a CPU.",
                    "Leave it out, or run on a machine with a GPU.",
                )
            found = [replace(workload, beside=True) for workload in found]
        if self.cold and (target.kind == "cpu" or self.beside):
            where = "beside a matmul, which reads x and writes y," if self.beside else "on a CPU"
            raise ConfigError(
                f"--cold measures with x and y in memory, but {where} they are in the cache.",
                "Leave it out." if self.beside else "Leave it out, or run on a GPU.",
            )
        scenarios = self.scenarios(target)
        return [Family(workload, target, scenarios) for workload in _merged(found)]

    def left_out(self, chosen: Sequence[Scenario]) -> tuple[tuple[Scenario, Scenario], ...]:
        """Batches of the traffic file that are not tuned for, each with the one of `chosen` that
        stands for it; nothing without a traffic file."""
        return () if self.traffic is None else left_out(read_traffic(self.traffic), chosen)

    def _adapters(self, shape: ModelShape) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
        """Ranks, and the modules to tune (None: all)."""
        given = parse_ranks(self.ranks) if self.ranks is not None else None
        if self.adapters is None:
            return given or DEFAULT_RANKS, None
        adapters = read_adapters(self.adapters, shape)
        return given or adapters.ranks, adapters.targets

    def scenarios(self, target: Target) -> tuple[Scenario, ...]:
        """The batches: of the traffic file, or mixes times token buckets; if asked for, their cold
        twins behind them.

        Raises:
            ConfigError: the traffic file, a number of tokens or a mix cannot be used.
        """
        warm = self._warm(target)
        twins = (replace(scenario, cold=True) for scenario in warm)
        return (*warm, *twins) if self.cold else warm

    def _warm(self, target: Target) -> tuple[Scenario, ...]:
        """The batches without their cold twins."""
        if self.traffic is not None:
            if self.tokens is not None or self.mix is not None:
                raise ConfigError(
                    "--traffic says the batches, and so do --tokens and --mix.",
                    "Give one or the other.",
                )
            return bucketize(read_traffic(self.traffic), TRAFFIC_SCENARIOS)
        buckets = CPU_BUCKETS if target.kind == "cpu" else BUCKETS
        chosen = default_scenarios(
            _numbers(self.tokens, "--tokens") if self.tokens is not None else buckets,
            _mixes(self.mix) if self.mix is not None else MIXES_BY_DEFAULT,
        )
        if self.mix is not None:
            return chosen
        return tuple(s for s in chosen if s.mix != "distinct" or s.tokens <= WIDEST_DISTINCT)


def seconds_of(text: str) -> float:
    """Seconds of a duration such as 90, 90s, 10m or 1.5h.

    Raises:
        ConfigError: it is not a positive duration.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smh]?)", text.strip())
    value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if value <= 0:
        raise ConfigError(f"{text!r} is not a duration.", "Write it like 90s, 10m or 1h.")
    return value


def log_path(model: str, target: Target) -> Path:
    """The log that `dop tune` writes if none is named: ./dop-<model>-<device kind>.jsonl."""
    path = Path(model)
    if path.name == "config.json":
        path = path.resolve().parent
    stem = path.name.removesuffix(".json")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "model"
    return Path(f"dop-{name}-{target.kind}.jsonl")


def _merged(workloads: Sequence[Workload]) -> list[Workload]:
    """Workloads of one key become one, named after all of them."""
    by_key: dict[str, list[Workload]] = {}
    for workload in workloads:
        by_key.setdefault(workload.key, []).append(workload)
    return [
        replace(same[0], name="+".join(dict.fromkeys(w.name for w in same)))
        for same in by_key.values()
    ]


def _numbers(text: str, option: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise ConfigError(f"{option} {text!r} is not a list of numbers.", "Write it like 1,8,32.")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _mixes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in MIXES]
    if unknown:
        raise ConfigError(f"mix {unknown[0]!r} is unknown.", f"Use some of {', '.join(MIXES)}.")
    return names
