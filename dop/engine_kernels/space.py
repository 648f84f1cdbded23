"""The search space of an engine's Triton kernel: a sketch whose open numbers are its options.

The structure is the engine's: tiles of rows of one adapter (the leading SP), tiles of the output
(SP), the reduction in blocks (SP) and, where the kernel has it, over thread blocks (SP, RF).
Warps and pipeline stages are pragmas. So the same search, mutators and cost model serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from dop.engine_kernels.task import EngineTask
from dop.space.sketch import Annotation, Domain, Limit, Sketch, Space
from dop.space.stages import INITIAL
from dop.space.step import Param, PragmaStep, RfactorStep, SplitStep, Step
from dop.target import Target

SHRINK, EXPAND = INITIAL.index("shrink"), INITIAL.index("expand")
WARPS = (1, 2, 4, 8)
PIPELINE = (1, 2, 3, 4)


def build_space(task: EngineTask, target: Target) -> Space:
    """All options of the kernel that the device may be able to run.

    Raises:
        ConstraintError: no option is left.
    """
    domains = _shrink_domains(task) if task.kernel == "shrink" else _expand_domains(task)
    names = [d.name for d in domains]
    half = task.kernel
    steps: list[Step] = [SplitStep(0, 0, None, (_open(names, "tokens.block_m", task.chunk),))]
    if half == "shrink":
        steps += _shrink_steps(names)
    else:
        steps += [
            SplitStep(EXPAND, 2, None, (Param("expand.block_n"),)),
            SplitStep(EXPAND, 4, None, (Param("expand.block_k"),)),
        ]
    stage = SHRINK if half == "shrink" else EXPAND
    steps += [
        PragmaStep(stage, 0, "triton_num_warps", Param(f"{half}.num_warps")),
        PragmaStep(stage, 0, "triton_num_stages", Param(f"{half}.num_stages")),
    ]
    limits = (
        Limit("shared memory bytes", target.max_smem_bytes, partial(_smem, half=half, task=task)),
        Limit("accumulators per thread", 128, partial(_accumulators, half=half, task=task)),
    )
    estimates = {
        "smem_bytes": partial(_smem, half=half, task=task),
        "threads": partial(_threads, half=half),
        "blocks_per_tile": partial(_blocks, half=half, task=task),
    }
    return Space(
        (Sketch(f"{task.engine}-{half}", tuple(steps), tuple(domains), limits, estimates),)
    )


def options(task: EngineTask, annotation: Annotation) -> dict[str, int]:
    """The annotation under the names that the engine's file uses."""
    plain = {name.partition(".")[2]: value for name, value in annotation.items()}
    if task.engine == "sglang":
        return {
            "BLOCK_N": plain["block_n"],
            "BLOCK_K": plain["block_k"],
            "num_warps": plain["num_warps"],
            "num_stages": plain["num_stages"],
        }
    chosen = {name: plain[name] for name in ("block_m", "block_n", "block_k")}
    if task.kernel == "shrink":
        chosen |= {"split_k": plain["split_k"], "group_size_m": 8}
    return chosen | {
        "num_warps": plain["num_warps"],
        "num_ctas": 1,
        "num_stages": plain["num_stages"],
    }


def _open(names: list[str], name: str, fixed: int) -> Param | int:
    return Param(name) if name in names else fixed


def _shrink_steps(names: list[str]) -> list[Step]:
    """Loops of shrink behind the row tiles: s, t, i, r, k."""
    steps: list[Step] = [SplitStep(SHRINK, 3, None, (Param("shrink.block_n"),))]
    if "shrink.split_k" in names:
        steps.append(SplitStep(SHRINK, 5, None, (Param("shrink.split_k"),), False))
        steps.append(SplitStep(SHRINK, 6, None, (Param("shrink.block_k"),)))
        steps.append(RfactorStep(SHRINK, 5, 0))
    else:
        steps.append(SplitStep(SHRINK, 5, None, (Param("shrink.block_k"),)))
    return steps


def _shrink_domains(task: EngineTask) -> list[Domain]:
    rank, depth = task.workload.rank, task.workload.in_features
    if task.engine == "sglang":  # its columns are those of all slices
        rank *= task.workload.slices
    domains = [
        _tile("shrink.block_n", _up_to(rank, (16, 32, 64, 128)), 16),
        _tile("shrink.block_k", _up_to(depth, (32, 64, 128, 256, 512)), 256),
        Domain("shrink.num_warps", "warps", WARPS, 4),
        Domain("shrink.num_stages", "pipeline", PIPELINE, 2),
    ]
    if task.engine == "vllm":
        splits = (1, 2, 4, 8, 16, 32, 64)
        domains.append(Domain("tokens.block_m", "tile", (16, 32, 64), 32))
        domains.append(Domain("shrink.split_k", "split_k", splits, 64))
    return domains


def _expand_domains(task: EngineTask) -> list[Domain]:
    width, rank = task.long_side, task.workload.rank
    domains = [
        _tile("expand.block_n", _up_to(width, (32, 64, 128, 256)), 64),
        _tile("expand.block_k", _up_to(rank, (16, 32, 64, 128)), 16 if task.chunk else 32),
        Domain("expand.num_warps", "warps", WARPS, 4),
        Domain("expand.num_stages", "pipeline", PIPELINE, 2),
    ]
    if task.engine == "vllm":
        domains.append(Domain("tokens.block_m", "tile", (16, 32, 64, 128), 64))
    return domains


def _up_to(size: int, choices: tuple[int, ...]) -> tuple[int, ...]:
    """Choices that are not twice as large as needed; at least one."""
    kept = tuple(c for c in choices if c < 2 * size)
    return kept or choices[:1]


def _tile(name: str, choices: tuple[int, ...], wanted: int) -> Domain:
    """A tile size whose default is the largest choice up to `wanted`."""
    return Domain(
        name, "tile", choices, max((c for c in choices if c <= wanted), default=choices[0])
    )


def _rows(values: Mapping[str, int], task: EngineTask) -> int:
    return values.get("tokens.block_m", task.chunk)


def _smem(values: Annotation, *, half: str, task: EngineTask) -> int:
    """Bytes of the operand tiles in flight; expand's first operand is float32 in vLLM."""
    rows, columns = _rows(values, task), values[f"{half}.block_n"]
    depth, stages = values[f"{half}.block_k"], max(1, values[f"{half}.num_stages"] - 1)
    left = 4 if half == "expand" and task.engine == "vllm" else task.workload.element_bytes
    return stages * depth * (rows * left + columns * task.workload.element_bytes)


def _threads(values: Annotation, *, half: str) -> int:
    return 32 * values[f"{half}.num_warps"]


def _accumulators(values: Annotation, *, half: str, task: EngineTask) -> int:
    rows, columns = _rows(values, task), values[f"{half}.block_n"]
    return rows * columns // _threads(values, half=half)


def _blocks(values: Annotation, *, half: str, task: EngineTask) -> int:
    """Thread blocks per row tile."""
    columns = values[f"{half}.block_n"]
    if half == "expand":
        return sum(-(-width // columns) for width in task.workload.out_features)
    split = values.get("shrink.split_k", 1)
    return split * task.workload.slices * -(-task.workload.rank // columns)
