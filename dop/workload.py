"""The problem: one SGMV call site of a model (one launch), without any batch."""

from __future__ import annotations

from dataclasses import dataclass

from dop.errors import ConfigError

DTYPES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Supported element types and their sizes in bytes."""

MAX_SLICES = 3

BESIDE = "/beside"
"""End of the key of a workload whose calls are made in two pieces."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Shapes and types of one SGMV call site.

    x is [tokens, in_features]; slice s has A [slots, rank, in_features] and
    B [slots, out_features[s], rank]; y is [tokens, sum(out_features)].

    Attributes:
        name: what a person calls it, e.g. "qkv_proj" (not part of the key).
        in_features: width of x.
        out_features: width of each slice (1 to 3 slices per launch).
        rank: rank of the weight stacks.
        dtype: element type of x, y, A and B: "float16", "bfloat16" or "float32".
        beside: the call is made in two pieces (dop/ops/beside.py): shrink beside the base layer's
            matmul, which writes y, and expand behind both. Its time is what it adds to the matmul.
    """

    name: str
    in_features: int
    out_features: tuple[int, ...]
    rank: int
    dtype: str
    beside: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype {self.dtype!r} is not supported.", f"Use one of {', '.join(DTYPES)}."
            )
        if not 1 <= len(self.out_features) <= MAX_SLICES:
            raise ConfigError(
                f"{len(self.out_features)} slices in one launch.", f"Give 1 to {MAX_SLICES} slices."
            )
        if self.in_features < 1 or min(self.out_features) < 1:
            raise ConfigError(
                f"widths {self.in_features} -> {self.out_features} must be positive.",
                "Check the model config.",
            )
        if self.rank < 1:
            raise ConfigError(f"rank {self.rank} is not a rank.", "Give ranks of 1 or more.")
        widest = min(self.in_features, max(self.out_features))
        if self.rank > widest:
            raise ConfigError(
                f"rank {self.rank} is larger than the layer's width {widest}.",
                "A low-rank adapter cannot have that rank; check the adapter.",
            )

    @property
    def slices(self) -> int:
        """Number of weight slices in one launch."""
        return len(self.out_features)

    @property
    def total_out(self) -> int:
        """Width of y: the slices side by side."""
        return sum(self.out_features)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First column of y for each slice."""
        starts = [0]
        for width in self.out_features[:-1]:
            starts.append(starts[-1] + width)
        return tuple(starts)

    @property
    def element_bytes(self) -> int:
        """Size of one element of x, y, A and B in bytes."""
        return DTYPES[self.dtype]

    @property
    def key(self) -> str:
        """The workload key written to the log; two workloads with one key share kernels."""
        widths = "+".join(map(str, self.out_features))
        call = f"sgmv/{self.dtype}/r{self.rank}/{self.in_features}->{widths}"
        return call + BESIDE if self.beside else call

    @staticmethod
    def parse(key: str, name: str = "") -> Workload:
        """Workload of a key.

        Raises:
            ConfigError: the key is not of the form that `key` writes.
        """
        try:
            head, dtype, rank, widths = key.removesuffix(BESIDE).split("/")
            left, right = widths.split("->")
            if head != "sgmv" or not rank.startswith("r"):
                raise ValueError(key)
            outs = tuple(int(w) for w in right.split("+"))
            return Workload(name or key, int(left), outs, int(rank[1:]), dtype, BESIDE in key)
        except ValueError as error:
            raise ConfigError(
                f"{key!r} is not a workload key.",
                "It should read like sgmv/bfloat16/r16/4096->4096+1024+1024.",
            ) from error

    def flops(self, tokens: int) -> int:
        """Floating-point operations of shrink and expand for `tokens` rows."""
        return 2 * tokens * self.rank * (self.in_features * self.slices + self.total_out)

    def min_bytes(self, tokens: int, adapters: int) -> int:
        """Fewest bytes that must move: x, y in and out, and each active adapter once; beside the
        base layer's matmul those of expand alone."""
        first = 0 if self.beside else self.in_features
        weights = self.rank * (first * self.slices + self.total_out)
        rows = first + 2 * self.total_out
        return self.element_bytes * (adapters * weights + tokens * rows)
