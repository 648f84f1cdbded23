from collections.abc import Callable
from typing import Any

class Call:
    def __new__(
        cls,
        entry: int,
        stream: int,
        fixed: bytes,
        launches: tuple[tuple[int, bytes, bool, bytes], ...],
        tile_rows: int,
        tokens: int,
        width: int,
        total_out: int,
        encode: int = ...,
        maps: bytes = ...,
        graphs: bytes = ...,
        /,
    ) -> Call: ...
    def run(self, x: int, y: int, stacks: bytes, tables: bytes, overlap: bool = ..., /) -> int: ...

class Weights:
    def __new__(
        cls,
        capsule: Any,
        tensor_type: type,
        number: int,
        device: int,
        slots: int,
        words: bytes,
        tensors: tuple[Any, ...],
        /,
    ) -> Weights: ...

class Short:
    def __new__(cls, capsule: Any, *parts: Any) -> Short: ...
    run: Callable[..., bool]
