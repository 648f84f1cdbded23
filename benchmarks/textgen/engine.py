"""What an arm of the comparison has to offer, whatever the engine behind it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol, runtime_checkable

from benchmarks.textgen.timing import Timing
from benchmarks.textgen.workload import Job
from dop.errors import ConfigError

ARMS = {
    "base": "the model without adapters",
    "stock": "the engine's own LoRA kernels (transformers: PEFT's loop over the batch's adapters)",
    "tuned-json": "the engine's own kernels with tuned configs (vLLM only)",
    "dop": "dop.ops",
    "loop": "stock, but one adapter at a time: no batch mixes adapters",
}


@dataclass(frozen=True)
class Switch:
    """What "stock+specialize" means, for any arm with adapters.

    Attributes:
        arguments: further arguments of vllm.LLM.
        variables: further variables of the environment of the arm's process.
    """

    arguments: Mapping[str, object] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


SWITCHES = {
    "specialize": Switch(arguments={"specialize_active_lora": True}),
    "dual": Switch(variables={"VLLM_LORA_ENABLE_DUAL_STREAM": "1"}),
    "behind": Switch(variables={"DOP_VLLM_BESIDE": "0"}),
}


def split(name: str) -> tuple[str, dict[str, object]]:
    """An arm's kind and the arguments that its switches add: "dop+specialize".

    Raises:
        ConfigError: an unknown arm or switch, or a switch for the arm without adapters.
    """
    kind, *switches = name.split("+")
    if kind not in ARMS:
        raise ConfigError(f"--arms {name} is unknown.", f"Use some of {', '.join(ARMS)}.")
    if bad := [s for s in switches if s not in SWITCHES or kind in ("base", "loop")]:
        known = ", ".join(f"stock+{s}, dop+{s}" for s in SWITCHES)
        raise ConfigError(f"--arms {name}: {bad[0]} is no switch of {kind}.", f"Use {known}.")
    extra: dict[str, object] = {}
    for switch in switches:
        extra |= SWITCHES[switch].arguments
    return kind, extra


def variables_of(name: str) -> dict[str, str]:
    """What an arm's switches add to its environment."""
    added: dict[str, str] = {}
    for switch in name.split("+")[1:]:
        added |= SWITCHES[switch].variables
    return added


def stock_of(name: str, names: Collection[str]) -> str | None:
    """The stock arm that another is compared with: of the same switches, else the plain one.

    None for a stock arm itself, and where there is none among `names`.
    """
    kind, _, switches = name.partition("+")
    if kind == "stock":
        return None
    wanted = [f"stock+{switches}"] if switches else []
    wanted += ["stock", *(n for n in names if n.startswith("stock+"))]
    return next((n for n in wanted if n in names), None)


class Arm(Protocol):
    """An engine that is loaded and serves requests."""

    def run(self, jobs: Sequence[Job], concurrency: int) -> list[Timing]:
        """Serve the jobs, at most `concurrency` in flight; their times in the same order."""
        ...

    def device_bytes(self) -> int | None:
        """Memory of the GPU that torch has handed out to the arm's process; None on a CPU."""
        ...

    def close(self) -> None:
        """Free what the arm holds; may be called twice."""
        ...


@runtime_checkable
class Watched(Protocol):
    """An arm that can tell where its time goes."""

    def profile(self, jobs: Sequence[Job], concurrency: int) -> str:
        """Serve the jobs while watched; what was seen, as text."""
        ...


class OneAdapterAtATime:
    """The arm "loop": another arm, which gets the jobs of one adapter after the other's."""

    def __init__(self, arm: Arm) -> None:
        self._arm = arm

    def run(self, jobs: Sequence[Job], concurrency: int) -> list[Timing]:
        """Serve the jobs adapter by adapter."""

        def adapter(index: int) -> int:
            chosen = jobs[index].adapter
            return -1 if chosen is None else chosen

        found: dict[int, Timing] = {}
        for _, group in groupby(sorted(range(len(jobs)), key=adapter), key=adapter):
            mine = list(group)
            times = self._arm.run([jobs[i] for i in mine], concurrency)
            found.update(zip(mine, times, strict=True))
        return [found[i] for i in range(len(jobs))]

    def device_bytes(self) -> int | None:
        """That of the other arm."""
        return self._arm.device_bytes()

    def close(self) -> None:
        """Nothing: the other arm is closed by its owner."""
