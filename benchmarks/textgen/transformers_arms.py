"""Arms on transformers: continuous batching in this process, all arms on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.textgen.engine import Arm
from benchmarks.textgen.models import BenchModel
from benchmarks.textgen.timing import Timing
from benchmarks.textgen.workload import Job
from dop.errors import ConfigError, MissingDependencyError
from dop.integrations.adapters import Adapter, random_adapter
from dop.integrations.transformers import LoraEngine, Request


class TransformersArm:
    """One LoraEngine; `adapters` False leaves all adapters out."""

    def __init__(self, engine: LoraEngine, adapters: bool) -> None:
        self._engine = engine
        self._adapters = adapters

    def run(self, jobs: Sequence[Job], concurrency: int) -> list[Timing]:
        """Serve the jobs."""
        requests = [
            Request(j.prompt, f"a{j.adapter}" if self._adapters else None, j.output) for j in jobs
        ]
        outputs = self._engine.generate(requests, concurrency=concurrency)
        for job, output in zip(jobs, outputs, strict=True):
            assert len(output.tokens) == job.output
        return [Timing(o.start_s, o.token_s) for o in outputs]

    def device_bytes(self) -> int | None:
        """Of this process, in which all arms are."""
        return torch.cuda.memory_allocated() if torch.cuda.is_available() else None

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()


def loop_plan(tokens: torch.Tensor, *, slots: int, ranks: torch.Tensor, scale: torch.Tensor) -> Any:
    """Rows of each adapter in the batch, once per step: what PEFT works out in every layer."""
    ids = tokens.tolist()
    rank, scales = ranks.tolist(), scale.tolist()
    return [
        (s, torch.tensor([i for i, t in enumerate(ids) if t == s], device=tokens.device), rank[s],
         scales[s])
        for s in sorted({t for t in ids if t >= 0})
    ]  # fmt: skip


def loop_add(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, plan: Any) -> None:
    """Two small matmuls an adapter, as in PEFT's LoraLayer._mixed_batch_forward."""
    for slot, rows, rank, scale in plan:
        y[rows] += (x[rows] @ a[slot, :rank].T @ b[slot, :, :rank].T) * scale


def load_arms(
    names: Sequence[str],
    model: BenchModel,
    *,
    rank: int,
    slots: int,
    count: int,
    batch_size: int,
    maxlen: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Arm]:
    """The arms base, stock and dop; `count` adapters take turns in `slots`.

    Raises:
        ConfigError: an arm that this engine has not.
        MissingDependencyError: transformers is not installed.
    """
    if bad := [n for n in names if n not in ("base", "stock", "dop")]:
        raise ConfigError(f"--arms {bad[0]} needs --engine vllm.", "Leave it out.")
    shared = _model(model, dtype, device)
    adapters: dict[str, Adapter] = {}
    if set(names) != {"base"}:
        adapters = {f"a{i}": random_adapter(shared, rank, i) for i in range(count)}
    sizes: dict[str, Any] = {
        "max_requests": batch_size,
        "max_length": maxlen,
        "max_batch_tokens": max(512, min(maxlen, 2048)),
    }
    arms: dict[str, Arm] = {}
    for name in names:
        own = _same_weights(shared)
        extra: dict[str, Any] = {"slots": slots} if name != "base" else {}
        if name == "stock":
            extra |= {"apply": loop_add, "make_plan": loop_plan}
        engine = LoraEngine(own, {} if name == "base" else adapters, **sizes, **extra)
        arms[name] = TransformersArm(engine, name != "base")
    return arms


def _model(model: BenchModel, dtype: torch.dtype, device: torch.device) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(
            "transformers is not installed.", 'pip install "dop[engines]"'
        ) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    if model.checkpoint is not None:
        loaded = AutoModelForCausalLM.from_pretrained(model.checkpoint, dtype=dtype)
        return loaded.to(device).eval()
    settings = {k: v for k, v in model.config.items() if k not in ("model_type", "torch_dtype")}
    with torch.device(device):
        config = AutoConfig.for_model(model.config["model_type"], **settings)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _same_weights(model: Any) -> Any:
    """A copy of the modules that shares parameters and buffers with the original."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})
