"""Which backend serves a framework's name, a device kind, or an array.

Backends are looked up on first use: our own by the table below, others by `register_backend` or
the entry-point group ``rlx_driver.backends``, which is read only for a name nobody knows
(reading it costs tens of milliseconds).
"""

from __future__ import annotations

import importlib
import threading
from typing import TYPE_CHECKING, Any

from rlx_driver.errors import DeviceUnavailableError, UnknownFrameworkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from importlib.metadata import EntryPoint

    from rlx_driver.backends.base import Backend

__all__ = ["ENTRY_POINT_GROUP", "Registry", "register_backend", "registry"]

ENTRY_POINT_GROUP = "rlx_driver.backends"

# name -> (module, class, packages whose arrays it owns, device kinds it allocates on)
_BUILTIN: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "numpy": ("rlx_driver.backends.numpy", "NumpyBackend", ("numpy",), ("cpu",)),
    "torch": ("rlx_driver.backends.torch", "TorchBackend", ("torch",), ("cuda", "rocm", "metal")),
    "jax": ("rlx_driver.backends.jax", "JaxBackend", ("jax", "jaxlib"), ("tpu",)),
}


class Registry:
    """Finds and keeps the backends of this process; one instance each."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forget every loaded and registered backend, so that only the built-in ones are known."""
        with self._lock:
            # Public for the hot paths, which look here before they ask `get`.
            self.loaded: dict[str, Backend] = {}
            self._factories: dict[str, Callable[[], Backend]] = {}
            self._packages = {p: name for name, row in _BUILTIN.items() for p in row[2]}
            self._kinds = {kind: name for name, row in _BUILTIN.items() for kind in row[3]}
            self._by_type: dict[type, Backend | None] = {}
            # (array type, framework as the user wrote it) -> the fast way; kept by `exchange`.
            self.lanes: dict[tuple[type, Any], Callable[[Any], Any]] = {}
            self._entry_points_read = False

    def register(
        self,
        name: str,
        factory: Callable[[], Backend],
        *,
        packages: Iterable[str] = (),
        kinds: Iterable[str] = (),
    ) -> None:
        """Add a backend, or take the place of one; see `register_backend`."""
        with self._lock:
            self._factories[name] = factory
            self.loaded.pop(name, None)
            self._by_type.clear()
            self.lanes.clear()
            self._packages.update(dict.fromkeys(packages, name))
            self._kinds.update(dict.fromkeys(kinds, name))

    def unregister(self, name: str) -> None:
        """Take a registered backend out again; the built-in ones come back in its place."""
        with self._lock:
            factories = {k: v for k, v in self._factories.items() if k != name}
            packages = {k: v for k, v in self._packages.items() if v != name}
            kinds = {k: v for k, v in self._kinds.items() if v != name}
            loaded = {k: v for k, v in self.loaded.items() if k != name}
            self.reset()
            self._factories, self.loaded = factories, loaded
            self._packages = {**self._packages, **packages}
            self._kinds = {**self._kinds, **kinds}

    def names(self) -> list[str]:
        """Give the name of every backend known, installed or not."""
        self._read_entry_points()
        return sorted({*_BUILTIN, *self._factories})

    def get(self, name: str) -> Backend:
        """Give the backend of a framework, loading it on first use.

        Raises
        ------
        UnknownFrameworkError
            When no backend has that name.
        DeviceUnavailableError
            When the package behind it is not installed or does not import.
        """
        found = self.loaded.get(name)
        return found if found is not None else self._load(name)

    def for_kind(self, kind: str) -> Backend | None:
        """Give the backend that allocates on a device kind, or None when there is none."""
        name = self._kinds.get(kind)
        if name is None:
            self._read_entry_points()
            name = self._kinds.get(kind)
        return None if name is None else self.get(name)

    def for_array(self, array: Any) -> Backend | None:
        """Give the backend whose framework made an array, or None for a foreign object."""
        cls = type(array)
        try:
            return self._by_type[cls]
        except KeyError:
            pass
        for base in cls.__mro__:
            name = self._packages.get(base.__module__.partition(".")[0])
            if name is not None and self.get(name).owns(array):
                break
        else:
            name = None
        found = None if name is None else self.get(name)
        self._by_type[cls] = found
        return found

    def _load(self, name: str) -> Backend:
        with self._lock:
            factory = self._factories.get(name)
            if factory is None and name in _BUILTIN:
                factory = _builtin_factory(name)
            if factory is None:
                self._read_entry_points()
                factory = self._factories.get(name)
            if factory is None:
                raise UnknownFrameworkError(
                    f"no backend is called {name!r}; known are {', '.join(self.names())}. "
                    "Pass the framework's module itself if it has from_dlpack, or add a backend "
                    "with rlx_driver.register_backend"
                )
            try:
                self.loaded[name] = backend = factory()
            except ImportError as error:
                raise DeviceUnavailableError(
                    f"the backend {name!r} was asked for and does not import here ({error}); "
                    "install what it needs, or take it out with "
                    f"rlx_driver.registry.registry.unregister({name!r})"
                ) from error
            return backend

    def _read_entry_points(self) -> None:
        with self._lock:
            if self._entry_points_read:
                return
            self._entry_points_read = True
            from importlib import metadata  # 20 ms, which `import rlx_driver` is not to pay

            for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
                if point.name in _BUILTIN or point.name in self._factories:
                    continue
                try:
                    cls = point.load()
                except Exception as error:  # of a third party: it is to fail alone
                    self.register(point.name, _broken_factory(point, error))
                    continue
                # When they are read is an accident: they add, and take nobody's place.
                self.register(
                    point.name,
                    cls,
                    packages=set(getattr(cls, "packages", ())) - set(self._packages),
                    kinds=set(getattr(cls, "kinds", ())) - set(self._kinds),
                )


def _builtin_factory(name: str) -> Callable[[], Backend]:
    module, cls = _BUILTIN[name][:2]

    def load() -> Backend:
        try:
            return getattr(importlib.import_module(module), cls)()  # type: ignore[no-any-return]
        except ImportError as error:
            extra = "rlx-driver" if name == "numpy" else f"'rlx-driver[{name}]'"
            raise DeviceUnavailableError(
                f"{name} was asked for and does not import here ({error}); install it with: "
                f"pip install {extra}"
            ) from error

    return load


def _broken_factory(point: EntryPoint, error: Exception) -> Callable[[], Backend]:
    package = "the package it comes with" if point.dist is None else point.dist.name

    def load() -> Backend:
        raise DeviceUnavailableError(
            f"the backend {point.name!r} does not load from its entry point {point.value!r} "
            f"({type(error).__name__}: {error}); mend or uninstall {package}"
        ) from error

    return load


registry = Registry()
"""The backends of this process."""


def register_backend(
    name: str,
    factory: Callable[[], Backend],
    *,
    packages: Iterable[str] = (),
    kinds: Iterable[str] = (),
) -> None:
    """Add a backend under a name, without a package or an entry point.

    Parameters
    ----------
    name
        The framework's name, as in ``exchange(x, name)``.
    factory
        Called once, on first use, to make the `Backend`; usually its class.
    packages
        Top-level packages whose array types belong to it, such as ``("cupy",)``.
    kinds
        Device kinds (`Device.kinds`) on which it allocates; it takes the place of the backend
        that served them.

    See Also
    --------
    rlx_driver.backends.base.Backend : the contract to implement.
    """
    registry.register(name, factory, packages=packages, kinds=kinds)
