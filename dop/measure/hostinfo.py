"""This machine as a Target: what the CPU and the GPU are, without torch or TVM.

The CPU comes from /proc/cpuinfo and /sys, the GPU from the driver library through ctypes.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from dop.errors import ConfigError
from dop.target import Target

CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

_FEATURES: Mapping[str, str] = {
    "sse4_2": "sse4.2",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi1": "bmi",
    "bmi2": "bmi2",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "avx_vnni": "avxvnni",
}
"""Flag in /proc/cpuinfo -> LLVM's feature, for those that matter to vector code."""

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"})
_LEVELS = (
    ("x86-64-v4", _AVX512 | _AVX2),
    ("x86-64-v3", _AVX2),
    ("x86-64-v2", frozenset({"sse4_2", "ssse3", "popcnt"})),
    ("x86-64", frozenset[str]()),
)
_INTEL: Mapping[int, str] = {
    **dict.fromkeys((0x3C, 0x3F, 0x45, 0x46), "haswell"),
    **dict.fromkeys((0x3D, 0x47, 0x4F, 0x56), "broadwell"),
    **dict.fromkeys((0x4E, 0x5E, 0x8E, 0x9E, 0xA5, 0xA6), "skylake"),
    0x55: "skylake-avx512",
    **dict.fromkeys((0x6A, 0x6C), "icelake-server"),
    **dict.fromkeys((0x7D, 0x7E), "icelake-client"),
    **dict.fromkeys((0x8C, 0x8D), "tigerlake"),
    **dict.fromkeys((0x97, 0x9A), "alderlake"),
    **dict.fromkeys((0xB7, 0xBA, 0xBF), "raptorlake"),
    0x8F: "sapphirerapids",
    0xCF: "emeraldrapids",
    0xAD: "graniterapids",
}
"""Model number of Intel's family 6 -> LLVM's name. Source: LLVM's Host.cpp."""

_WITH_AVX512 = frozenset(
    {
        *("skylake-avx512", "cascadelake", "cooperlake", "icelake-server", "icelake-client"),
        *("tigerlake", "sapphirerapids", "emeraldrapids", "graniterapids", "znver4", "znver5"),
    }
)
_ARM: Mapping[str, str] = {
    "0xd0c": "neoverse-n1",
    "0xd40": "neoverse-v1",
    "0xd49": "neoverse-n2",
    "0xd4f": "neoverse-v2",
}
"""CPU part -> LLVM's name."""


def find_target(device: str | None = None, *, threads: int | None = None) -> Target:
    """Target of "cuda" or "cpu"; if None, the GPU where there is one, else the CPU.

    Raises:
        ConfigError: the device is unknown, or CUDA is asked for and has no device.
    """
    if device not in (None, "cuda", "cpu"):
        raise ConfigError(f"device {device!r} is unknown.", "Use cuda or cpu.")
    if device != "cpu":
        found = cuda_target()
        if found is not None:
            return found
        if device == "cuda":
            raise ConfigError(
                "this machine has no usable CUDA device.",
                "Check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu.",
            )
    return cpu_target(threads)


def cpu_target(threads: int | None = None) -> Target:
    """This CPU, used with `threads` threads (default: as many as this process may use)."""
    info = cpu_info()
    arch, features = cpu_arch(info, platform.machine())
    flags = _flags(info)
    width = 64 if "avx512f" in flags else 32 if "avx" in flags else 16
    registers = 32 if width == 64 or platform.machine() in ("aarch64", "arm64") else 16
    return Target(
        kind="cpu",
        arch=arch,
        device_name=cpu_name(),
        units=threads or usable_cores(),
        max_threads=1,
        max_smem_bytes=0,
        max_registers=registers,
        l2_bytes=max(cache_bytes().values(), default=1 << 20),
        vector_bytes=width,
        features=features,
    )


def cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, key by key; empty where there is none."""
    try:
        text = CPUINFO.read_text(errors="replace")
    except OSError:
        return {}
    return parse_cpuinfo(text)


def parse_cpuinfo(text: str) -> dict[str, str]:
    """Keys and values of the first processor in the text of /proc/cpuinfo."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip() and found:
            break
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def cpu_name() -> str:
    """Model of the CPU as the operating system reports it."""
    info = cpu_info()
    name = info.get("model name") or info.get("Model") or platform.processor()
    return " ".join((name or platform.machine() or "unknown CPU").split())


def cpu_arch(info: Mapping[str, str], machine: str) -> tuple[str, str]:
    """LLVM's name of the CPU, and its feature string ("+avx2,+fma").

    A virtual machine may hide features that the model's name implies; then the name is one of
    the generic levels (x86-64-v3), so that no instruction is generated that would trap.
    """
    if machine in ("aarch64", "arm64"):
        return _ARM.get(info.get("CPU part", ""), "generic"), ""
    if machine not in ("x86_64", "AMD64"):
        return "generic", ""
    flags = _flags(info)
    features = ",".join(f"+{llvm}" for flag, llvm in _FEATURES.items() if flag in flags)
    name = _x86_name(info)
    implied = _AVX2 | (_AVX512 if name in _WITH_AVX512 else frozenset())
    if name is None or not implied <= flags:
        name = next(level for level, needs in _LEVELS if needs <= flags)
    return name, features


def _x86_name(info: Mapping[str, str]) -> str | None:
    """LLVM's name of a known Intel or AMD model. Source: LLVM's Host.cpp."""
    try:
        keys = ("cpu family", "model", "stepping")
        family, model, stepping = (int(info.get(key, "0")) for key in keys)
    except ValueError:
        return None
    if info.get("vendor_id") == "GenuineIntel" and family == 6:
        if model == 0x55 and stepping >= 5:
            return "cooperlake" if stepping >= 10 else "cascadelake"
        return _INTEL.get(model)
    if info.get("vendor_id") == "AuthenticAMD":
        if family == 0x17:
            return "znver2" if model >= 0x30 else "znver1"
        if family == 0x19:
            zen4 = 0x10 <= model <= 0x1F or 0x60 <= model <= 0x7F or 0xA0 <= model <= 0xAF
            return "znver4" if zen4 else "znver3"
        if family == 0x1A:
            return "znver5"
    return None


def _flags(info: Mapping[str, str]) -> frozenset[str]:
    return frozenset(info.get("flags", info.get("Features", "")).split())


def usable_cores() -> int:
    """Cores this process may run on: its affinity, less where a container has a quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        cores = min(cores, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError, ZeroDivisionError):
        pass  # no cgroup, or the quota is "max"
    return max(1, cores)


def cache_bytes() -> dict[int, int]:
    """Cache level -> bytes of the data cache that core 0 sees; empty where unknown."""
    found: dict[int, int] = {}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        for index in sorted(_CACHES.glob("index*")):
            if (index / "type").read_text().strip() == "Instruction":
                continue
            size = (index / "size").read_text().strip()
            scale = units.get(size[-1:], 1)
            number = size[:-1] if size[-1:] in units else size
            found[int((index / "level").read_text())] = int(number) * scale
    except (OSError, ValueError):
        pass
    return found


# Attribute numbers of CUdevice_attribute in cuda.h; they never change.
_MAX_THREADS, _REGISTERS, _UNITS, _L2, _MAJOR, _MINOR, _SMEM_OPTIN = 1, 12, 16, 38, 75, 76, 97


def cuda_target(index: int = 0) -> Target | None:
    """GPU number `index` as the driver reports it; None without a driver or a device.

    Calls cuInit, which makes CUDA unusable in children made by fork: start workers by spawn.
    """
    library = _driver()
    if library is None:
        return None
    device = ctypes.c_int()
    if library.cuDeviceGet(ctypes.byref(device), index) != 0:
        return None

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        return (
            value.value
            if not library.cuDeviceGetAttribute(ctypes.byref(value), number, device)
            else 0
        )

    name = ctypes.create_string_buffer(256)
    library.cuDeviceGetName(name, len(name), device)
    major, minor = attribute(_MAJOR), attribute(_MINOR)
    return Target(
        kind="cuda",
        arch=cuda_arch(major, minor),
        device_name=name.value.decode(errors="replace"),
        units=attribute(_UNITS),
        max_threads=attribute(_MAX_THREADS),
        max_smem_bytes=attribute(_SMEM_OPTIN),
        max_registers=attribute(_REGISTERS),
        l2_bytes=attribute(_L2),
        vector_bytes=16,
    )


def cuda_arch(major: int, minor: int) -> str:
    """Architecture for nvcc; from Hopper on with the "a" that its own instructions need."""
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def driver_version() -> str:
    """The CUDA version that the driver supports ("13.0"), or "" without a driver."""
    library = _driver()
    version = ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _driver() -> ctypes.CDLL | None:
    """The driver library, initialised; None if there is none or it has no device."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        return library if library.cuInit(0) == 0 else None
    except (OSError, AttributeError):
        return None
