"""What runs here: versions, CPU, GPUs. Run `python -m dop.collect_env` for a bug report.

Standard library only, and every probe is guarded: this must work where nothing else does.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")

_PACKAGES = {
    "dop": ("dop", "dop"),
    "torch": ("torch", "torch"),
    "tvm": ("apache-tvm", "tvm"),
    "tvm-ffi": ("apache-tvm-ffi", "tvm_ffi"),
    "lightgbm": ("lightgbm", "lightgbm"),
    "numpy": ("numpy", "numpy"),
}
"""Name in records -> names of the distribution and of its module."""

_ASK_MODULES = """
import importlib, json, sys
path, names = json.loads(sys.argv[1])
sys.path[:] = path
found = {}
for name, module in names.items():
    try:
        found[name] = str(importlib.import_module(module).__version__)
    except Exception:
        pass
print("\\n" + json.dumps(found))
"""
"""Prints the versions that modules themselves give."""


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = {"python": platform.python_version()}
    bare: dict[str, str] = {}
    for name, (package, module) in _PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except Exception:  # not installed, unpacked by hand, or metadata that is damaged
            if _guard(functools.partial(importlib.util.find_spec, module)):
                bare[name] = module
    found |= _module_versions(bare)
    for name, probe in (("nvcc", nvcc_version), ("driver", gpu_driver_version)):
        if value := _guard(probe):
            found[name] = value
    return tuple(found.items())


def _module_versions(modules: dict[str, str]) -> dict[str, str]:
    """Versions that modules without metadata give, by name. Those that are not imported yet are
    asked in a child, so that nothing heavy comes into this process."""
    found = {}
    for name, module in modules.items():
        if version := getattr(sys.modules.get(module), "__version__", None):
            found[name] = str(version)
    absent = {name: module for name, module in modules.items() if name not in found}
    if absent:
        answer = _output(
            sys.executable, "-c", _ASK_MODULES, json.dumps([sys.path, absent]), limit_s=60
        )
        found |= _guard(lambda: json.loads(answer.splitlines()[-1])) or {}
    return found


def versions() -> dict[str, str]:
    """Versions by name (dop, python, torch, tvm, tvm-ffi, lightgbm, numpy, nvcc, driver).

    From the packages' metadata, else what the module says. What is not there is left out. Nothing
    heavy is imported; cached for the process.
    """
    return dict(_versions())


@functools.cache
def revision() -> str:
    """Git revision of the checkout that this package runs from, "" if it is none.

    Ends in "-dirty" if tracked files of the package differ from that revision.
    """
    package = Path(__file__).resolve().parent
    top = _output("git", "-C", str(package), "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() / "dop" != package:
        return ""  # installed inside of somebody else's repository
    head = _output("git", "-C", top, "rev-parse", "--short=12", "HEAD")
    status = ("status", "--porcelain", "--untracked-files=no", "--", "dop")
    changed = _output("git", "--no-optional-locks", "-C", top, *status)
    return head + ("-dirty" if head and changed else "")


def nvcc_version() -> str:
    """Version of nvcc ("13.0.88"), "" without one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    match = re.search(r"\bV(\d[\d.]*)", _output(nvcc, "--version")) if nvcc else None
    return match[1] if match else ""


def gpu_driver_version() -> str:
    """Version of NVIDIA's kernel driver, "" without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    match = re.search(r"\b(\d{3}\.[\d.]+)\b", text)
    return match[1] if match else ""


def gpus() -> list[str]:
    """Name, memory and driver of each GPU, as nvidia-smi says; empty without one."""
    query = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return _output("nvidia-smi", *query).splitlines()


def collect() -> dict[str, object]:
    """Everything worth knowing about this environment, ready for JSON."""
    return {
        "versions": _guard(versions) or {},
        "revision": _guard(revision) or "",
        "platform": _guard(platform.platform) or "",
        "cpu": _guard(_cpu) or {},
        "cuda": _guard(_cuda) or "",
        "gpus": _guard(gpus) or [],
        "environment": {
            name: os.environ[name]
            for name in ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "OMP_NUM_THREADS")
            if name in os.environ
        },
    }


def lines(found: dict[str, object]) -> list[str]:
    """The result of `collect` as aligned lines of text."""
    rows: list[tuple[str, object]] = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows += [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            rows += [(f"{name}[{i}]", item) for i, item in enumerate(value)] or [(name, "none")]
        else:
            rows.append((name, value or "none"))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _cpu() -> dict[str, object]:
    from dop.measure import hostinfo

    target = hostinfo.cpu_target()
    caches = {f"l{level}_bytes": size for level, size in hostinfo.cache_bytes().items()}
    return {
        "model": target.device_name,
        "llvm": target.arch,
        "features": target.features,
        "threads": target.units,
        **caches,
    }


def _cuda() -> str:
    """CUDA version of the driver; asked in a child, so that this process stays as it was."""
    code = "from dop.measure.hostinfo import driver_version as v; print(v())"
    return _output(sys.executable, "-c", code)


def _guard(probe: Callable[[], _T]) -> _T | None:
    """What a probe says; None if it fails, whatever the reason."""
    try:
        return probe()
    except Exception:
        return None


def _output(*command: str, limit_s: float = 10) -> str:
    """Standard output of a command, "" if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main() -> None:
    """Print the environment; as JSON with --json."""
    found = collect()
    print(json.dumps(found, indent=2) if "--json" in sys.argv[1:] else "\n".join(lines(found)))


if __name__ == "__main__":
    main()
