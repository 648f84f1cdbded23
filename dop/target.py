"""Where code runs: device, its limits, and the toolchain that builds for it."""

from __future__ import annotations

from dataclasses import dataclass

from dop.errors import ConfigError
from dop.scenario import Scenario
from dop.workload import Workload


@dataclass(frozen=True, slots=True)
class Target:
    """A device and the limits that candidates are checked against.

    Attributes:
        kind: "cuda" or "cpu".
        arch: "sm_90a" and the like for CUDA; LLVM's CPU name for CPUs.
        device_name: as the driver or the operating system reports it.
        units: multiprocessors (CUDA) or threads used (CPU).
        max_threads: threads per block (CUDA); 1 on a CPU.
        max_smem_bytes: shared memory per block, opt-in limit (CUDA); 0 on a CPU.
        max_registers: registers per block (CUDA); vector registers on a CPU.
        l2_bytes: last-level cache.
        vector_bytes: widest load, 16 on CUDA, the SIMD width on a CPU.
        features: LLVM feature string ("+avx2,+fma"), CPU only.
    """

    kind: str
    arch: str
    device_name: str
    units: int
    max_threads: int
    max_smem_bytes: int
    max_registers: int
    l2_bytes: int
    vector_bytes: int
    features: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("cuda", "cpu"):
            raise ConfigError(f"device {self.kind!r} is unknown.", "Use cuda or cpu.")

    @property
    def key(self) -> str:
        """Target string of the log."""
        if self.kind == "cuda":
            return f"cuda -arch={self.arch}"
        features = f" -mattr={self.features}" if self.features else ""
        return f"llvm -mcpu={self.arch}{features} -num-cores={self.units}"

    @property
    def hardware_params(self) -> tuple[int, ...]:
        """The auto-scheduler's list: cores, vector bytes, cache line bytes, shared memory
        per block, registers per block, threads per block, vthread extent, warp size."""
        warp = 32 if self.kind == "cuda" else 1
        return (
            self.units,
            self.vector_bytes,
            64,
            self.max_smem_bytes,
            self.max_registers,
            self.max_threads,
            8,
            warp,
        )


SM_90 = Target("cuda", "sm_90a", "NVIDIA H100", 132, 1024, 232448, 65536, 50 << 20, 16)
"""An H100's limits: what is assumed where no GPU can be asked."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is tuned: a workload under a scenario on a target."""

    workload: Workload
    scenario: Scenario
    target: Target

    @property
    def key(self) -> str:
        """Identity in the log: workload, scenario and device."""
        return f"{self.workload.key}|{self.scenario.key}|{self.target.device_name}"
