"""The race checker: what the hooks of the driver call while somebody checks.

It holds no lock of the driver but that of the access whose array it hands out, and none at all
where a weak reference dies, which may be in the middle of a collection.
"""

from __future__ import annotations

import functools
import gc
import itertools
import warnings
import weakref
from collections import deque
from threading import get_ident
from typing import TYPE_CHECKING, Any

from rlx_driver import _hooks
from rlx_driver._locks import acquire, release
from rlx_driver._races import Place, Race, elsewhere, here, raised, user_depth
from rlx_driver._watch import Watch, used_in
from rlx_driver.access import Access, Lease, alive
from rlx_driver.backends.base import Backend
from rlx_driver.errors import DriverError, RaceWarning
from rlx_driver.transfer import span_of

if TYPE_CHECKING:
    from types import ModuleType

    from rlx_driver._checking import Check
    from rlx_driver._views import ViewsMixin
    from rlx_driver._watch import Writers

__all__ = ["Checker"]

_MUTABLE_VIEWS = 8
"""How many places are remembered, for each memory, where mutable views were handed out."""


class Checker:
    """Watches every array that is handed out while blocks of `rlx_driver.checking` are open."""

    def __init__(self) -> None:
        self.checks: list[Check] = []  # the innermost last
        self._watches: dict[int, Watch] = {}
        self._keys = itertools.count()
        self._writers: weakref.WeakKeyDictionary[Access, Writers] = weakref.WeakKeyDictionary()
        self._unsaid: deque[Race] = deque()
        self._collecting: set[int] = set()

    # --- on and off

    def start(self) -> None:
        """Switch off every fast return of a view that is cached."""
        _hooks.checker = self
        gc.callbacks.append(self._on_collection)
        for access in list(alive):
            self.join(access)
            for lease in list(access.leases.values()):
                lease.handed = None

    def join(self, access: Access) -> None:
        """Send every use of a memory the slow way, where the hooks are."""
        access.fast = access.native_ready = False

    def stop(self) -> None:
        """Make everything as fast as it was."""
        _hooks.checker = None
        gc.callbacks.remove(self._on_collection)
        self._watches.clear()
        patience = 0.1
        for access in list(alive):
            access.fast = access.order.synchronous
            if not access.fast or access.state != "open":
                continue
            try:
                acquire((), [access], timeout=patience)
            except DriverError:
                patience = 0
                continue  # who writes it sets the flags when done
            access.refresh()
            release((), [access])

    def _on_collection(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._collecting.add(get_ident())
        else:
            self._collecting.discard(get_ident())

    # --- hooks: views

    def hand_out(self, buffer: ViewsMixin, lease: Lease, array: Any) -> Any:
        """Give the array that the user is to have, an alias that is watched."""
        access = buffer._access
        checks = list(self.checks)
        if not checks:
            return array  # the last block has ended meanwhile
        checks[0].note_use()
        watch = self._known(access, array)
        # Before it is given out again, for then nobody can tell whether it was held. The same goes
        # for the array itself, which our callers have too.
        if watch is not None and watch.alias is not None:
            self._compare(watch)
        with access.lock:
            watch = self._known(access, array)
            alias = None if watch is None else watch.given()
            if watch is None or alias is None:
                try:
                    watch, alias = self._watched(buffer, lease, array, checks[-1])
                except Exception:
                    if lease.is_dead(array):
                        return array  # another thread has written since
                    raise
        if alias is array or watch.expected is None:
            watch.remember(access)
        self.announce()
        return alias

    def _known(self, access: Access, array: Any) -> Watch | None:
        """Find the watch of an array whose alias, still held, can be given out again."""
        for watch in list(self._watches.values()):
            if watch.origin is array:
                given = watch.given()
                if given is not None and (
                    not access.native_out or watch.backend.shows_current_bytes(given)
                ):
                    return watch
        return None

    def _watched(
        self, buffer: ViewsMixin, lease: Lease, array: Any, check: Check
    ) -> tuple[Watch, Any]:
        alias = lease.backend.alias(array)
        place = here(f"the {lease.backend.name} view was handed out at")
        watch = Watch(buffer, lease, array, place, check, self._writers_of(buffer._access))
        key = next(self._keys)
        if alias is not array:
            watch.alias = weakref.ref(alias, functools.partial(self._let_go, key))
            lease.alias = watch.alias
        self._watches[key] = watch
        return watch, alias

    def give_mutable(self, buffer: ViewsMixin, target: Backend | ModuleType) -> None:
        """Remember where a view was handed out through which the bytes may be written."""
        name = target.name if isinstance(target, Backend) else target.__name__
        place = here(f"a {name} view was handed out at")
        key = (name, [(frame.filename, frame.lineno) for frame in place.stack])
        writers = self._writers_of(buffer._access)
        if all(key != other for other, _ in list(writers)):
            writers.append((key, place))
        self.before_read(buffer)

    def _writers_of(self, access: Access) -> Writers:
        return self._writers.setdefault(access, deque(maxlen=_MUTABLE_VIEWS))

    # --- hooks: accesses

    def before_read(self, buffer: ViewsMixin) -> None:
        """Look whether memory that is about to be seen was donated by the user."""
        span = span_of(buffer._facts)
        for watch in self._of(buffer._access):
            if watch.overlaps(span):
                self._require_commit(watch)
        self.announce()

    def after_read(self, access: Access) -> None:
        """Compare at the end of a read scope."""
        for watch in self._of(access):
            self._compare(watch)

    def before_write(self, access: Access, updated: Lease | None = None) -> None:
        """Compare before a write by the driver; the caller has the access for writing.

        It may have the array of one lease already, the updated one.
        """
        if access.is_recording():
            return
        place = None
        for watch in self._of(access):
            had = updated is not None and updated.array is watch.origin
            self._compare(watch, get_ident(), others=int(had))
            watch.expect_death()
            if not watch.is_dead():
                watch.written_at = place = place or here("a write by the driver ended it at")
        self.announce()

    def before_close(self, access: Access) -> None:
        """Compare for the last time; the caller has the access for writing."""
        for watch in self._of(access):
            self._compare(watch, get_ident())
            self._require_commit(watch, get_ident())
        for key in list(self._watches):
            known = self._watches.get(key)
            if known is not None and known.access is access:
                self._watches.pop(key, None)

    def _of(self, access: Access) -> list[Watch]:
        """List the watches of a memory, and forget those of which nothing can come any more."""
        found = []
        for key in list(self._watches):  # no items(): that allocates, and a collection may pop one
            watch = self._watches.get(key)
            theirs = None if watch is None else watch.access
            if watch is None:
                pass
            elif theirs is access and watch.matters():
                found.append(watch)
            elif theirs is access or (theirs is None and not watch.is_held()):
                self._watches.pop(key, None)
        return found

    # --- findings

    def _compare(self, watch: Watch, holder: int = 0, others: int = 0) -> None:
        """Look for changed bytes; `holder` and `others` as for `Watch`."""
        if not watch.is_changed(holder):
            return
        if watch.is_held(others):
            gc.collect()  # the program may have let go of what is part of a cycle
        if watch.is_held(others):
            self._found_change(watch)
        watch.expected = None

    def _let_go(self, key: int, _: object) -> None:
        # Runs wherever the last reference went, in the collector too. In a collection nobody knows
        # since when the array had been garbage.
        try:
            watch = self._watches.get(key)
            if watch is None or _hooks.checker is not self:
                return
            if watch.was_given_away():
                watch.expect_death()
                return  # until it is committed
            self._watches.pop(key, None)
            if get_ident() not in self._collecting and watch.is_changed():
                self._found_change(watch)
        except Exception:  # there is nobody to raise it to
            return

    def _found_change(self, watch: Watch) -> None:
        known = list(watch.writers)
        names = dict.fromkeys(key[0] for key, _ in known)
        places = [place for _, place in known] or [
            elsewhere(
                "no mutable view was handed out while checking: written through one from before, "
                "through memory that Buffer.from_array took, or through a pointer"
            )
        ]
        self._found(watch, "changed under a view", tuple(names) or ("unknown",), places)

    def _require_commit(self, watch: Watch, holder: int = 0) -> None:
        if not watch.told and watch.is_uncommitted(holder):
            watch.told = True
            self._found(watch, "not committed", (), [])

    def _found(
        self,
        watch: Watch,
        kind: str,
        writers: tuple[str, ...],
        places: list[Place],
        noticed_at: Place | None = None,
    ) -> None:
        race = Race(
            watch.label,
            kind,
            (watch.backend.name, *writers),
            watch.place,
            tuple(places),
            noticed_at or here("noticed at"),
        )
        watch.check.races.append(race)
        if watch.check.on_race == "warn":
            self._unsaid.append(race)

    def announce(self) -> None:
        """Warn of what was found, where a block wants that."""
        while self._unsaid:
            text = str(self._unsaid.popleft())
            warnings.warn(text, RaceWarning, stacklevel=user_depth())

    def unsaid(self) -> list[Race]:
        """Take what was found and not warned of yet."""
        return [self._unsaid.popleft() for _ in range(len(self._unsaid))]

    # --- the end of a block

    def finish(self, check: Check) -> None:
        """Compare for a block that ends; what is still held goes on in the one around it."""
        self.checks.remove(check)
        for watch in list(self._watches.values()):
            if watch.check is check:
                self._compare(watch)
                self._require_commit(watch)
                if self.checks:
                    watch.check = self.checks[-1]

    def find_stale(self, error: BaseException, check: Check) -> bool:
        """Look whether an error is a framework's own about views that went stale."""
        dead = [watch for watch in list(self._watches.values()) if watch.is_dead()]
        dead = [watch for watch in dead if watch.backend.is_about(error, watch.origin)]
        if isinstance(error, DriverError) or not dead:
            return False
        used = used_in(error, dead)
        for watch in used:
            watch.check = check
            by_driver = watch.written_at
            place = by_driver or elsewhere("the program itself donated or deleted it")
            used_at = raised("it was used at", error, watch.backend.packages)
            self._found(watch, "stale view", (), [place], used_at)
        return bool(used)
