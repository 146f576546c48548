"""Batches made ahead: the same ones, in order, at most one too many; what fails there fails
here."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from trainer.data import batch, packing
from trainer.data.tokenised import Rows
from trainer.loop.progress import Readback

CPU = torch.device("cpu")


def some_rows(*lengths: int) -> Rows:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(starts[-1], dtype=np.int32)
    return Rows(
        ids,
        ids % 3 > 0,
        starts,
        np.ones(len(lengths), np.bool_),
        [f"f:{i}" for i in range(len(lengths))],
    )


def work(step: int) -> batch.Work:
    return batch.Work([], {}, step, 1, [])


def test_steps_come_in_order_and_only_one_is_made_ahead() -> None:
    made: list[int] = []
    ready = threading.Semaphore(0)

    def make(step: int) -> batch.Work:
        made.append(step)
        ready.release()
        return work(step)

    ahead = batch.Prefetcher(make, 3, 7)
    taken = []
    for step in range(3, 7):
        taken.append(ahead.take().count)
        while len(made) < min(step + 2 - 3, 4):
            assert ready.acquire(timeout=30)
        assert made == list(range(3, min(step + 2, 7)))
    ahead.close()
    assert taken == [3, 4, 5, 6]


def test_an_error_in_the_thread_is_raised_when_its_step_is_taken() -> None:
    def make(step: int) -> batch.Work:
        if step == 1:
            raise ValueError("row 7 is broken")
        return work(step)

    ahead = batch.Prefetcher(make, 0, 3)
    assert ahead.take().count == 0
    with pytest.raises(ValueError, match="row 7"):
        ahead.take()
    ahead.close()


@pytest.mark.parametrize("collate", [batch.packed, batch.padded])
def test_a_batch_made_on_the_host_is_the_batch_made_on_the_device(collate) -> None:
    rows = some_rows(5, 9, 2)
    there, here = (
        batch.on(CPU, batch.pinned(collate(rows, [2, 0, 1], CPU), CPU)),
        collate(rows, [2, 0, 1], CPU),
    )
    assert there.keys() == here.keys()
    for name, value in here.items():
        assert (
            torch.equal(there[name], value)
            if isinstance(value, torch.Tensor)
            else there[name] == value
        )


def test_numbers_that_are_read_later_are_those_of_their_step() -> None:
    buffer = torch.tensor([1.5, 0.0])
    reading = Readback(torch.cat([buffer, torch.tensor([2.0])]))
    buffer.zero_()
    assert reading.read() == [1.5, 0.0, 2.0]


def test_two_threads_that_ask_for_different_epochs_get_the_rows_of_their_own() -> None:
    """As a stage does that looks at its step's rows while the next step's are made."""
    order = packing.Order(5, 5, 8, seed=3)
    expected = [packing.Order(5, 5, 8, seed=3).step(k) for k in range(2)]
    wrong, interval = [], sys.getswitchinterval()

    def ask(first: int) -> None:
        wrong.extend(
            k for k in range(4000) if order.step((k + first) % 2) != expected[(k + first) % 2]
        )

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(ask, range(2)))
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
