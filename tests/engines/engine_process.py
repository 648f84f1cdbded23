"""One vLLM engine over the tiny model; writes what it answered as JSON. Run by test_vllm_gpu.py.

python engine_process.py FOLDER OUT SETTINGS_JSON
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from tiny_llama import ADAPTERS

IDS = {name: number for number, name in enumerate([*ADAPTERS, "a1b"], start=1)}
IDS["a1b"] = IDS["a1"]  # the same adapter id with other weights
TOKENS = 12
LOGPROBS = 20


def requests() -> list[dict[str, Any]]:
    """Prompts of several lengths, adapters mixed, some without."""
    rng = random.Random(0)
    names = [*ADAPTERS, ""]
    return [
        {
            "prompt": [rng.randrange(3, 1024) for _ in range(rng.choice((3, 17, 40)))],
            "adapter": names[i % len(names)],
            "tokens": TOKENS,
        }
        for i in range(24)
    ]


class Engine:
    """vLLM, and how requests are put to it."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        if os.environ["DOP_VLLM"] == "1":
            from dop.integrations.vllm import register

            register()  # where the package is not installed there is no entry point
        from vllm import LLM

        self.folder = folder
        self.llm = LLM(
            model=str(folder), skip_tokenizer_init=True, enable_lora=True,
            dtype=settings.get("dtype", "float16"),
            max_loras=settings.get("max_loras", 3), max_lora_rank=16,
            max_cpu_loras=max(4, settings.get("max_loras", 3)),
            specialize_active_lora=settings.get("specialize", False), max_model_len=128,
            max_num_seqs=settings.get("sequences", 16), gpu_memory_utilization=0.1,
            kv_cache_memory_bytes=64 << 20,
            enforce_eager=settings["eager"], enable_prefix_caching=False, seed=0,
        )  # fmt: skip

    def lora(self, name: str, **more: bool) -> Any:
        """vLLM's request for an adapter; a1 and its successor share an id."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"id{IDS[name]}", IDS[name], str(self.folder / name), **more)

    def ask(
        self,
        asked: list[dict[str, Any]],
        *,
        inplace: bool = False,
        logprobs: int | None = LOGPROBS,
    ) -> Any:
        """Tokens of each request and the log-probabilities of its first token's best."""
        from vllm import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=r["prompt"]) for r in asked]
        if inplace:
            self.replace(*sorted({r["adapter"] for r in asked} - {""}))
        outputs = self.llm.generate(
            prompts, parameters(logprobs), lora_request=[self.request_of(r) for r in asked],
            use_tqdm=False,
        )  # fmt: skip
        tokens = [list(o.outputs[0].token_ids) for o in outputs]
        first = [
            {token: entry.logprob for token, entry in o.outputs[0].logprobs[0].items()}
            for o in (outputs if logprobs else ())
        ]
        return tokens, first

    def request_of(self, asked: dict[str, Any]) -> Any:
        """vLLM's request for the adapter of one of our requests."""
        from vllm.lora.request import LoRARequest

        if not asked["adapter"]:
            return None
        if "id" not in asked:
            return self.lora(asked["adapter"])
        return LoRARequest(f"n{asked['id']}", asked["id"], str(self.folder / asked["adapter"]))

    def replace(self, *names: str) -> None:
        """Load adapters over those of the same ids."""
        for name in names:
            self.llm.llm_engine.add_lora(self.lora(name, load_inplace=True))

    def start(self, asked: list[dict[str, Any]], names: list[str]) -> None:
        """Put requests to the engine without waiting for them."""
        from vllm import TokensPrompt

        for request, name in zip(asked, names, strict=True):
            self.llm.llm_engine.add_request(
                name, TokensPrompt(prompt_token_ids=request["prompt"]), parameters(),
                lora_request=self.request_of(request),
            )  # fmt: skip

    def steps(self, count: int = 1 << 30) -> dict[str, list[int]]:
        """Tokens, by name, of what finishes within so many steps."""
        done: dict[str, list[int]] = {}
        engine = self.llm.llm_engine
        while count and engine.has_unfinished_requests():
            count -= 1
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
        return done


def parameters(logprobs: int | None = LOGPROBS) -> Any:
    """Greedy, always the same number of tokens."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=TOKENS, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=logprobs
    )


def swapped(engine: Engine) -> dict[str, Any]:
    """a1, then its successor under the same id between other adapters, then all over again."""
    one = [{**r, "adapter": "a1"} for r in requests()[:6]]
    other = [{**r, "adapter": "a1b"} for r in requests()[:6]]
    before, _ = engine.ask(one)
    fresh, _ = engine.ask(other, inplace=True)
    for _ in range(2):  # with 3 slots everything is evicted in between
        engine.ask(requests())
        engine.ask(other, inplace=True)
    again, _ = engine.ask(other)
    engine.ask(one, inplace=True)
    return {"requests": other, "before": before, "fresh": fresh, "again": again}


def under_load(engine: Engine) -> dict[str, Any]:
    """a1 is replaced by other weights under its id while other adapters' requests are running, and
    the slots change hands (3 of them for 5 adapters); requests of the new weights join at once."""
    others = [r for r in requests() if r["adapter"] not in ("", "a1")]
    asked: list[dict[str, Any]] = []
    done: dict[str, list[int]] = {}
    for turn, name in enumerate(("a1", "a1b", "a1", "a1b")):
        mine = [{**r, "adapter": name} for r in requests()[turn : turn + 3]]
        part = others[turn * 3 : turn * 3 + 6]
        names = [str(len(asked) + i) for i in range(len(part) + len(mine))]
        engine.start(part, names[: len(part)])
        done |= engine.steps(3)
        engine.replace(name)
        engine.start(mine, names[len(part) :])
        asked += part + mine
        # A running request would see its weights replaced, with any kernels.
        while not set(names[len(part) :]) <= set(done):
            done |= engine.steps(1)
    done |= engine.steps()
    return {"requests": asked, "tokens": [done[str(i)] for i in range(len(asked))]}


def device_memory() -> list[int]:
    """Bytes that torch has handed out and holds, after everything has finished."""
    import gc

    import torch

    gc.collect()
    torch.cuda.synchronize()
    return [torch.cuda.memory_allocated(), torch.cuda.memory_reserved()]


def many(engine: Engine, adapters: int = 500, count: int = 2000) -> dict[str, Any]:
    """2,000 requests over 500 adapters in random order: device memory before and after, and what
    the last of them answered."""
    rng = random.Random(1)
    kinds = [r for r in requests() if r["adapter"]]
    names = list(ADAPTERS)
    asked = []
    for _ in range(count):
        number = rng.randrange(adapters)
        prompt = rng.choice(kinds)["prompt"]
        name = names[number % len(names)]
        asked.append({"prompt": prompt, "adapter": name, "id": 1000 + number, "tokens": TOKENS})
    # Twenty log-probabilities of every token are most of such a run's time, and nobody reads them.
    engine.ask(asked[:200], logprobs=None)
    before = device_memory()
    tokens, _ = engine.ask(asked, logprobs=None)
    return {
        "before": before, "after": device_memory(), "answered": len(tokens),
        "requests": asked[-60:], "tokens": tokens[-60:],
    }  # fmt: skip


JOBS = {"swapped": swapped, "under_load": under_load, "many": many}


def main() -> int:
    """Run everything and write it."""
    folder, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    engine = Engine(folder, settings)
    tokens, logprobs = engine.ask(requests())
    found: dict[str, Any] = {"requests": requests(), "tokens": tokens, "logprobs": logprobs}
    if os.environ["DOP_VLLM"] == "1":
        from dop.integrations.vllm_wrapper import _WRAPPERS

        layers = [reason for w in _WRAPPERS.values() for reason in w._layers.values()]
        found["served"] = sum(not reason for reason in layers)
        found["stock_reasons"] = sorted({reason for reason in layers if reason})
    for job in settings.get("jobs", ()):
        found[job] = JOBS[job](engine)
    out.write_text(json.dumps(found))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
