"""The proof that nothing is left that bills: three spaced reads of the list of vast.ai without the
label, and the destroy that goes on until they succeed. It needs neither a journal nor a disk.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from ops.errors import BoxLeaked, MilkteaError, Refused
from ops.market.client import Vast
from ops.market.models import Instance
from ops.wait import Clock, until

T = TypeVar("T")

READS = 3  # lists in a row without an instance prove that it is absent
PROOF_S = 2.0  # between reads after a destroy
DESTROY_PATIENCE_S = 600.0


def instances_with_label(vast: Vast, label: str, *, every_s: float = PROOF_S) -> list[Instance]:
    """Every instance with `label`. Stops at the first read that shows any; an empty list is proven
    by READS reads, `every_s` apart. Raises MarketError when a read fails: the reads before it prove
    nothing."""
    return _read(lambda: vast.instances(label=label), vast.clock, every_s)[0]


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
    label: str,
    *,
    known: int | None = None,
    begun: Callable[[], object] = lambda: None,
    tell: Callable[[str], object] = lambda trouble: None,
) -> list[float]:
    """Destroy instance `known` and every instance with `label`, again and again, until vast.ai has
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
            said = _try_destroy(vast, instance_id, label, known)
            trouble = said or trouble
            (refused.add if said else refused.discard)(instance_id)
        if first:
            first = False
            ignore_errors(begun)
        try:
            listed, reads = _ids_with_label(vast, label)
        except Exception as e:  # a list that cannot be read proves nothing, whatever it holds
            _raise_leaked_if_final(e, label, known)
            trouble = trouble or message_of(e)
        else:
            pending = sorted({*listed, *refused})
            if not pending:
                return reads
            trouble = trouble or "still listed"
        ignore_errors(tell, trouble)
        return None

    found = until(absent, every_s=PROOF_S, timeout_s=DESTROY_PATIENCE_S, clock=vast.clock)
    if found is None:
        raise _box_leaked(label, known, trouble)
    return found


def _try_destroy(vast: Vast, instance_id: int, label: str, known: int | None) -> str:
    """Send one DELETE. Returns what went wrong, or "". Raises BoxLeaked where the key is not
    accepted."""
    try:
        vast.destroy(instance_id)
    except Exception as e:  # it is sent again, whatever came back
        _raise_leaked_if_final(e, label, known)
        return message_of(e)
    return ""


def _ids_with_label(vast: Vast, label: str) -> tuple[list[int], list[float]]:
    """(ids of the instances with `label`, the unix seconds of each read). It reads only id and
    label of each row: a row that cannot be parsed as an instance does not stop a destroy."""

    def look() -> list[int]:
        return [number for number, theirs in vast.labels() if theirs == label]

    return _read(look, vast.clock, PROOF_S)


def _raise_leaked_if_final(e: Exception, label: str, known: int | None) -> None:
    if isinstance(e, Refused) and e.code == "auth_error":
        raise _box_leaked(label, known, str(e)) from e


def message_of(e: Exception) -> str:
    return str(e) if isinstance(e, MilkteaError) else f"{type(e).__name__}: {e}"


def ignore_errors(act: Callable[..., object], *args: object) -> None:
    """Call `act`. A full disk, a closed screen or text that cannot be encoded must not stop a
    destroy."""
    with suppress(Exception):
        act(*args)


def _box_leaked(label: str, instance_id: int | None, trouble: str) -> BoxLeaked:
    which = "" if instance_id is None else f" (instance {instance_id})"
    return BoxLeaked(f"the box of {label}{which} is not proven destroyed: {trouble}")
