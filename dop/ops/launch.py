"""Launching kernels of a call with as little host work as possible.

A *block* is everything about the launches of one kernel choice that does not change from call to
call: grids, functions, workspaces and an argument area in which only addresses are rewritten. It
belongs to one thread and one stream, so two threads never share an area (see calls.py) or a
workspace.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dop.errors import ExportError, MissingKernelError
from dop.measure import cuda_driver, tensor_map
from dop.measure.artifact import Buffer, Launch, evaluate, is_pair
from dop.ops import calls, graphs
from dop.ops.calls import CONFIG, FIXED_WORDS, TABLE_WORDS, Call, MapPlace, Start, make_call
from dop.ops.plan import ROW_TABLES, TILE_TABLES, tile_count
from dop.ops.shapes import DTYPES, Shape

STACK_NAMES = ("a", "b", "a1_shift", "a2_shift", "b1_shift", "b2_shift")
TILE_ORDER = (*TILE_TABLES, "row_index")

ELEMENT_BYTES = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
SPACE_ALIGN = 256
DEFAULT_SMEM = 48 << 10
CAPTURE_RELAXED = 2


@dataclass(frozen=True, eq=False)
class DeviceKernel:
    """A kernel choice that can be loaded: one or more launches and a binary.

    Attributes:
        name: for people.
        origin: where it comes from: a pack's path, "nvrtc", "generic".
        reason: why it was chosen, one line.
        tile_rows: rows per tile of the tables it takes; 0 for the row form.
        launches: in order; arguments are x, y_in, y, a, b, shifts, tables, tokens, tiles, slots,
            workspaces, tensor maps and names of `constants`.
        workspaces: what the launches share.
        image: gives the cubin (or fatbin).
        constants: further int32 arguments by name, e.g. widths of a kernel for any shape.
        image_key: name of the binary if many kernels share it: it is then read once only.
        beside: it was tuned for calls in two pieces, see beside.py.
    """

    name: str
    origin: str
    reason: str
    tile_rows: int
    launches: tuple[Launch, ...]
    workspaces: tuple[Buffer, ...]
    image: Callable[[], bytes]
    constants: Mapping[str, int] = field(default_factory=dict)
    image_key: str = ""
    beside: bool = False

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of the tensor maps that its launches take, see tensor_map.py."""
        names = dict.fromkeys(name for one in self.launches for name in one.arguments)
        return tuple(name for name in names if tensor_map.parse(name))


class Block:
    """Launches of one kernel choice for one batch size, thread and stream.

    Attributes:
        kernel: what it launches.
        x_shape, y_shape, dtype: what fits.
        tile_rows: tables it wants.
        stream: CUstream; 0 for the default one.
        starts: the launches.
        call: does them.
        workspace: kept alive.
        overlaps: whether the GPU knows dependent launches.
        early: a kernel reads tables and weights before it waits, see settled.py.
    """

    __slots__ = ("_fixed", "_pieces", "_sizes", "call", "dtype", "early", "kernel", "overlaps",
                 "starts", "stream", "tile_rows", "workspace", "x_shape", "y_shape")  # fmt: skip

    def __init__(
        self,
        kernel: DeviceKernel,
        functions: Sequence[int],
        shape: Shape,
        batch: tuple[int, int],
        stream: int,
        workspace: Tensor | None,
    ) -> None:
        """
        Args:
            kernel: the choice.
            functions: CUfunction of each launch.
            shape: shapes of the call site.
            batch: tokens and slots of the plan.
            stream: CUstream.
            workspace: uint8, at least `workspace_bytes`; None if that is 0.
        """
        tokens, slots = batch
        self.stream, self.workspace = stream, workspace
        self.overlaps = has_dependent_launches(shape.device)
        self.kernel, self.tile_rows, self.dtype = kernel, kernel.tile_rows, shape.dtype
        self.x_shape = torch.Size((tokens, shape.in_features))
        self.y_shape = torch.Size((tokens, shape.total_out))
        tiles = tile_count(tokens, kernel.tile_rows, slots) if kernel.tile_rows else tokens
        numbers = {"tokens": tokens, "tiles": tiles, "slots": slots, **kernel.constants}
        base = 0 if workspace is None else workspace.data_ptr()
        spaces, _ = workspace_places(kernel, tokens, tiles)
        numbers |= {name: base + offset for name, offset in spaces.items()}
        places = argument_places(kernel.tile_rows, tuple(numbers))
        maps = map_places(kernel, shape, batch, places) if kernel.maps else {}
        self.starts = []
        for launch, function in zip(kernel.launches, functions, strict=True):
            grid = [evaluate(extent, tokens=tokens, tiles=tiles) for extent in launch.grid]
            if min(grid) > 0:
                self.starts.append(self._start(launch, function, grid, places, maps))
        self.early = any(start.early for start in self.starts)
        self._sizes = (tokens, shape.in_features, shape.total_out)
        self._fixed = (*numbers.values(), *[0] * (tensor_map.WORDS * len(maps)))
        self._pieces: dict[tuple[int, int], tuple[Call, Call]] = {}
        recorder = driver().recorder(shape.device) if tokens <= graphs.KEEP_TOKENS else b""
        self.call = self._make_call(stream, self.starts, recorder)

    @property
    def is_pair(self) -> bool:
        """Whether shrink and expand can be launched apart: see `artifact.is_pair`."""
        launches = self.kernel.launches
        return len(self.starts) == len(launches) and is_pair(launches)

    def pieces(self, first: int, last: int | None = None) -> tuple[Call, Call]:
        """All launches but the last, and the last one; plain ones: what they overlap with is not
        each other.

        Args:
            first, last: CUstream of each piece; the last one's is the block's own by default.
        """
        streams = (first, self.stream if last is None else last)
        found = self._pieces.get(streams)
        if found is None:
            plain = [replace(start, dependent=False, early=False) for start in self.starts]
            found = (
                self._make_call(streams[0], plain[:-1]),
                self._make_call(streams[1], plain[-1:]),
            )
            self._pieces[streams] = found
        return found

    def _make_call(self, stream: int, starts: Sequence[Start], recorder: bytes = b"") -> Call:
        return make_call(
            driver(), stream, self._fixed, starts, self.tile_rows, self._sizes, recorder
        )

    def _start(
        self,
        launch: Launch,
        function: int,
        grid: Sequence[int],
        places: Mapping[str, int],
        maps: Mapping[str, MapPlace],
    ) -> Start:
        mine = tuple(maps[name] for name in launch.arguments if name in maps)
        if mine:
            places = {**places, **{name: one.place for name, one in maps.items()}}
        unknown = [name for name in launch.arguments if name not in places]
        if unknown:
            raise ExportError(
                f"kernel {launch.name} of {self.kernel.origin} wants {', '.join(unknown)}, which "
                "nobody provides.",
                "Export it again with this version of Dop.",
            )
        figures = (*grid, *launch.block, launch.dynamic_smem_bytes)
        where = tuple(places[name] for name in launch.arguments)
        dependent, early = launch.dependent and self.overlaps, launch.early and self.overlaps
        return Start(function, figures, dependent, where, early, mine)


@lru_cache(maxsize=64)
def has_dependent_launches(device: int) -> bool:
    """Whether a GPU knows programmatic dependent launches: Hopper and newer do. A negative number
    stands for no GPU, where nothing is launched."""
    return device < 0 or torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache(maxsize=4096)
def argument_places(tile_rows: int, numbers: tuple[str, ...]) -> dict[str, int]:
    """Word of each argument in the area."""
    names = ["x", "y_in", "y", *STACK_NAMES]
    places = {name: i for i, name in enumerate(names)}
    tables = TILE_ORDER if tile_rows else ROW_TABLES
    places |= {name: TABLE_WORDS + i for i, name in enumerate(tables)}
    return places | {name: FIXED_WORDS + i for i, name in enumerate(numbers)}


def map_places(
    kernel: DeviceKernel, shape: Shape, batch: tuple[int, int], places: Mapping[str, int]
) -> dict[str, MapPlace]:
    """The tensor maps of a kernel, behind everything else in the area.

    Tables name the plan's slots only, so a map need not know those that the stacks have beyond.

    Args:
        kernel: the choice.
        shape: of the call site.
        batch: tokens and slots of the plan.
        places: word of each other argument.

    Raises:
        ExportError: the driver makes no maps, or there is no such map.
    """
    if driver().encode is None:
        raise tensor_map.no_encoder(f"kernel {kernel.name} of {kernel.origin}")
    tokens, slots = batch
    end, found = max(places.values()) + 1, {}
    for name in kernel.maps:
        what = tensor_map.tensor_map(
            name,
            dtype=DTYPES[shape.dtype],
            in_features=shape.in_features,
            out_features=shape.outs,
            rank=shape.rank,
            tokens=tokens,
            slots=slots,
        )
        base, shift = places[what.tensor[0]], places.get(f"{what.tensor}_shift", 0)
        found[name] = MapPlace(end, base, shift, what)
        end += tensor_map.WORDS
    return found


def workspace_places(kernel: DeviceKernel, tokens: int, tiles: int) -> tuple[dict[str, int], int]:
    """Offset of each workspace, and the bytes of all."""
    places, offset = {}, 0
    for space in kernel.workspaces:
        places[space.name] = offset
        size = evaluate(space.elements, tokens=tokens, tiles=tiles) * ELEMENT_BYTES[space.dtype]
        offset += -(-size // SPACE_ALIGN) * SPACE_ALIGN
    return places, offset


def workspace_bytes(kernel: DeviceKernel, tokens: int, slots: int) -> int:
    """Bytes of a call's workspaces."""
    tiles = tile_count(tokens, kernel.tile_rows, slots) if kernel.tile_rows else tokens
    return workspace_places(kernel, tokens, tiles)[1]


class Room:
    """The workspace of one thread on one stream. It grows; what was handed out stays valid, since
    blocks hold the tensor that they were given."""

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def at_least(self, size: int, device: torch.device) -> Tensor | None:
        """A uint8 tensor of that size or more; None for 0 bytes."""
        if size == 0:
            return None
        if self._held is None or self._held.numel() < size:
            grown = max(size, 2 * self._held.numel() if self._held is not None else 0)
            self._held = torch.empty(grown, dtype=torch.uint8, device=device)
        return self._held


class PerThread(threading.local):
    """Blocks and workspaces of a thread."""

    def __init__(self) -> None:
        self.blocks: dict[Any, Block] = {}
        self.rooms: dict[Any, Room] = {}
        self.recorders: dict[int, bytes] = {}


LOCAL = PerThread()
BLOCK_LIMIT = 8192


class Driver:
    """The few driver functions that launching needs; tests put another one in its place."""

    def __init__(self) -> None:
        library = cuda_driver.driver()
        if library is None:
            raise MissingKernelError(
                "there is no NVIDIA driver (libcuda.so.1).", "Use CPU tensors on this machine."
            )
        self._library: Any = library
        self.launch: Callable[..., int] = self._launch_the_old_way
        self.entry = 0
        """Address of cuLaunchKernelEx; 0 before CUDA 12."""
        if hasattr(library, "cuLaunchKernelEx"):
            self.launch = library.cuLaunchKernelEx
            self.entry = ctypes.cast(library.cuLaunchKernelEx, ctypes.c_void_p).value or 0
        self._graphs = graphs.entries(library) if graphs.are_on() else ()
        self.encode: Any = tensor_map.encoder()
        """cuTensorMapEncodeTiled; None before CUDA 12."""
        self.encode_entry = 0
        """Address of it; 0 where there is none."""
        if self.encode is not None:
            self.encode_entry = ctypes.cast(self.encode, ctypes.c_void_p).value or 0

    def _launch_the_old_way(self, config: Any, function: Any, parameters: Any, extra: Any) -> int:
        """For drivers before CUDA 12: no attributes, so no dependent launch."""
        figures = CONFIG.unpack(ctypes.string_at(config.value, CONFIG.size))
        stream = ctypes.c_void_p(figures[7])
        code = self._library.cuLaunchKernel(function, *figures[:7], stream, parameters, extra)
        return int(code)

    def recorder(self, device: int) -> bytes:
        """What records this thread's calls on a device, which is the current one, see
        `graphs.recorder`; empty if nothing does."""
        if not self._graphs:
            return b""
        found = LOCAL.recorders.get(device)
        if found is None:
            found = LOCAL.recorders[device] = graphs.recorder(self._library, self._graphs)
        return found

    def ensure_context(self, device: int) -> None:
        """Makes torch's context of the device current in this thread if none is."""
        context = ctypes.c_void_p()
        cuda_driver.check("cuCtxGetCurrent", self._library.cuCtxGetCurrent(ctypes.byref(context)))
        if not context:
            cuda_driver.check(
                "cuDevicePrimaryCtxRetain",
                self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
            )
            cuda_driver.check("cuCtxSetCurrent", self._library.cuCtxSetCurrent(context))

    def load(self, image: bytes, launches: Sequence[Launch]) -> list[int]:
        """Functions of a binary, loaded at once and for good, also while a graph is captured."""
        with self.relaxed():
            module = ctypes.c_void_p()
            code = self._library.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(image))
            cuda_driver.check("cuModuleLoadData", code)
            return [self._function(module, launch) for launch in launches]

    @contextmanager
    def relaxed(self) -> Any:
        """Lets this thread load code while a stream is being captured."""
        mode = ctypes.c_int(CAPTURE_RELAXED)
        self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            yield
        finally:
            self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def clusters_at_once(self, function: int, launch: Launch) -> int | None:
        """`cuda_driver.clusters_at_once` of a function that `load` gave."""
        handle = ctypes.c_void_p(function)
        return cuda_driver.clusters_at_once(handle, launch.block, launch.dynamic_smem_bytes)

    def _function(self, module: ctypes.c_void_p, launch: Launch) -> int:
        function = cuda_driver.Function(module, launch.name)
        # Asking for an attribute loads the code now: drivers load lazily otherwise.
        function.attribute(cuda_driver.NUM_REGS)
        if launch.dynamic_smem_bytes > DEFAULT_SMEM:
            function.allow_dynamic_smem(launch.dynamic_smem_bytes)
        if tensor_map.wanted(launch.arguments):  # only such kernels have them
            function.allow_large_clusters()
        assert function.handle.value is not None
        return function.handle.value


@lru_cache(maxsize=1)
def driver() -> Driver:
    """The driver of this process.

    Raises:
        MissingKernelError: there is none.
    """
    return Driver()


_LOADED: dict[Any, list[int]] = {}
_LOAD_LOCK = threading.Lock()


def functions_of(kernel: DeviceKernel, device: int) -> list[int]:
    """Functions of a kernel on a device, loaded when first wanted; equal binaries once."""
    wanted = tuple(
        (one.name, one.dynamic_smem_bytes if one.dynamic_smem_bytes > DEFAULT_SMEM else 0)
        for one in kernel.launches
    )
    short = (kernel.image_key or kernel, wanted, device)
    found = _LOADED.get(short)
    if found is not None:
        return found
    with _LOAD_LOCK:
        if short not in _LOADED:
            image = kernel.image()
            key = (hashlib.sha256(image).digest(), wanted, device)
            if key not in _LOADED:
                _LOADED[key] = driver().load(image, kernel.launches)
            _LOADED[short] = _LOADED[key]
        return _LOADED[short]


def has_room(kernel: DeviceKernel, device: int) -> bool:
    """Whether a GPU has room for the clusters of a kernel, which this loads."""
    driver().ensure_context(device)
    placed = zip(functions_of(kernel, device), kernel.launches, strict=True)
    return all(driver().clusters_at_once(function, one) != 0 for function, one in placed)


def new_block(
    kernel: DeviceKernel, shape: Shape, batch: tuple[int, int], stream: int, *, capturing: bool
) -> Block:
    """A block of this thread with a workspace: the thread's own for the stream, or while a graph
    is captured one from torch's allocator, which then belongs to the graph."""
    driver().ensure_context(shape.device)
    functions = functions_of(kernel, shape.device)
    size = workspace_bytes(kernel, *batch)
    where = torch.device("cuda", shape.device) if shape.device >= 0 else torch.device("cpu")
    room = Room() if capturing else LOCAL.rooms.setdefault((shape.device, stream), Room())
    return Block(kernel, functions, shape, batch, stream, room.at_least(size, where))


def remember(key: Any, block: Block) -> None:
    """Keeps a block for the next call of this thread."""
    if len(LOCAL.blocks) >= BLOCK_LIMIT:
        LOCAL.blocks.clear()
    LOCAL.blocks[key] = block


def launch(
    block: Block, x: int, y: int, stack_words: bytes, words: bytes, overlap: bool = False
) -> int:
    """Launches a block's kernels: the slow way, for what is not hot. Returns 0.

    Args:
        block: of this thread.
        x, y: device addresses.
        stack_words: `Stacks.words`.
        words: `table_words` or `derived_words`.
        overlap: early kernels are launched as dependent ones, see settled.py.

    Raises:
        CudaError: the driver refused.
    """
    calls.check(block.call.run(x, y, stack_words, words, overlap))
    return 0


def forget() -> None:
    """Drops this thread's blocks and workspaces; loaded code stays."""
    LOCAL.blocks.clear()
    LOCAL.rooms.clear()
