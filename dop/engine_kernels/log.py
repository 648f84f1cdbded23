"""The log of engine kernels: JSON lines, append-only, one per candidate, task and batch.

    {"v": "engine-1", "engine": "vllm", "kernel": "shrink", "workload": "sgmv/...", "slots": 64,
     "add_inputs": true, "chunk": 0, "scenario": "T32/uniform/6", "options": {"block_m": 32, ...},
     "i": [["SP", 0, 0, null, [32], 1], ...], "r": [[seconds, ...], error_no, accuracy, time],
     "message": "", "device": "NVIDIA H200", "versions": {"triton": "3.6.0", "vllm": "0.24.0"}}

"i" is the trace as in Dop's tuning log, "options" the same under the engine's names. Reading a
line executes nothing; lines of other kinds and a truncated last line are skipped and counted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dop.engine_kernels.task import EngineTask
from dop.errors import ConfigError, DopError, Failure, LogError
from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.space.trace import Trace

VERSION = "engine-1"


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One line: a candidate of a task under a batch."""

    task: EngineTask
    scenario: Scenario
    options: Mapping[str, int]
    trace: Trace
    measurement: Measurement
    device: str
    versions: Mapping[str, str] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def to_line(self) -> str:
        """The line, without its end."""
        found = self.measurement
        result = [list(found.seconds), int(found.failure), found.accuracy, round(self.time, 1)]
        return json.dumps(
            {
                "v": VERSION,
                **self.task.to_json(),
                "scenario": self.scenario.key,
                "options": dict(self.options),
                "i": self.trace.to_json(),
                "r": result,
                "message": found.message,
                "device": self.device,
                "versions": dict(self.versions),
            },
            separators=(",", ":"),
        )

    @staticmethod
    def from_line(line: str) -> EngineRecord:
        """Record of a line.

        Raises:
            LogError: it is not such a line.
        """
        try:
            data = json.loads(line)
            if not isinstance(data, dict) or data.get("v") != VERSION:
                raise LogError(f"not a line of version {VERSION}.")
            seconds, error, accuracy, when = data["r"]
            message = str(data["message"])
            measured = Measurement(
                tuple(float(s) for s in seconds), Failure(error), message, _number(accuracy)
            )
            return EngineRecord(
                EngineTask.from_json(data),
                Scenario.parse(str(data["scenario"])),
                {str(k): _whole(v) for k, v in data["options"].items()},
                Trace.from_json(data["i"]),
                measured,
                str(data["device"]),
                {str(k): str(v) for k, v in data.get("versions", {}).items()},
                float(when),
            )
        except LogError:
            raise
        except (DopError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise LogError(f"not a record of an engine's kernel: {error}.") from error


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def append(path: Path, records: Iterable[EngineRecord]) -> None:
    """Append records; each line is whole or absent.

    Raises:
        LogError: the file cannot be written.
    """
    text = "".join(record.to_line() + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                file.write(b"\n")  # a line that was cut short stays alone
            file.write(text.encode())
    except OSError as error:
        raise LogError(
            f"{path}: {error.strerror}.", "Check the path and the free space."
        ) from error


def read(path: Path) -> tuple[list[EngineRecord], int]:
    """Records of a log, and the number of lines that are none.

    Raises:
        LogError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}.", "Give a log of `dop engine tune`.") from error
    records, skipped = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            records.append(EngineRecord.from_line(line))
        except LogError:
            skipped += 1
    return records, skipped


Options = tuple[tuple[str, int], ...]


def best(records: Iterable[EngineRecord], tokens: int) -> dict[str, int] | None:
    """The options with the least geometric mean time over a task's batches of so many tokens.

    Only options that were right under every such batch count. None if there are none.
    """
    times: dict[Options, dict[str, float]] = {}
    batches: set[str] = set()
    failed: set[Options] = set()
    for record in records:
        if record.scenario.tokens != tokens:
            continue
        options: Options = tuple(sorted(record.options.items()))
        batches.add(record.scenario.key)
        if record.measurement.ok:
            times.setdefault(options, {})[record.scenario.key] = record.measurement.median_s
        else:
            failed.add(options)
    whole: dict[Options, float] = {
        options: sum(map(math.log, found.values())) / len(found)
        for options, found in times.items()
        if options not in failed and found.keys() == batches
    }
    if not whole:
        return None
    chosen: Options = min(whole, key=lambda options: (whole[options], options))
    return dict(chosen)


def one_device(
    records: Iterable[EngineRecord], wanted: str | None
) -> tuple[list[EngineRecord], str]:
    """The records of one device, and its name.

    Raises:
        ConfigError: there is none, or there are several and none was named.
    """
    records = list(records)
    devices = sorted({record.device for record in records})
    if wanted is not None:
        devices = [d for d in devices if d == wanted]
    if len(devices) != 1:
        raise ConfigError(
            f"records of {len(devices)} devices ({', '.join(devices)})"
            if devices
            else "no record.",
            "Name one with --device." if devices else "Tune first, or name another device.",
        )
    return [r for r in records if r.device == devices[0]], devices[0]
