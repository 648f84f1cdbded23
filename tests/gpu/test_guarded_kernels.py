"""Every shipped kernel between guard zones: nothing is written or read beside its tensors.

The same calls as `sanitize_packs.py` makes under compute-sanitizer; about a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import guarded  # noqa: E402
import sanitize_packs  # noqa: E402

BATCHES = tuple(guarded.BATCHES)
CASES = [*sanitize_packs.pack_cases(BATCHES), *sanitize_packs.generic_cases(BATCHES)]
GROUPS = sorted({case.group for case in CASES})


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_stay_within_their_tensors(group):
    found = [
        f"{case.name} {name}: {line}"
        for case in CASES
        if case.group == group
        for name in case.batches
        for line in case.run(guarded.BATCHES[name or "one"], guarded.Arena())
    ]
    assert not found
