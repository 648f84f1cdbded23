"""A made-up but plausible device: sketches with eight numbers and a rugged time for each point.

The times have what real tables have: waves, occupancy, bank conflicts, cliffs, dead regions that
fail, and noise that repeats for the same point.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import product

from dop.errors import Failure
from dop.measurement import Measurement
from dop.scenario import Scenario, named
from dop.search.table import SpaceTable
from dop.space.sketch import Annotation, Candidate, Domain, Limit, Sketch, Space
from dop.space.step import (
    AnnotationStep,
    CacheReadStep,
    ComputeRootStep,
    Param,
    PragmaStep,
    RfactorStep,
    SplitStep,
    StorageAlignStep,
)
from dop.target import SM_90
from dop.workload import Workload

WORKLOAD = Workload("o_proj", 4096, (4096,), 16, "bfloat16")
WIDER = Workload("down_proj", 14336, (4096,), 16, "bfloat16")
SMALL = {
    "tokens.tile": (1, 4, 8, 16),
    "shrink.split_k": (1, 2, 4, 8, 16),
    "shrink.tile": (128, 256, 512),
    "shrink.vector": (4, 8),
    "shrink.stages": (1, 2),
    "expand.tile": (64, 128, 256),
    "expand.warps": (2, 4),
    "expand.pad": (0,),
}
"""1,440 points."""

KIND = {
    "tokens.tile": "tile",
    "shrink.split_k": "split_k",
    "shrink.tile": "tile",
    "shrink.vector": "vector",
    "shrink.stages": "pipeline",
    "expand.tile": "tile",
    "expand.warps": "warps",
    "expand.pad": "align",
    "expand.unroll": "unroll",
}
FULL = {
    "tokens.tile": (1, 2, 4, 8, 16, 32, 64),
    "shrink.split_k": (1, 2, 4, 8, 16, 32),
    "shrink.tile": (64, 128, 256, 512, 1024),
    "shrink.vector": (1, 2, 4, 8),
    "shrink.stages": (1, 2, 3, 4),
    "expand.tile": (32, 64, 128, 256, 512),
    "expand.warps": (1, 2, 4, 8, 16),
    "expand.pad": (0, 4, 8),
}


def _smem(v: Annotation) -> int:
    return v.get("shrink.stages", 1) * v["shrink.tile"] * (16 + v["tokens.tile"]) * 2


def sketch(
    name: str = "tiled/staged",
    choices: dict[str, tuple[int, ...]] | None = None,
    estimates: bool = True,
) -> Sketch:
    """A sketch over `choices`; its steps use every parameter, so that traces differ."""
    chosen = FULL if choices is None else choices
    domains = tuple(Domain(n, KIND[n], c, c[len(c) // 2]) for n, c in chosen.items())
    steps = [
        SplitStep(0, 0, None, (Param("tokens.tile"),)),
        ComputeRootStep(2),
        SplitStep(2, 2, 4096, (Param("shrink.tile"),)),
        SplitStep(2, 2, None, (Param("shrink.split_k"),), False),
        RfactorStep(2, 2, 0),
        AnnotationStep(2, 0, 7),
        SplitStep(5, 0, 4096, (Param("expand.tile"),)),
        PragmaStep(5, 0, "warps", Param("expand.warps")),
        AnnotationStep(5, 0, 5),
    ]
    if "shrink.vector" in chosen:
        steps.append(SplitStep(1, 1, 4096, (Param("shrink.vector"),)))
        steps.append(AnnotationStep(1, 2, 2))
    if "shrink.stages" in chosen:
        steps.append(PragmaStep(1, 0, "stages", Param("shrink.stages")))
    if "expand.pad" in chosen:
        steps.append(StorageAlignStep(4, 0, 32, Param("expand.pad")))
    if "expand.unroll" in chosen:
        steps.append(PragmaStep(5, 0, "unroll", Param("expand.unroll")))
    if "staged" in name:
        steps.append(CacheReadStep(1, "shared", (2,)))
    limits = (
        Limit("shared memory bytes", 160 << 10, _smem),
        Limit("threads per block", 1024, lambda v: 32 * v["expand.warps"] * 2),
    )
    known = {"smem_bytes": lambda v: float(_smem(v))} if estimates else {}
    return Sketch(name, tuple(steps), domains, limits, known)


def space(sketches: int = 3) -> Space:
    """A space of a few related sketches."""
    without = {n: c for n, c in FULL.items() if n not in ("shrink.stages", "expand.pad")}
    unrolled = {**without, "expand.unroll": (0, 16, 64)}
    every = (
        sketch(),
        sketch("tiled/direct", without),
        sketch("unrolled/direct", unrolled),
    )
    return Space(every[:sketches])


def _hash(text: str) -> float:
    """A fixed number in [0, 1) for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / (1 << 48)


@dataclass(frozen=True)
class Device:
    """The performance model; `flavour` varies its constants and its noise."""

    flavour: int = 0
    noise: float = 0.03
    jumps: float = 0.08
    failing: bool = True

    def measure(
        self, candidate: Candidate, scenario: Scenario, workload: Workload = WORKLOAD
    ) -> Measurement:
        """The time of a candidate, or a failure for some regions of the space."""
        v, name = candidate.values, candidate.sketch.name
        if self.failing and v["tokens.tile"] >= 8 and v["shrink.tile"] * v["shrink.split_k"] > 8192:
            return Measurement.failed(Failure.LAUNCH, "too many resources requested")
        text = f"{self.flavour}|{name}|{candidate.annotation}|{scenario.key}|{workload.key}"
        noise = 1 + self.noise * (2 * _hash(text) - 1)
        rugged = 1.0
        for a, b in (
            ("tokens.tile", "shrink.tile"),
            ("shrink.split_k", "expand.tile"),
            ("shrink.vector", "shrink.stages"),
            ("expand.warps", "expand.tile"),
        ):
            key = f"{self.flavour}|{a}{v.get(a)}|{b}{v.get(b)}"
            rugged *= 1 + self.jumps * _hash(key)
        seconds = self._base(v, name, scenario, workload) * noise * rugged
        accuracy, floor = 1e-3, workload.min_bytes(scenario.tokens, scenario.adapters) / 3e12
        return Measurement((seconds,), accuracy=accuracy, floor_s=floor)

    def _base(self, v: Annotation, name: str, scenario: Scenario, workload: Workload) -> float:
        c = [0.5 + 1.5 * _hash(f"{self.flavour}/{i}") for i in range(8)]
        rows, split, tile_k = v["tokens.tile"], v["shrink.split_k"], v["shrink.tile"]
        tiles = sum(-(-n // rows) for n in scenario.segments)
        padded = tiles * rows
        weights = tiles * workload.rank * 2
        vector = v.get("shrink.vector", 4)
        width = (1.0, 0.8, 0.62, 0.55 + 0.25 * (rows > 16))[int(math.log2(vector))]
        stages = v.get("shrink.stages", 1)
        hide = (1.0, 0.72, 0.66, 0.7)[stages - 1] if stages * tile_k < 2500 * c[0] else 1.1
        blocks = tiles * split
        waves = max(1.0, math.ceil(blocks / (132 * max(1, 4 - _smem(v) // 50000))))
        per_block = -(-workload.in_features // (tile_k * split)) * tile_k * (16 + rows * c[1])
        shrink = waves * per_block * width * hide * 2.2e-11 + split * 1.1e-7 * c[2]
        n_tile, warps = v["expand.tile"], v["expand.warps"]
        grid = tiles * -(-workload.total_out // n_tile)
        occupancy = max(1, 16 // warps) if n_tile * warps < 2048 * c[3] else 1
        expand = math.ceil(grid / (132 * occupancy)) * n_tile * (20 + rows * c[4]) / warps**0.7
        conflict = 1.25 if v.get("expand.pad", 4) == 0 and n_tile >= 128 else 1.0
        unroll = 1 - 0.06 * (v.get("expand.unroll", 0) == 16)
        structure = {"tiled/staged": 1.0, "tiled/direct": 1.05 + 0.1 * c[5]}.get(name, 1.0)
        move = (weights * (workload.in_features + workload.total_out) + 8192 * padded) / 3.3e12
        return structure * (2e-6 + move + shrink + expand * conflict * unroll * 1.6e-10)


def table(
    flavour: int, tokens: int = 32, mix: str = "uniform", estimates: bool = True
) -> SpaceTable:
    """The small sub-space, measured whole on a device."""
    scenario = named(mix, tokens)
    small = sketch("tiled/staged", SMALL, estimates)
    device = Device(flavour)
    found = SpaceTable(WORKLOAD, SM_90, scenario, small, tuple(small.estimates))
    for values in product(*SMALL.values()):
        annotation = dict(zip(SMALL, values, strict=True))
        if small.broken_limit(annotation) is None:
            candidate = Candidate.of(small, annotation)
            found.add(candidate, device.measure(candidate, scenario))
    return found
