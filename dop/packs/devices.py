"""Which architecture a GPU has, by name, and which GPU is meant if none is named."""

from __future__ import annotations

import re

from dop.errors import ConfigError
from dop.packs import known_packs

_ARCHES = (
    (r"\b(H100|H200|H800|H20|GH200)\b", "sm_90"),
    (r"\b(B100|B200|GB200)\b", "sm_100"),
    (r"\b(B300|GB300)\b", "sm_103"),
    (r"\b(A100|A800|A30)\b", "sm_80"),
    (r"\b(A10G?|A16|A40|A2|RTX A\d{4}|RTX 30\d\d)\b", "sm_86"),
    (r"\b(L4|L20|L40S?|RTX 40\d\d)\b", "sm_89"),
    (r"\b(RTX 50\d\d|RTX PRO \d{4})\b", "sm_120"),
    (r"\b(V100)\b", "sm_70"),
    (r"\b(T4|RTX 20\d\d)\b", "sm_75"),
)
"""Source: NVIDIA, CUDA GPU compute capability."""


def arch_of(device_name: str) -> str:
    """Architecture of a GPU by its name.

    Raises:
        ConfigError: the name is unknown.
    """
    for entry in known_packs():
        if entry.device_name == device_name:
            return entry.arch.rstrip("af")
    for pattern, arch in _ARCHES:
        if re.search(pattern, device_name, re.IGNORECASE):
            return arch
    raise ConfigError(
        f"the architecture of {device_name!r} is not known.", "Give it: --arch sm_90."
    )


def device_of(name: str | None, arch: str | None) -> tuple[str, str, str]:
    """Device name, architecture, and a note on where they come from.

    Args:
        name: as given; None: the GPU of this machine, else the one that most packs were tuned on.
        arch: as given; None: by name.

    Raises:
        ConfigError: nothing is known about the name, or there is neither GPU nor pack.
    """
    if name is not None:
        return name, arch or arch_of(name), ""
    from dop.measure.hostinfo import cuda_target

    here = cuda_target()
    if here is not None:
        return here.device_name, arch or here.arch.rstrip("af"), ""
    names = [entry.device_name for entry in known_packs()]
    if not names:
        raise ConfigError("no GPU here and no pack to go by.", "Give --device-name.")
    most = max(names, key=names.count)
    note = f"no GPU here: {most} is assumed (--device-name says otherwise)"
    return most, arch or arch_of(most), note
