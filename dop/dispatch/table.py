"""The dispatch table: batch -> kernel, for every workload of one device.

A batch is seen as two numbers that are known before it runs: its tokens, and the rows that one
segment is expected to have (tokens over adapters). Nothing on the device is looked at, so a CUDA
graph captured for a token count is right for every later batch of that size: every kernel computes
every batch correctly, and the table only decides which one is fastest.

The rule, which exports repeat in their own language:

1. the bucket is the smallest token count in the table at or above the batch's, else the largest;
2. in it, the first row whose `rows_upto` is not below the expected rows per segment. A bucket's
   first row has `rows_upto` 0 and serves batches about which nothing is known (hint 0); the other
   limits lie halfway, on a log scale, between measured segment lengths; the last is infinite.

A batch of unknown segments still has a bound: no more adapters than the weight stacks have slots.
Where that is less than its tokens, segments are long on average, and the kernel that takes least
over the batches that are left, all together, serves it (`Bound`).

Buckets that were not measured lie between the measured ones and beyond them, with rows from
interpolated times (`dop.dispatch.between`); `dop.dispatch.holdout` measures what that loses.

Standard library only: the run time loads tables too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dop.errors import ConfigError, ExportError
from dop.scenario import short_key

UNKNOWN_ROWS = 0.0
"""The hint of a batch whose segments are not known."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the decision.

    Attributes:
        tokens: the bucket.
        rows_upto: largest expected rows per segment that this row serves; 0 for the row of an
            unknown hint, infinite for the last row of a bucket.
        trace_key: `Trace.key` of the kernel.
        worst: for an unknown hint, the largest loss against the log's best over all measured
            batches of the bucket (0.05 is 5 %); None if it was not measured under all of them.
        worst_scenario: the batch that loses it.
    """

    tokens: int
    rows_upto: float
    trace_key: str
    worst: float | None = None
    worst_scenario: str = ""


@dataclass(frozen=True, slots=True)
class Bound:
    """What serves batches of unknown segments that have some rows each, on average.

    Attributes:
        tokens: the bucket.
        rows_from: fewest rows per segment, on average, that a batch can have.
        trace_key: `Trace.key` of the kernel.
        worst: largest loss against the log's best over the bucket's batches of such segments; None
            if it was not measured under all of them.
        worst_scenario: the batch that loses it.
    """

    tokens: int
    rows_from: float
    trace_key: str
    worst: float | None = None
    worst_scenario: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """How well the table serves one measured scenario.

    Attributes:
        scenario_key: `Scenario.key`.
        trace_key: the kernel that the table picks for it.
        seconds: its measured time; None if it was not measured under this scenario.
        best_trace_key: the fastest kernel of the log.
        best_s: its time.
        floor_s: least time that the bytes allow, if known.
        others: measured times of the table's other kernels, by trace key.
    """

    scenario_key: str
    trace_key: str
    seconds: float | None
    best_trace_key: str
    best_s: float
    floor_s: float | None = None
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def regret(self) -> float:
        """Time lost against the log's best: 0.05 is 5 %; infinite if it was not measured."""
        return math.inf if self.seconds is None else self.seconds / self.best_s - 1


@dataclass(frozen=True, slots=True)
class WorkloadTable:
    """The decision for one workload.

    Attributes:
        workload_key: `Workload.key`.
        rows: by tokens, then by rows_upto, ascending.
        fits: one per measured scenario.
        between: buckets that were not measured: their rows come from interpolated times.
        bounds: by tokens, then by rows_from, ascending.
    """

    workload_key: str
    rows: tuple[Row, ...]
    fits: tuple[Fit, ...] = ()
    between: tuple[int, ...] = ()
    bounds: tuple[Bound, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise ExportError(f"the table of {self.workload_key} is empty.")
        if list(self.rows) != sorted(self.rows, key=lambda r: (r.tokens, r.rows_upto)):
            raise ExportError(f"the rows of {self.workload_key} are out of order.")
        ends = {row.tokens: row.rows_upto for row in self.rows}
        if any(end != math.inf for end in ends.values()):
            raise ExportError(f"a bucket of {self.workload_key} does not serve every batch.")

    @property
    def trace_keys(self) -> tuple[str, ...]:
        """The kernels in use, in the order of their first row."""
        keys = [row.trace_key for row in self.rows] + [bound.trace_key for bound in self.bounds]
        return tuple(dict.fromkeys(keys))

    @property
    def worst_regret(self) -> float:
        """Largest regret over the measured scenarios."""
        return max((fit.regret for fit in self.fits), default=0.0)

    def choose(self, tokens: int, adapters: int | None = None, slots: int | None = None) -> str:
        """Kernel of a batch.

        Args:
            tokens: rows of the batch, 1 or more.
            adapters: distinct adapters expected in it; None if that is not known.
            slots: adapters that the weight stacks have room for, so that no batch has more; None if
                that is not known.
        """
        return self.row(tokens, adapters, slots).trace_key

    def row(self, tokens: int, adapters: int | None = None, slots: int | None = None) -> Row:
        """The row that serves a batch; arguments as `choose`. If a bound decides, it is given as a
        row for an unknown hint."""
        if adapters:
            return self.row_by_rows(tokens, tokens / min(adapters, slots or adapters))
        bound = self.bound(tokens, slots) if slots else None
        if bound is None:
            return self.row_by_rows(tokens, UNKNOWN_ROWS)
        return Row(bound.tokens, UNKNOWN_ROWS, bound.trace_key, bound.worst, bound.worst_scenario)

    def bound(self, tokens: int, slots: int) -> Bound | None:
        """What serves a batch of unknown segments if there are fewer slots than tokens; None if
        the slots say nothing."""
        if slots >= tokens:
            return None
        bucket, least, found = self.bucket(tokens), tokens / slots, None
        for bound in self.bounds:
            if bound.tokens == bucket and bound.rows_from <= least:
                found = bound
        return found

    def bucket(self, tokens: int) -> int:
        """Token count of the rows that serve a batch."""
        above = min((r.tokens for r in self.rows if r.tokens >= tokens), default=0)
        return above or self.rows[-1].tokens

    def choose_by_rows(self, tokens: int, rows_per_segment: float) -> str:
        """Kernel of a batch by its expected rows per segment; 0 if that is not known."""
        return self.row_by_rows(tokens, rows_per_segment).trace_key

    def row_by_rows(self, tokens: int, rows_per_segment: float) -> Row:
        """The row that serves a batch, see `choose_by_rows`."""
        if tokens < 1 or not rows_per_segment >= 0:
            raise ConfigError(
                f"{tokens} tokens with {rows_per_segment} rows per segment.",
                "Give 1 token or more and a hint of 0 or more.",
            )
        bucket = self.bucket(tokens)
        for row in self.rows:
            if row.tokens == bucket and rows_per_segment <= row.rows_upto:
                return row
        raise AssertionError("the last row of a bucket serves everything")


@dataclass(frozen=True, slots=True)
class Table:
    """The decisions for one device.

    Attributes:
        device_name: where the times were taken.
        target_key: `Target.key` of it.
        workloads: by `Workload.key`.
    """

    device_name: str
    target_key: str
    workloads: Mapping[str, WorkloadTable]

    def choose(
        self, workload_key: str, tokens: int, adapters: int | None = None, slots: int | None = None
    ) -> str:
        """Trace key of the kernel for a batch; arguments as `WorkloadTable.choose`.

        Raises:
            ConfigError: the workload is not in the table.
        """
        if workload_key not in self.workloads:
            raise ConfigError(
                f"{workload_key} was not tuned on {self.device_name}.",
                "Run dop tune for its model and rank.",
            )
        return self.workloads[workload_key].choose(tokens, adapters, slots)

    def only(self, keys: Iterable[str]) -> Table:
        """The table with only these workloads."""
        return Table(self.device_name, self.target_key, {key: self.workloads[key] for key in keys})

    @property
    def kernels(self) -> int:
        """Kernels over all workloads."""
        return sum(len(w.trace_keys) for w in self.workloads.values())

    def to_json(self) -> dict[str, object]:
        """Plain data for an index; what is infinite becomes null."""
        return {
            "device": self.device_name,
            "target": self.target_key,
            "workloads": {key: _to_json(table) for key, table in self.workloads.items()},
        }

    @staticmethod
    def from_json(data: object) -> Table:
        """Table of its JSON form.

        Raises:
            ExportError: it is not such a form.
        """
        try:
            assert isinstance(data, dict)
            workloads = {key: _from_json(key, value) for key, value in data["workloads"].items()}
            return Table(str(data["device"]), str(data["target"]), workloads)
        except (AssertionError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExportError(
                f"the dispatch table is damaged ({type(error).__name__}: {error}).",
                "Export it again from the log.",
            ) from error

    def text(self) -> str:
        """The table for people: per workload its rows, then the regret of every scenario."""
        lines = [f"Dispatch on {self.device_name} ({self.target_key}): {self.kernels} kernels"]
        for table in self.workloads.values():
            lines += ["", table.workload_key, *_row_lines(table), *_fit_lines(table.fits)]
        return "\n".join(lines)


def halfway(shorter: float, longer: float) -> float:
    """The limit between two segment lengths: their geometric mean, to 6 digits, so that every
    language writes and compares the same number."""
    return float(f"{math.sqrt(shorter * longer):.6g}")


def _to_json(table: WorkloadTable) -> dict[str, object]:
    rows = [_row_to_json(row) for row in table.rows]
    fits = [
        {
            "scenario": fit.scenario_key,
            "kernel": fit.trace_key,
            "seconds": fit.seconds,
            "best": fit.best_trace_key,
            "best_s": fit.best_s,
            "floor_s": fit.floor_s,
            "others": dict(fit.others),
        }
        for fit in table.fits
    ]
    bounds = [
        [b.tokens, b.rows_from, b.trace_key, *_loss_to_json(b.worst, b.worst_scenario)]
        for b in table.bounds
    ]
    return {"rows": rows, "scenarios": fits, "between": list(table.between), "bounds": bounds}


def _row_to_json(row: Row) -> list[object]:
    upto = None if row.rows_upto == math.inf else row.rows_upto
    return [row.tokens, upto, row.trace_key, *_loss_to_json(row.worst, row.worst_scenario)]


def _loss_to_json(worst: float | None, scenario: str) -> list[object]:
    return [] if worst is None else [worst, scenario]


def _loss_of(loss: Sequence[Any]) -> tuple[float | None, str]:
    return (float(loss[0]), str(loss[1])) if loss else (None, "")


def _row_of(data: Sequence[Any]) -> Row:
    tokens, upto, trace_key, *loss = data
    limit = math.inf if upto is None else float(upto)
    return Row(int(tokens), limit, str(trace_key), *_loss_of(loss))


def _bound_of(data: Sequence[Any]) -> Bound:
    tokens, rows_from, trace_key, *loss = data
    return Bound(int(tokens), float(rows_from), str(trace_key), *_loss_of(loss))


def _from_json(key: str, data: Mapping[str, Any]) -> WorkloadTable:
    rows = [_row_of(row) for row in data["rows"]]
    fits = []
    for item in data["scenarios"]:
        names = ("scenario", "kernel", "seconds", "best", "best_s", "floor_s", "others")
        fits.append(Fit(*({"others": {}, **item}[name] for name in names)))
    between = tuple(int(tokens) for tokens in data.get("between", ()))
    bounds = tuple(_bound_of(bound) for bound in data.get("bounds", ()))
    return WorkloadTable(key, tuple(rows), tuple(fits), between, bounds)


def _row_lines(table: WorkloadTable) -> Iterable[str]:
    yield "  tokens  rows per segment  kernel" + ("   (~ not measured)" if table.between else "")
    for row in table.rows:
        if row.rows_upto == UNKNOWN_ROWS:
            upto = "not known"
        elif row.rows_upto == math.inf:
            upto = "any other"
        else:
            upto = f"up to {row.rows_upto:g}"
        mark = "~" if row.tokens in table.between else " "
        yield f" {mark}{row.tokens:6d}  {upto:<16}  {row.trace_key}{_loss_text(row)}"
        if row.rows_upto == UNKNOWN_ROWS:
            for bound in (b for b in table.bounds if b.tokens == row.tokens):
                what = f"  {bound.rows_from:g} or more"
                yield f" {mark}{row.tokens:6d}  {what:<16}  {bound.trace_key}{_loss_text(bound)}"


def _loss_text(row: Row | Bound) -> str:
    return "" if row.worst is None else f"  loses at most {row.worst:.1%}, at {row.worst_scenario}"


def _fit_lines(fits: Iterable[Fit]) -> Iterable[str]:
    yield "  scenario                  kernel us  best us  regret  floor us"
    for fit in fits:
        seconds = "-" if fit.seconds is None else f"{fit.seconds * 1e6:.2f}"
        regret = "-" if fit.seconds is None else f"{fit.regret:.1%}"
        floor = "-" if fit.floor_s is None else f"{fit.floor_s * 1e6:.2f}"
        name = short_key(fit.scenario_key, 24)
        yield f"  {name:<24}  {seconds:>9}  {fit.best_s * 1e6:7.2f}  {regret:>6}  {floor:>8}"
