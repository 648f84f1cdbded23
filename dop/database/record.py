"""One measurement of one trace: a line of the tuning log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dop.measurement import Measurement
from dop.space.trace import Trace

LOG_VERSION = "v0.6"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Record:
    """A trace, what it was measured for, where, and what came out.

    Attributes:
        workload_key: `Workload.key`.
        target_key: `Target.key`.
        hardware_params: `Target.hardware_params`.
        scenario_key: `Scenario.key`.
        device_name: `Target.device_name`.
        trace: the steps.
        measurement: times or failure.
        timestamp: seconds since 1970.
        sketch: name of the sketch, for people; the trace decides.
        versions: toolchain versions by name (dop, tvm, cuda, driver, python, ...).
        seed: the search's seed.
        revision: git revision of Dop, or "".
        predicted_s: what the cost model expected, if it had been trained.
    """

    workload_key: str
    target_key: str
    hardware_params: tuple[int, ...]
    scenario_key: str
    device_name: str
    trace: Trace
    measurement: Measurement
    timestamp: int
    sketch: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    revision: str = ""
    predicted_s: float | None = None

    @property
    def task_key(self) -> str:
        """Same form as `Task.key`: records of one task compete with each other."""
        return f"{self.workload_key}|{self.scenario_key}|{self.device_name}"
