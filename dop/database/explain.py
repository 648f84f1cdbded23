"""A record in plain words: what it is for, how fast and how right, and what each step does."""

from __future__ import annotations

import datetime
import math
from dataclasses import asdict, dataclass

from dop.database.record import Record
from dop.database.step_words import LoopTracker, StepWords
from dop.errors import ConfigError
from dop.measurement import Measurement
from dop.scenario import COLD
from dop.workload import Workload

AXIS_MEANING = {
    "t": "tiles of rows (single rows in the row form)",
    "i": "rows of a tile",
    "k": "columns of x",
    "r": "ranks",
    "s": "weight slices",
    "n": "columns of y",
    "g": "groups of the packed columns of x",
    "l": "lanes that share a group",
    "e": "neighbouring columns of one lane",
}

STAGE_MEANING = {
    "gather_x": "fetches the rows of x",
    "gather_a": "fetches the adapter's A",
    "shrink": "multiplies x by A and sums over k, giving v",
    "gather_b": "fetches the adapter's B",
    "expand": "multiplies v by B and sums over r",
    "accumulate": "adds the result to y",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """A record in words.

    Attributes:
        header: pairs of a label and its text: task, device, time, accuracy, ...
        steps: one sentence per step, in order.
    """

    header: tuple[tuple[str, str], ...]
    steps: tuple[StepWords, ...]

    def text(self) -> str:
        """All of it as plain lines, at most one per fact and step."""
        width = max(len(label) for label, _ in self.header)
        lines = [f"{label:<{width}}  {words}" for label, words in self.header]
        lines += ["", "Stages, in order of computation:"]
        lines += [f"  {name:<10} {words}" for name, words in STAGE_MEANING.items()]
        lines += ["Loops:"]
        lines += [f"  {name:<10} {words}" for name, words in AXIS_MEANING.items()]
        lines += ["", "Steps:" if self.steps else "No steps: the plain program."]
        digits = len(str(len(self.steps)))
        lines += [f"  {s.position:>{digits}} {s.code:<4} {s.words}" for s in self.steps]
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """The same as data."""
        return {
            "header": dict(self.header),
            "stages": STAGE_MEANING,
            "loops": AXIS_MEANING,
            "steps": [asdict(step) for step in self.steps],
        }


def explain(record: Record) -> Explanation:
    """The record in words; never fails, an odd step is described as odd."""
    return Explanation(tuple(_header(record)), tuple(LoopTracker(record.trace.steps).walk()))


def _header(record: Record) -> list[tuple[str, str]]:
    rows = [
        ("task", record.task_key),
        ("problem", _problem(record.workload_key)),
        ("batch", _batch(record.scenario_key)),
        ("device", f"{record.device_name} ({record.target_key})"),
    ]
    rows += _outcome(record.measurement)
    if record.predicted_s is not None:
        rows.append(("predicted", microseconds(record.predicted_s)))
    if record.measurement.resources:
        uses = (f"{name} {value:g}" for name, value in record.measurement.resources.items())
        rows.append(("resources", ", ".join(uses)))
    rows.append(("sketch", record.sketch or "(not named)"))
    versions = ", ".join(f"{tool} {version}" for tool, version in record.versions.items())
    rows.append(
        ("measured", f"{date_words(record.timestamp)}{'; ' + versions if versions else ''}")
    )
    search = f"seed {record.seed}" + (f", revision {record.revision}" if record.revision else "")
    rows.append(("search", search))
    return rows


def _problem(key: str) -> str:
    try:
        workload = Workload.parse(key)
    except ConfigError:
        return "(the workload key cannot be read)"
    widths = " + ".join(map(str, workload.out_features))
    return (
        f"y += (x @ A.T) @ B.T in {workload.dtype}: x has {workload.in_features} columns, "
        f"rank {workload.rank}, y has {widths} columns"
    )


def _batch(key: str) -> str:
    tokens, _, rest = key.removesuffix(COLD).partition("/")
    mix, _, lengths = rest.partition("/")
    if not tokens.startswith("T") or not lengths:
        return key
    return _composition(tokens, mix, lengths) + ", x and y in memory" * key.endswith(COLD)


def _composition(tokens: str, mix: str, lengths: str) -> str:
    if mix == "recorded":
        segments, _, bare = lengths.partition("/")
        return f"tokens {tokens[1:]}, rows per adapter {segments}, rows without adapter {bare or 0}"
    return f"tokens {tokens[1:]}, adapters {lengths}, {mix} shares"


def _outcome(measurement: Measurement) -> list[tuple[str, str]]:
    if not measurement.ok:
        failure = measurement.failure.name.lower()
        rows = [("outcome", f"failed ({failure}): {measurement.message or 'no message'}")]
    else:
        rows = [("time", time_words(measurement.median_s, measurement.floor_s))]
    if measurement.accuracy is None:
        rows.append(("accuracy", "not checked"))
    else:
        rows.append(("accuracy", f"error {measurement.accuracy:.2e} of the largest element"))
    return rows


def time_words(seconds: float, floor_s: float | None) -> str:
    """A time beside the least that the bytes allow."""
    words = microseconds(seconds)
    if floor_s is None or not floor_s > 0:
        return f"{words} (floor not known)"
    return f"{words}, {seconds / floor_s:.2f} times its floor of {microseconds(floor_s)}"


def microseconds(seconds: float) -> str:
    """Seconds as text in microseconds."""
    if not math.isfinite(seconds):
        return "no time"
    value = seconds * 1e6
    return f"{value:.2f} us" if value < 1000 else f"{value:,.0f} us"


def date_words(timestamp: int) -> str:
    """A timestamp as text, in UTC."""
    try:
        moment = datetime.datetime.fromtimestamp(timestamp, datetime.timezone.utc)
    except (OverflowError, OSError, ValueError):
        return f"at {timestamp} seconds since 1970"
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
