"""`dop.ops` for the peers' own benchmark: `bench_peers.py --extra benchmarks/peers/dop_ops.py`.

The script calls `make` once per case and times what it returns as it times every peer: a CUDA graph
of calls, each on weights of its own, one call per group of slices. As for the peers, what depends
on the batch only is made once, before the graph: here the segment plan.

What the host tells the plan about the number of adapters is what the peers are told. In "tight"
decode cases that is the number of slots (the next power of two of the adapters), by which the peers
size their grids and choose their plans; in "server" cases, where a graph serves any batch, it is
nothing; a prefill is launched by a host that counted its segments (csgmv's grid and triton's
segments are exact there). `DOP_BENCH_HINT=exact` or `never` overrides that, and `DOP_BENCH_SPLIT=1`
times shrink and expand apart as well. The file stands alone: it is loaded by path, in a process
whose torch the script chose.
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

    def shrink(i: int) -> Any:
        return ops.sgmv_shrink(x[i], a[i], plan)

    def expand(i: int, v: Any) -> None:
        ops.sgmv_expand(y[i], v, b[i], plan)

    return op_type("vllm", shrink, expand, both, note=note)


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
