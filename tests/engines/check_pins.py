"""Whether Dop installs beside the serving engines without moving what they pin.

    python tests/engines/check_pins.py --python python3.12 -o tests/engines/pins.json

Builds Dop's wheel, then lets pip resolve each engine alone and beside Dop in an empty virtual
environment: `pip install --dry-run --report`, which installs nothing and reads the packages'
metadata by range requests (an index without them would have pip download gigabytes: stop it then).
The two sets of pins must be equal but for Dop. Needs a package index; a few minutes per engine.

    --stand-in certifi==2026.10.19

gives pip an empty package of that name and version, for what an index does not hold (yet); both
resolutions of every engine get it, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENGINES = ("vllm==0.24.0", "vllm==0.33.0", "sglang==0.5.23")
PIP = "pip>=26"
"""The oldest whose dry run downloads no wheel that it read lazily."""

Report = dict[str, Any]


def run(*command: str | Path, limit_s: int = 1200) -> None:
    """Runs a command; its output is shown only if it fails.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:6]))} ... failed:\n{done.stdout}\n{done.stderr}")


def fresh_pip(folder: Path, python: str) -> Path:
    """pip of a new virtual environment."""
    run(python, "-m", "venv", folder / "venv")
    pip = folder / "venv" / "bin" / "pip"
    run(folder / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", PIP)
    return pip


def build_wheel(folder: Path, pip: Path) -> Path:
    """Dop's wheel, built from the committed files."""
    archive, source = folder / "dop.tar", folder / "source"
    run("git", "-C", ROOT, "archive", "-o", archive, "HEAD")
    source.mkdir()
    run("tar", "-xf", archive, "-C", source)
    run(pip, "wheel", "--no-deps", "-w", folder, source)
    return next(folder.glob("dop-*.whl"))


def stand_in(folder: Path, requirement: str) -> None:
    """Puts an empty wheel into the folder."""
    name, _, version = requirement.partition("==")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")


def resolve(folder: Path, pip: Path, *requirements: str) -> Report:
    """pip's report on what it would install."""
    report = folder / "report.json"
    options = ("--dry-run", "--ignore-installed", "--no-cache-dir", "--use-feature=fast-deps")
    places = ("--find-links", folder / "stand-ins", "--report", report)
    run(pip, "install", *options, *places, *requirements)
    found: Report = json.loads(report.read_text())
    return found


def pins(report: Report) -> dict[str, str]:
    """Version of each package that would be installed, by normalised name."""
    facts = [item["metadata"] for item in report["install"]]
    return {normal(fact["name"]): fact["version"] for fact in facts}


def normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def one_of(chosen: dict[str, str], requirement: str) -> str:
    """What was chosen of the package that a requirement names, in the same form."""
    name = requirement.partition("==")[0]
    return f"{name}=={chosen.get(normal(name))}"


def requirements(report: Report, package: str) -> list[str]:
    """What a package requires without any extra."""
    for item in report["install"]:
        if normal(item["metadata"]["name"]) == package:
            lines = item["metadata"].get("requires_dist", [])
            return [line for line in lines if "extra ==" not in line]
    return []


def exact(report: Report, package: str) -> dict[str, str]:
    """Resolved versions of what a package pins with `==`."""
    chosen = pins(report)
    found = {}
    for line in requirements(report, package):
        match = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*\(?==", line)
        if match and normal(match[1]) in chosen:
            found[normal(match[1])] = chosen[normal(match[1])]
    return dict(sorted(found.items()))


def compare(alone: Report, beside: Report, engine: str) -> dict[str, object]:
    """The two resolutions of an engine, without and with Dop."""
    before, after = pins(alone), pins(beside)
    moved = {
        name: [before[name], after[name]]
        for name in before.keys() & after.keys()
        if before[name] != after[name]
    }
    return {
        "engine": engine,
        "packages_alone": len(before),
        "packages_beside_dop": len(after),
        "added": {name: after[name] for name in sorted(after.keys() - before.keys())},
        "removed": sorted(before.keys() - after.keys()),
        "moved": moved,
        "pinned_by_the_engine": exact(beside, normal(engine.partition("==")[0])),
        "python": beside["environment"]["python_full_version"],
        "pip": beside["pip_version"],
    }


def is_kept(row: dict[str, Any]) -> bool:
    """Whether nothing changed but that Dop is there."""
    return list(row["added"]) == ["dop"] and not row["removed"] and not row["moved"]


def main() -> int:
    """Resolves, compares, writes; exit code 1 if a pin moved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--stand-in", action="append", default=[], metavar="NAME==VERSION")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = []
    requires: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = fresh_pip(folder, options.python)
        wheel = build_wheel(folder, pip)
        (folder / "stand-ins").mkdir()
        for requirement in options.stand_in:
            stand_in(folder / "stand-ins", requirement)
        for engine in options.engines.split(","):
            alone = resolve(folder, pip, engine)
            beside = resolve(folder, pip, engine, str(wheel))
            requires = requirements(beside, "dop")
            row = compare(alone, beside, engine)
            chosen = pins(beside)
            used = [each for each in options.stand_in if each == one_of(chosen, each)]
            rows.append(row | {"stand_ins": used})
            print(f"{engine}: {'pins kept' if is_kept(rows[-1]) else 'PINS MOVED'}")
            print(json.dumps(rows[-1], indent=2), flush=True)
    document = {"date": date.today().isoformat(), "dop_requires": requires, "engines": rows}
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(map(is_kept, rows)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
