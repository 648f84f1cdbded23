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
            max_loras=settings.get("max_loras", 3), max_cpu_loras=4, max_lora_rank=16,
            specialize_active_lora=settings.get("specialize", False), max_model_len=128,
            max_num_seqs=16, gpu_memory_utilization=0.1, kv_cache_memory_bytes=64 << 20,
            enforce_eager=settings["eager"], enable_prefix_caching=False, seed=0,
        )  # fmt: skip

    def lora(self, name: str, **more: bool) -> Any:
        """vLLM's request for an adapter; a1 and its successor share an id."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"id{IDS[name]}", IDS[name], str(self.folder / name), **more)

    def ask(self, asked: list[dict[str, Any]], *, inplace: bool = False) -> Any:
        """Tokens of each request and the log-probability of its first token."""
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(
            max_tokens=TOKENS, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=1
        )
        prompts = [TokensPrompt(prompt_token_ids=r["prompt"]) for r in asked]
        loras = [self.lora(r["adapter"]) if r["adapter"] else None for r in asked]
        if inplace:
            for name in sorted({r["adapter"] for r in asked} - {""}):
                self.llm.llm_engine.add_lora(self.lora(name, load_inplace=True))
        outputs = self.llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
        tokens = [list(o.outputs[0].token_ids) for o in outputs]
        first = [next(iter(o.outputs[0].logprobs[0].values())).logprob for o in outputs]
        return tokens, first


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


def memory_growth(engine: Engine) -> int:
    """Bytes of device memory that 5 more rounds of requests took."""
    import torch

    engine.ask(requests())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        engine.ask(requests())
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before


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
    if settings == {"eager": False}:
        found["swapped"] = swapped(engine)
        found["memory_growth_bytes"] = memory_growth(engine)
    out.write_text(json.dumps(found))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
