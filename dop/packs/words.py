"""An answer of `dop explain` as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dop.packs.answer import Answer, Evidence

_SERVED = {
    "pack": "a tuned kernel, from a pack",
    "log": "a tuned kernel, once the log is exported",
    "nvrtc": "a tuned kernel of another GPU, built here by NVRTC (once, into the cache)",
    "generic": "the generic kernels",
    "torch": "torch's own operators",
    "nothing": "nothing: this GPU is too old",
}


def text_of(answer: Answer) -> str:
    """Lines for people."""
    return "\n".join(_lines(answer))


def _lines(answer: Answer) -> Iterator[str]:
    batch = answer.batch
    adapters = "unknown adapters" if batch.adapters is None else f"{batch.adapters} adapters"
    if batch.slots is not None:
        adapters += f", {batch.slots} slots"
    name = "" if batch.workload.name in ("", batch.workload.key) else f"{batch.workload.name}: "
    yield f"{name}{batch.workload.key}, {batch.tokens} tokens, {adapters}"
    yield f"  on {batch.device_name} ({batch.arch}): {_SERVED[answer.served_by]}"
    if answer.kernel:
        yield f"  kernel   {answer.kernel}"
        form = f"; {answer.form}" if answer.form else ""
        yield f"           {answer.sketch.replace('/', ', ')}{form}"
        yield f"  source   {answer.pack}"
        yield f"           {_origin(answer)}"
    for i, reason in enumerate(answer.reasons):
        yield f"  {'why' if i == 0 else '':<7}  {reason}"
    for i, evidence in enumerate(answer.evidence):
        yield f"  {'times' if i == 0 else '':<7}  {_times(evidence)}"
        if evidence.alternatives:
            others = ", ".join(
                f"{a.trace_key} {a.seconds * 1e6:.2f} us ({a.regret:+.1%})"
                for a in evidence.alternatives
            )
            yield f"           others: {others}"


def _origin(answer: Answer) -> str:
    p = answer.provenance
    digest = str(p.get("log_sha256", ""))[:12]
    return (
        f"from {p.get('log')} (sha256 {digest}..., {p.get('records')} records), measured on "
        f"{p.get('device')}, newest record {p.get('newest_record')}"
    )


def _times(evidence: Evidence) -> str:
    floor = "" if evidence.floor_s is None else f", floor {evidence.floor_s * 1e6:.2f} us"
    best = f"log's best {evidence.best_s * 1e6:.2f} us"
    if evidence.seconds is None or evidence.regret is None:
        return f"{evidence.scenario}: not measured with this kernel; {best}{floor}"
    return (
        f"{evidence.scenario}: {evidence.seconds * 1e6:.2f} us, {best} "
        f"(regret {evidence.regret:.1%}){floor}"
    )
