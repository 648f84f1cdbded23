"""The accuracy gate: what is compared with what, and when a candidate is right.

Inputs are normal and scaled (A by 1/sqrt(in), B by 1/sqrt(rank)) so that the update and y are of
order 1 whatever the shape. Two figures are judged:

- the largest error over max |want|: catches single wrong or unwritten elements;
- the root mean square error over that of the update: catches a dropped k element, which moves
  every element by 1/sqrt(in) (0.8 % at in = 16384) and so hides behind rounding in the maximum.

Rows without adapter and the guards before and behind y must be bit-identical.

Tolerances. float32: sums of up to 30,000 terms in any order give about 1e-6 of max |want|; 1e-4
leaves room for reassociation, and one dropped element of 16384 still shows. float16, bfloat16:
y is rounded once (up to 2^-11 and 2^-8 of the element) and kernels on tensor cores round v to the
element type, which adds about a third; 2e-3 and 1e-2 are two to three times that. Rounding alone
gives an rms error of 3e-4 and 2.8e-3 of the update.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dop.measure.plan import SlotFacts
from dop.scenario import NO_ADAPTER

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed errors: of any element over max |want|, and in the root mean square."""

    largest: float
    rms: float


TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-5),
    "float16": Tolerance(2e-3, 1e-3),
    "bfloat16": Tolerance(1e-2, 6e-3),
}


@dataclass(frozen=True)
class Errors:
    """What a comparison found; NaN where an element was NaN.

    Attributes:
        largest: max |got - want| over the rows with an adapter.
        scale: max |want| over them.
        rms: root mean square of got - want.
        update_rms: root mean square of what the call had to add.
        bare_changed: whether a row without adapter changed in any bit.
        guard_changed: whether memory before or behind y changed in any bit.
    """

    largest: float
    scale: float
    rms: float
    update_rms: float
    bare_changed: bool
    guard_changed: bool


def judge(errors: Errors, dtype: str) -> tuple[float, str]:
    """Accuracy (largest error over max |want|) and why the result is wrong; "" if it is right."""
    scale = errors.scale or 1.0
    accuracy = errors.largest / scale
    limit = TOLERANCES[dtype]
    if errors.guard_changed:
        return accuracy, "memory outside y was written"
    if errors.bare_changed:
        return accuracy, "a row without adapter was changed"
    if not np.isfinite(accuracy):
        return accuracy, "the result has NaN or infinite elements"
    if accuracy > limit.largest:
        return accuracy, f"wrong result: error {accuracy:.2e}, at most {limit.largest:g}"
    relative = errors.rms / (errors.update_rms or 1.0)
    if not relative <= limit.rms:
        return accuracy, f"wrong result: rms error {relative:.2e}, at most {limit.rms:g}"
    return accuracy, ""


def reference(
    x: Floats,
    a: list[Floats],
    b: list[Floats],
    y: Floats,
    token_slot: NDArray[np.int32],
    facts: SlotFacts | None = None,
) -> NDArray[np.float64]:
    """What y must hold after the call, in float64.

    Args:
        x: [tokens, in].
        a, b: per slice [slots, rank, in] and [slots, out, rank].
        y: [tokens, sum of out] before the call.
        token_slot: [tokens], -1 for no adapter.
        facts: rank and scale of each slot; None for full ranks and scale 1.
    """
    want = y.astype(np.float64)
    for slot in np.unique(token_slot[token_slot != NO_ADAPTER]):
        rows = np.flatnonzero(token_slot == slot)
        inputs = x[rows].astype(np.float64) * (facts.scales[slot] if facts else 1.0)
        rank = facts.ranks[slot] if facts else None
        column = 0
        for a_s, b_s in zip(a, b, strict=True):
            shrunk = inputs @ a_s[slot, :rank].astype(np.float64).T
            update = shrunk @ b_s[slot, :, :rank].astype(np.float64).T
            want[rows, column : column + update.shape[1]] += update
            column += update.shape[1]
    return want


def compare(
    got: Floats, want: Floats, before: Floats, token_slot: NDArray[np.int32], guard_changed: bool
) -> Errors:
    """Errors of a result on the CPU; all arrays [tokens, sum of out]."""
    used = token_slot != NO_ADAPTER
    bare_changed = not np.array_equal(_bits(got[~used]), _bits(before[~used]))
    if not used.any():
        return Errors(0.0, 1.0, 0.0, 1.0, bare_changed, guard_changed)
    everything = bool(used.all())
    got_f, want_f = got.astype(np.float32), want.astype(np.float32)
    old = before.astype(np.float32)
    if not everything:
        got_f, want_f, old = got_f[used], want_f[used], old[used]
    error, update = (got_f - want_f).ravel(), (want_f - old).ravel()
    return Errors(
        float(np.abs(error).max()),
        float(np.abs(want_f).max()),
        float(np.sqrt(np.dot(error, error) / error.size)),
        float(np.sqrt(np.dot(update, update) / update.size)),
        bare_changed,
        guard_changed,
    )


def _bits(values: Floats) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).view(np.uint8)
