"""What is tuned for a serving engine: one of its Triton kernels on one shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from dop.errors import ConfigError
from dop.scenario import Scenario, named
from dop.workload import Workload

ENGINES = ("vllm", "sglang")
KERNELS = ("shrink", "expand")

CHUNKS = (16, 32, 128)
"""Rows per chunk that SGLang's csgmv picks by the tokens of a step: below 64, below 256, above."""

MIXES = ("distinct", "uniform", "identical")
MIXED_TOKENS = 256
"""Largest step in which every row may have its own adapter."""


@dataclass(frozen=True, slots=True)
class EngineTask:
    """One kernel of an engine on one shape.

    Attributes:
        engine: "vllm" or "sglang".
        kernel: "shrink" or "expand".
        workload: shapes of the launch; shrink reads in_features, expand out_features.
        slots: adapter slots of the engine (`max_loras`, `max_loras_per_batch`).
        add_inputs: vLLM's expand adds to y (True) or writes (False); True elsewhere.
        chunk: SGLang's rows per chunk; 0 for vLLM.
    """

    engine: str
    kernel: str
    workload: Workload
    slots: int
    add_inputs: bool = True
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES or self.kernel not in KERNELS:
            raise ConfigError(
                f"{self.engine} {self.kernel} is no kernel of a known engine.",
                f"Engines: {', '.join(ENGINES)}; kernels: {', '.join(KERNELS)}.",
            )
        if self.slots < 1 or self.chunk < 0 or (self.engine == "sglang") != (self.chunk > 0):
            raise ConfigError(
                f"{self.slots} slots and chunks of {self.chunk} rows for {self.engine}.",
                "Give at least one slot; chunks are SGLang's.",
            )

    @property
    def long_side(self) -> int:
        """The wide dimension that the engine's table is keyed by: hidden size or output width."""
        if self.kernel == "shrink":
            return self.workload.in_features
        if self.engine == "sglang":
            return self.workload.total_out
        return max(self.workload.out_features)

    @property
    def shape_key(self) -> tuple[object, ...]:
        """What the engine's table tells apart; tasks that share it get one entry."""
        chosen = (self.engine, self.kernel, self.add_inputs, self.chunk, self.slots)
        return (*chosen, self.workload.slices, self.long_side, self.workload.rank)

    @property
    def key(self) -> str:
        """One line for people and for seeds."""
        how = "" if self.add_inputs else "/write"
        chunk = f"/chunk{self.chunk}" if self.chunk else ""
        return f"{self.engine}/{self.kernel}{how}{chunk}/{self.slots} slots/{self.workload.key}"

    def to_json(self) -> dict[str, object]:
        """As it stands in a log line."""
        return {
            "engine": self.engine,
            "kernel": self.kernel,
            "workload": self.workload.key,
            "slots": self.slots,
            "add_inputs": self.add_inputs,
            "chunk": self.chunk,
        }

    @staticmethod
    def from_json(data: Mapping[str, object]) -> EngineTask:
        """Task of a log line.

        Raises:
            ConfigError: a field is missing or makes no task.
        """
        try:
            slots, chunk = data["slots"], data["chunk"]
            if not isinstance(slots, int) or not isinstance(chunk, int):
                raise TypeError("slots and chunk are numbers")
            return EngineTask(
                str(data["engine"]),
                str(data["kernel"]),
                Workload.parse(str(data["workload"])),
                slots,
                bool(data["add_inputs"]),
                chunk,
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not an engine kernel's task: {error}.") from error


def tasks_of(engine: str, workloads: Iterable[Workload], slots: int) -> list[EngineTask]:
    """Every entry that an engine looks up for these launches, each once.

    Raises:
        ConfigError: the engine is unknown, or there is no slot.
    """
    found: dict[tuple[object, ...], EngineTask] = {}
    for workload in workloads:
        for kernel in KERNELS:
            base = EngineTask(engine, kernel, workload, slots, chunk=CHUNKS[0] * (engine != "vllm"))
            for task in _variants(base):
                found.setdefault(task.shape_key, task)
    return list(found.values())


def _variants(base: EngineTask) -> list[EngineTask]:
    if base.engine == "sglang":
        return [replace(base, chunk=chunk) for chunk in CHUNKS]
    if base.kernel == "expand":
        return [base, replace(base, add_inputs=False)]
    return [base]


def scenarios_of(task: EngineTask, tokens: Iterable[int]) -> tuple[Scenario, ...]:
    """Batches that a task is timed under; for SGLang those whose chunk size is the task's."""
    chosen = [t for t in tokens if not task.chunk or chunk_of(t) == task.chunk]
    return tuple(
        scenario
        for count in chosen
        for scenario in _distinct(count)
        if scenario.adapters <= task.slots
    )


def _distinct(tokens: int) -> list[Scenario]:
    mixes = MIXES if tokens <= MIXED_TOKENS else MIXES[1:]
    found: dict[tuple[int, ...], Scenario] = {}
    for mix in mixes:
        scenario = named(mix, tokens)
        found.setdefault(scenario.segments, scenario)
    return list(found.values())


def chunk_of(tokens: int) -> int:
    """Rows per chunk that csgmv uses for a step of so many tokens (its largest chunk allowed)."""
    if tokens >= 256:
        return CHUNKS[2]
    return CHUNKS[1] if tokens >= 64 else CHUNKS[0]
