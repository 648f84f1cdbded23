"""Records tuned in one 16-bit type, shipped in the other as well.

fp16 and bf16 move the same bytes and use the same instructions at the same rate, so the kernel that
is fastest in one is taken to be fastest in the other. What is shipped is built for real in its own
type; that its times are the other type's is written beside it. A trace names its matrix intrinsics
by type (`mma_bf16`), so those names change with it, and with them the trace's key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from dop.dispatch.table import Table, WorkloadTable
from dop.errors import ExportError
from dop.export.select import Kernel, Selection
from dop.space.step import AnnotationStep, PragmaStep, Step
from dop.space.trace import Trace
from dop.workload import Workload

TWINS = {"float16": "bfloat16", "bfloat16": "float16"}
"""Types that exchange records."""

_SHORT = {"float16": "f16", "bfloat16": "bf16"}
"""As intrinsics name them."""


def in_dtypes(selection: Selection, dtypes: Sequence[str]) -> Selection:
    """The selection in exactly these types: what was tuned in them, and what can be transferred.

    Raises:
        ExportError: nothing is left.
    """
    tables: dict[str, WorkloadTable] = {}
    kernels: list[Kernel] = []
    for key in wanted_keys(selection.table.workloads, dtypes):
        if key in selection.table.workloads:
            tables[key] = selection.table.workloads[key]
            kernels += selection.of(key)
        else:
            moved = [_transferred(k, Workload.parse(key).dtype) for k in selection.of(_twin(key))]
            old = selection.of(_twin(key))
            names = {o.trace_key: m.trace_key for o, m in zip(old, moved, strict=True)}
            tables[key] = _renamed(selection.table.workloads[_twin(key)], key, names)
            kernels += moved
    if not kernels:
        raise ExportError(
            f"the log holds nothing for {', '.join(dtypes)}.", "Give --dtype as it was tuned."
        )
    table = Table(selection.table.device_name, selection.table.target_key, tables)
    return replace(selection, table=table, kernels=tuple(kernels))


def _transferred(kernel: Kernel, dtype: str) -> Kernel:
    """The kernel in another type; its record keeps its times and says so through the mark."""
    workload = replace(kernel.workload, dtype=dtype)
    trace = translated(kernel.record.trace, kernel.workload.dtype, dtype)
    return replace(
        kernel,
        workload=workload,
        trace_key=trace.key,
        record=replace(kernel.record, workload_key=workload.key, trace=trace),
        transferred_from=kernel.workload.key,
    )


def translated(trace: Trace, old: str, new: str) -> Trace:
    """The trace with the intrinsics of another type, e.g. mma_f16 for mma_bf16."""
    return Trace(tuple(step_in(step, old, new) for step in trace.steps))


def step_in(step: Step, old: str, new: str) -> Step:
    """A step with the intrinsics of another type."""
    word = re.compile(rf"(?<![a-z0-9]){_SHORT[old]}(?![a-z0-9])")
    if isinstance(step, AnnotationStep) and step.intrinsic:
        return replace(step, intrinsic=word.sub(_SHORT[new], step.intrinsic))
    if isinstance(step, PragmaStep) and isinstance(step.value, str):
        return replace(step, value=word.sub(_SHORT[new], step.value))
    return step


def _renamed(table: WorkloadTable, key: str, names: Mapping[str, str]) -> WorkloadTable:
    """The table for another key, its kernels under other names."""
    rows = tuple(replace(row, trace_key=names[row.trace_key]) for row in table.rows)
    fits = tuple(
        replace(
            fit,
            trace_key=names[fit.trace_key],
            best_trace_key=names.get(fit.best_trace_key, fit.best_trace_key),
            others={names[trace]: seconds for trace, seconds in fit.others.items()},
        )
        for fit in table.fits
    )
    bounds = tuple(replace(bound, trace_key=names[bound.trace_key]) for bound in table.bounds)
    return replace(table, workload_key=key, rows=rows, fits=fits, bounds=bounds)


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
