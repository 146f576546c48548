"""The proof that nothing is left that bills: three spaced reads of the list of vast.ai without a
label of the run, and the destroy that goes on until they succeed. It needs neither a journal nor a
disk.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from ops.errors import BoxLeaked, MilkteaError, Refused
from ops.job.label import is_of
from ops.market.client import Vast
from ops.market.models import Instance
from ops.wait import Clock, until

T = TypeVar("T")

READS = 3  # lists in a row without an instance prove that it is absent
PROOF_S = 2.0  # between reads after a destroy
DESTROY_PATIENCE_S = 600.0


def instances_of_run(vast: Vast, run_id: str, *, every_s: float = PROOF_S) -> list[Instance]:
    """Every instance with a label of this run. Stops at the first read that shows any; an empty
    list is proven by READS reads, `every_s` apart. Raises MarketError when a read fails: the reads
    before it prove nothing."""
    return _read(lambda: vast.instances(_of(run_id)), vast.clock, every_s)[0]


def _of(run_id: str) -> Callable[[str], bool]:
    return lambda label: is_of(label, run_id)


def _read(look: Callable[[], list[T]], clock: Clock, every_s: float) -> tuple[list[T], list[float]]:
    """(what `look` found, or nothing after READS looks; the unix seconds of each look)."""
    reads: list[float] = []
    while True:
        found = look()
        reads.append(round(clock.now(), 2))
        if found or len(reads) == READS:
            return found, reads
        clock.sleep(every_s)


def until_absent(
    vast: Vast,
    run_id: str,
    *,
    known: int | None = None,
    begun: Callable[[], object] = lambda: None,
    tell: Callable[[str], object] = lambda trouble: None,
) -> list[float]:
    """Destroy instance `known` and every instance of this run, again and again, until vast.ai has
    taken the DELETE of each and READS spaced reads in a row list none. Returns the unix seconds of
    those reads.

    `begun` is called once the first DELETE is sent, `tell` with each trouble; what they raise is
    ignored. Raises BoxLeaked without proof after DESTROY_PATIENCE_S, or at once where vast.ai does
    not accept the key (auth_error). Nothing else ends it."""
    pending = [] if known is None else [known]
    trouble, first = "", True
    refused: set[int] = set()  # no DELETE of these was taken: a list without them may be late

    def absent() -> list[float] | None:
        nonlocal pending, trouble, first
        trouble = ""
        for instance_id in pending:
            said = _try_destroy(vast, instance_id, run_id, known)
            trouble = said or trouble
            (refused.add if said else refused.discard)(instance_id)
        if first:
            first = False
            ignore_errors(begun)
        try:
            listed, reads = _ids_of_run(vast, run_id)
        except Exception as e:  # a list that cannot be read proves nothing, whatever it holds
            _raise_leaked_if_final(e, run_id, known)
            trouble = trouble or message_of(e)
        else:
            pending = sorted({*listed, *refused})
            if not pending:
                return reads
            trouble = trouble or "still listed"
        ignore_errors(tell, trouble)
        return None

    patience_s = DESTROY_PATIENCE_S
    found = until(absent, every_s=PROOF_S, timeout_s=patience_s, clock=vast.clock, tries=3)
    if found is None:
        raise _box_leaked(run_id, known, trouble)
    return found


def _try_destroy(vast: Vast, instance_id: int, run_id: str, known: int | None) -> str:
    """Send one DELETE. Returns what went wrong, or "". Raises BoxLeaked where the key is not
    accepted."""
    try:
        vast.destroy(instance_id)
    except Exception as e:  # it is sent again, whatever came back
        _raise_leaked_if_final(e, run_id, known)
        return message_of(e)
    return ""


def _ids_of_run(vast: Vast, run_id: str) -> tuple[list[int], list[float]]:
    """(ids of the instances of this run, the unix seconds of each read). It reads only id and
    label of each row: a row that cannot be parsed as an instance does not stop a destroy."""

    def look() -> list[int]:
        return [number for number, label in vast.labels() if is_of(label, run_id)]

    return _read(look, vast.clock, PROOF_S)


def _raise_leaked_if_final(e: Exception, run_id: str, known: int | None) -> None:
    if isinstance(e, Refused) and e.code == "auth_error":
        raise _box_leaked(run_id, known, str(e)) from e


def message_of(e: Exception) -> str:
    return str(e) if isinstance(e, MilkteaError) else f"{type(e).__name__}: {e}"


def ignore_errors(act: Callable[..., object], *args: object) -> None:
    """Call `act`. A full disk, a closed screen or text that cannot be encoded must not stop a
    destroy."""
    with suppress(Exception):
        act(*args)


def _box_leaked(run_id: str, instance_id: int | None, trouble: str) -> BoxLeaked:
    which = "" if instance_id is None else f" (instance {instance_id})"
    return BoxLeaked(f"the box of {run_id}{which} is not proven destroyed: {trouble}")
