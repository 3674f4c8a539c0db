"""The ledger: what it counts, for whom, and that `no_copies` stops a copy before it is made."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import numpy as np
import pytest

import rlx_driver as rlx
from rlx_driver._ledger import CopyCount, Ledger, LedgerCounts
from support import aligned, read_bytes


@pytest.fixture
def ledger():
    return Ledger()


def fill(ledger):
    ledger.count_exchange()
    ledger.count_exchange()
    ledger.count_host_wait()
    ledger.will_copy(100, "alignment")
    ledger.will_copy(50, "alignment")
    ledger.will_copy(7, "strides")


def test_a_new_ledger_is_empty(ledger):
    assert ledger.snapshot() == LedgerCounts()
    assert (ledger.exchanges, ledger.copies, ledger.bytes_copied, ledger.host_waits) == (0,) * 4
    assert ledger.reasons == {}


def test_it_counts(ledger):
    fill(ledger)
    assert ledger.exchanges == 2
    assert ledger.copies == 3
    assert ledger.bytes_copied == 157
    assert ledger.host_waits == 1
    assert ledger.reasons == {"alignment": CopyCount(2, 150), "strides": CopyCount(1, 7)}


def test_reset_sets_every_counter_to_zero(ledger):
    fill(ledger)
    ledger.reset()
    assert ledger.snapshot() == LedgerCounts()


def test_a_snapshot_does_not_change(ledger):
    fill(ledger)
    before = ledger.snapshot()
    ledger.reasons.pop("alignment", None)
    fill(ledger)
    assert before == LedgerCounts(
        2, 3, 157, 1, {"alignment": CopyCount(2, 150), "strides": CopyCount(1, 7)}
    )
    with pytest.raises(AttributeError):
        before.copies = 0
    assert ledger.copies == 6


def test_the_difference_of_two_moments(ledger):
    fill(ledger)
    before = ledger.snapshot()
    ledger.will_copy(3, "strides")
    ledger.will_copy(4, "x64")
    ledger.count_host_wait()
    assert ledger.snapshot() - before == LedgerCounts(
        0, 2, 7, 1, {"strides": CopyCount(1, 3), "x64": CopyCount(1, 4)}
    )
    assert before - before == LedgerCounts()


def test_a_record_counts_a_block(ledger):
    fill(ledger)
    with ledger.record() as outer:
        assert outer.counts == LedgerCounts()
        ledger.count_exchange()
        assert outer.counts.exchanges == 1, "counts are live inside the block"
        with ledger.record() as inner:
            ledger.will_copy(5, "strides")
        ledger.count_exchange()
    ledger.count_exchange()
    assert outer.counts == LedgerCounts(2, 1, 5, 0, {"strides": CopyCount(1, 5)})
    assert inner.counts == LedgerCounts(0, 1, 5, 0, {"strides": CopyCount(1, 5)})
    assert ledger.exchanges == 5


def test_a_record_ends_with_an_error_too(ledger):
    def count_and_fail():
        with ledger.record() as record:
            seen.append(record)
            ledger.count_exchange()
            raise ZeroDivisionError

    seen = []
    with pytest.raises(ZeroDivisionError):
        count_and_fail()
    ledger.count_exchange()
    assert seen[0].counts.exchanges == 1


def test_its_text_tells_all(ledger):
    fill(ledger)
    text = str(ledger.snapshot())
    assert text.splitlines() == [
        "2 exchanges, 3 copies (157 bytes), 1 host waits",
        "  2 x alignment (150 bytes)",
        "  1 x strides (7 bytes)",
    ]
    assert "3 copies" in repr(ledger)


def test_threads_lose_no_count(ledger):
    def work():
        for _ in range(500):
            fill(ledger)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.snapshot() == LedgerCounts(
        8000,
        12000,
        157 * 4000,
        4000,
        {"alignment": CopyCount(8000, 600_000), "strides": CopyCount(4000, 28_000)},
    )


def test_a_snapshot_is_of_one_moment(ledger):
    """A total that is not the sum of its reasons would show that a lock is missing."""
    stop = threading.Event()

    def work():
        while not stop.is_set():
            ledger.will_copy(1, "a")
            ledger.will_copy(1, "b")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(500):
            counts = ledger.snapshot()
            assert counts.copies == sum(c.copies for c in counts.reasons.values())
            a = counts.reasons.get("a", CopyCount()).copies
            b = counts.reasons.get("b", CopyCount()).copies
            assert a - b in (0, 1)
    finally:
        stop.set()
        thread.join()


# --- no_copies -----------------------------------------------------------------------------------


def test_no_copies_stops_a_copy_before_it_is_counted(ledger):
    with rlx.no_copies(), pytest.raises(rlx.ZeroCopyError) as caught:
        ledger.will_copy(1234, "strides (to jax)")
    assert "1,234 bytes" in str(caught.value)
    assert "strides (to jax)" in str(caught.value)
    assert "no_copies" in str(caught.value)
    assert ledger.snapshot() == LedgerCounts()
    ledger.will_copy(1, "strides")
    assert ledger.copies == 1


def test_no_copies_lets_everything_else_through(ledger):
    with rlx.no_copies():
        ledger.count_exchange()
        ledger.count_host_wait()
    assert (ledger.exchanges, ledger.host_waits) == (1, 1)


def test_no_copies_nests_and_ends_with_an_error(ledger):
    with rlx.no_copies():
        with rlx.no_copies():
            pass
        with pytest.raises(rlx.ZeroCopyError):
            ledger.will_copy(1, "still inside the outer one")
    with pytest.raises(ZeroDivisionError), rlx.no_copies():
        raise ZeroDivisionError
    ledger.will_copy(1, "outside")


def test_no_copies_holds_for_its_own_thread(ledger):
    def work():
        ledger.will_copy(1, "in another thread")

    with rlx.no_copies():
        thread = threading.Thread(target=work, daemon=True)
        context = contextvars.Context()  # what a thread starts with
        context.run(thread.start)
        thread.join()
    assert ledger.copies == 1


def test_no_copies_holds_for_its_own_task(ledger):
    async def strict(entered, leave):
        with rlx.no_copies():
            entered.set()
            await leave.wait()
            with pytest.raises(rlx.ZeroCopyError):
                ledger.will_copy(1, "strict")

    async def main():
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(strict(entered, leave))
        await entered.wait()
        ledger.will_copy(1, "beside it")
        leave.set()
        await task

    asyncio.run(main())
    assert ledger.reasons == {"beside it": CopyCount(1, 1)}


def test_no_copies_as_a_decorator_stops_too(ledger):
    @rlx.no_copies()
    def step():
        ledger.will_copy(1, "inside")

    for _ in range(2):
        with pytest.raises(rlx.ZeroCopyError):
            step()
    ledger.will_copy(1, "outside")


# --- the ledger of the process -------------------------------------------------------------------


def test_the_driver_tells_it_of_transfers():
    x = aligned(16)
    x[:] = 3
    b = rlx.Buffer.zeros(16)
    with rlx.ledger.record() as record:
        b.copy_from(x)
        b.to_host()
    assert record.counts.copies == 2
    assert record.counts.bytes_copied == 128


def test_a_transfer_stopped_by_no_copies_moves_no_byte():
    b = rlx.Buffer.zeros(16)
    before, epoch = read_bytes(b), b.epoch
    x = np.ones(16, np.float32)
    with rlx.no_copies():
        for transfer in (
            lambda: b.copy_from(x),
            lambda: b.to_host(),
            lambda: rlx.Buffer.from_array(x, copy=True),
            lambda: rlx.exchange(x, "numpy", copy=True),
        ):
            with pytest.raises(rlx.ZeroCopyError, match="no_copies"):
                transfer()
    assert read_bytes(b) == before
    assert b.epoch == epoch
    assert rlx.ledger.copies == 0
