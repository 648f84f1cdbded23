"""Timing an engine's kernel on the GPU: CUDA-graph replay over rotating weights, checked first."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dop.errors import Failure
from dop.measurement import Measurement
from dop.scenario import Scenario

TOLERANCE = 0.02
"""Largest |got - want| / max |want| that counts as right, for 16-bit operands and results."""

_REPEATS = 3
_MIN_S = 0.002
_MAX_CALLS = 64

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One batch, ready to run.

    Attributes:
        calls: launches over different weights, so that these come from memory.
        check: runs the first call and gives |got - want| / max |want|.

    A case does not depend on the kernel's options, so it serves every candidate of a task.
    """

    calls: Sequence[Call]
    check: Callable[[], float]


def measure_case(case: Case) -> Measurement:
    """Check, then time: seconds per call, one figure per repeat."""
    began = time.monotonic()
    try:
        error = case.check()
        if not error <= TOLERANCE:
            return Measurement.failed(
                Failure.CORRECTNESS, f"off by {error:.3g} of the largest value", _since(began)
            )
        seconds = _replay(case.calls)
        return Measurement(seconds, accuracy=error, cost_s=_since(began))
    except torch.cuda.OutOfMemoryError as problem:
        return Measurement.failed(Failure.LAUNCH, str(problem), _since(began))
    except Exception as problem:
        # Triton has classes of its own for what it cannot build, and they move between versions.
        message = f"{type(problem).__name__}: {problem}"
        return Measurement.failed(Failure.COMPILE, message, _since(began))


def _since(began: float) -> float:
    return time.monotonic() - began


def _replay(calls: Sequence[Call]) -> tuple[float, ...]:
    for call in calls:  # engines make tables of addresses at a first call, not while capturing
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    once = _timed(graph, 1)
    rounds = max(1, min(200, int(_MIN_S / max(once, 1e-7))))
    found = [_timed(graph, rounds) / rounds / len(calls) for _ in range(_REPEATS)]
    del graph
    return tuple(found)


def _timed(graph: torch.cuda.CUDAGraph, rounds: int) -> float:
    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(rounds):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def copies_for(stack_bytes: int, l2_bytes: int) -> int:
    """How many copies of the weight stacks together exceed twice the L2 cache."""
    return max(2, -(-2 * l2_bytes // max(1, stack_bytes)))


def mappings(scenario: Scenario, slots: int) -> list[list[int]]:
    """token -> slot of several calls that use different slots as far as there are any."""
    used = max(1, scenario.adapters)
    ids = scenario.token_to_adapter()
    order = list(range(slots))
    random.Random(0).shuffle(order)
    turns = max(1, slots // used)
    return [
        [order[(adapter + turn * used) % slots] if adapter >= 0 else -1 for adapter in ids]
        for turn in range(min(turns, _MAX_CALLS))
    ]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| / max |want|."""
    return float(
        (got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-9)
    )


def spread(mapped: int, copies: int) -> list[tuple[int, int]]:
    """(mapping, copy) of every call: all mappings over each copy, up to a limit."""
    pairs = [(m, c) for c in range(copies) for m in range(mapped)]
    return pairs[:_MAX_CALLS]
