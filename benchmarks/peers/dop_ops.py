"""`dop.ops` for the peers' own benchmark: `bench_peers.py --extra benchmarks/peers/dop_ops.py`.

The script calls `make` once per case and times what it returns as it times every peer: a CUDA graph
of calls, each on weights of its own, one call per group of slices. As for the peers, what depends
on the batch only is made once, before the graph: here the segment plan.

What the host tells the plan is what the peers are told. A decode graph is captured before the batch
is known, so nobody gets the number of adapters there, only the number of slots; a prefill is
launched by a host that counted its segments (csgmv's grid and triton's segments are exact there),
so the plan gets the number too. `DOP_BENCH_HINT=always` or `never` overrides that, and
`DOP_BENCH_SPLIT=1` times shrink and expand apart as well. The file stands alone: it is loaded by
path, in a process whose torch the script chose.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def adapters_hint(kind: str, active: int) -> int | None:
    """Number of adapters that the host knows of when it launches a batch; None if it does not."""
    wish = os.environ.get("DOP_BENCH_HINT", "prefill")
    if wish not in ("always", "never", "prefill"):
        raise ValueError(f"DOP_BENCH_HINT={wish}: say always, never or prefill")
    known = wish == "always" or (wish == "prefill" and kind == "prefill")
    return active if known else None


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
    hint = adapters_hint(case.kind, case.active)
    plan = ops.segment_plan(ids, slots=case.slots, adapters=hint)
    a, b = (_stacks(sets) for sets in data.weights("vllm"))
    x, y = data.x, data.y

    def both(i: int) -> None:
        ops.add_lora(y[i], x[i], a[i], b[i], plan)

    note = {"adapters_hint": hint, "plan": type(plan).__name__}
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
