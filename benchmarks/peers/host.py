"""What one eager call costs the host: time until it returns, allocations, synchronisations.

Bursts of calls are timed without waiting for the device, short enough that its queue never fills
(a full queue makes the host wait, and the figure the device's).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks.peers.cases import Case
from benchmarks.peers.contenders import Contender
from benchmarks.peers.data import Data

BURST = 100
"""Calls per burst: three launches each stay below the 1,024 that a stream queues."""
BURSTS = 60


@dataclass(frozen=True)
class HostCost:
    """Host cost of one eager call.

    Attributes:
        median_us, least_us: microseconds over the bursts, the empty loop taken off.
        allocations: device allocations per call after warm-up; None on a CPU.
        synchronises: message of torch's synchronisation check, "" if it found none.
    """

    name: str
    case: str
    median_us: float
    least_us: float
    allocations: float | None
    synchronises: str

    def line(self) -> str:
        """One line for a person."""
        what = "" if self.allocations is None else f", {self.allocations:g} allocations"
        if self.synchronises:
            what += f", SYNCHRONISES: {self.synchronises}"
        head = f"{self.name:<8}{self.case:<40}"
        return f"{head}{self.median_us:7.2f} us, least {self.least_us:.2f}{what}"

    def document(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def host_cost(contender: Contender, case: Case, data: Data, bursts: int = BURSTS) -> HostCost:
    """Measures a contender's eager call on one set, again and again."""
    prepared = contender.prepare(case, data)

    def call() -> object:
        return prepared.call(0)

    try:
        for _ in range(3):
            call()
        wait = _wait(data)
        wait()
        empty = statistics.median(_burst(lambda: None, wait) for _ in range(bursts))
        samples = [_burst(call, wait) - empty for _ in range(bursts)]
        allocations, message = _cuda_facts(call) if data.device.type == "cuda" else (None, "")
    finally:
        prepared.close()
    median = statistics.median(samples)
    return HostCost(contender.name, case.key, median, min(samples), allocations, message)


def _wait(data: Data) -> Callable[[], None]:
    return torch.cuda.synchronize if data.device.type == "cuda" else lambda: None


def _burst(call: Callable[[], object], wait: Callable[[], None]) -> float:
    """Microseconds per call of a burst; the device is idle before it."""
    begin = time.perf_counter()
    for _ in range(BURST):
        call()
    spent = time.perf_counter() - begin
    wait()
    return spent * 1e6 / BURST


def _cuda_facts(call: Callable[[], object]) -> tuple[float, str]:
    """Allocations per call, and what torch's check of synchronisations says."""
    key = "allocation.all.allocated"
    before = torch.cuda.memory_stats()[key]
    for _ in range(BURST):
        call()
    allocations = (torch.cuda.memory_stats()[key] - before) / BURST
    message = ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        message = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return allocations, message
