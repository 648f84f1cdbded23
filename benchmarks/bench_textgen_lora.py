"""Punica's text-generation benchmark on today's engines: many adapters, arms in turn, one run.

    python -m benchmarks.bench_textgen_lora --batch-size 32
    python -m benchmarks.bench_textgen_lora --engine vllm --model Llama-3.1-8B \\
        --batch-size 1,8,32,64 --lora-popularity distinct,uniform,identical --lengths 64:128

    python -m benchmarks.bench_textgen_lora --merge RESULTS... --save-to benchmarks/results

Without a GPU it serves a tiny model with transformers. See docs/textgen.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.textgen import load as load_test
from benchmarks.textgen import results as report
from benchmarks.textgen.engine import ARMS, SWITCHES, Arm, OneAdapterAtATime, Watched, split
from benchmarks.textgen.merge import show
from benchmarks.textgen.models import TINY, BenchModel, copy_bandwidth, find_model
from benchmarks.textgen.results import CaseResult
from benchmarks.textgen.timing import Run, summarise
from benchmarks.textgen.workload import PUNICA, Case, Job, waves
from dop import collect_env
from dop.errors import ConfigError, DopError, MissingDependencyError

DEFAULT_ARMS = "base,stock,dop,loop"
LOAD_TOKENS = load_test.PROMPT + load_test.OUTPUT
WATCHED = 8
"""Batches that an arm serves while watched."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, defaults filled in for the machine."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="arms: "
        + "; ".join(f"{name}: {what}" for name, what in ARMS.items())
        + f"; vLLM: stock, tuned-json and dop also with a switch ({', '.join(SWITCHES)}), as in "
        "dop+specialize",
    )
    add = parser.add_argument
    add("--engine", choices=("transformers", "vllm"), default="transformers")
    add("--arms", default=DEFAULT_ARMS, help="comma list (default %(default)s)")
    add("--model", help="tiny, a named model (random weights), or a checkpoint's folder")
    add("--lora-rank", type=int, default=16)
    add("--lora-popularity", default="distinct", help="comma list of distinct, uniform, "
        "skewed, identical")  # fmt: skip
    add("--batch-size", default="32", help="requests in flight; comma list")
    add("--lengths", default=PUNICA, help='"punica" or PROMPT:OUTPUT, e.g. 64:128; comma list')
    add("--cases", help="instead of the three above: batch/popularity/lengths, comma list")
    add("--num-batches", type=int, help="batches of requests a case and repeat")
    add("--prefill-batches", type=int, help="the same of cases whose outputs have one token: they "
        "are short, and first tokens vary more than a step (default: --num-batches)")  # fmt: skip
    add("--maxlen", type=int, help="longest prompt with its output")
    add("--repeats", type=int, default=3, help="runs of each arm and case (default 3)")
    add("--slots", type=int, help="adapter slots (default: largest batch, 64 on vLLM)")
    add("--adapters", type=int, help="distinct adapters (default: as many as slots)")
    add("--dtype", choices=("float32", "float16", "bfloat16"))
    add("--device", choices=("cpu", "cuda"))
    add("--seed", type=int, default=0)
    add("--budget", type=float, metavar="SECONDS", help="from the start on; once it is spent, "
        "every case that is left is measured once")  # fmt: skip
    add("--save-to", type=Path, help="folder for results.jsonl, table.md and plot.svg")
    add("--load", metavar="REQUESTS:ADAPTERS", help="after the cases, every arm with adapters: so "
        "many requests over more adapters than slots, memory before and after")  # fmt: skip
    add("--profile", metavar="CASE", help="vLLM: before the load, every arm serves this case "
        "while watched; where the time goes stands in profile.txt")  # fmt: skip
    add("--merge", type=Path, nargs="+", metavar="RESULTS", help="measure nothing: put folders or "
        "files of earlier runs together; with --save-to a document and a figure")  # fmt: skip
    add("--tuned-configs", type=Path, help="folder of vLLM's tuned JSON files (arm tuned-json)")
    add("--work", type=Path, help="vLLM: folder for configs, caches and logs (default: temporary)")
    add("--eager", action="store_true", help="vLLM: no torch.compile, no CUDA graphs")
    add(
        "--vllm-args",
        type=_object,
        default={},
        metavar="JSON",
        help="further arguments of vllm.LLM",
    )
    options = parser.parse_args(arguments)
    if not options.merge:
        _complete(options)
    return options


def _object(text: str) -> dict[str, Any]:
    """A JSON object of the command line."""
    try:
        found = json.loads(text)
        assert isinstance(found, dict)
    except (ValueError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object") from error
    return found


def _complete(options: argparse.Namespace) -> None:
    """Fill in what depends on the machine, refuse what makes no sense."""
    gpu = torch.cuda.is_available()
    options.device = options.device or ("cuda" if gpu else "cpu")
    on_gpu = options.device == "cuda"
    if on_gpu and not gpu:
        raise ConfigError("--device cuda: there is no GPU.", "Use --device cpu.")
    if options.engine == "vllm" and not on_gpu:
        raise ConfigError("--engine vllm needs a GPU.", "Use --engine transformers.")
    options.model = options.model or ("Llama-3.1-8B" if on_gpu else TINY)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.maxlen = options.maxlen or (2048 if on_gpu else 64)
    options.num_batches = options.num_batches or (2 if on_gpu else 1)
    options.prefill_batches = options.prefill_batches or options.num_batches
    options.arms = [a for a in options.arms.split(",") if a]
    for name in options.arms:
        split(name)
    if (
        not options.arms
        or min(options.lora_rank, options.repeats, options.num_batches, options.prefill_batches) < 1
    ):
        raise ConfigError("arms, rank, repeats and batches must be positive.", "Give at least 1.")
    options.cases = list(_cases(options))
    options.load = load_test.parse(options.load) if options.load else None
    options.profile = _case(options.profile) if options.profile else None
    if options.profile and (options.engine != "vllm" or not options.save_to):
        raise ConfigError("--profile needs --engine vllm and --save-to.", "Give both.")
    every = [*options.cases, *([options.profile] if options.profile else [])]
    options.maxlen = max([options.maxlen, *(sum(c.fixed) for c in every if c.fixed)])
    options.batch = max(case.batch_size for case in every)
    options.kv_tokens = max(case.tokens_in_flight(options.maxlen) for case in every)
    if options.load:
        options.maxlen = max(options.maxlen, LOAD_TOKENS)
        options.kv_tokens = max(options.kv_tokens, options.batch * LOAD_TOKENS)
    options.slots = options.slots or (64 if options.engine == "vllm" else options.batch)
    options.adapters = options.adapters or options.slots
    many = options.load.adapters if options.load else 0
    if options.engine != "vllm" and many > options.adapters:
        raise ConfigError(f"--load asks for {many} adapters.", f"Use --adapters {many}.")


def _case(text: str) -> Case:
    """A case as the command line names it: "32/distinct/64:128"."""
    try:
        batch, mix, lengths = text.split("/")
        return Case(int(batch), mix, lengths)
    except ValueError as error:
        raise ConfigError(
            f"{text!r} is no case ({error}).", "Write e.g. 32/distinct/64:128."
        ) from error


def _cases(options: argparse.Namespace) -> list[Case]:
    try:
        if options.cases:
            return [_case(case) for case in options.cases.split(",")]
        return [
            Case(int(batch), mix, length)
            for length in options.lengths.split(",")
            for batch in options.batch_size.split(",")
            for mix in options.lora_popularity.split(",")
        ]
    except ValueError as error:
        raise ConfigError(
            f"--batch-size cannot be read ({error}).", "Write e.g. --batch-size 1,8,32,64."
        ) from error


def load(options: argparse.Namespace, model: BenchModel, work: Path) -> dict[str, Arm]:
    """The arms, loaded; the loop shares stock's engine."""
    names = [a for a in options.arms if a != "loop"]
    if "loop" in options.arms and "stock" not in names:
        names.append("stock")
    dtype = getattr(torch, options.dtype)
    if options.engine == "vllm":
        from benchmarks.textgen import vllm_arms

        settings = vllm_arms.VllmOptions(
            options.lora_rank,
            options.slots,
            options.adapters,
            tuple(sorted({options.batch, *(case.batch_size for case in options.cases)})),
            options.maxlen,
            options.kv_tokens,
            dtype,
            work,
            options.tuned_configs,
            eager=options.eager,
            extra=options.vllm_args,
        )
        arms = vllm_arms.load_arms(names, model, settings)
    else:
        from benchmarks.textgen import transformers_arms

        arms = transformers_arms.load_arms(
            names,
            model,
            rank=options.lora_rank,
            slots=options.slots,
            count=options.adapters,
            batch_size=options.batch,
            maxlen=options.maxlen,
            dtype=dtype,
            device=torch.device(options.device),
        )
    if "loop" in options.arms:
        arms["loop"] = OneAdapterAtATime(arms["stock"])
    return arms


def serve(arm: Arm, groups: Sequence[Sequence[Job]], case: Case) -> Run:
    """One arm serves a case once."""
    times = [arm.run(group, case.batch_size) for group in groups]
    return summarise(times, case.fixed is not None)


def _warm(jobs: Sequence[Job], case: Case, slots: int) -> list[Job]:
    """A batch, and one request of every further adapter that finds a slot, with short outputs."""
    chosen = list(jobs[: case.batch_size])
    known = {job.adapter for job in chosen}
    for job in jobs[case.batch_size :]:
        if job.adapter not in known and len(known) < slots:
            known.add(job.adapter)
            chosen.append(job)
    return [Job(job.prompt, min(job.output, 4), job.adapter) for job in chosen]


def measure(
    arms: Mapping[str, Arm],
    options: argparse.Namespace,
    model: BenchModel,
    bandwidth: float,
    save: Callable[[CaseResult], None],
    deadline: float = math.inf,
) -> None:
    """All cases; in every repeat all arms, each time starting with another.

    Behind the deadline (time.monotonic) a case is measured once.
    """
    one = model.adapter_bytes(options.lora_rank, getattr(torch, options.dtype))
    for case in options.cases:
        groups = waves(
            case,
            options.num_batches if case.decodes else options.prefill_batches,
            options.maxlen,
            options.adapters,
            model.vocabulary,
            options.seed,
        )
        begin = time.monotonic()
        read_ms = case.in_flight(options.slots) * one / bandwidth * 1e3
        result = CaseResult(case, read_ms, {name: [] for name in options.arms})
        names = list(options.arms)
        for name in names:  # adapters into their slots, kernels chosen and compiled
            serve(arms[name], [_warm(groups[0], case, options.slots)], case)
        for repeat in range(options.repeats):
            if repeat and time.monotonic() > deadline:
                break
            shift = repeat % len(names)
            for name in names[shift:] + names[:shift]:
                result.runs[name].append(serve(arms[name], groups, case))
        save(result)
        paces = ", ".join(f"{name} {result.pace(name):.0f}" for name in names)
        print(f"{case.key}: {paces} tokens/s ({time.monotonic() - begin:.0f} s)", flush=True)


def watch(arms: Mapping[str, Arm], options: argparse.Namespace, model: BenchModel) -> None:
    """profile.txt: where the time of one case goes in every arm that can tell."""
    if options.profile is None:
        return
    case = options.profile
    batches = waves(case, WATCHED, options.maxlen, options.adapters, model.vocabulary, options.seed)
    jobs = [job for batch in batches for job in batch]
    parts = []
    for name, arm in arms.items():
        if isinstance(arm, Watched):
            arm.run(jobs, case.batch_size)
            text = arm.profile(jobs, case.batch_size)
            parts.append(f"==== {name}, {case.key}\n\n{text}\n")
    options.save_to.mkdir(parents=True, exist_ok=True)
    (options.save_to / "profile.txt").write_text("".join(parts))


def put_under_load(
    arms: Mapping[str, Arm],
    options: argparse.Namespace,
    model: BenchModel,
    about: dict[str, Any],
    deadline: float,
) -> None:
    """What `--load` asks for, Dop's arms first; behind the deadline no further arm."""
    if options.load is None:
        return
    about["load"] = {}
    with_adapters = [name for name in arms if split(name)[0] not in ("base", "loop")]
    for name in sorted(with_adapters, key=lambda name: split(name)[0] != "dop"):
        if about["load"] and time.monotonic() > deadline:
            break
        done = load_test.run(arms[name], options.load, model.vocabulary, options.batch)
        about["load"][name] = done.as_dict()
        print(load_test.lines({name: about["load"][name]})[0], flush=True)


def header(options: argparse.Namespace, model: BenchModel, bandwidth: float) -> dict[str, Any]:
    """What a reader of the results has to know."""
    from importlib.metadata import PackageNotFoundError, version

    known = collect_env.versions()
    versions: dict[str, str] = {
        k: known[k] for k in ("python", "dop", "torch", "driver") if k in known
    }
    packages = ["vllm", "triton"] if options.engine == "vllm" else ["transformers", "peft"]
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    return {
        "engine": options.engine,
        "model": model.name,
        "rank": options.lora_rank,
        "slots": options.slots,
        "adapters": options.adapters,
        "dtype": options.dtype,
        "device": device,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "revision": collect_env.revision(),
        "maxlen": options.maxlen,
        "num_batches": options.num_batches,
        "prefill_batches": options.prefill_batches,
        "repeats": options.repeats,
        "vllm_args": options.vllm_args,
        "copy_gb_per_s": bandwidth / 1e9,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit code."""
    begin = time.monotonic()
    options = parse(arguments)
    if options.merge:
        show(options.merge, options.save_to)
        return 0
    model = find_model(options.model, options.maxlen)
    bandwidth = copy_bandwidth(torch.device(options.device))
    torch.cuda.empty_cache()
    about = header(options, model, bandwidth)
    print(report.title(about), flush=True)
    found: list[CaseResult] = []

    def save(result: CaseResult) -> None:  # a run that is stopped keeps what it has
        found.append(result)
        if options.save_to:
            report.write_lines(options.save_to, about, found)

    try:
        with tempfile.TemporaryDirectory() as temporary:
            arms = load(options, model, options.work or Path(temporary))
            try:
                before = {name: arm.device_bytes() for name, arm in arms.items()}
                deadline = begin + (options.budget or math.inf)
                measure(arms, options, model, bandwidth, save, deadline)
                watch(arms, options, model)
                put_under_load(arms, options, model, about, deadline)
                about["device_bytes"] = {n: [before[n], arms[n].device_bytes()] for n in arms}
            finally:
                for arm in arms.values():
                    arm.close()
    finally:
        if found:
            tell(options, about, found)
    return 0


def tell(options: argparse.Namespace, about: dict[str, Any], found: Sequence[CaseResult]) -> None:
    """Print and write what was measured, also if the run ended early."""
    print(report.table(found))
    for line in report.summary(found):
        print(line)
    for name, (first, last) in about.get("device_bytes", {}).items():
        if first is not None and options.engine == "vllm":
            print(f"{name}: {first >> 20} MiB of the GPU before, {last >> 20} MiB after")
    if options.save_to:
        try:
            report.write(options.save_to, about, found)
        except MissingDependencyError as error:
            print(f"no plot.svg: {error}")
        print(f"written to {options.save_to}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DopError as error:
        sys.exit(f"error: {error}")
