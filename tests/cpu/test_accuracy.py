"""The accuracy gate: rounding passes, every planted fault does not."""

import numpy as np
import pytest

from dop.measure.accuracy import TOLERANCES, compare, judge, reference

TOKENS, WIDTH, OUT, RANK = 24, 4096, 96, 16
SLOTS = np.array([0, 1, 2, -1] * 6, np.int32)


def case(dtype):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((TOKENS, WIDTH)).astype(dtype)
    a = [(rng.standard_normal((3, RANK, WIDTH)) * WIDTH**-0.5).astype(dtype)]
    b = [(rng.standard_normal((3, OUT, RANK)) * RANK**-0.5).astype(dtype)]
    y = rng.standard_normal((TOKENS, OUT)).astype(dtype)
    return x, a, b, y, reference(x, a, b, y, SLOTS).astype(np.float32)


def verdict(got, want, before, dtype, guard_changed=False):
    return judge(compare(got, want, before, SLOTS, guard_changed), np.dtype(dtype).name)[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rounding_in_the_element_type_passes(dtype):
    x, a, b, y, want = case(dtype)
    got = y.copy()
    for row in np.flatnonzero(SLOTS >= 0):
        v = (x[row].astype(np.float32) @ a[0][SLOTS[row]].astype(np.float32).T).astype(dtype)
        update = v.astype(np.float32) @ b[0][SLOTS[row]].astype(np.float32).T
        got[row] = (y[row].astype(np.float32) + update).astype(dtype)
    assert verdict(got, want, y, dtype) == ""


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_dropped_k_element_is_wrong(dtype):
    x, a, b, y, want = case(dtype)
    shorter = x.copy()
    shorter[:, -1] = 0
    got = reference(shorter, a, b, y, SLOTS).astype(dtype)
    assert "rms" in verdict(got, want, y, dtype) or "wrong" in verdict(got, want, y, dtype)


def right(dtype=np.float32):
    *_, y, want = case(dtype)
    got = want.astype(dtype)
    got[SLOTS < 0] = y[SLOTS < 0]
    return got, want, y


def test_the_reference_itself_passes():
    got, want, y = right()
    assert verdict(got, want, y, np.float32) == ""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda got, y: got.__setitem__((3, 0), np.nextafter(y[3, 0], 9)), "without adapter"),
        (lambda got, y: got.__setitem__((0, 5), np.nan), "NaN"),
        (lambda got, y: got.__setitem__((0, 5), np.inf), "NaN or infinite"),
        (lambda got, y: got.__setitem__((4, 7), y[4, 7]), "wrong result"),
        (lambda got, y: got.__setitem__((slice(None), 95), y[:, 95]), "wrong result"),
        (lambda got, y: got.__setitem__(2, y[2]), "wrong result"),
    ],
)
def test_planted_faults_are_found(fault, words):
    got, want, y = right()
    fault(got, y)
    assert words in verdict(got, want, y, np.float32)


def test_negative_zero_in_a_bare_row_counts_as_changed():
    got, want, y = right()
    y[3, 0], got[3, 0] = 0.0, -0.0
    assert "without adapter" in verdict(got, want, y, np.float32)


def test_guards_count():
    got, want, y = right()
    assert "outside y" in verdict(got, want, y, np.float32, guard_changed=True)


def test_batch_of_bare_rows_only():
    y = np.ones((2, 3), np.float32)
    slots = np.full(2, -1, np.int32)
    errors = compare(y.copy(), y, y, slots, False)
    assert judge(errors, "float32") == (0.0, "")


def test_every_dtype_has_a_tolerance():
    assert set(TOLERANCES) == {"float32", "float16", "bfloat16"}
