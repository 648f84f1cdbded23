"""Where an export comes from: log, device, versions, dates. The same log gives the same text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from dop.database.wire import Entry
from dop.errors import ExportError


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin of an export.

    Attributes:
        log_name: file name of the log.
        log_sha256: of its bytes.
        records: usable lines of the device.
        device_name: where it was measured.
        target_key: `Target.key` of it.
        versions: of every tool, as the records name them; several are joined by " / ".
        newest: date of the newest record, UTC.
    """

    log_name: str
    log_sha256: str
    records: int
    device_name: str
    target_key: str
    versions: Mapping[str, str]
    newest: str

    def to_json(self) -> dict[str, object]:
        """Plain data for an index."""
        return {
            "log": self.log_name,
            "log_sha256": self.log_sha256,
            "records": self.records,
            "device": self.device_name,
            "target": self.target_key,
            "versions": dict(self.versions),
            "newest_record": self.newest,
        }

    def lines(self) -> list[str]:
        """The same for a comment in C."""
        versions = ", ".join(f"{tool} {version}" for tool, version in self.versions.items())
        lines = [
            f"log       {self.log_name}, sha256 {self.log_sha256}",
            f"device    {self.device_name} ({self.target_key}), {self.records} records",
            f"newest    {self.newest}",
            f"versions  {versions or 'not recorded'}",
        ]
        return [in_comment(line) for line in lines]


def in_comment(text: str) -> str:
    """Text of a log as it may stand in a comment: it cannot end the comment or its line."""
    kept = "".join(c if c.isprintable() and c != "\\" else " " for c in text)
    return kept.replace("*/", "* /").replace("/*", "/ *")


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes.

    Raises:
        ExportError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    return digest.hexdigest()


def provenance_of(log: Path, entries: Iterable[Entry]) -> Provenance:
    """Provenance of an export from these entries, all of one device and target."""
    mine = list(entries)
    versions: dict[str, dict[str, None]] = {}
    for seen in {id(e.versions): e.versions for e in mine}.values():
        for tool, version in seen.items():
            versions.setdefault(tool, {})[version] = None
    return Provenance(
        log.name,
        sha256_of(log),
        len(mine),
        mine[0].device_name,
        mine[0].target_key,
        {tool: " / ".join(seen) for tool, seen in sorted(versions.items())},
        _date(max(e.timestamp for e in mine)),
    )


def _date(timestamp: int) -> str:
    try:
        moment = datetime.fromtimestamp(timestamp, timezone.utc)
    except (ValueError, OverflowError, OSError):  # a log may hold any number
        return f"{timestamp} s after 1970"
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
