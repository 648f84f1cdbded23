"""One vLLM engine in a process of its own; answers JSON lines. Started by vllm_arms.py.

    python -m benchmarks.textgen.vllm_worker IN_FD OUT_FD

The first line holds the settings. Then {"op": "run", "jobs": [...], "concurrency": n} is answered
by the times of every token, {"op": "profile", ...} likewise by a text, {"op": "memory"} by
device_bytes(), {"op": "stop"} ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any


class Served:
    """The engine and how it is asked."""

    def __init__(self, settings: dict[str, Any]) -> None:
        if settings["plugin"]:
            # Where the package is not installed there is no entry point; registering twice is fine.
            from dop.integrations.vllm import register

            register()
        from vllm import LLM

        if settings["share_file"]:
            _load_each_file_once()
        self._adapter = settings["adapter"]
        self._count = 0
        self._engine: Any = LLM(**settings["llm"]).llm_engine
        for index in range(settings["slots"] if self._adapter else 0):
            self._engine.add_lora(self._lora(index))

    def _lora(self, index: int) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"a{index}", index + 1, self._adapter)

    def _submit(self, job: Sequence[Any]) -> str:
        from vllm import SamplingParams, TokensPrompt

        prompt, output, adapter = job
        self._count += 1
        name = str(self._count)
        params = SamplingParams(
            max_tokens=output, temperature=0.0, ignore_eos=True, detokenize=False
        )
        lora = None if adapter is None or not self._adapter else self._lora(adapter)
        self._engine.add_request(
            name, TokensPrompt(prompt_token_ids=prompt), params, lora_request=lora
        )
        return name

    def run(self, jobs: Sequence[Sequence[Any]], concurrency: int) -> list[list[Any]]:
        """[start, [time of each token]] of each job [prompt, output, adapter]."""
        waiting = deque(enumerate(jobs))
        flying: dict[str, int] = {}
        starts = [0.0] * len(jobs)
        tokens: list[list[float]] = [[] for _ in jobs]
        while waiting or flying:
            while waiting and len(flying) < concurrency:
                index, job = waiting.popleft()
                starts[index] = time.perf_counter()
                flying[self._submit(job)] = index
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                mine = tokens[flying[output.request_id]]
                mine += [now] * (len(output.outputs[0].token_ids) - len(mine))
                if output.finished:
                    del flying[output.request_id]
        return [[start, times] for start, times in zip(starts, tokens, strict=True)]


def _load_each_file_once() -> None:
    """All adapters come from one file: read and pin it once instead of for every adapter.

    Only for adapters that stay in their slots. What the GPU sees does not change: every adapter is
    copied into a slot of its own. 64 adapters of rank 64 on an 8B model are 21 GB in pinned memory
    otherwise, in each process.
    """
    from vllm.lora.worker_manager import WorkerLoRAManager

    load = WorkerLoRAManager._load_adapter
    known: dict[str, Any] = {}

    def once(manager: Any, request: Any) -> Any:
        if request.lora_path not in known:
            known[request.lora_path] = load(manager, request)
            return known[request.lora_path]
        return known[request.lora_path].clone(request.lora_int_id)

    WorkerLoRAManager._load_adapter = once


def device_bytes() -> int | None:
    """Bytes that torch has handed out on the GPU, after everything has finished."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def profile(serve: Callable[[], object], rows: int = 80) -> str:
    """What `serve` spends its time on: Python's functions, then torch's operators and kernels.

    The two are watched in turn, as each slows the other down.
    """
    import cProfile
    import io
    import pstats

    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    text = io.StringIO()
    python = cProfile.Profile()
    python.runcall(serve)
    pstats.Stats(python, stream=text).sort_stats("cumulative").print_stats(rows)
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with watch(activities=kinds) as seen:
        serve()
    averages = seen.key_averages()
    for order in ("self_cpu_time_total", *(["self_cuda_time_total"] if len(kinds) > 1 else [])):
        text.write(averages.table(sort_by=order, row_limit=rows, max_name_column_width=60))
        text.write("\n")
    text.write(timeline(seen.events()))
    if settled := sys.modules.get("dop.ops.settled"):
        text.write(f"early kernels, calls outside of the short path: {settled.seen}\n")
    return text.getvalue()


def timeline(events: Iterable[Any], rows: int = 160) -> str:
    """Kernels from past the middle of a watched run in the order of their starts: when (us), how
    long after the last one's end (negative: beside it), how long, on which stream. In the middle
    itself a batch ends and the next one's prompts are read.

    Args:
        events: of torch's profiler.
        rows: kernels that are shown.
    """
    from torch.autograd import DeviceType

    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda event: event.time_range.start)
    shown = kernels[len(kernels) * 16 // 25 :][:rows]
    lines = ["     start    after     took stream kernel\n"]
    ended = shown[0].time_range.start if shown else 0.0
    for event in shown:
        start, end = event.time_range.start, event.time_range.end
        at, took, stream = start - shown[0].time_range.start, end - start, event.device_resource_id
        lines.append(f"{at:10.1f} {start - ended:8.1f} {took:8.1f} {stream:6} {event.name[:60]}\n")
        ended = max(ended, end)
    return "".join([*lines, "\n"]) if shown else ""


def main() -> int:
    """Serves until told to stop; returns the exit code."""
    commands = os.fdopen(int(sys.argv[1]), "r")
    answers = os.fdopen(int(sys.argv[2]), "w", buffering=1)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")

    try:
        begin = time.perf_counter()
        served = Served(json.loads(commands.readline()))
        answer(ready=True, seconds=time.perf_counter() - begin)
        for line in commands:
            command = json.loads(line)
            if command["op"] == "stop":
                break
            if command["op"] == "memory":
                answer(bytes=device_bytes())
            elif command["op"] == "profile":
                asked = (command["jobs"], command["concurrency"])
                answer(text=profile(partial(served.run, *asked)))
            else:
                answer(times=served.run(command["jobs"], command["concurrency"]))
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # engines leave threads behind that would hold the process up
