"""`dop.ops` for the peers' own benchmark: `bench_peers.py --extra benchmarks/peers/dop_ops.py`.

The script calls `make` once per case and times what it returns as it times every peer: a CUDA graph
of calls, each on weights of its own, one call per group of slices. As for the peers, what depends
on the batch only is made once, before the graph: here the segment plan.

What the host tells the plan about the number of adapters is what the peers are told. In "tight"
decode cases that is the number of slots (the next power of two of the adapters), by which the peers
size their grids and choose their plans; in "server" cases, where a graph serves any batch, it is
nothing; a prefill is launched by a host that counted its segments (csgmv's grid and triton's
segments are exact there). `DOP_BENCH_HINT=exact` or `never` overrides that, and `DOP_BENCH_SPLIT=1`
times the kernels of a call apart as well, launched plainly: without the overlap that they have
together, they take longer than both at once. The file stands alone: it is loaded by path, in a
process whose torch the script chose.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def adapters_hint(kind: str, tight: bool, tokens: int, slots: int, active: int) -> int | None:
    """Number of adapters that the host tells when it launches a batch; None for nothing."""
    wish = os.environ.get("DOP_BENCH_HINT", "peers")
    if wish not in ("peers", "exact", "never"):
        raise ValueError(f"DOP_BENCH_HINT={wish}: say peers, exact or never")
    if wish == "never":
        return None
    if wish == "exact" or kind == "prefill":
        return active
    return min(tokens, slots) if tight else None


def make(torch: Any, case: Any, data: Any, op_type: Any) -> Any:
    """The operator on one case, as an `Op` of the script.

    Args:
        torch: the module.
        case: the script's Case: T, slots, active, kind, ...
        data: the script's Data: x[i] [T, in], y[i] [T, out], weights("vllm") with one stack per
            slice, tok [T] on the host.
        op_type: the script's Op.
    """
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import dop.ops as ops

    ids = data.tok.to(device=data.device, dtype=torch.int32)
    tight = case.smode == "tight"
    hint = adapters_hint(case.kind, tight, case.T, case.slots, case.active)
    plan = ops.segment_plan(ids, slots=case.slots, adapters=hint)
    a, b = (_stacks(sets) for sets in data.weights("vllm"))
    x, y = data.x, data.y

    def both(i: int) -> None:
        ops.add_lora(y[i], x[i], a[i], b[i], plan)

    note = {"adapters_hint": hint, "kernel": _kernel(ops, case, x[0], hint)}
    if os.environ.get("DOP_BENCH_SPLIT") != "1":
        return op_type("vllm", both=both, note=note)
    if not x[0].is_cuda:
        return op_type(
            "vllm",
            lambda i: ops.sgmv_shrink(x[i], a[i], plan),
            lambda i, v: ops.sgmv_expand(y[i], v, b[i], plan),
            both,
            note=note,
        )
    first, last, is_pair = _halves(torch, x, y, a, b, plan)
    return op_type("vllm", *((first, last) if is_pair else (None, None)), both, note=note)


def _halves(torch: Any, x: Any, y: Any, a: Any, b: Any, plan: Any) -> tuple[Any, Any, bool]:
    """The chosen kernel's launches but the last, the last one (it takes what the first returned,
    whose workspace it reads), and whether there are two."""
    from dop.ops import eager
    from dop.ops.calls import check
    from dop.ops.derived import derived_words

    def prepared(i: int, block: Any = None) -> tuple[Any, Any, Any, int]:
        stacks = eager.checked_stacks(x[i], a[i], b[i], plan)
        block = block or eager.block_for(stacks.shape, plan)
        facts = eager.call_facts(plan, stacks.shape.rank, 1.0, None)
        words = derived_words(plan, block.tile_rows, *facts)
        return block, stacks, words, torch.cuda.current_stream().cuda_stream

    def first(i: int) -> Any:
        block, stacks, words, stream = prepared(i)
        check(block.pieces(stream, stream)[0].run(x[i].data_ptr(), 0, stacks.words, words))
        return block

    def last(i: int, block: Any) -> None:
        block, stacks, words, stream = prepared(i, block)
        check(block.pieces(stream, stream)[1].run(0, y[i].data_ptr(), stacks.words, words))

    return first, last, prepared(0)[0].is_pair


def _stacks(sets: Any) -> list[list[Any]]:
    """Views [slots, rows, columns] of the script's stacks [slots, 1, rows, columns], made once."""
    return [[stack.squeeze(1) for stack in stacks] for stacks in sets]


def _kernel(ops: Any, case: Any, x: Any, hint: int | None) -> str:
    """Which kernel serves the case and where it comes from, in one line."""
    widths = "+".join(map(str, case.outs))
    name = str(x.dtype).removeprefix("torch.")
    key = f"sgmv/{name}/r{case.rank}/{case.K}->{widths}"
    batch = {"tokens": case.T, "adapters": hint, "slots": case.slots}
    try:
        found = ops.explain_choice(key, **batch, device=x.device)
    except Exception as error:  # a note is no reason to lose a measurement
        return f"unknown: {error}"[:200]
    return " ".join(str(found).split())[:300]
