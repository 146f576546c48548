"""Calls that cost money: each is in a journal before it is sent, and its worst case in the purse.

The journal is a file of JSON lines, each on the disk (fsync) before what follows from it:

    {"ask": CALL, "worst_usd": ...}    before a call is sent
    {"answer": CALL, "text": ..., "finish": ..., "tokens": [in, out], "usd": ...}
    {"failed": CALL, "why": ..., "usd": ...}    no answer; what it may have cost

CALL is a hash of the model and of what is asked, so the journal is the cache: a question that was
answered once is never sent again. A call that was sent and of which nothing is known (this process
was killed) counts as its worst case for ever.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import requests

from ops.errors import ConfigError, PreflightError
from ops.prepare.endpoint import Answer, Endpoint, Messages, NotAnswered, ask, open_session
from ops.wait import REAL, Clock

TRIES = 6  # of one call that is not answered
FIRST_WAIT_S = 2.0  # before the second try; twice as long before each further one
AROUND_MESSAGE = 16  # tokens that a template may put around one, at most
DOWN, MISSED = 40, 8  # points, one for a call that is refused, 8 for one not answered: it is down
GO_ON = "the same command again goes on and pays for none of them twice"


class Stopped(Exception):
    """The work ends here: money, a wish of the user's, an endpoint that answers nobody."""


@dataclass
class Spent:
    """What the calls of a journal cost, and of how many of them."""

    usd: float = 0.0
    answered: int = 0
    failed: int = 0
    unknown: int = 0  # sent, and nothing is known of them
    tokens_in: int = 0
    tokens_out: int = 0
    now: int = 0  # that were sent by this process


class Calls:
    """The journal at `path`, held against another process, and the purse of `max_usd`. From any
    thread. Raises ConfigError for a journal of something else, PreflightError for one that another
    process holds."""

    def __init__(
        self, path: Path, endpoint: Endpoint, max_usd: float | None, clock: Clock = REAL
    ) -> None:
        self.endpoint, self.spent, self._max = endpoint, Spent(), max_usd
        self._answers: dict[str, Answer] = {}
        self._reserved, self._sending, self._down = 0.0, 0, 0
        self._why, self._hint = "", ""
        self._changed, self._own, self._clock = threading.Condition(), threading.local(), clock
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._file.close()
            what = f"{path} is held by another process"
            raise PreflightError(what, hint="wait until it has ended") from e
        try:
            self._recall(path)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    # -- the journal -------------------------------------------------------------------------------

    def _recall(self, path: Path) -> None:
        """Reads what an earlier process wrote; a last line that is not whole goes."""
        self._file.seek(0)
        told = self._file.read()
        whole = told[: told.rfind(b"\n") + 1]
        if len(whole) != len(told):
            self._file.truncate(len(whole))
        open_usd: dict[str, list[float]] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._read(json.loads(line), open_usd)
            except (ValueError, LookupError, TypeError) as e:
                what = f"{path}:{number} is no line of a journal of calls"
                raise ConfigError(what, hint="name another file to write") from e
        for left in open_usd.values():
            self.spent.usd += sum(left)
            self.spent.unknown += len(left)

    def _read(self, row: Mapping[str, Any], open_usd: dict[str, list[float]]) -> None:
        if "ask" in row:
            open_usd.setdefault(row["ask"], []).append(float(row["worst_usd"]))
            return
        open_usd[row["answer"] if "answer" in row else row["failed"]].pop()
        self.spent.usd += float(row["usd"])
        if "failed" in row:
            self.spent.failed += 1
            return
        tokens = row["tokens"] and (int(row["tokens"][0]), int(row["tokens"][1]))
        self._take(row["answer"], Answer(row["text"], row["finish"], tokens or None))

    def _take(self, call: str, answer: Answer) -> None:
        self._answers[call] = answer
        self.spent.answered += 1
        self.spent.tokens_in += answer.tokens[0] if answer.tokens else 0
        self.spent.tokens_out += answer.tokens[1] if answer.tokens else 0

    def _write(self, row: Mapping[str, Any]) -> None:
        """A line, on the disk when this returns; no part of it where the disk does not take it."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        before = os.fstat(self._file.fileno()).st_size
        try:
            at = 0
            while at < len(line):
                at += self._file.write(line[at:])
            os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), before)
            raise OSError(error.errno, error.strerror, self._file.name) from error

    # -- the purse ---------------------------------------------------------------------------------

    def stop(self, why: str, hint: str = GO_ON) -> None:
        """No call is sent any more; those on their way are waited for. The first reason stays, and
        what to type next with it."""
        with self._changed:
            if not self._why:
                self._why, self._hint = why, hint
            self._changed.notify_all()

    @property
    def why_stopped(self) -> str:
        return self._why

    @property
    def what_next(self) -> str:
        """What to type after the work ended early."""
        return self._hint

    def _reserve(self, call: str, worst: float) -> None:
        with self._changed:
            while True:
                if self._why:
                    raise Stopped(self._why)
                if self._max is None or self.spent.usd + self._reserved + worst <= self._max:
                    break
                if not self._sending:
                    self._why = (
                        f"the next call may cost ${worst:.4f}, and ${self.spent.usd:.4f} of "
                        f"${self._max:.4f} are spent"
                    )
                    self._hint = f"--max-usd with more, and {GO_ON}"
                    self._changed.notify_all()
                    raise Stopped(self._why)
                self._changed.wait()
            self._write({"ask": call, "worst_usd": worst})
            self._reserved += worst
            self._sending += 1
            self.spent.now += 1

    def _settle(self, worst: float, row: Mapping[str, Any]) -> None:
        with self._changed:
            self._reserved -= worst
            self._sending -= 1
            self.spent.usd += float(row["usd"])
            try:
                self._write(row)
            finally:
                self._changed.notify_all()

    # -- one call ----------------------------------------------------------------------------------

    def ask(self, messages: Messages, max_tokens: int) -> Answer:
        """The answer, from the journal where it has one. Raises NotAnswered, and Stopped where the
        work has to end."""
        body = self.endpoint.body(messages, max_tokens)
        call = call_of(body)
        with self._changed:
            if call in self._answers:
                return self._answers[call]
        worst_in = bytes_of(messages)
        worst = self.endpoint.usd(worst_in, max_tokens)
        wait_s = FIRST_WAIT_S
        for number in range(1, TRIES + 1):
            self._reserve(call, worst)
            try:
                answer = ask(self._session, self.endpoint.url, body, call)
            except NotAnswered as e:
                self._lost(call, worst, e)
                if e.fatal:
                    hint = f"look at --endpoint, --model and --key-env; then {GO_ON}"
                    self.stop(f"the endpoint refuses: {e}", hint)
                if not e.again or number == TRIES:
                    self._missed(e)
                    raise
                self._wait(wait_s if e.wait_s is None else e.wait_s)
                wait_s *= 2
                continue
            self._answered(call, worst, answer, (worst_in, max_tokens))
            return answer
        raise AssertionError("the last try raises")

    def _answered(self, call: str, worst: float, answer: Answer, most: tuple[int, int]) -> None:
        usd = worst if answer.tokens is None else self.endpoint.usd(*answer.tokens)
        row = {"answer": call, "text": answer.text, "finish": answer.finish}
        self._settle(worst, {**row, "tokens": answer.tokens, "usd": usd})
        with self._changed:
            self._take(call, answer)
            self._down = 0
        costs = self.endpoint.usd_in or self.endpoint.usd_out
        if costs and answer.tokens and any(n > m for n, m in zip(answer.tokens, most, strict=True)):
            counted = f"{answer.tokens[0]:,} tokens in and {answer.tokens[1]:,} out"
            allowed = f"{most[0]:,} and {most[1]:,}"
            self.stop(
                f"the endpoint counts {counted} where at most {allowed} were asked for: no cap "
                "holds with it",
                f"another --endpoint, and {GO_ON}",
            )

    def _lost(self, call: str, worst: float, error: NotAnswered) -> None:
        usd = worst if error.billed else 0.0
        self._settle(worst, {"failed": call, "why": str(error)[:300], "usd": usd})
        with self._changed:
            self.spent.failed += 1

    def _missed(self, error: NotAnswered) -> None:
        with self._changed:
            self._down += MISSED if error.again else 1
            down = self._down >= DOWN
        if down:
            self.stop(f"the endpoint does not answer: {error}")

    def _wait(self, seconds: float) -> None:
        """Waits, or less where the work is to end."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._why), seconds * self._clock.pace)

    @property
    def _session(self) -> requests.Session:
        """Of this thread."""
        if not hasattr(self._own, "session"):
            self._own.session = open_session(self.endpoint)
        session: requests.Session = self._own.session
        return session


def call_of(body: Mapping[str, Any]) -> str:
    """The name of a call: a hash of all that is asked."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]


def bytes_of(messages: Messages) -> int:
    """Tokens that messages have at most: no tokenizer makes more of a text than its bytes."""
    return sum(len(m["content"].encode("utf-8", "replace")) + AROUND_MESSAGE for m in messages)
