"""Logs of engines' kernels as `dop engine tune` writes them, with times made up."""

from __future__ import annotations

import random

from dop.config import workloads_from_model
from dop.engine_kernels.log import EngineRecord
from dop.engine_kernels.space import build_space, options
from dop.engine_kernels.task import scenarios_of, tasks_of
from dop.measurement import Measurement
from dop.target import SM_90

DEVICE = "NVIDIA H100 80GB HBM3"
TOKENS = (1, 8, 32, 64, 256, 2048)


def records(engine: str, slots: int = 64, model: str = "llama-3.1-8b") -> list[EngineRecord]:
    """Three candidates of every task under every batch, each right, with random times."""
    rng = random.Random(0)
    found = []
    for task in tasks_of(engine, workloads_from_model(model, ranks=(16,)), slots):
        space = build_space(task, SM_90)
        candidates = [*space.defaults(), *(space.sample(rng) for _ in range(2))]
        for scenario in scenarios_of(task, TOKENS):
            for candidate in candidates:
                times = Measurement((rng.uniform(1e-6, 1e-4),))
                chosen = options(task, candidate.values)
                versions = {"triton": "3.6.0", engine: "0"}
                found.append(
                    EngineRecord(
                        task, scenario, chosen, candidate.trace, times, DEVICE, versions, 0.0
                    )
                )
    return found


def vllm_records() -> list[EngineRecord]:
    return records("vllm")


def sglang_records() -> list[EngineRecord]:
    return records("sglang", slots=8)
