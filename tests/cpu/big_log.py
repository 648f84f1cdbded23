"""A log of a long search, for the tests of scale: real workloads, real traces, mixed failures."""

from __future__ import annotations

import random
from pathlib import Path

from dop.database import wire
from dop.database.record import Record
from dop.errors import Failure
from dop.family import Family
from dop.measurement import Measurement
from dop.scenario import MIXES, named
from dop.space.generate import build_space
from dop.space.sketch import Candidate
from dop.target import SM_90
from dop.workload import Workload

SHAPES = (
    ("qkv_proj", 4096, (4096, 1024, 1024)),
    ("o_proj", 4096, (4096,)),
    ("gate_up_proj", 4096, (14336, 14336)),
    ("down_proj", 14336, (4096,)),
)
BATCHES = [(n, mix) for n in (8, 32, 128) for mix in MIXES] + [(1, "identical")]


def families() -> list[Family]:
    """8 workloads, 104 tasks."""
    batches = tuple(named(mix, tokens) for tokens, mix in BATCHES)
    return [
        Family(Workload(name, k, out, rank, "bfloat16"), SM_90, batches)
        for rank in (16, 64)
        for name, k, out in SHAPES
    ]


def write_big_log(path: Path, records: int = 100_000) -> Path:
    """A log of that many records, every trace measured once under all batches of its family."""
    rng = random.Random(0)
    made = families()
    each = -(-records // (len(made) * len(BATCHES)))
    lines: list[bytes] = []
    for family in made:
        space = build_space(family.workload, SM_90)
        taken = set()
        while len(taken) < each:
            candidate = space.sample(rng)
            if candidate.trace not in taken:
                taken.add(candidate.trace)
                lines += _lines(family, candidate, rng, len(lines))
    path.write_bytes(b"\n".join(lines[:records]) + b"\n")
    return path


def _lines(family: Family, candidate: Candidate, rng: random.Random, number: int) -> list[bytes]:
    """What a candidate's measurement left: one line per batch, cut from one line's text."""
    failure = Failure(rng.randrange(1, 8)) if rng.random() < 0.3 else Failure.NONE
    if failure is Failure.NONE:
        found = Measurement((1.25, 1.5, 1.75), accuracy=3e-3, floor_s=2e-6, cost_s=0.04)
    else:
        found = Measurement.failed(failure, f"it broke at {rng.randrange(50)}", 0.5)
    text = wire.dump(
        Record(
            workload_key=family.workload.key,
            target_key=SM_90.key,
            hardware_params=SM_90.hardware_params,
            scenario_key="SCENARIO",
            device_name=SM_90.device_name,
            trace=candidate.trace,
            measurement=found,
            timestamp=1_700_000_000,
            sketch=candidate.sketch.name,
            versions={"dop": "0.1.0", "tvm": "0.27.0"},
            seed=7,
            revision="abc1234",
            predicted_s=7.125,
        )
    )
    lines = []
    for place, scenario in enumerate(family.scenarios):
        us = rng.uniform(4, 40) * scenario.tokens**0.5
        times = ",".join(f"{us * share:.4f}e-6" for share in (1.0, 1.02, 0.99))
        lines.append(
            text.replace(b"SCENARIO", scenario.key.encode())
            .replace(b"7.125", f"{us * rng.uniform(0.8, 1.2):.4f}e-6".encode())
            .replace(b"1.25,1.5,1.75", times.encode())
            .replace(b"1700000000", str(1_700_000_000 + (number + place) // 20).encode())
        )
    return lines
