"""Options of SGLang's csgmv kernels as the JSON files that SGLang loads.

SGLANG_LORA_CONFIG_DIR names a folder; below it csgmv_configs/triton_<x_y_z>/ holds one file per
kernel and shape, `lora_<kernel>,K=<wide side>,R=<rank>,S=<slices>,device=<name>.json`, whose keys
are rows per chunk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dop.engine_kernels import log
from dop.engine_kernels.task import CHUNKS, EngineTask
from dop.errors import ExportError
from dop.export.files import write_file

ROOT = "csgmv_configs"


@dataclass(frozen=True, slots=True)
class Table:
    """One file: a kernel and shape, options by rows per chunk."""

    task: EngineTask
    options: Mapping[int, Mapping[str, int]]

    def name(self, device: str) -> str:
        """The file's name."""
        task = self.task
        shape = f"K={task.long_side},R={task.workload.rank},S={task.workload.slices}"
        return f"lora_{task.kernel},{shape},device={device.replace(' ', '_')}.json"

    def text(self) -> str:
        """The file's content: all chunk sizes, those without measurements as the nearest."""
        tuned = sorted(self.options)
        whole = {
            str(chunk): dict(self.options[min(tuned, key=lambda t: (abs(t - chunk), t))])
            for chunk in sorted({*CHUNKS, *tuned})
        }
        return json.dumps(whole, indent=4) + "\n"


def tables(records: Iterable[log.EngineRecord]) -> list[Table]:
    """The best options of every kernel and shape.

    Raises:
        ExportError: the log has nothing for SGLang.
    """
    by_shape: dict[tuple[object, ...], dict[EngineTask, list[log.EngineRecord]]] = {}
    for record in records:
        task = record.task
        if task.engine == "sglang":
            shape = (task.kernel, task.long_side, task.workload.rank, task.workload.slices)
            by_shape.setdefault(shape, {}).setdefault(task, []).append(record)
    found = []
    for tasks in by_shape.values():
        options = {task.chunk: chosen for task, mine in tasks.items() if (chosen := overall(mine))}
        if options:
            found.append(Table(next(iter(tasks)), options))
    if not found:
        raise ExportError(
            "the log has no working options of SGLang's kernels.", "Run `dop engine tune` first."
        )
    return found


def overall(records: Iterable[log.EngineRecord]) -> dict[str, int] | None:
    """Options with the least geometric mean over all batches of a chunk size; None if none ran.

    Only options that were right under every batch of the task count.
    """
    batches: dict[str, dict[log.Options, float]] = {}
    failed: set[log.Options] = set()
    for record in records:
        options: log.Options = tuple(sorted(record.options.items()))
        times = batches.setdefault(record.scenario.key, {})
        if record.measurement.ok:
            times[options] = record.measurement.median_s
        else:
            failed.add(options)
    ran = [set(times) for times in batches.values()]
    everywhere: set[log.Options] = set.intersection(*ran) - failed if ran else set()
    if not everywhere:
        return None

    def mean(options: log.Options) -> tuple[float, log.Options]:
        return sum(math.log(times[options]) for times in batches.values()), options

    chosen: log.Options = min(everywhere, key=mean)
    return dict(chosen)


def export_sglang(
    records: Iterable[log.EngineRecord], output: Path, device: str, triton_version: str
) -> list[Table]:
    """Write the files below `output` and give what is in them.

    Raises:
        ExportError: nothing was tuned, or a file cannot be written.
    """
    found = tables(records)
    folder = output / ROOT / f"triton_{triton_version.replace('.', '_')}"
    for table in found:
        write_file(folder / table.name(device), table.text().encode())
    return found


def triton_version_of(records: Iterable[log.EngineRecord]) -> str:
    """The version of Triton that the newest record was measured with.

    Raises:
        ExportError: no record says.
    """
    known = [(r.time, r.versions["triton"]) for r in records if "triton" in r.versions]
    if not known:
        raise ExportError("no record names its Triton version.", "Tune with this version of Dop.")
    return max(known)[1]
