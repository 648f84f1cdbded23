"""The example of docs/writing-a-rule.md runs, and its rule lowers."""

from __future__ import annotations

import random
import re
from pathlib import Path

DOC = Path(__file__).parents[2] / "docs" / "writing-a-rule.md"


def run_example(capsys) -> tuple[dict[str, object], list[str]]:
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {"__name__": "example"}
    printed = []
    for block in blocks:
        exec(compile(block, str(DOC), "exec", dont_inherit=True), names)
        printed.append(capsys.readouterr().out)
    return names, printed


def test_the_example_derives_sketches_and_lowers(capsys):
    names, (derived, lowered) = run_example(capsys)
    count = int(derived.split()[0])
    assert count >= 1
    assert "scalar_b" in derived
    assert "threadIdx.x" in lowered
    assert "__global__" in lowered
    sketches = names["added"]
    assert len(sketches) == count
    rng = random.Random(0)
    for sketch in sketches:
        values = [sketch.sample(rng) for _ in range(40)]
        assert any(sketch.broken_limit(v) is None for v in values)


def test_the_document_names_every_builder_method():
    from dop.space.rule import SketchState

    text = DOC.read_text()
    plumbing = {"fork", "sketch"}
    methods = {n for n in vars(SketchState) if not n.startswith("_")} - plumbing
    fields = set(SketchState.__dataclass_fields__)
    missing = [n for n in methods - fields if f"`{n}`" not in text and f"`{n}(" not in text]
    assert not missing
