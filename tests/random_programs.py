"""Random programs over several handles: what they may do, and how they are drawn.

A program is a list of small operations on a few square matrices of small whole numbers. `draw`
makes one from a source of choices, so that both hypothesis and `random.Random` can drive it; it
draws only what the contract of the driver allows. What runs them is in `random_executors`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = ("float32", "int32")
WHOLE, COLUMNS, PARTS = 0, 4, 5  # parts 1 to 3 are blocks of rows, two of which overlap


def key_of(part: int, side: int) -> Any:
    """Give the index of a part of a matrix."""
    if part == WHOLE:
        return ...
    if part == COLUMNS:
        return slice(None), slice(3, 7)
    start = (0, side // 4, side // 8)[part - 1]
    return slice(start, start + side // 4)


# --- operations ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, repr=False)
class Op:
    """One operation, called from one of three threads and, on CUDA, on one of three streams."""

    thread: int = 0
    stream: int = 0

    def __repr__(self) -> str:
        said = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if self._tells(f))
        return f"{type(self).__name__}({', '.join(said)})"

    def _tells(self, one: Any) -> bool:
        return getattr(self, one.name) != one.default


@dataclass(frozen=True, kw_only=True, repr=False)
class Look(Op):
    """See a matrix now: by a framework's view, by `to_host`, or by a fetch of the JAX array."""

    handle: int
    by: str  # numpy, torch, jax, host, fetch (numpy.asarray of JAX's), put (device_put of JAX's)
    how: str = "fresh"  # fresh, held, scope
    part: int = WHOLE


@dataclass(frozen=True, kw_only=True, repr=False)
class Reader(Op):
    """Start a slow program that reads matrices late; its result is looked at later."""

    handles: tuple[int, ...]
    by: str = "jax"  # torch too, on CUDA
    how: str = "fresh"
    part: int = WHOLE


@dataclass(frozen=True, kw_only=True, repr=False)
class Collect(Op):
    """Wait for all results that have not been looked at."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Write(Op):
    """Change matrices in place by NumPy or torch, in a scope or through a view alone."""

    handles: tuple[int, ...]
    by: str
    k: int
    how: str = "scope"  # scope, fresh, held
    part: int = WHOLE
    heavy: bool = False  # on CUDA: late


@dataclass(frozen=True, kw_only=True, repr=False)
class Update(Op):
    """Update one handle or a tree of two, with another handle or an array as an argument."""

    handles: tuple[int, ...]
    by: str
    k: int
    argument: int | str | None = None  # a handle, "array" (changed after the call), or none
    part: int = WHOLE
    ordered: bool = True
    heavy: bool = False
    jitted: str = ""  # by the user: donating, or plain, so that the result lies elsewhere


@dataclass(frozen=True, kw_only=True, repr=False)
class Copy(Op):
    """Set the bytes to those of an array; of a NumPy one that is changed after the call."""

    handle: int
    source: str  # numpy, torch, jax (late), own (JAX's next value of the handle itself, late),
    # buffer, numpy view, torch view, jax view (these four of the handle `other`)
    k: int = 0
    other: int | None = None
    part: int = WHOLE


@dataclass(frozen=True, kw_only=True, repr=False)
class Fill(Op):
    """Assign a number to a part."""

    handle: int
    k: int
    part: int = WHOLE


@dataclass(frozen=True, kw_only=True, repr=False)
class Commit(Op):
    """Run a donating program of the user's own on the views, and commit its results."""

    handles: tuple[int, ...]
    k: int
    heavy: bool = False


@dataclass(frozen=True, kw_only=True, repr=False)
class Dead(Op):
    """Use a JAX array from before a write: it has to raise."""

    handle: int


@dataclass(frozen=True, kw_only=True)
class Program:
    """Matrices and what is done to them; its text is an expression that makes it again."""

    dtypes: tuple[str, ...]
    side: int
    owner: str = "native"  # of the memory; or jax
    viewed: bool = False  # views of every handle are taken before the first operation, and held
    ops: tuple[Op, ...] = field(default=())

    def __repr__(self) -> str:
        head = f"Program(\n    dtypes={self.dtypes}, side={self.side}, owner={self.owner!r},"
        head += f" viewed={self.viewed},"
        lines = "".join(f"\n        {op!r}," for op in self.ops)
        return f"{head}\n    ops=({lines}\n    ),\n)"


# --- drawing one ---------------------------------------------------------------------------------


@dataclass
class _Known:
    """What the generator has to know of a handle to keep to the contract."""

    out: set[str] = field(default_factory=set)  # frameworks whose views somebody holds
    settled: set[int] = field(default_factory=set)  # streams on which held views are right
    reading: bool = False  # a reader in flight that `Collect` waits for
    reading_part: bool = False  # one of a slice
    lent: bool = False  # an argument of an update in flight, which `Collect` does not wait for
    taken: str = ""  # the JAX array that somebody holds: live, dead, or not to be used
    touched: bool = False  # torch work on stream 0 that the driver has not been told of

    def written(self, stream: int, settled: bool = True) -> None:
        """Note a write by the driver."""
        self.settled = {stream} if settled else set()
        self.reading = self.reading_part = self.lent = self.touched = False
        self.taken = self.taken and ("dead" if self.taken == "live" else self.taken)


class _Draw:
    """The state of a program while it is drawn; each method draws one kind of operation."""

    def __init__(self, choose: Callable[[int], int], handles: int, cuda: bool, streams: int):
        self.choose = choose
        self.known = [_Known() for _ in range(handles)]
        self.cuda, self.streams = cuda, streams
        self.natives = ("torch",) if cuda else ("numpy", "torch")
        self.recent = [0]

    def one(self, options: Any) -> Any:
        """Choose one; the first is the simplest."""
        return options[self.choose(len(options))]

    def handle(self, *without: int) -> int:
        """Choose a handle, mostly one used just before: hazards are between neighbours."""
        recent = [i for i in self.recent if i not in without]
        if not recent or self.choose(3) == 2:
            recent = [self.one([i for i in range(len(self.known)) if i not in without])]
        self.recent = [recent[0], *(i for i in self.recent if i != recent[0])]
        return recent[0]

    def handles(self) -> tuple[int, ...]:
        first = self.handle()
        return (first,) if self.choose(4) < 3 else (first, self.handle(first))

    def place(self, *handles: int) -> dict[str, int]:
        """Choose a thread and a stream; handles touched on stream 0 alone stay there."""
        bound = any(self.known[i].touched for i in handles)
        return {
            "thread": (0, 0, 1, 2)[self.choose(4)],
            "stream": 0 if bound else self.choose(self.streams),
        }

    def look(self) -> Op | None:
        i = self.handle()
        place, known = self.place(i), self.known[i]
        put = ("put", "fetch") if self.cuda else ("fetch",)
        held = [by for by in self.natives if by in known.out and place["stream"] in known.settled]
        if held and self.choose(2) == 1:
            return Look(handle=i, by=self.one(held), how="held", **place)
        by = self.one((*self.natives, "jax", "host", *put))
        hows = ["fresh"] if by in ("host", *put) else ["fresh", "scope"]
        hows += ["held"] * 2 * (by == "jax" and known.taken == "live")
        how = self.one(hows)
        native = by in self.natives or by == "host"
        part = self.one(range(PARTS if native else COLUMNS)) if how != "held" else WHOLE
        if how == "fresh":
            self._viewed(known, by, place["stream"], part)
        return Look(handle=i, by=by, how=how, part=part, **place)

    def _viewed(self, known: _Known, by: str, stream: int, part: int = WHOLE) -> None:
        if by in self.natives:
            known.settled.add(stream)
            if part == WHOLE:
                known.out.add(by)
        elif by == "jax" and part == WHOLE:
            known.taken = "live"

    def reader(self) -> Op | None:
        handles = self.handles()
        place, known = self.place(*handles), [self.known[i] for i in handles]
        by = self.one(("jax", "jax", "torch")) if self.cuda else "jax"
        held = by == "jax" and all(one.taken == "live" for one in known)
        how = self.one(["fresh", "scope"] + ["held"] * held)
        part = self.one(range(COLUMNS)) if how != "held" and len(handles) == 1 else WHOLE
        for one in known:
            if by == "torch" and how == "fresh":
                one.touched, place["stream"] = True, 0
            one.reading = True
            one.reading_part = one.reading_part or (by == "jax" and part != WHOLE)
        if how == "fresh":
            for one in known:
                self._viewed(one, by, place["stream"], part)
        return Reader(handles=handles, by=by, how=how, part=part, **place)

    def collect(self) -> Op | None:
        for one in self.known:
            one.reading = one.reading_part = False
        return Collect()

    def write(self) -> Op | None:
        handles = self.handles()
        place, by = self.place(*handles), self.one(self.natives)
        known, hows = self.known[handles[0]], ["scope"]
        if len(handles) == 1 and not known.reading and not known.lent:
            hows += ["fresh"] + ["held"] * (by in known.out and 0 in known.settled)
        how = self.one(hows)
        part = self.one(range(PARTS)) if len(handles) == 1 and how != "held" else WHOLE
        for i in handles:
            if how == "scope":
                self.known[i].written(place["stream"])
        if how != "scope":
            place["stream"] = 0
            self._viewed(known, by, 0, part)
            known.settled, known.touched = {0}, self.cuda
            known.taken = known.taken and "not to be used"
        heavy = self.cuda and self.choose(2) == 1
        return Write(handles=handles, by=by, k=self.k(), how=how, part=part, heavy=heavy, **place)

    def k(self) -> int:
        return 1 + self.choose(9)

    def update(self, argument: Any = None) -> Op | None:
        handles = self.handles() if argument is None else (self.handle(argument),)
        by = self.one(("jax", "jax", "jax", *self.natives, "torch"))
        part = WHOLE
        if len(handles) == 1 and argument is None:
            part = self.one((WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, 1, 2, 3))
            if (
                part == WHOLE
                and (argument := self.one((None, None, None, "handle", "array"))) == "handle"
            ):
                argument = self.handle(*handles)
        others = (argument,) if isinstance(argument, int) else ()
        place = self.place(*handles, *others)
        ordered = by != "jax" or self.choose(3) < 2
        for i in handles:
            known = self.known[i]
            known.written(place["stream"], ordered and (by != "jax" or bool(known.out)))
        for i in others:
            self.known[i].lent = self.known[i].lent or by == "jax" or self.cuda
        heavy = (by == "jax" or self.cuda) and self.choose(3) > 0
        alone = by == "jax" and len(handles) == 1 and argument is None
        jitted = self.one(("", "", "", "donating", "plain")) if alone else ""
        return Update(
            handles=handles,
            by=by,
            k=self.k(),
            argument=argument,
            part=part,
            ordered=ordered,
            heavy=heavy,
            jitted=jitted,
            **place,
        )

    def after(self) -> Op | None:
        """Draw what an update in flight is most likely to go wrong with, straight after it."""
        last = self.recent[0]
        return self.update(last) if self.choose(4) == 0 else self.look()

    def copy(self) -> Op | None:
        i = self.handle()
        views = [f"{name} view" for name in (*self.natives, "jax")]
        source = self.one(("numpy", "torch", "jax", "own", "buffer", *views))
        other = self.handle(i) if source == "buffer" or source in views else None
        part = WHOLE if other is not None or source == "own" else self.one(range(PARTS))
        place = self.place(i) if other is None else self.place(i, other)
        if source in views:
            self._viewed(self.known[other], source.removesuffix(" view"), place["stream"])
        if other is not None:
            self.known[other].lent = self.known[other].lent or self.cuda
        self.known[i].written(place["stream"])
        if source == "own":
            self.known[i].taken = "not to be used"
        return Copy(handle=i, source=source, k=self.k(), other=other, part=part, **place)

    def fill(self) -> Op | None:
        i = self.handle()
        place = self.place(i)
        self.known[i].written(place["stream"])
        return Fill(handle=i, k=self.k(), part=self.one(range(PARTS)), **place)

    def commit(self) -> Op | None:
        handles = self.handles()
        if any(self.known[i].reading_part for i in handles):
            # The driver does not see a program of the user's own, and so cannot make it wait for
            # readers of another view of the memory.
            return None
        place = self.place(*handles)
        for i in handles:
            self.known[i].written(place["stream"], bool(self.known[i].out))
        return Commit(handles=handles, k=self.k(), heavy=self.choose(3) > 0, **place)

    def dead(self) -> Op | None:
        found = [i for i, known in enumerate(self.known) if known.taken == "dead"]
        return Dead(handle=self.one(found), thread=0) if found else None


KINDS = (
    *("look", "reader", "update", "write") * 5,
    *("look", "update", "commit", "copy") * 3,
    *("fill", "collect", "dead", "dead"),
)


def draw(
    choose: Callable[[int], int],
    *,
    cuda: bool = False,
    streams: int = 1,
    side: int = 256,
    longest: int = 20,
) -> Program:
    """Draw a program from ``choose(n)``, which gives a number from 0 to n - 1; 0 is simplest."""
    dtypes = tuple(DTYPES[choose(2)] for _ in range((2, 2, 3, 4)[choose(4)]))
    owner = "jax" if not cuda and choose(6) == 5 else "native"
    drawing = _Draw(choose, len(dtypes), cuda, streams)
    viewed = choose(2) == 1
    if viewed:
        for known in drawing.known:
            known.out, known.settled, known.taken = set(drawing.natives), {0}, "live"
    ops = []
    for _ in range(6 + choose(longest - 5)):
        kind = choose(len(KINDS) + 1)  # 0 is nothing, so that hypothesis can leave one out
        op = getattr(drawing, KINDS[kind - 1])() if kind else None
        if op is not None:
            ops.append(op)
        if isinstance(op, (Update, Commit)) and op.heavy and choose(2):
            ops.append(drawing.after())
    return Program(dtypes=dtypes, side=side, owner=owner, viewed=viewed, ops=tuple(ops))
