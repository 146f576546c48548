"""What can go wrong, sorted by who must act.

    MilkteaError
    ├── ConfigError         2   the user edits the job file
    ├── PreflightError      3   the user mends data, key, credit or image; nothing was spent
    ├── MarketError         4   vast.ai did not give a machine
    │   ├── NoOffer             no offer passes; says which filter removed most
    │   ├── OfferGone           taken between search and create: the next one is tried
    │   ├── Refused             vast.ai said no, and would again (credit, key, arguments)
    │   ├── RateLimited         asked too often: waited and asked again
    │   └── NoAnswer            no reply, or one that says nothing: the label decides what exists
    ├── BoxError            5   this machine is no good: destroyed, the next is tried
    │   ├── NeverReady          did not boot or let us in by its deadline
    │   ├── Unsuitable          is not what was offered
    │   ├── Preempted           outbid or out of credit: the newest checkpoint goes on elsewhere
    │   ├── Lost                the connection broke; says nothing about the training
    │   └── HostKeyChanged      somebody else answers at its address: stop
    ├── TrainingError       6   the training ended without an adapter
    │   ├── Failed              the trainer's own exit code and reason
    │   ├── Stalled             no event for limits.stall_minutes
    │   └── OverBudget          limits.max_usd or limits.max_hours reached
    ├── AdapterError        7   what came home is not a whole, sane adapter
    ├── JournalError        8   the run's journal is damaged, or of a newer version
    │   ├── Fenced              another client acts on this run; this one stops
    │   ├── Elsewhere           the run was rented at another address or by another account
    │   └── NotYours            the run is another person's: asked about first, or refused
    └── BoxLeaked          70   a box may still be billing

Every message has three parts: what happened, with the numbers; the state of the money; `hint`, the
next command to type.
"""

from __future__ import annotations

import errno


class MilkteaError(Exception):
    """`money` says what is or is not being billed; `hint` is what to type or edit next.

    A raise that knows more of the money than its class says it. Where none did, the meter is filled
    in when the error leaves the run (`ops.run.session.metered`): by then the box is gone."""

    exit_code = 1
    money = "nothing was spent"
    hint = ""

    def __init__(self, what: str, *, money: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        if money is not None:
            self.money = money
        if hint is not None:
            self.hint = hint

    def fill_in_money(self, money: str) -> None:
        """Say `money` unless the raise, or an earlier call, said it."""
        vars(self).setdefault("money", money)


class ConfigError(MilkteaError):
    exit_code = 2
    hint = "edit the job file; `milktea schema` prints every key, jobs/reference.toml explains them"


class PreflightError(MilkteaError):
    exit_code = 3


class MarketError(MilkteaError):
    """`code` is vast.ai's own word for a refusal, "" without one; `instance_id` the contract that a
    reply names although it says no."""

    exit_code = 4

    def __init__(
        self,
        what: str,
        *,
        code: str = "",
        instance_id: int | None = None,
        money: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what, money=money, hint=hint)
        self.code = code
        self.instance_id = instance_id


class NoOffer(MarketError):
    hint = "relax the filter named above in [offer], or run `milktea plan` later: the market moves"


class OfferGone(MarketError):
    hint = "run it again: offers come and go"


class Refused(MarketError):
    pass


class RateLimited(MarketError):
    hint = "wait a minute and run it again"


class NoAnswer(MarketError):
    money = "unknown"
    hint = "run `milktea reap`: it lists by label what exists and destroys it"


class BoxError(MilkteaError):
    exit_code = 5
    money = "the box is still rented"


class NeverReady(BoxError):
    pass


class Unsuitable(BoxError):
    pass


class Preempted(BoxError):
    pass


class Lost(BoxError):
    hint = "`milktea resume RUN` goes on from the journal"


class HostKeyChanged(BoxError):
    pass


class TrainingError(MilkteaError):
    exit_code = 6


class Failed(TrainingError):
    pass


class Stalled(TrainingError):
    pass


class OverBudget(TrainingError):
    pass


class AdapterError(MilkteaError):
    exit_code = 7
    money = "the box is kept, with the result on it"


class JournalError(MilkteaError):
    exit_code = 8


class DiskError(JournalError):
    """This machine's disk does not take or give what a run needs there."""

    hint = "make room, or mend the rights of the folder named above; then `milktea resume RUN`"


_OF_A_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.EFBIG,
    errno.EMFILE,
)


def disk_error(error: OSError) -> DiskError | None:
    """`error` in words where it is of this machine's disk; None for another, a bug of ours."""
    if error.errno not in _OF_A_DISK:
        return None
    where = f": {error.filename}" if error.filename else ""
    return DiskError(f"this machine's disk fails: {error.strerror}{where}")


class Fenced(JournalError):
    money = "the other client looks after the box"


class Elsewhere(JournalError):
    money = "unknown here; what the run has rented is looked after by its own account"
    hint = "set VAST_API_KEY (and VAST_URL) to those with which the run was rented"


class NotYours(JournalError):
    money = "nothing was changed"


class BoxLeaked(MilkteaError):
    exit_code = 70
    money = "it may be billing"
    hint = (
        "run `milktea reap`; if that fails, destroy the instance at "
        "https://cloud.vast.ai/instances/"
    )
