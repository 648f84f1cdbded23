"""The base layer's matmul, beside and behind which calls in two pieces are timed (CUDA).

As in a CUDA graph of an engine (dop/ops/beside.py): a small kernel writes x, the matmul is
launched, shrink on a second stream beside it, expand behind both, and a small kernel reads y. What
counts is what the call adds to the same graph without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dop.measure import cuda_driver as cuda
from dop.measure.side_stream import SideStream
from dop.workload import Workload

FAR_BYTES = 4 << 30
FAR_PARTS = 32
"""Memory of which a part is read between two calls, in turn: what the rest of a model does to
caches and address translation. Without it a shrink beside qkv's matmul took 18 us instead of 24,
and the search chose kernels that do not end in time where it matters."""
GRAPH_S = 1e-3
"""About how long a graph of matmuls takes; it has 4 to 16 of them."""
CACHE_FACTOR = 2
"""Bytes of weights over which calls rotate, in units of the L2 cache."""
REPLAYS = 3
LAYERS = 8
"""Layers whose weights are kept."""


@dataclass
class Matmuls:
    """The matmuls of one batch: y = x W^T for each of the layer's weights in turn.

    Attributes:
        x, y: [tokens, in] and [tokens, out].
        calls: matmuls of a graph.
        graph: only matmuls; None before `BaseLayers.prepare`.
        far: [parts, n], one of which is read between two calls.
    """

    x: torch.Tensor
    y: torch.Tensor
    weights: Sequence[torch.Tensor]
    calls: int = 4
    graph: cuda.Graph | None = None
    far: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._source, self._seen = self.x.clone(), torch.empty_like(self.y)
        self._sum, self._turn = torch.zeros((), device=self.x.device), 0

    def feed(self) -> None:
        """What is in front of a matmul: something reads other memory, and a kernel writes x, what
        it was before."""
        if self.far is not None:
            self._turn = (self._turn + 1) % len(self.far)
            torch.sum(self.far[self._turn], dim=0, out=self._sum)
        torch.mul(self._source, 1.0, out=self.x)

    def read(self) -> None:
        """The kernel behind: it reads y."""
        torch.mul(self.y, 1.0, out=self._seen)

    def launch(self, call: int) -> None:
        """Matmul number `call`, on torch's current stream; it overwrites y."""
        torch.mm(self.x, self.weights[call % len(self.weights)].t(), out=self.y)

    def added_s(
        self, graph: cuda.Graph, replay: Callable[[cuda.Graph], float], least_s: float
    ) -> float:
        """What a graph takes beyond its matmuls, which are replayed right behind it: within a
        second a matmul of 85 us came to take 2 us more or less.

        Args:
            graph: `calls` times `feed`, `launch` with what is timed, `read`.
            replay: seconds of a replay.
            least_s: what a call adds at least, in seconds: a launch. The difference of two noisy
                times may be less, and would then be the best of all.
        """
        assert self.graph is not None
        together_s = replay(graph)
        return max(together_s - replay(self.graph), self.calls * least_s)


class BaseLayers:
    """Weights of base layers, and the second stream.

    Args:
        l2_bytes: of the GPU.
        pause: see `SideStream`.
    """

    def __init__(self, l2_bytes: int, pause: Callable[[int], object] | None = None) -> None:
        self._l2_bytes = l2_bytes
        self._weights: dict[tuple[object, ...], list[torch.Tensor]] = {}
        self._far: torch.Tensor | None = None
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._side = SideStream(side, pause)

    def matmuls(self, workload: Workload, x: torch.Tensor, y: torch.Tensor) -> Matmuls:
        """Those of a batch; x [tokens, in], y [tokens, out]."""
        key = (workload.in_features, workload.total_out, x.dtype)
        if key not in self._weights:
            while len(self._weights) >= LAYERS:
                self._weights.pop(next(iter(self._weights)))
            size = workload.total_out * workload.in_features * workload.element_bytes
            count = max(2, math.ceil(CACHE_FACTOR * self._l2_bytes / size))
            shape = (workload.total_out, workload.in_features)
            self._weights[key] = [
                torch.empty(shape, dtype=x.dtype, device=x.device).normal_(0.0, shape[1] ** -0.5)
                for _ in range(count)
            ]
        if self._far is None:
            free, _ = torch.cuda.mem_get_info()
            each = min(FAR_BYTES, free // 4) // (4 * FAR_PARTS)
            self._far = torch.zeros((FAR_PARTS, each), device=x.device)
        return Matmuls(x, y, self._weights[key], far=self._far)

    def prepare(self, matmuls: Matmuls, stream: int, replay: Callable[[cuda.Graph], float]) -> None:
        """Captures the matmuls alone, as many as take about GRAPH_S.

        Args:
            matmuls: of the batch that is about to be timed.
            stream: CUstream; torch's current one.
            replay: seconds of a replay.
        """
        if matmuls.graph is not None:
            return
        matmuls.feed()  # what is loaded lazily cannot be loaded while capturing
        for call in range(len(matmuls.weights)):
            matmuls.launch(call)
        matmuls.read()
        cuda.synchronize(stream)
        graph = capture(matmuls, stream)
        once_s = min(replay(graph) for _ in range(REPLAYS)) / matmuls.calls
        graph.close()
        matmuls.calls = min(16, max(4, math.ceil(GRAPH_S / once_s)))
        matmuls.graph = capture(matmuls, stream)
        replay(matmuls.graph)

    def beside(
        self, matmul: Callable[[], None], shrink: Callable[[int], None], expand: Callable[[], None]
    ) -> None:
        """One call, launched as `Beside` does it: `shrink` gets the second stream's CUstream."""
        self._side.mark()
        matmul()
        self._side.run(partial(shrink, self._side.number))
        expand()


def capture(matmuls: Matmuls, stream: int) -> cuda.Graph:
    """A graph of the matmuls alone."""
    graph = cuda.Graph()
    with graph.capture(stream):
        for call in range(matmuls.calls):
            matmuls.feed()
            matmuls.launch(call)
            matmuls.read()
    return graph
