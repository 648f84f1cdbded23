"""What every exported library can say: what is in it, and which kernel serves a batch."""

from __future__ import annotations

from pathlib import Path

from dop.export.index import Index, KernelInfo


class Library:
    """The index of a library or pack, and the choice.

    Attributes:
        path: folder or file.
        index: everything that is known without reading a binary.
        table: which kernel serves which batch.
        kernels: by name.
    """

    def __init__(self, where: Path, index: Index) -> None:
        self.path = where
        self.index = index
        self.table = index.table
        self.kernels = index.kernels
        self._by_trace = {(k.workload.key, k.trace_key): k for k in index.kernels.values()}

    @property
    def workloads(self) -> tuple[str, ...]:
        """Keys of the workloads in it."""
        return tuple(self.table.workloads)

    def kernel(self, workload_key: str, trace_key: str) -> KernelInfo:
        """The kernel that a row of the table names."""
        return self._by_trace[workload_key, trace_key]

    def choose(
        self, workload_key: str, tokens: int, adapters: int | None = None, slots: int | None = None
    ) -> KernelInfo:
        """The kernel for a batch.

        Args:
            workload_key: `Workload.key`.
            tokens: rows of the batch.
            adapters: distinct adapters in it; None if that is not known.
            slots: adapters that the weight stacks have room for: no batch has more.

        Raises:
            ConfigError: the workload is not in the library.
        """
        trace = self.table.choose(workload_key, tokens, adapters, slots)
        return self._by_trace[workload_key, trace]
