"""Arms on vLLM: a process each, loaded side by side, asked over pipes so that they alternate."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.textgen.engine import Arm, split, variables_of
from benchmarks.textgen.models import BenchModel, write_adapter
from benchmarks.textgen.timing import Timing
from benchmarks.textgen.workload import Job
from dop.errors import ConfigError, DopError, MissingDependencyError

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_HOST_IP": "127.0.0.1",
}
LOAD_S = 560.0
RUN_S = 300.0
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class VllmOptions:
    """How the engines are loaded.

    Attributes:
        rank, slots: of the adapters; slots is vLLM's max_loras.
        adapters: distinct ones; beyond `slots` they wait in CPU memory and throw others out of
            their slots when a request asks for them.
        batch_sizes: of the cases: requests in flight, and the batches that get CUDA graphs.
        maxlen: longest prompt with its output.
        kv_tokens: tokens whose keys and values have to fit at once.
        dtype: of weights and adapters.
        work: folder for configs, adapters, compile caches and logs.
        tuned: folder of tuned-config JSON files, for the arm tuned-json.
        memory: share of the GPU that must be free for an arm before it loads.
        eager: no torch.compile and no CUDA graphs.
        extra: further arguments of vllm.LLM.
    """

    rank: int
    slots: int
    adapters: int
    batch_sizes: tuple[int, ...]
    maxlen: int
    kv_tokens: int
    dtype: torch.dtype
    work: Path
    tuned: Path | None = None
    memory: float = 0.1
    eager: bool = False
    extra: Mapping[str, Any] | None = None


class VllmArm:
    """A process with one engine."""

    def __init__(
        self, name: str, settings: dict[str, Any], environment: Mapping[str, str], log: Path
    ):
        self.name = name
        self._log = log
        command_read, command_write = os.pipe()
        answer_read, answer_write = os.pipe()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.textgen.vllm_worker",
                    str(command_read),
                    str(answer_write),
                ],
                pass_fds=(command_read, answer_write),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                cwd=Path(__file__).parents[2],
            )
        os.close(command_read)
        os.close(answer_write)
        self._commands = os.fdopen(command_write, "w", buffering=1)
        self._answers = os.fdopen(answer_read, "rb", buffering=0)
        self._rest = b""
        self._send(settings)

    def ready(self, seconds: float = LOAD_S) -> float:
        """Wait until the engine is loaded; returns the seconds that it took."""
        return float(self._answer(seconds)["seconds"])

    def run(self, jobs: Sequence[Job], concurrency: int) -> list[Timing]:
        """Serve the jobs."""
        lines = [[j.prompt, j.output, j.adapter] for j in jobs]
        self._send({"op": "run", "jobs": lines, "concurrency": concurrency})
        return [Timing(start, times) for start, times in self._answer(RUN_S)["times"]]

    def profile(self, jobs: Sequence[Job], concurrency: int) -> str:
        """Serve the jobs twice while watched: where the host's and the GPU's time goes, as text."""
        lines = [[j.prompt, j.output, j.adapter] for j in jobs]
        self._send({"op": "profile", "jobs": lines, "concurrency": concurrency})
        return str(self._answer(RUN_S)["text"])

    def device_bytes(self) -> int | None:
        """Of the arm's process."""
        self._send({"op": "memory"})
        found: int | None = self._answer(RUN_S)["bytes"]
        return found

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            try:
                self._send({"op": "stop"})
                self._process.wait(20)
            except (DopError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        for pipe in (self._commands, self._answers):
            try:
                pipe.close()
            except OSError:
                continue

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._commands.write(json.dumps(message) + "\n")
        except OSError as error:
            raise DopError(f"vLLM's process of arm {self.name} is gone.", self._hint()) from error

    def _answer(self, seconds: float) -> dict[str, Any]:
        limit = time.monotonic() + seconds
        while b"\n" not in self._rest:
            # Children of a process that died may hold its end of the pipe open: look at it, too.
            dead = self._process.poll() is not None
            if select.select([self._answers], [], [], 0 if dead else 1.0)[0]:
                chunk = self._answers.read(1 << 20)
                self._rest += chunk
                dead = dead or not chunk
            if b"\n" not in self._rest and dead:
                raise DopError(f"vLLM's process of arm {self.name} died.", self._hint())
            if time.monotonic() > limit:
                raise DopError(
                    f"arm {self.name} did not answer within {seconds:.0f} s.", self._hint()
                )
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise DopError(f"arm {self.name} failed: {found['error']}.", self._hint())
        return found

    def _hint(self) -> str:
        try:
            tail = self._log.read_text(errors="replace").splitlines()[-12:]
        except OSError:
            tail = []
        return "\n".join([f"The end of {self._log}:", *tail])


def load_arms(names: Sequence[str], model: BenchModel, options: VllmOptions) -> dict[str, Arm]:
    """The arms base, stock, tuned-json and dop, with or without switches, loaded side by side.

    Raises:
        ConfigError: the arm tuned-json without a folder, or a rank that vLLM refuses.
        MissingDependencyError: vLLM is not installed.
        DopError: an engine did not load; the error ends with the last lines of its log.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError("vLLM is not installed.", "pip install vllm")
    if "tuned-json" in names and options.tuned is None:
        raise ConfigError("--arms tuned-json needs --tuned-configs.", "See `dop export vllm`.")
    if options.rank > VLLM_RANKS[-1]:
        raise ConfigError(f"--lora-rank {options.rank}: vLLM serves up to {VLLM_RANKS[-1]}.")
    options.work.mkdir(parents=True, exist_ok=True)
    config = options.work / "model"
    config.mkdir(exist_ok=True)
    (config / "config.json").write_text(json.dumps(model.config, indent=1) + "\n")
    adapter = options.work / f"adapter-r{options.rank}"
    if set(names) != {"base"}:
        write_adapter(adapter, model, options.rank, options.dtype)
    arms: dict[str, VllmArm] = {}
    try:
        for name in names:
            kind, switches = split(name)
            lora = kind != "base"
            settings = {
                "plugin": kind == "dop",
                "adapter": str(adapter.resolve()) if lora else None,
                "slots": min(options.slots, options.adapters),
                "share_file": options.adapters <= options.slots,
                "llm": {**llm_arguments(model, options, lora, config), **switches},
            }
            log = options.work / f"{name}.log"
            arms[name] = VllmArm(name, settings, environment(name, options), log)
        for name, arm in arms.items():
            print(f"arm {name}: loaded in {arm.ready():.0f} s", flush=True)
    except BaseException:
        for arm in arms.values():
            arm.close()
        raise
    return dict(arms)


def environment(name: str, options: VllmOptions) -> dict[str, str]:
    """Environment of an arm's process: its own compile cache, and who may plug in."""
    values = {**OFFLINE, "VLLM_CACHE_ROOT": str((options.work / f"cache-{name}").resolve())}
    kind, _ = split(name)
    values["VLLM_PLUGINS"] = "dop" if kind == "dop" else ""
    values["DOP_VLLM"] = "1" if kind == "dop" else "0"
    values |= variables_of(name)
    if kind == "tuned-json":
        assert options.tuned is not None
        values["VLLM_TUNED_CONFIG_FOLDER"] = str(options.tuned.resolve())
    return values


def llm_arguments(
    model: BenchModel, options: VllmOptions, lora: bool, config: Path
) -> dict[str, Any]:
    """Arguments of vllm.LLM, the same for all arms but for LoRA."""
    batches = sorted({1, *options.batch_sizes})
    length = options.maxlen + 8
    kept = max(options.kv_tokens, length) + 32 * (batches[-1] + 1)  # blocks are not split
    arguments: dict[str, Any] = {
        "model": str((model.checkpoint or config).resolve()),
        "load_format": "auto" if model.checkpoint else "dummy",
        "skip_tokenizer_init": True,
        "dtype": str(options.dtype).removeprefix("torch."),
        "max_model_len": length,
        "max_num_seqs": batches[-1],
        "gpu_memory_utilization": options.memory,
        "kv_cache_memory_bytes": model.kv_bytes(kept, options.dtype),
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if options.eager:
        arguments["enforce_eager"] = True
    else:
        arguments["compilation_config"] = {"cudagraph_capture_sizes": batches}
    if lora:
        arguments |= {
            "enable_lora": True,
            "max_loras": options.slots,
            "max_cpu_loras": max(options.slots, options.adapters),
            "max_lora_rank": next(r for r in VLLM_RANKS if r >= options.rank),
        }
    return {**arguments, **(options.extra or {})}
