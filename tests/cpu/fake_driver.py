"""A CUDA driver made of Python: launches read their parameters from memory as a GPU would, and
compute on CPU tensors. What `dop.ops.launch` packs is thereby tested without a GPU."""

from __future__ import annotations

import ctypes
import struct
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch

from dop.measure import tensor_map
from dop.measure.artifact import Buffer, Launch
from dop.ops import api, eager, launch, native, short, sources
from dop.ops.launch import DeviceKernel
from dop.ops.sources import Choice

STREAM = 77
ENTRY = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
"""cuLaunchKernelEx, as the compiled extension calls it."""
ENCODE = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32),
    *(*[ctypes.c_void_p] * 5, *[ctypes.c_int] * 4),
)
"""cuTensorMapEncodeTiled."""
KINDS = {torch.float32: ctypes.c_float, torch.int32: ctypes.c_int32}


def at(address: int, count: int, kind: torch.dtype) -> torch.Tensor:
    """Tensor over memory."""
    assert address % 4 == 0
    if count == 0:
        return torch.empty(0, dtype=kind)
    array = (KINDS[kind] * count).from_address(address)
    return torch.frombuffer(array, dtype=kind, count=count)


def encoder(maps: list[dict], code=lambda: 0):
    """A cuTensorMapEncodeTiled that notes what it is asked for, and writes the note's number and
    the address down instead of a map."""

    def encode(to, kind, axes, address, dims, strides, box, steps, *flags) -> int:
        def read(which, count, place) -> tuple:
            return tuple((which * count).from_address(place))

        note = {
            "aligned": to % 64 == 0,
            "kind": kind,
            "axes": axes,
            "address": address,
            "dims": read(ctypes.c_uint64, 3, dims),
            "strides": read(ctypes.c_uint64, 2, strides),
            "box": read(ctypes.c_uint32, 3, box),
            "steps": read(ctypes.c_uint32, 3, steps),
            "flags": flags,
        }
        if not code():
            (ctypes.c_uint64 * 16).from_address(to)[:] = [len(maps), address, *range(14)]
            maps.append(note)
        return code()

    return ENCODE(encode)


def read(name: str, place: int):
    """A parameter as a kernel gets it: a number, or the words of a map."""
    if tensor_map.parse(name):
        return struct.unpack("=16Q", ctypes.string_at(place, 128))
    return struct.unpack("=q", ctypes.string_at(place, 8))[0]


class FakeGraphs:
    """Records and replays launches: the driver's functions, as `_launch.Call` takes them.

    Attributes:
        recording: launches since the last begin; None outside of a recording.
        graphs: what was recorded.
        execs: what can be replayed, by handle.
        replayed: handles and streams in order.
        refuse: name of a function that fails.
    """

    STREAM = 99
    FUNCTIONS: ClassVar = {
        "begin": (ctypes.c_void_p, ctypes.c_int),
        "end": (ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)),
        "instantiate": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint64),
        "launch": (ctypes.c_void_p, ctypes.c_void_p),
        "drop_exec": (ctypes.c_void_p,),
        "drop_graph": (ctypes.c_void_p,),
        "exchange_mode": (ctypes.POINTER(ctypes.c_int),),
    }

    def __init__(self) -> None:
        self.recording: list | None = None
        self.graphs: dict[int, list] = {}
        self.execs: dict[int, list] = {}
        self.replayed: list[tuple[int, int | None]] = []
        self.modes = [0]
        self.made = 0
        self.refuse = ""
        self._callbacks = [
            ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._guarded(name))
            for name, types in self.FUNCTIONS.items()
        ]
        addresses = [ctypes.cast(one, ctypes.c_void_p).value for one in self._callbacks]
        self.recorder = struct.pack("=8Q", *addresses, self.STREAM)

    def _guarded(self, name: str):
        def call(*given) -> int:
            if self.refuse != name:
                return int(getattr(self, name)(*given))
            if name == "end":  # a broken recording ends as well
                self.recording = None
            return 7

        return call

    def begin(self, stream, mode) -> int:
        assert (stream, mode, self.recording, self.modes[-1]) == (self.STREAM, 2, None, 2)
        self.recording = []
        return 0

    def end(self, stream, graph) -> int:
        assert stream == self.STREAM
        self.made += 1
        self.graphs[self.made], self.recording = self.recording, None
        graph[0] = self.made
        return 0

    def instantiate(self, exec_, graph, flags) -> int:
        assert flags == 0
        self.execs[1000 + graph] = self.graphs[graph]
        exec_[0] = 1000 + graph
        return 0

    def launch(self, exec_, stream) -> int:
        self.replayed.append((exec_, stream))
        for one in self.execs[exec_]:
            one()
        return 0

    def drop_exec(self, exec_) -> int:
        del self.execs[exec_]
        return 0

    def drop_graph(self, graph) -> int:
        del self.graphs[graph]
        return 0

    def exchange_mode(self, mode) -> int:
        self.modes.append(mode[0])
        mode[0] = self.modes[-2]
        return 0


class FakeDriver:
    """Counts launches; `code` is what a launch answers, `map_code` what making a map does."""

    keeps = False

    def __init__(self, shape_sizes) -> None:
        self.sizes = shape_sizes  # slices, rank, in, outs, slots of the stacks
        self.functions: list[Launch] = []
        self.launches: list[tuple] = []
        self.loads = 0
        self.code = 0
        self._callback = ENTRY(self._launch_from_c)
        self.entry = ctypes.cast(self._callback, ctypes.c_void_p).value
        self.maps: list[dict] = []
        self.map_code = 0
        self.encode = encoder(self.maps, lambda: self.map_code)
        self.encode_entry = ctypes.cast(self.encode, ctypes.c_void_p).value
        self.graphs = FakeGraphs() if self.keeps else None

    def recorder(self, device: int) -> bytes:
        return self.graphs.recorder if self.graphs else b""

    def ensure_context(self, device: int) -> None:
        pass

    def load(self, image: bytes, launches) -> list[int]:
        assert image == b"cubin"
        self.loads += 1
        first = len(self.functions)
        self.functions += launches
        return [first + i + 1 for i in range(len(launches))]

    def _launch_from_c(self, config, function, parameters, extra) -> int:
        return self.launch(
            ctypes.c_void_p(config), ctypes.c_void_p(function), ctypes.c_void_p(parameters), extra
        )

    def launch(self, config, function, parameters, extra) -> int:
        assert extra is None
        if self.code:
            return self.code
        what = self.functions[function.value - 1]
        *grid_block_smem, stream, attributes, count = struct.unpack(
            "=7I4xQQI4x", ctypes.string_at(config.value, 56)
        )
        if count:
            kind, allowed = struct.unpack("=I4xi", ctypes.string_at(attributes, 12))
            assert (kind, allowed, count) == (6, 1, 1)
        self.launches.append((what.name, tuple(grid_block_smem), stream, bool(count)))
        words = (ctypes.c_void_p * len(what.arguments)).from_address(parameters.value)
        given = {n: read(n, words[i]) for i, n in enumerate(what.arguments)}
        if self.graphs is not None and self.graphs.recording is not None:
            assert stream == FakeGraphs.STREAM
            self.graphs.recording.append(lambda: getattr(self, what.name)(given))
        else:
            getattr(self, what.name)(given)
        return 0

    def _tiles(self, p):
        """(rows, slot, rank, scale) of each tile or token."""
        if "tile_slot" in p:
            index = at(p["row_index"], p["tokens"], torch.int32)
            names = ("tile_slot", "tile_row0", "tile_rows", "tile_rank")
            tables = [at(p[n], p["tiles"], torch.int32) for n in names]
            scale = at(p["tile_scale"], p["tiles"], torch.float32)
            for t, (slot, row0, rows, rank) in enumerate(
                zip(*map(torch.Tensor.tolist, tables), strict=True)
            ):
                yield t, index[row0 : row0 + rows].long(), slot, rank, float(scale[t])
            return
        slot, rank = (at(p[n], p["tokens"], torch.int32) for n in ("token_slot", "token_rank"))
        scale = at(p["token_scale"], p["tokens"], torch.float32)
        for t in range(p["tokens"]):
            if slot[t] >= 0:
                yield t, torch.tensor([t]), int(slot[t]), int(rank[t]), float(scale[t])

    def _stack(self, p, side, s):
        _, rank, width, outs, slots = self.sizes
        address = p[side] + (16 * p[f"{side}{s}_shift"] if s else 0)
        size = (slots, rank, width) if side == "a" else (slots, outs[s], rank)
        return at(address, slots * size[1] * size[2], torch.float32).view(size)

    def shrink(self, p) -> None:
        slices, rank, width, _, _ = self.sizes
        x = at(p["x"], p["tokens"] * width, torch.float32).view(-1, width)
        v = at(p["v"], p["tokens"] * slices * rank, torch.float32).view(-1, slices, rank)
        v.fill_(float("nan"))
        for _, rows, slot, true, _ in self._tiles(p):
            true = min(true, rank)
            for s in range(slices):
                v[rows, s, :true] = x[rows] @ self._stack(p, "a", s)[slot, :true].T

    def expand(self, p) -> None:
        slices, rank, _, outs, _ = self.sizes
        assert p["y"] == p["y_in"]
        assert p["answer"] == 42
        y = at(p["y"], p["tokens"] * sum(outs), torch.float32).view(-1, sum(outs))
        v = at(p["v"], p["tokens"] * slices * rank, torch.float32).view(-1, slices, rank)
        for _, rows, slot, true, scale in self._tiles(p):
            true = min(true, rank)
            parts = [
                v[rows, s, :true] @ self._stack(p, "b", s)[slot, :, :true].T for s in range(slices)
            ]
            y[rows] += scale * torch.cat(parts, dim=1)


TABLES = {
    0: ("token_slot", "token_rank", "token_scale"),
    16: ("tile_slot", "tile_row0", "tile_rows", "tile_rank", "tile_scale", "row_index"),
}


def kernel(tile_rows: int, slices: int, early: bool = False) -> DeviceKernel:
    shifts = tuple(f"{side}{s}_shift" for side in "ab" for s in range(1, slices))
    common = (*TABLES[tile_rows], "tokens", "tiles", *shifts)
    tiles = "tiles" if tile_rows else "tokens"
    launches = (
        Launch(
            *("shrink", (tiles, "8", "1"), (128, 1, 1), 64 << 10, ("x", "a", "v", *common)),
            early=early,
        ),
        Launch(
            "expand",
            ("tokens * 2", "1", "1"),
            (256, 1, 1),
            0,
            ("v", "b", "y_in", "y", "answer", *common),
            dependent=True,
        ),
    )
    spaces = (
        Buffer("other", "bfloat16", "tokens * 3"),
        Buffer("v", "float32", "tokens * 3 * 64"),
    )
    return DeviceKernel(
        f"tiles{tile_rows}", "test", "", tile_rows, launches, spaces, lambda: b"cubin",
        {"answer": 42},
    )  # fmt: skip


WAYS = ["compiled", "kept", "ctypes"]
"""How kernels are launched; "kept": compiled, and calls that come again are graphs."""
NO_EXTENSION = "dop.ops._launch is not built, or torch is older than 2.10"


def choose_way(monkeypatch, way: str) -> None:
    """Launch in one of WAYS; skips the test where that one is missing."""
    if way == "ctypes":
        monkeypatch.setattr(native, "EXTENSION", None)
    elif not native.reads_tensors():
        pytest.skip(NO_EXTENSION)
    monkeypatch.setattr(FakeDriver, "keeps", way == "kept")


def install(monkeypatch, sizes, tile_rows: int, early: bool = False) -> FakeDriver:
    """Puts the fake in the driver's place, for CPU tensors."""
    driver = FakeDriver(sizes)
    chosen = kernel(tile_rows, sizes[0], early)
    launch.forget()
    monkeypatch.setattr(launch, "driver", lambda: driver)
    monkeypatch.setattr(launch, "_LOADED", {})
    set_surroundings(monkeypatch)
    monkeypatch.setattr(eager, "device_guard", lambda device: nullcontext())
    monkeypatch.setattr(eager, "on_gpu", lambda device: True)
    choice = Choice("key", "fake", 0, None, chosen, "")
    monkeypatch.setattr(sources, "choose", lambda *_: choice)
    return driver


def set_surroundings(
    monkeypatch, *, capturing: bool = False, current_device: int = -1, stream: int = STREAM
) -> None:
    """What the operator learns from torch about streams and devices."""
    facts = {
        "stream_of": lambda device: stream,
        "capturing": lambda: capturing,
        "current_device": lambda: current_device,
    }
    for name, value in facts.items():
        monkeypatch.setattr(eager, name, value)
    monkeypatch.setattr(api, "_short_path", short.short_path(short.Surroundings(**facts)))
