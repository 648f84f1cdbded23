"""Which loop goes to which axis of the grid or block."""

from __future__ import annotations

from dop.search.mutator.base import AnyMutator


class BindingMutator(AnyMutator):
    """Any other binding: bindings have no order."""

    kind = "binding"
