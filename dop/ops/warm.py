"""Making everything ready before the first request: choices, loaded code, workspaces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from dop.config.hf import workloads_from_model
from dop.errors import ConfigError, DopError
from dop.ops import api, cpu_pack, eager, launch, sources
from dop.ops.plan import SegmentPlan
from dop.ops.shapes import DTYPES, Shape, shape_of
from dop.ops.sources import Choice
from dop.ops.stacks import stacks_of
from dop.workload import Workload

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Batch sizes that are made ready unless others are given."""

_TORCH_TYPES = {name: kind for kind, name in DTYPES.items()}


def warmup(
    what: Any,
    *,
    tokens: Iterable[int] = TOKENS,
    slots: int = 64,
    adapters: Iterable[int | None] = (None,),
    ranks: Iterable[int] = (16,),
    tp: int = 1,
    dtype: str = "bfloat16",
    device: Any = "cuda",
) -> list[Choice]:
    """Chooses and loads the kernels of all calls to come, builds what NVRTC must build, and
    allocates their workspace on the current stream, so that the first call costs what later ones
    do and nothing is allocated or loaded while a CUDA graph is captured.

    Args:
        what: a model (a shipped name, a config.json or its folder), a workload key such as
            "sgmv/bfloat16/r16/4096->4096+1024+1024", a `Workload`, a pair (a, b) of weight
            stacks as add_lora takes them, or a list of such.
        tokens: batch sizes.
        slots: slots of the plans, as in `segment_plan`.
        adapters: the hints with which plans will be made.
        ranks: ranks of the stacks (models only).
        tp: tensor-parallel shards (models only).
        dtype: element type (models only).
        device: where; on "cpu" nothing needs to be made ready.

    Returns:
        The choices, one per shape, batch size and hint.

    Raises:
        ConfigError: no such model, or a shape that is none.
        MissingKernelError: no kernel for a shape, and building one is forbidden.
    """
    index = sources.parse_device(device)
    options = {"ranks": tuple(ranks), "tp": tp, "dtype": dtype}
    shapes = list(_shapes(what, index, options))
    if not eager.on_gpu(index):
        return []
    hints = tuple(adapters)
    with eager.device_guard(index):
        nobody = torch.full((1,), -1, dtype=torch.int32, device=index)
        api.segment_plan(nobody, slots=slots)
        # The largest batch first: its workspace serves the others.
        sizes = sorted({int(count) for count in tokens if count > 0}, reverse=True)
        return [
            _ready(shape, size, slots, hint) for shape in shapes for size in sizes for hint in hints
        ]


def _ready(shape: Shape, tokens: int, slots: int, adapters: int | None) -> Choice:
    choice = sources.choose(shape, tokens, slots, adapters)
    eager.block_for(shape, _Batch(tokens, slots, adapters))
    return choice


class _Batch(SegmentPlan):
    """The numbers of a plan without its tables."""

    def __init__(self, tokens: int, slots: int, adapters: int | None) -> None:
        super().__init__(torch.empty(0, dtype=torch.int32), tokens, slots, adapters)


def _shapes(what: Any, device: int, options: Any) -> Iterable[Shape]:
    if isinstance(what, Workload):
        yield _shape(what, device)
    elif isinstance(what, str) and what.startswith("sgmv/"):
        yield _shape(Workload.parse(what), device)
    elif isinstance(what, str) or hasattr(what, "__fspath__"):
        for workload in workloads_from_model(what, **options):
            yield _shape(workload, device)
    elif _is_pair(what):
        yield stacks_of(*what).shape
    elif isinstance(what, Iterable):
        for each in what:
            yield from _shapes(each, device, options)
    else:
        raise ConfigError(
            f"{what!r} cannot be made ready.",
            "Give a model's name, a workload key, a Workload or a pair (a, b) of stacks.",
        )


def _is_pair(what: Any) -> bool:
    """Whether it is (a, b): tensors, or sequences of them."""
    if not isinstance(what, (tuple, list)) or len(what) != 2:
        return False
    first = what[0][0] if isinstance(what[0], (tuple, list)) and what[0] else what[0]
    return isinstance(first, torch.Tensor)


def _shape(workload: Workload, device: int) -> Shape:
    kind = _TORCH_TYPES[workload.dtype]
    return shape_of(workload.in_features, tuple(workload.out_features), workload.rank, kind, device)


def explain_choice(
    workload: Workload | str,
    *,
    tokens: int,
    adapters: int | None = None,
    slots: int = 64,
    device: Any = "cuda",
) -> Choice:
    """Which kernel serves a batch, and why; `str()` of the answer is for people.

    Args:
        workload: shapes, or their key; `beside`: a call in two pieces (beside.py).
        tokens: rows of the batch.
        adapters: the hint of the plan; None if there is none.
        slots: slots of the plan.
        device: where; the CPU is served by torch or by an exported library.

    Raises:
        ConfigError: the key or the device is none.
        MissingKernelError: no kernel, and building one is forbidden; the message says what was
            searched.
    """
    found = Workload.parse(workload) if isinstance(workload, str) else workload
    index = sources.parse_device(device)
    shape = _shape(found, index)
    if not eager.on_gpu(index):
        return _on_cpu(shape, tokens, adapters)
    with eager.device_guard(index):  # a kernel may be loaded, to see whether the GPU has room
        return sources.choose(shape, tokens, slots, adapters, found.beside)


def _on_cpu(shape: Shape, tokens: int, adapters: int | None) -> Choice:
    misses: list[str] = []
    try:
        library = cpu_pack.cpu_library(shape.key)
    except DopError as error:
        library = None
        misses.append(str(error))
    if library is None:
        reason = "every shape, rank and type"
        return Choice(shape.key, "cpu", tokens, adapters, None, reason, tuple(misses))
    info = library.choose(shape.key, tokens, adapters)
    reason = f"{info.name} of {library.path}: the table's choice for {tokens} tokens"
    return Choice(shape.key, "cpu", tokens, adapters, None, reason, tuple(misses))


def forget() -> None:
    """Forgets choices, opened packs, and this thread's prepared launches and workspaces: for
    tests, and after DOP_PACK_PATH changed."""
    sources.forget()
    cpu_pack.forget()
    launch.forget()
