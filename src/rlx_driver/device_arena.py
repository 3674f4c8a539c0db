"""`DeviceArena`: what a program needs of the memory it runs in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Hashable

    import numpy as np

__all__ = ["DeviceArena"]


@runtime_checkable
class DeviceArena(Protocol):
    """What a program needs of the memory it runs in, whoever made it: the arena contract of RLX."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole arena."""
        ...

    def byte_offset(self, node: Hashable) -> int | None:
        """Give where a node's slot begins, in bytes; None when it has none."""
        ...

    def has_buffer(self, node: Hashable) -> bool:
        """Tell whether a node has a slot."""
        ...

    def write_input_f32(self, node: Hashable, dtype: Any, data: Any) -> int:
        """Convert float32 values into a slot; gives how many were written."""
        ...

    def read_output_f32(
        self, node: Hashable, dtype: Any, n_elements: int
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Convert the first elements of a slot to float32."""
        ...
