"""Options of vLLM's own LoRA kernels as the JSON files that vLLM loads.

VLLM_TUNED_CONFIG_FOLDER names a folder with <gpu>_SHRINK.json, <gpu>_EXPAND_TRUE.json and
<gpu>_EXPAND_FALSE.json; a table is indexed by max_loras + 1, slices, tokens, k and n, with strings
as keys. vLLM takes the nearest key of every level but `slices`, where a missing key ends the
engine: so every table has 1, 2 and 3 slices, those that were not tuned as the nearest that was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dop.engine_kernels import log
from dop.engine_kernels.task import EngineTask
from dop.errors import ExportError
from dop.export.files import write_folder

SLICES = (1, 2, 3)
"""Projections that vLLM packs into one launch: 1, gate_up 2, qkv 3."""

MARKER = "dop.json"

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """One look-up that vLLM will do and what it has to find."""

    task: EngineTask
    tokens: int
    options: dict[str, int]

    @property
    def query(self) -> dict[str, object]:
        """Arguments of vLLM's `get_lora_op_configs`."""
        adds = None if self.task.kernel == "shrink" else self.task.add_inputs
        return {
            "op_type": self.task.kernel,
            "max_loras": self.task.slots + 1,
            "batch": self.tokens,
            "hidden_size": self.task.long_side,
            "rank": self.task.workload.rank,
            "num_slices": self.task.workload.slices,
            "add_inputs": adds,
        }

    @property
    def path(self) -> tuple[str, ...]:
        """Keys of the leaf, outermost first."""
        task = self.task
        k, n = task.long_side, task.workload.rank
        if task.kernel == "expand":
            k, n = n, k
        return tuple(map(str, (task.slots + 1, task.workload.slices, self.tokens, k, n)))


def entries(records: Iterable[log.EngineRecord]) -> list[Entry]:
    """The best options of every task and number of tokens in a log.

    Raises:
        ExportError: the log has nothing for vLLM.
    """
    by_task: dict[EngineTask, list[log.EngineRecord]] = {}
    for record in records:
        if record.task.engine == "vllm":
            by_task.setdefault(record.task, []).append(record)
    found = []
    for task, mine in by_task.items():
        for tokens in sorted({record.scenario.tokens for record in mine}):
            options = log.best(mine, tokens)
            if options is not None:
                found.append(Entry(task, tokens, options))
    if not found:
        raise ExportError(
            "the log has no working options of vLLM's kernels.", "Run `dop engine tune` first."
        )
    return found


def files(found: Sequence[Entry], device: str) -> dict[str, bytes]:
    """Content by file name. EXPAND_FALSE is EXPAND_TRUE's where only that was tuned."""
    trees = {name: _tree(e for e in found if belongs(e.task)) for name, belongs in _TABLES.items()}
    trees["EXPAND_FALSE"] = trees["EXPAND_FALSE"] or trees["EXPAND_TRUE"]
    name = file_name(device)
    return {
        f"{name}_{table}.json": (json.dumps(tree, indent=1) + "\n").encode()
        for table, tree in trees.items()
        if tree
    }


_TABLES: dict[str, Callable[[EngineTask], bool]] = {
    "SHRINK": lambda task: task.kernel == "shrink",
    "EXPAND_TRUE": lambda task: task.kernel == "expand" and task.add_inputs,
    "EXPAND_FALSE": lambda task: task.kernel == "expand" and not task.add_inputs,
}


def file_name(device: str) -> str:
    """A device's name as vLLM spells it in file names."""
    return device.replace(" ", "_").replace("-", "_")


def _tree(found: Iterable[Entry]) -> Tree:
    root: Tree = {}
    for entry in found:
        node = root
        for key in entry.path[:-1]:
            node = node.setdefault(key, {})
        node[entry.path[-1]] = entry.options
    for by_slices in root.values():
        tuned = [int(key) for key in by_slices]
        for slices in SLICES:
            nearest = min(tuned, key=lambda t: (abs(t - slices), t))
            by_slices.setdefault(str(slices), by_slices[str(nearest)])
    return root


def export_vllm(records: Iterable[log.EngineRecord], output: Path, device: str) -> list[Entry]:
    """Write the folder and give what is in it.

    Raises:
        ExportError: nothing was tuned, or the folder cannot be written.
    """
    found = entries(records)
    about = {"made_by": "dop export vllm", "device": device, "entries": len(found)}
    content = {**files(found, device), MARKER: (json.dumps(about) + "\n").encode()}
    write_folder(output, content, marker=MARKER)
    return found


_CHECK = """
import json, sys
from unittest.mock import patch
device, queries = json.load(sys.stdin)
with patch("torch.cuda.get_device_name", lambda *_: device):
    from vllm.lora.ops.triton_ops.utils import get_lora_op_configs
    print("FOUND" + json.dumps([get_lora_op_configs(**query) for query in queries]))
"""


def check_with_vllm(output: Path, found: Sequence[Entry], device: str) -> bool:
    """Load the folder through vLLM's own loader, in a process of its own.

    Returns:
        Whether vLLM could be asked; False if it is not installed here.

    Raises:
        ExportError: vLLM finds other options for a tuned shape.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CHECK],
        input=json.dumps([device, [entry.query for entry in found]]),
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_TUNED_CONFIG_FOLDER": str(output.resolve()), "DOP_VLLM": "0"},
        check=False,
    )
    answer = next((x for x in done.stdout.splitlines() if x.startswith("FOUND")), None)
    if answer is None:
        if "No module named" in done.stderr:
            return False
        last = done.stderr.strip().splitlines()[-1:] or ["no answer"]
        raise ExportError(f"vLLM's loader refused {output}: {last[0]}", "Report this.")
    compare(found, json.loads(answer.removeprefix("FOUND")))
    return True


def compare(found: Sequence[Entry], loaded: Sequence[object]) -> None:
    """Every entry's options are what the engine loaded.

    Raises:
        ExportError: one is not.
    """
    for entry, got in zip(found, loaded, strict=True):
        if got != entry.options:
            raise ExportError(
                f"{entry.task.key} at {entry.tokens} tokens loads as {got}, not {entry.options}.",
                "Export each max_loras into a folder of its own.",
            )
