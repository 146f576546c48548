"""Several calls at once: runs until all is done, or until something says stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ops.errors import MilkteaError, PreflightError
from ops.prepare.calls import Calls, Spent, Stopped
from trainer.data.words import number_of

T = TypeVar("T")
Tell = Callable[[int, int, Spent], None]  # done, of how many, what was spent
INTERRUPTED = "it was interrupted"
LOOK_S = 0.2


def no_tell(done: int, total: int, spent: Spent) -> None:
    """Tells nobody."""


def journal_of(out: Path) -> Path:
    """Where the calls for a file stand."""
    return out.with_name(out.name + ".calls.jsonl")


def at_once(
    parts: Sequence[T], act: Callable[[T], None], calls: Calls, number: int, tell: Tell = no_tell
) -> None:
    """`act` on each part, so many at a time. Where the work ends early `calls.why_stopped` says
    why, and what was on its way has been waited for. Raises what `act` raises, but Stopped."""
    with ThreadPoolExecutor(number) as pool, _signals(calls):
        left: set[Future[bool]] = {pool.submit(_until_stopped, act, part) for part in parts}
        failed: BaseException | None = None
        whole = 0
        while left:
            done, left = wait(left, LOOK_S, FIRST_EXCEPTION)
            for one in done:
                if (error := one.exception()) is None:
                    whole += one.result()
                elif failed is None:
                    failed = error
                    calls.stop(f"{type(error).__name__}: {error}")
            tell(whole, len(parts), calls.spent)
        if failed is not None:
            raise failed


def _until_stopped(act: Callable[[T], None], part: T) -> bool:
    """Whether `act` came to its end."""
    try:
        act(part)
    except Stopped:
        return False
    return True


@contextmanager
def _signals(calls: Calls) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets the calls on their way come home; the second ends all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def ends(number: int, frame: object) -> None:
        threading.Thread(target=calls.stop, args=(INTERRUPTED,)).start()  # it takes a lock
        for other, handler in before.items():
            signal.signal(other, handler or signal.SIG_DFL)

    for number in numbers:
        signal.signal(number, ends)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def ended_early(calls: Calls, done: int, total: int, what: str) -> MilkteaError:
    """The error for work that stopped before its end."""
    spent = calls.spent
    return PreflightError(
        f"{calls.why_stopped}; {done:,} of {number_of(total, what, 'is', 'are')} done",
        money=f"${spent.usd:.4f} at most, of {number_of(spent.answered, 'answer')}, which are kept",
        hint=calls.what_next,
    )
