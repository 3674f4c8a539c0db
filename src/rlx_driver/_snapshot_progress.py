"""Who is told how far a snapshot has got: nobody, a function, or a bar in the terminal."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from rlx_driver.errors import MissingPackageError, SnapshotError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Progress: TypeAlias = bool | Callable[[int, int], object] | None

__all__ = ["reporting"]


@contextmanager
def reporting(progress: Progress, total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Give what is to be told of each piece that is done, in bytes.

    Parameters
    ----------
    progress
        None or False: nobody; True: a bar by rich; a function: called with the bytes done and
        those in all, at the start and after each piece.
    total
        Bytes in all.
    what
        Stands before the bar.

    Raises
    ------
    SnapshotError
        `progress` is something else.
    MissingPackageError
        rich is not installed.
    """
    if progress is None or progress is False:
        yield lambda nbytes: None
    elif progress is True:
        with _bar(total, what) as advance:
            yield advance
    elif callable(progress):
        yield _counting(progress, total)
    else:
        raise SnapshotError(
            f"progress is {progress!r}; give True, None, or a function of the bytes done and the "
            "bytes in all. Nothing was changed"
        )


def _counting(tell: Callable[[int, int], object], total: int) -> Callable[[int], None]:
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell(done, total)

    tell(0, total)
    return advance


@contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    try:
        from rich import progress as rich
    except ImportError as error:
        raise MissingPackageError(
            f"progress=True draws with rich, which cannot be imported ({error}): pip install "
            "rlx-driver[snapshots], or give a function",
            name="rich",
        ) from error
    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.DownloadColumn(binary_units=True),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
