"""The owner of a run: the one process that holds the journal's lock, runs the story and obeys
wishes.

    supervise(session)      in this process (--foreground, Python): its own screen and signals
    start(folder, vast)     in a detached process of its own; terminals attach (ops/run/attach.py)

A detached owner has no terminal: what it would show goes to `told.jsonl` in the run's folder, what
it prints to `supervisor.log`. It knows that a terminal watches by a lock that each terminal shares,
and what the user wants by a file (ops/run/wishes.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from ops.detached import start_detached
from ops.errors import DiskError, Fenced, JournalError, MilkteaError
from ops.job.notify import Notify
from ops.job.plan import Plan
from ops.market.client import Vast
from ops.market.models import Instance
from ops.market.provider import provider_from
from ops.market.ranking import Ranking
from ops.run import journal, wishes
from ops.run.folders import ours
from ops.run.interrupt import default_wish
from ops.run.journal import Journal, Line
from ops.run.meter import plan_of
from ops.run.notify import Notifier
from ops.run.rent_and_chat import end_conversation
from ops.run.rent_and_train import rent_and_train
from ops.run.rental import destroy
from ops.run.session import Detached, Interrupted, Kept, Session, metered
from ops.wait import RealClock
from trainer.wire.events import Event, Sample, Score

LOG = "supervisor.log"
PROGRESS = "told.jsonl"
MARKET = "market.json"  # the ranking that the user saw, for the first choice of a machine
WATCHED = "watched"  # locked (shared) by each terminal that watches
LISTEN_S = 0.25  # between two looks for a wish and for terminals
REPEAT_S = 5.0  # before the same line is written to PROGRESS again
MARKET_S = 300.0  # after which MARKET is too old
_market: TypeAdapter[Ranking] = TypeAdapter(Ranking)


# -- the owner -------------------------------------------------------------------------------------


@metered
def supervise(
    session: Session, seen: Ranking | None = None, talk: Callable[[Session], None] | None = None
) -> None:
    """Run the story in this process and write how it ended into the journal. Returns with the
    adapter here, or with a box that was left; raises as `rent_and_train`, and Interrupted where the
    run was ended before the training. `talk` is the story of a box that was rented to talk."""
    session.note("owned", pid=os.getpid())
    with _signals(session), _listening(session):
        try:
            if session.plan.trains:
                rent_and_train(session, seen)
            else:
                (talk or end_conversation)(session)
        except Kept:
            pass  # its "kept" line says so
        except Detached:
            session.note("left", ends_at=session.dies_at())
        except Interrupted:
            if session.may_have_box():
                destroy(session, why="Interrupted")
            text = f"no box of this run is left; {session.money()}"
            session.note("failed", what=f"interrupted: {text}", error="Interrupted", exit_code=130)
            raise Interrupted(text) from None
        except Exception as e:
            with suppress(JournalError, OSError):  # a full disk must not hide the first error
                session.note("failed", **error_facts(e))
            raise


def error_facts(e: Exception) -> dict[str, Any]:
    """An error as the journal keeps it; `ops.run.attach` makes an error of it again. Any error but
    a MilkteaError is a bug of ours, and has exit code 1."""
    facts: dict[str, Any] = {"what": f"{type(e).__name__}: {e}", "error": type(e).__name__}
    if not isinstance(e, MilkteaError):
        return facts | {"exit_code": 1}
    return facts | {"exit_code": e.exit_code, "money": e.money, "hint": e.hint, "said": str(e)}


@contextmanager
def _signals(session: Session) -> Iterator[None]:
    """Handle signals while the block runs. SIGINT asks the user what to do; SIGUSR1 says that a
    wish has arrived; SIGTERM and SIGHUP, and SIGINT without a terminal, end the run by
    `default_wish`. Outside the main thread, where no signal arrives, this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        if number in (signal.SIGTERM, signal.SIGHUP):
            session.wish = session.wish or default_wish(session)
        session.shield.interrupt()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def _listening(session: Session) -> Iterator[None]:
    """Look for wishes and for terminals that watch, and tell whom the job names, while the block
    runs."""
    ended = threading.Event()
    main = threading.main_thread().ident if _is_main() else None
    listener, notifier = _Listener(session, main), _notifier_of(session)

    def listen() -> None:
        going = True
        while going:
            going = not ended.wait(LISTEN_S)
            with suppress(Exception):  # the next look comes
                if notifier is not None:
                    notifier.look(session.journal.lines, session.clock.now())
            with suppress(Exception):
                if going:
                    listener.look()

    thread = threading.Thread(target=listen, name="wishes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _notifier_of(session: Session) -> Notifier | None:
    """None where the job tells nobody, or what its journal says of that is not understood."""
    if session.plan.notify is None:
        return None
    with suppress(ValueError):
        notify = Notify.model_validate(session.plan.notify)
        return Notifier(notify, session.journal.folder, session.journal.lines)
    return None


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


class _Listener:
    """Looks for a wish, interrupts the thread `main` for it, and notes in the journal when
    terminals begin and cease to watch."""

    def __init__(self, session: Session, main: int | None) -> None:
        self._session, self._main = session, main
        self._last_wish, self._watched = "", False

    def look(self) -> None:
        folder = self._session.journal.folder
        wish = wishes.read(folder)
        if wish and not self._last_wish and self._main is not None:
            self._session.wish = wish
            signal.pthread_kill(self._main, signal.SIGUSR1)
        self._last_wish = wish or ""
        self._session.screen.meter(self._session.spent_usd(), self._session.plan.max_usd)
        watched = is_watched(folder)
        if watched != self._watched:
            self._watched = watched
            kind = "attached" if watched else "detached"
            self._session.journal.append(kind)


def is_watched(folder: Path) -> bool:
    """Whether a terminal watches this run."""
    return journal.is_locked(folder / WATCHED, fcntl.LOCK_EX)


# -- a process of its own --------------------------------------------------------------------------


def start(folder: Path, vast: Vast, seen: Ranking | None = None) -> int:
    """Start a detached owner of this run, in a session of its own; its process number, once it
    holds the run. `seen` is the market as the user has seen it.

    Raises Fenced where another process holds it, JournalError where it does not come up."""
    if seen is not None:
        with open(folder / MARKET, "wb", opener=ours) as file:
            file.write(_market.dump_json(seen))
    env = {
        "VAST_URL": vast.provider.url,
        "VAST_API_KEY": vast.provider.api_key,
        "MILKTEA_PACE": str(vast.clock.pace),
    }
    ready, ready_fd = os.pipe()
    words = (str(folder), str(ready_fd))
    child = start_detached(
        "ops.run.supervisor", words, folder, folder / LOG, env=env, pass_fds=(ready_fd,)
    )
    os.close(ready_fd)
    with open(ready, "rb") as pipe:
        text = pipe.read()  # until it says so, or has ended
    if text == b"ready":
        return child.pid
    if journal.is_held(folder):
        raise Fenced(f"{folder.name}: another milktea is acting on this run")
    tail = (folder / LOG).read_text("utf-8", "replace")[-1000:]
    raise JournalError(
        f"{folder.name}: its supervisor did not come up: {tail.strip() or 'it said nothing'}",
        hint=f"`milktea resume {folder.name} --foreground` runs it in this process",
    )


def main() -> int:
    """`python -m ops.run.supervisor FOLDER FD`: own the run in FOLDER; "ready" is written to FD
    once its journal is locked. Returns the run's exit code."""
    folder, ready_fd = Path(sys.argv[1]), int(sys.argv[2])
    provider = provider_from(os.environ)
    assert provider is not None, "start() names the provider"
    vast = Vast(provider, RealClock(float(os.environ.get("MILKTEA_PACE") or 1)))

    def held() -> None:
        os.write(ready_fd, b"ready")
        os.close(ready_fd)

    return own(folder, vast, held)


def own(folder: Path, vast: Vast, begun: Callable[[], None] = lambda: None) -> int:
    """Take the run in this folder to its end, without a terminal, and return its exit code. `begun`
    is called once its journal is locked. Raises Fenced where another process owns it."""
    try:
        with Journal(folder) as held, FileScreen(folder) as screen:
            begun()
            session = Session(held, plan_of(held.lines), vast, screen)
            try:
                supervise(session, _saved_ranking(folder))
            except Interrupted:
                return 130
            except MilkteaError as e:
                return e.exit_code
    except DiskError as e:  # the journal cannot be opened: `start` shows these lines
        print(f"{e}\n  next: {e.hint}", file=sys.stderr)
        return e.exit_code
    return 0


def _saved_ranking(folder: Path) -> Ranking | None:
    """The ranking that `start` saved, removed once read; None where it is too old."""
    path = folder / MARKET
    try:
        fresh = time.time() - path.stat().st_mtime < MARKET_S
        seen = _market.validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    finally:
        with suppress(OSError):
            path.unlink()
    return seen if fresh else None


class FileScreen:
    """The screen of an owner without a terminal: writes what is neither in the journal nor in the
    events to PROGRESS, one JSON object a line, for the terminals that watch."""

    def __init__(self, folder: Path) -> None:
        self.samples: list[Sample] = []
        self.score: Score | None = None
        self._path = folder / PROGRESS
        self._file: IO[str] | None = None
        self._last: dict[str, tuple[float, Any]] = {}  # by kind: when, and what

    def __enter__(self) -> FileScreen:
        with suppress(OSError):  # without it terminals see less, and nothing else changes
            self._file = open(self._path, "w", encoding="utf-8", opener=ours)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            with suppress(OSError):
                self._file.close()

    def _tell(self, kind: str, **facts: Any) -> None:
        """Write at most one line of a kind in LISTEN_S, and the same line once in REPEAT_S."""
        now = time.monotonic()
        when, what = self._last.get(kind, (-REPEAT_S, None))
        if now - when < (REPEAT_S if what == facts else LISTEN_S) or self._file is None:
            return
        self._last[kind] = (now, facts)
        with suppress(OSError, ValueError):  # a full disk, or the end: nothing depends on it
            row = {"t": round(time.time(), 3), "kind": kind, **facts}
            self._file.write(json.dumps(row, ensure_ascii=True) + "\n")
            self._file.flush()

    def line(self, line: Line) -> None:
        """Nothing: the journal has it."""

    def plan(self, plan: Plan, ranking: Ranking, credit_usd: float) -> None:
        """Nothing: the terminal that started the run has shown it."""

    def event(self, event: Event, spent_usd: float, max_usd: float, dies_at_unix_s: float) -> None:
        """Nothing: events.jsonl has it."""

    def booting(self, instance: Instance, waited_s: float) -> None:
        self._tell("booting", instance=asdict(instance), waited_s=round(waited_s))

    def connecting(self, message: str) -> None:
        self._tell("connecting", message=message)

    def moving(self, what: str, done_bytes: int, total_bytes: int) -> None:
        self._tell("moving", what=what, done=done_bytes, total=total_bytes)

    def waiting(self, message: str) -> None:
        self._tell("waiting", message=message)

    def talking(self, page: str, ends_at_unix_s: float) -> None:
        self._tell("talking", page=page, ends_at=ends_at_unix_s)

    def destroying(self, why: str) -> None:
        self._tell("destroying", why=why)

    def meter(self, spent_usd: float, max_usd: float) -> None:
        """Nothing: it follows from the journal."""

    def choose(self, choices: Sequence[tuple[str, str]]) -> str | None:
        return None


if __name__ == "__main__":
    sys.exit(main())
