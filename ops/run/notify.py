"""Tell people of a run: that it is done, failed, has spent 80 % of its budget, lost its machine, or
leaves a box that may be billing.

The owner's listener shows each new journal line to a `Notifier`. Every message goes out in a thread
of its own, within SEND_S and TRIES; whatever becomes of it changes nothing in the run. A process
that ends gives messages that are on their way REST_S more. What became of each is a line of
FILE in the run's folder. docs/watch.md tells what a message holds.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import requests

from ops.job.notify import BUDGET_SHARE, Event, Notify
from ops.run.journal import Line, last
from ops.run.meter import max_usd_of, spent_usd

FILE = "notified.jsonl"
VERSION = 1  # of the payload; keys are only added
SEND_S = 20.0  # for one message in one way, all tries together
REST_S = 20.0  # for messages on their way when the process ends
TRIES, PAUSE_S = 3, 1.5  # of a receiver that fails; the second pause is twice as long
ANSWER_S = 5.0  # for a receiver to connect, and again for its first word
_DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY", "DBUS_SESSION_BUS_ADDRESS")
_WORDS: dict[Event, str] = {
    "done": "the adapter is at home, and no box is left",
    "failed": "failed with exit code {exit_code} ({error}); `milktea explain {run_id}` says why",
    "budget": "{share:.0%} of its budget is spent",
    "outbid": "its machine was taken away; the newest checkpoint goes on elsewhere",
    "leaked": "a box may be billing: run `milktea reap` now",
}
_URGENT = ("failed", "leaked")


class Notifier:
    """Decides what is told of one run, each thing once, and sends it."""

    def __init__(self, notify: Notify, folder: Path, lines: Sequence[Line]) -> None:
        """`lines` are the journal's so far: of what they say nobody is told again."""
        self._notify, self._folder, self._seen = notify, folder, len(lines)
        self._budget_told = _told_before(folder, "budget")

    def look(self, lines: list[Line], now: float) -> None:
        """Tell of what is new in the journal at `now` (unix seconds)."""
        lines = list(lines)  # the story appends meanwhile
        new, self._seen = lines[self._seen :], len(lines)
        for line in new:
            if (event := event_of(line, lines)) is not None:
                self._tell(event, payload(event, self._folder.name, lines, now, line))
        if not self._budget_told and spent_usd(lines, now) >= BUDGET_SHARE * max_usd_of(lines):
            self._budget_told = True
            self._tell("budget", payload("budget", self._folder.name, lines, now))

    def _tell(self, event: Event, told: dict[str, Any]) -> None:
        if event not in self._notify.on:
            return
        for way, send in self._ways(told):
            _in_thread(partial(self._send, event, way, send))

    def _ways(self, told: dict[str, Any]) -> list[tuple[str, Callable[[], str]]]:
        notify = self._notify
        ways: list[tuple[str, Callable[[], str]]] = []
        if notify.url is not None:
            ways.append(("url", lambda: post(notify, told)))
        if notify.command is not None:
            ways.append(("command", lambda: call(notify.words, told)))
        if shutil.which("notify-send") and any(map(os.environ.get, _DISPLAYS)):
            words = ["notify-send", "--app-name=milktea"]
            words += ["--urgency=critical"] if told["event"] in _URGENT else []
            words += ["--", f"milktea: {told['event']}", told["text"]]
            ways.append(("desktop", lambda: call(words, told)))
        return ways

    def _send(self, event: Event, way: str, send: Callable[[], str]) -> None:
        try:
            why = send()
        except Exception as e:  # of a message nothing may depend
            why = type(e).__name__
        row = {"t": round(time.time(), 3), "event": event, "way": way, "arrived": not why}
        with suppress(OSError):
            path = self._folder / FILE
            with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as file:
                file.write(json.dumps(row | ({"why": why} if why else {})) + "\n")


def event_of(line: Line, lines: list[Line]) -> Event | None:
    """What a journal line is to people; None for most."""
    match line.kind:
        case "destroyed":
            pulled = last(lines[: line.n], "pulled", "destroyed")
            return "done" if pulled is not None and pulled.kind == "pulled" else None
        case "failed":  # what the user asked for, and a leak, which has its own line, are none
            return None if line.get("error") in ("Interrupted", "BoxLeaked") else "failed"
        case "preempted":
            return "outbid"
        case "leaked":
            return "leaked"
        case _:
            return None


def payload(
    event: Event, run_id: str, lines: list[Line], now: float, line: Line | None = None
) -> dict[str, Any]:
    """The message as JSON: nothing in it comes from a machine or from rows, and nothing is
    secret."""
    spent, most = spent_usd(lines, now), max_usd_of(lines)
    code, error = 1, ""
    if event == "failed" and line is not None:
        code, error = int(line.get("exit_code", 1)), str(line.get("error", ""))
        error = error if error.isidentifier() else "error"
    words = _WORDS[event].format(run_id=run_id, exit_code=code, error=error, share=spent / most)
    told: dict[str, Any] = {
        "milktea": VERSION,
        "event": event,
        "run_id": run_id,
        "t": round(now, 3),
        "spent_usd": round(spent, 4),
        "max_usd": most,
        "text": f"{run_id}: {words} ({spent:.2f} of {most:.2f} $)",
    }
    return told | ({"exit_code": code, "error": error} if event == "failed" else {})


# -- the ways --------------------------------------------------------------------------------------


def post(notify: Notify, told: dict[str, Any]) -> str:
    """Send one message to notify.url: JSON, or what ntfy takes. Returns "" once the receiver took
    it, else why not. A receiver that is slow, busy (429) or fails (5xx) is asked TRIES times within
    SEND_S; a redirect is not followed."""
    headers = {"User-Agent": "milktea"}
    if notify.is_ntfy:
        headers |= {"Title": f"milktea: {told['event']}", "Content-Type": "text/plain"}
        headers["Priority"] = "high" if told["event"] in _URGENT else "default"
        body = str(told["text"]).encode()
    else:
        headers["Content-Type"] = "application/json"
        body = json.dumps(told).encode()
    if notify.token is not None:
        headers["Authorization"] = f"Bearer {os.environ.get(notify.token, '').strip()}"
    ends, why = time.monotonic() + SEND_S, ""
    for n in range(TRIES):
        if n:
            time.sleep(PAUSE_S * n)
        wait_s = min(ANSWER_S, ends - time.monotonic())
        if wait_s <= 0:
            break
        why, again = _posted(str(notify.url), body, headers, wait_s)
        if not again:
            break
    return why


def _posted(url: str, body: bytes, headers: dict[str, str], wait_s: float) -> tuple[str, bool]:
    """("" or why it was not taken, whether to ask again). The answer's text is not read."""
    try:
        with requests.post(
            url, data=body, headers=headers, timeout=wait_s, allow_redirects=False, stream=True
        ) as answer:
            status = answer.status_code
    except requests.RequestException as e:
        return type(e).__name__, True
    if 200 <= status < 300:
        return "", False
    if 300 <= status < 400:
        return f"status {status}: a redirect, which is not followed", False
    return f"status {status}", status == 429 or status >= 500


def call(words: Sequence[str], told: dict[str, Any]) -> str:
    """Run a program with the message as JSON on its stdin and MILKTEA_EVENT, MILKTEA_RUN and
    MILKTEA_TEXT in its environment, which lacks the key to vast.ai. Returns "" or why it failed;
    what it left running is killed after SEND_S."""
    more = {"MILKTEA_EVENT": told["event"], "MILKTEA_RUN": told["run_id"]}
    env = {k: v for k, v in os.environ.items() if k != "VAST_API_KEY"}
    child = subprocess.Popen(
        list(words),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=env | more | {"MILKTEA_TEXT": told["text"]},
        start_new_session=True,
    )
    try:
        child.communicate(json.dumps(told).encode() + b"\n", timeout=SEND_S)
    except subprocess.TimeoutExpired:
        with suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return f"it had not ended after {SEND_S:.0f} s, and was killed"
    return f"exit code {child.returncode}" if child.returncode else ""


# -- threads ---------------------------------------------------------------------------------------

_going: list[threading.Thread] = []


def _in_thread(act: Callable[[], None]) -> None:
    _going[:] = [thread for thread in _going if thread.is_alive()]
    thread = threading.Thread(target=act, name="notify", daemon=True)
    _going.append(thread)
    thread.start()


@atexit.register
def wait_for_messages(seconds: float = REST_S) -> None:
    """Wait for the messages that are on their way, `seconds` in all."""
    ends = time.monotonic() + seconds
    for thread in list(_going):
        thread.join(max(0.0, ends - time.monotonic()))


def _told_before(folder: Path, event: Event) -> bool:
    """Whether a message of this kind was sent by an earlier owner."""
    with suppress(OSError):
        for text in (folder / FILE).read_text("utf-8", "replace").splitlines():
            with suppress(ValueError, AttributeError):
                if json.loads(text).get("event") == event:
                    return True
    return False
