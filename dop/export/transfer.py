"""Records tuned in one 16-bit type, shipped in the other as well.

fp16 and bf16 move the same bytes and use the same instructions at the same rate, so the kernel that
is fastest in one is taken to be fastest in the other. What is shipped is built for real in its own
type; that its times are the other type's is written beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from dop.dispatch.table import Table, WorkloadTable
from dop.errors import ConfigError, ExportError
from dop.export.select import Kernel, Selection
from dop.workload import DTYPES, Workload

ALIASES = {"fp16": "float16", "bf16": "bfloat16", "half": "float16", "fp32": "float32"}
TWINS = {"float16": "bfloat16", "bfloat16": "float16"}
"""Types that exchange records."""


def parse_dtypes(text: str) -> tuple[str, ...]:
    """Element types of a list such as "fp16,bf16".

    Raises:
        ConfigError: one of them is unknown.
    """
    names = [part.strip().lower() for part in text.split(",")]
    found = tuple(dict.fromkeys(ALIASES.get(name, name) for name in names))
    unknown = [name for name in found if name not in DTYPES]
    if unknown:
        raise ConfigError(f"dtype {unknown[0]!r} is unknown.", "Give some of fp16, bf16, fp32.")
    return found


def in_dtypes(selection: Selection, dtypes: Sequence[str]) -> Selection:
    """The selection in exactly these types: what was tuned in them, and what can be transferred.

    Raises:
        ExportError: nothing is left.
    """
    tables: dict[str, WorkloadTable] = {}
    kernels: list[Kernel] = []
    for key in wanted_keys(selection.table.workloads, dtypes):
        origin = key if key in selection.table.workloads else _twin(key)
        tables[key] = replace(selection.table.workloads[origin], workload_key=key)
        for kernel in selection.of(origin):
            workload = replace(kernel.workload, dtype=Workload.parse(key).dtype)
            mark = "" if key == origin else origin
            kernels.append(replace(kernel, workload=workload, transferred_from=mark))
    if not kernels:
        raise ExportError(
            f"the log holds nothing for {', '.join(dtypes)}.", "Give --dtype as it was tuned."
        )
    table = Table(selection.table.device_name, selection.table.target_key, tables)
    return replace(selection, table=table, kernels=tuple(kernels))


def wanted_keys(measured: Iterable[str], dtypes: Sequence[str]) -> list[str]:
    """Keys to ship: in the order of the log's, in every type that was measured or has a twin."""
    keys: dict[str, None] = {}
    there = dict.fromkeys(measured)
    for key in there:
        workload = Workload.parse(key)
        for dtype in dtypes:
            if dtype in (workload.dtype, TWINS.get(workload.dtype)):
                keys[replace(workload, dtype=dtype).key] = None
    return list(keys)


def without(selection: Selection, workload_key: str) -> Selection:
    """The selection without one workload."""
    tables = {k: t for k, t in selection.table.workloads.items() if k != workload_key}
    table = Table(selection.table.device_name, selection.table.target_key, tables)
    kernels = tuple(k for k in selection.kernels if k.workload.key != workload_key)
    return replace(selection, table=table, kernels=kernels)


def _twin(key: str) -> str:
    workload = Workload.parse(key)
    return replace(workload, dtype=TWINS[workload.dtype]).key
