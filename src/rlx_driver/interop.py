"""The exporter's side of a Buffer: DLPack, ``__array__``, the CUDA array interface, no pickling.

Arrays made this way are the user's: the driver orders the moment of export, and does not fence
their later use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from rlx_driver._ledger import ledger
from rlx_driver.errors import DeviceUnavailableError, DTypeError, ShapeError, ZeroCopyError

if TYPE_CHECKING:
    from rlx_driver.device import Device

__all__ = ["InteropMixin"]

# The interface has no code for the narrow floats; these are the widths that consumers map back.
_OPAQUE = {1: "|V1", 2: "<V2"}

_ASKED = "copy=True was asked for"


class InteropMixin:
    """Protocol methods of `Buffer`."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def device(self) -> Device: ...  # noqa: D102

        @property
        def dtype(self) -> np.dtype[Any]: ...  # noqa: D102

        @property
        def byte_size(self) -> int: ...  # noqa: D102
        def numpy(self) -> np.ndarray[Any, Any]: ...  # noqa: D102
        def torch(self) -> Any: ...  # noqa: D102
        def array(self, framework: Any) -> Any: ...  # noqa: D102

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Export the memory as the array API standard says; narrow floats as what they are.

        Copies: only for ``copy=True``. Blocks: on the host until updates in progress are done; on
        a GPU the consumer's stream waits instead. Read-only: no. Aliases: this Buffer.
        """
        if copy is True:
            ledger.require_copies(self.byte_size, _ASKED)
        backend = self.device.backend
        capsule = backend.export(
            self.array(backend.name),
            stream=stream,
            max_version=max_version,
            dl_device=dl_device,
            copy=copy,
        )
        if copy is True:
            ledger.count_copy(self.byte_size, _ASKED)
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        """Give DLPack's pair for the device."""
        return self.device.dlpack_device

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Give the memory to ``numpy.asarray``; off the host this raises."""
        view = self.numpy()
        if dtype is not None and np.dtype(dtype) != view.dtype:
            if copy is False:
                # NumPy's protocol wants a ValueError here.
                raise ShapeError(f"{view.dtype} cannot be seen as {np.dtype(dtype)} without a copy")
            ledger.will_copy(view.nbytes, "another dtype was asked for")
            return view.astype(dtype)
        if not copy:
            return view
        ledger.will_copy(view.nbytes, _ASKED)
        return view.copy()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The CUDA array interface, version 3; on CUDA devices only."""
        if self.device.kind != "cuda":
            raise AttributeError(f"memory on {self.device} has no __cuda_array_interface__")
        native: Any = self.torch()
        facts = self.device.backend.facts(native)
        return {
            "data": (facts.address, False),
            "shape": facts.shape,
            "strides": None if facts.is_row_major else facts.strides,
            "typestr": _OPAQUE.get(facts.dtype.itemsize, facts.dtype.str)
            if facts.dtype.kind == "V"
            else facts.dtype.str,
            "version": 3,
            # Null: this property has ordered torch's current stream, and names no other.
            "stream": None,
        }

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to pickle or copy: memory has an address, not only a value."""
        raise DTypeError(
            f"a {type(self).__name__} is memory at an address and does not pickle or copy: take "
            "its value with to_host().numpy().copy()"
        )

    def host_bytes(self) -> memoryview:
        """Give the bytes of a contiguous host Buffer as a writable memoryview.

        Copies: never. Blocks: until updates in progress are done. Read-only: no. Aliases: this
        Buffer.

        Raises
        ------
        DeviceUnavailableError
            Off the host: `to_host` copies.
        ZeroCopyError
            When the Buffer is not contiguous.
        """
        if not self.device.is_host:
            raise DeviceUnavailableError(
                f"the bytes live on {self.device}: call to_host() for a copy on the host"
            )
        view = self.numpy()
        if not view.flags.c_contiguous:
            raise ZeroCopyError(
                f"strides {view.strides} are not contiguous: call to_host() for a compact copy"
            )
        return memoryview(view.reshape(-1).view(np.uint8))  # type: ignore[arg-type]

    def as_f32(self) -> np.ndarray[Any, Any]:
        """Give a host Buffer of float32 as a NumPy array; never converts.

        Raises
        ------
        DTypeError
            For any other dtype.
        DeviceUnavailableError
            Off the host.
        """
        if self.dtype != np.float32:
            raise DTypeError(
                f"as_f32 sees float32 and this Buffer is {self.dtype.name}: convert a copy with "
                "numpy().astype('float32')"
            )
        return self.numpy()
