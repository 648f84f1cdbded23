"""Where kernels come from, and which one serves a batch.

Sources in order; the first that knows the call's shapes, and runs on its GPU, decides:

1. packs and libraries in the folders of DOP_PACK_PATH,
2. packs that are installed with Dop (dop/packs/<device>/),
3. NVRTC: kernels built from the generated CUDA that a pack of another GPU carries,
4. the generic kernels: every shape, rank and GPU from sm_80 on.

The choice depends on shapes, tokens and the hint `adapters` only, never on what is on the device:
a CUDA graph that was captured with it is right for every later batch of that size.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from dop import packs
from dop.errors import ConfigError, DopError, MissingKernelError
from dop.export.index import KernelInfo
from dop.export.load import CudaLibrary
from dop.measure import tensor_map
from dop.ops import launch
from dop.ops.launch import DeviceKernel
from dop.ops.plan import TILE_SIZES
from dop.ops.shapes import Shape, device_name
from dop.ops.switches import JIT
from dop.workload import BESIDE


@dataclass(frozen=True)
class Choice:
    """What serves a batch, and why.

    Attributes:
        workload_key: the call's shapes.
        device: e.g. "cuda:0 (NVIDIA H100)".
        tokens, adapters: the batch; adapters None if not known.
        kernel: the choice; None for torch's own operators on the CPU.
        reason: one line.
        passed_over: sources that were asked before, and why they did not serve.
    """

    workload_key: str
    device: str
    tokens: int
    adapters: int | None
    kernel: DeviceKernel | None
    reason: str
    passed_over: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return "torch" if self.kernel is None else self.kernel.name

    @property
    def origin(self) -> str:
        """Where the kernel comes from."""
        return "torch" if self.kernel is None else self.kernel.origin

    def __str__(self) -> str:
        hint = "an unknown number of" if self.adapters is None else str(self.adapters)
        lines = [
            f"{self.workload_key}, {self.tokens} tokens, {hint} adapters, {self.device}:",
            f"  {self.name} from {self.origin}: {self.reason}",
            *(f"  passed over: {line}" for line in self.passed_over),
        ]
        return "\n".join(lines)


@dataclass
class Search:
    """A search for a kernel: what is wanted, and why sources could not give it.

    Attributes:
        beside: the call is made in two pieces, see beside.py.
    """

    shape: Shape
    tokens: int
    slots: int
    adapters: int | None
    beside: bool = False
    misses: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """As `Workload.key` writes it."""
        return self.shape.key + BESIDE if self.beside else self.shape.key

    def matches(self) -> tuple[tuple[str, packs.Match], ...]:
        """Packs that hold the call, best first, each with the key of its table."""
        return packs.find_call(*gpu(self.shape.device), self.key)


Source = Callable[[Search], "DeviceKernel | None"]

_CHOICES: dict[Any, Choice] = {}
_LOCK = threading.Lock()
_CHOICE_LIMIT = 65536


def choose(
    shape: Shape, tokens: int, slots: int, adapters: int | None, beside: bool = False
) -> Choice:
    """The choice for a call on a GPU, made in two pieces if `beside`; remembered.

    Raises:
        MissingKernelError: no source has a kernel.
    """
    key = (shape, tokens, slots, adapters, beside, bool(JIT))
    found = _CHOICES.get(key)
    if found is None:
        with _LOCK:
            if len(_CHOICES) >= _CHOICE_LIMIT:
                _CHOICES.clear()
            found = _CHOICES[key] = _search(Search(shape, tokens, slots, adapters, beside))
    return found


def _search(search: Search) -> Choice:
    for source in SOURCES:
        kernel = source(search)
        if kernel is not None:
            return Choice(
                search.key,
                f"{device_name(search.shape.device)} ({gpu(search.shape.device)[0]})",
                search.tokens,
                search.adapters,
                kernel,
                kernel.reason,
                tuple(search.misses),
            )
    raise missing(search)


def missing(search: Search, why: str = "") -> MissingKernelError:
    """The error that names the shape, the device and what was searched."""
    device = search.shape.device
    folders = ", ".join(str(folder) for folder in packs.folders())
    reasons = "; ".join([*search.misses, *([why] if why else [])])
    return MissingKernelError(
        f"no ready kernel for {search.key} on {device_name(device)} "
        f"({', '.join(gpu(device))}), {search.tokens} tokens; folders searched: {folders}; "
        f"{reasons}.",
        "Install a pack for this GPU or set DOP_PACK_PATH"
        + ("." if JIT else ", or allow building kernels (DOP_JIT=1)."),
    )


@cache
def gpu(device: int) -> tuple[str, str]:
    """Name and architecture of a GPU, e.g. ("NVIDIA H100", "sm_90")."""
    facts = torch.cuda.get_device_properties(device)
    return str(facts.name), f"sm_{facts.major}{facts.minor}"


def from_packs(search: Search) -> DeviceKernel | None:
    """Sources 1 and 2."""
    for key, match in search.matches():
        if match.how == packs.Match.SOURCE:
            arch = gpu(search.shape.device)[1]
            search.misses.append(f"{match.entry.path} has no binaries for {arch}")
            continue
        library = match.library()
        info = library.choose(key, search.tokens, search.adapters, search.slots)
        if info.tile_rows and info.tile_rows not in TILE_SIZES:
            search.misses.append(
                f"{info.name} of {library.path} wants tiles of {info.tile_rows} rows"
            )
            continue
        kernel = pack_kernel(library, info, search, match.note)
        if kernel.maps and launch.driver().encode is None:
            search.misses.append(f"{info.name} of {library.path} {tensor_map.NO_ENCODER}")
            continue
        if kernel.maps and not launch.has_room(kernel, search.shape.device):
            search.misses.append(
                f"{info.name} of {library.path} wants larger clusters than this GPU has room for"
            )
            continue
        return kernel
    if not search.misses:
        folders = ", ".join(str(folder) for folder in packs.folders())
        search.misses.append(f"no pack with this shape in {folders}")
    return None


_KERNELS: dict[Any, DeviceKernel] = {}


def pack_kernel(
    library: CudaLibrary, info: KernelInfo, search: Search, note: str = ""
) -> DeviceKernel:
    """A pack's kernel as launching wants it; one object per kernel, so that it is loaded once."""
    key = (library.path, info.name)
    if key not in _KERNELS:
        hint = search.adapters
        batch = "unknown segments" if hint is None else f"{search.tokens / hint:g} rows a segment"
        _KERNELS[key] = DeviceKernel(
            info.name,
            str(library.path),
            f"tuned on {library.table.device_name}: the table's choice for {search.tokens} tokens "
            f"with {batch} ({info.sketch or info.trace_key})" + (note and f"; {note}"),
            info.tile_rows,
            info.launches,
            info.workspaces,
            lambda: library.binary(info),
            beside=info.workload.beside,
        )
    return _KERNELS[key]


def from_nvrtc(search: Search) -> DeviceKernel | None:
    """Source 3: dop.ops.nvrtc.kernel(search) -> DeviceKernel or None.

    Raises:
        MissingKernelError: a kernel could be built, but that is forbidden.
    """
    carriers = [match for _, match in search.matches() if match.how == packs.Match.SOURCE]
    if not carriers:
        return None
    if not JIT:
        raise missing(search, f"it would be built from {carriers[0].entry.path} by NVRTC")
    build = optional("dop.ops.nvrtc", "kernel")
    if build is None:
        search.misses.append("NVRTC is not available")
        return None
    try:
        found: DeviceKernel | None = build(search)
    except DopError as error:
        search.misses.append(f"NVRTC: {error}")
        return None
    return found


def from_generic(search: Search) -> DeviceKernel | None:
    """Source 4: dop.ops.generic.kernel(search) -> DeviceKernel or None."""
    build = optional("dop.ops.generic", "kernel")
    if build is None:
        search.misses.append("this installation has no generic kernels")
        return None
    found: DeviceKernel | None = build(search)
    return None if found is None else shared_image(found)


def shared_image(kernel: DeviceKernel) -> DeviceKernel:
    """A generic kernel, marked as one of a binary that all of them share: it is read once."""
    return replace(kernel, image_key="generic")


@cache
def optional(module: str, name: str) -> Any:
    """Something of a module that an installation may lack; None if it does."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


SOURCES: list[Source] = [from_packs, from_nvrtc, from_generic]


def forget() -> None:
    """Forgets choices and opened packs, for instance after DOP_PACK_PATH changed."""
    with _LOCK:
        _CHOICES.clear()
        packs.refresh()


def parse_device(device: Any) -> int:
    """Index of a CUDA device, -1 for the CPU.

    Raises:
        ConfigError: it is another kind of device.
    """
    if isinstance(device, int):
        return device
    where = torch.device(device)
    if where.type == "cpu":
        return -1
    if where.type != "cuda":
        raise ConfigError(f"device {where} is not supported.", "Use cuda or cpu.")
    return torch.cuda.current_device() if where.index is None else where.index
