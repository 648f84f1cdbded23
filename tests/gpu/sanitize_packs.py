"""Runs each shipped kernel once or twice on small, nasty batches. Meant for compute-sanitizer:

    compute-sanitizer --tool memcheck  python tests/gpu/sanitize_packs.py --shard 0/8
    compute-sanitizer --tool racecheck python tests/gpu/sanitize_packs.py --shard 0/8
    python tests/gpu/sanitize_packs.py --guards         # without it: guard zones, see guarded.py
    ... --checked FILE                   # but for binaries whose digests stand in FILE

`tests/gpu/sanitize.sh` finds compute-sanitizer and runs the shards side by side. No kernels but
Dop's run: tensors are made, and results judged, on the CPU. Every tensor is an allocation of its
own, so that an address behind it is not another tensor's.

Ends with a line of JSON: kernels, calls, failures, what was not run, and the digests of the packs'
kernels that ran without failure. Exit status 1 after a failure.
A call that takes longer than --stall is one; the rest of the shard is not run then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    # Every tensor is an allocation of its own then. Not where tests import this: capturing a
    # graph needs the caching allocator.
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import guarded
import torch
from guarded import SLOTS, Arena, Batch

from dop import ops
from dop.export.load import load_cuda
from dop.ops.plan import SegmentPlan, buffer_size, fill_by_torch, layout
from dop.ops.sources import Source
from dop.workload import Workload

GENERIC = (
    "77->33/r5",
    "136->40+24+8/r12",
    "4096->512+256/r16",
    "520->264/r129",
)
"""Shapes of the generic kernels: odd, narrow, wide, a rank above 128."""
PIECE = 3
"""Cases of a group that stay in one shard: more would leave some shards with minutes of work."""
LEAST_COST = 1_000_000
PLANS = ((1, 1), (67, 6), (700, 1024), (4096, 3), (20_000, 40))
"""Tokens and slots; the last has more tokens than shared memory has room for."""


@dataclass(frozen=True)
class Case:
    """One kernel.

    Attributes:
        name: for messages.
        group: cases of one group share inputs.
        cost: how long it takes under racecheck, roughly: 20 s are 15 million.
        run: makes the calls with a batch and an arena; says what was wrong.
        batches: names of those it wants; "" if it has batches of its own.
        digest: of a pack's binary; "" for kernels that are built elsewhere.
    """

    name: str
    group: str
    cost: int
    run: Callable[[Batch, Arena], list[str]]
    batches: tuple[str, ...]
    digest: str = ""


def digests(file: Path) -> frozenset[str]:
    """Those of a file: the first 16 hexadecimal digits of a binary's SHA-256 begin each line; lines
    with # are for people."""
    lines = file.read_text().splitlines()
    return frozenset(line.split()[0] for line in lines if line.strip() and line[0] != "#")


def pack_cases(batches: tuple[str, ...], checked: frozenset[str] = frozenset()) -> Iterator[Case]:
    """Every kernel of the shipped packs, in both types; one that several packs have, once, and
    none whose digest is in `checked`."""
    seen = set()
    for entry in guarded.packs_here():
        library = load_cuda(entry.path)
        for info in library.kernels.values():
            binary = info.name, library.index.files[info.file]
            if binary in seen:
                continue
            seen.add(binary)
            digest = binary[1][:16]
            if digest in checked:
                continue
            source = guarded.pack_source(library, info.name)
            name = f"{entry.path.parent.name}/{entry.path.name}:{info.name}"
            cost = 8 * info.workload.in_features + info.workload.total_out
            yield Case(
                name, info.workload.key, cost * info.workload.rank, _call(info.workload, source),
                batches, digest,
            )  # fmt: skip


def _call(workload: Workload, source: Source) -> Callable[..., list[str]]:
    return lambda batch, arena: guarded.run(workload, batch, source, arena)


def generic_cases(batches: tuple[str, ...]) -> Iterator[Case]:
    """The generic kernels: forms, types, halves, and the plan kernels."""
    for dtype in ("float16", "bfloat16", "float32"):
        for text in GENERIC:
            shape, rank = text.split("/")
            workload = Workload.parse(f"sgmv/{dtype}/{rank}/{shape}")
            for rows in (0,) if dtype == "float32" else (0, 16, 64):
                source = guarded.generic_source(rows)
                name = f"generic:{workload.key}:{rows}"
                yield Case(name, workload.key, 1, _call(workload, source), batches)
            yield Case(f"halves:{workload.key}", workload.key, 1, _halves(workload), batches)
    for tokens, slots in PLANS:
        yield Case(f"plan:{tokens}x{slots}", "plan", 1, _plan(tokens, slots), ("",))


def _halves(workload: Workload) -> Callable[[Batch, Arena], list[str]]:
    """sgmv_shrink, then sgmv_expand with ranks and scales of the call."""

    def run(batch: Batch, arena: Arena) -> list[str]:
        given = guarded.inputs_of(workload, batch)
        a = [arena.put(f"a{s}", part) for s, part in enumerate(given.a)]
        b = [arena.put(f"b{s}", part) for s, part in enumerate(given.b)]
        x, y = arena.put("x", given.x), arena.put("y", given.y)
        ranks = batch.ranks(workload.rank)
        with torch.no_grad(), guarded.served_by(guarded.generic_source(0), arena):
            plan = guarded.plan_of(arena, Batch("", batch.ids, False), workload.rank)
            if ranks is None:
                ops.sgmv_expand(y, ops.sgmv_shrink(x, a, plan), b, plan)
            else:
                true = arena.put("call ranks", torch.tensor(ranks, dtype=torch.int32))
                scales = arena.put("call scales", torch.tensor(batch.scales))
                v = ops.sgmv_shrink(x, a, plan, ranks=true)
                ops.sgmv_expand(y, v, b, plan, ranks=true, scale=scales)
        return [*guarded.verdict(workload, batch, given, y.cpu()), *guarded.outside(arena)]

    return run


def _plan(tokens: int, slots: int) -> Callable[[Batch, Arena], list[str]]:
    """The plan kernel, for both types of ids, against torch."""

    def run(batch: Batch, arena: Arena) -> list[str]:
        draw = torch.Generator().manual_seed(tokens)
        found = []
        for kind in (torch.int32, torch.int64):
            ids = torch.randint(-1, slots, (tokens,), generator=draw).to(kind)
            ranks = torch.randint(1, 129, (slots,), generator=draw).int()
            scales = torch.rand(slots, generator=draw)
            buffer = arena.room("plan", 4 * buffer_size(tokens, slots)).view(torch.int32)
            empty = SegmentPlan(buffer, tokens, slots)
            plan = ops.segment_plan(
                arena.put("ids", ids),
                slots=slots,
                ranks=arena.put("ranks", ranks),
                scale=arena.put("scales", scales),
                out=empty,
            )
            if arena.device != "cpu":
                torch.cuda.synchronize()
            want = torch.zeros(buffer_size(tokens, slots), dtype=torch.int32)
            fill_by_torch(want, ids, slots, ranks, scales, 1.0)
            got = plan.buffer.cpu()
            for name, (start, length) in layout(tokens, slots).places.items():
                part = slice(start, start + length)
                if not torch.equal(got[part], want[part]):
                    found.append(f"{kind}: table {name} differs")
        return [*found, *guarded.outside(arena)]

    return run


def share(cases: list[Case], shard: int, count: int) -> list[Case]:
    """The cases of a shard: pieces of groups, by cost, each dealt to the shard that has least."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.group].append(case)
    pieces = [
        group[first : first + PIECE]
        for group in groups.values()
        for first in range(0, len(group), PIECE)
    ]
    loads, mine = [0.0] * count, []
    for piece in sorted(pieces, key=lambda p: (-sum(c.cost for c in p), p[0].name)):
        least = loads.index(min(loads))
        # A kernel costs something even if its tensors are small.
        loads[least] += sum(case.cost + LEAST_COST for case in piece)
        if least == shard:
            mine += piece
    return mine


def attempt(case: Case, batch: Batch, zone: int) -> list[str]:
    """A case's call; an error is a failure like any other."""
    try:
        return case.run(batch, Arena(zone))
    except Exception as error:
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]


@dataclass
class Shown:
    """What a shard has to say.

    Attributes:
        shard: which part of how many.
        cases: their names.
        calls: made so far.
        clean: digests of kernels without failure.
        failures: what was wrong.
        left: cases that were not run.
    """

    shard: str
    cases: list[str]
    calls: int = 0
    clean: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the shard began."""
        return time.monotonic() - self.began

    def failed(self, line: str) -> None:
        """Note what was wrong."""
        self.failures.append(line)
        print(f"FAILED {line}", flush=True)

    def stalled(self, name: str, seconds: float) -> None:
        """End the process, in which the call of a case does not end."""
        self.failed(f"{name}: did not end within {seconds:.0f} s")
        self.left += self.cases[self.cases.index(name) + 1 :]
        print(self.summary(), flush=True)
        os._exit(1)

    def summary(self) -> str:
        """A line of JSON."""
        return json.dumps(
            {
                "shard": self.shard,
                "kernels": len(self.cases) - len(self.left),
                "calls": self.calls,
                "slots": SLOTS,
                "seconds": round(self.seconds, 1),
                "clean": self.clean,
                "failures": self.failures,
                "not_run": self.left,
            }
        )


def main() -> int:
    """Runs a shard."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shard", default="0/1", help="which part of how many, e.g. 3/8")
    parser.add_argument("--guards", action="store_true", help="guard zones around every tensor")
    parser.add_argument("--batches", default="mixed,one", help=f"of {', '.join(guarded.BATCHES)}")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--checked", type=Path, help="file of digests that are left out")
    parser.add_argument("--stall", type=float, default=100, help="seconds that a call may take")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds; the rest is named")
    parser.add_argument("--list", action="store_true", help="print the cases only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = tuple(options.batches.split(","))
    shard, count = map(int, options.shard.split("/"))
    checked = digests(options.checked) if options.checked else frozenset()
    cases = [*pack_cases(names, checked), *generic_cases(names)]
    cases = [case for case in cases if options.only in case.name]
    mine = share(cases, shard, count)
    if options.list:
        print("\n".join(case.name for case in mine))
        return 0
    shown = Shown(options.shard, [case.name for case in mine])
    for case in mine:
        if shown.seconds > options.limit:
            shown.left.append(case.name)
            continue
        failed = len(shown.failures)
        for name in case.batches:
            batch = guarded.BATCHES[name or "one"]
            shown.calls += 1
            watch = threading.Timer(options.stall, shown.stalled, (case.name, options.stall))
            watch.daemon = True
            watch.start()
            for line in attempt(case, batch, guarded.ZONE_BYTES if options.guards else 0):
                shown.failed(f"{case.name} {name}: {line}")
            watch.cancel()
        if case.digest and len(shown.failures) == failed:
            shown.clean.append(case.digest)
        print(f"ran {case.name} ({shown.seconds:.0f} s)", flush=True)
    print(shown.summary(), flush=True)
    return 1 if shown.failures else 0


if __name__ == "__main__":
    sys.exit(main())
