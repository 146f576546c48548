"""Who is told of a run: by a real receiver over HTTP, and by receivers that hang, fail and lead
elsewhere."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import rig
from ops.errors import PreflightError
from ops.fakevast import FakeVast
from ops.job.notify import Notify, describe
from ops.market.models import Offer
from ops.run import notify as telling
from ops.run.journal import Journal, Line
from ops.run.supervisor import supervise


class Receiver:
    """Answers with the statuses in `says`, one after another and the last one for ever, and keeps
    what it was told."""

    def __init__(self, *says: int) -> None:
        self.says, self.told = list(says), []
        told, statuses = self.told, self.says

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                told.append((self.path, dict(self.headers), body))
                self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *words: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Receiver:
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *rest: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def pauses_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "PAUSE_S", 0.02)
    monkeypatch.setattr(telling, "ANSWER_S", 20.0)
    monkeypatch.setattr(telling, "SEND_S", 60.0)


TOLD = {"event": "failed", "run_id": "one", "text": "one: failed"}


def sent(url: str, **more: Any) -> str:
    return telling.post(Notify(url=url, **more), TOLD)


def test_a_receiver_that_fails_for_a_moment_is_asked_again_and_one_that_refuses_is_not() -> None:
    with Receiver(500, 429, 200) as busy, Receiver(404) as gone, Receiver(307) as moved:
        assert sent(busy.url) == "" and len(busy.told) == 3
        assert sent(gone.url) == "status 404" and len(gone.told) == 1
        assert "redirect" in sent(moved.url)
        assert [path for path, _, _ in moved.told] == ["/"], "nothing goes where it leads"
    with Receiver(503) as down:
        assert sent(down.url) == "status 503" and len(down.told) == telling.TRIES
    assert sent(down.url) == "ConnectionError"


def test_json_and_ntfy_are_told_the_same_text_and_a_token_of_a_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NTFY_TOKEN", "tk_secret")
    with Receiver(200) as receiver:
        assert sent(f"{receiver.url}/hook", token="NTFY_TOKEN") == ""
        assert sent(f"{receiver.url}/topic", format="ntfy") == ""
    (hook, as_json, body), (topic, as_text, text) = receiver.told
    assert (hook, topic) == ("/hook", "/topic") and json.loads(body) == TOLD
    assert as_json["Authorization"] == "Bearer tk_secret" and "Authorization" not in as_text
    assert text == b"one: failed" and as_text["Title"] == "milktea: failed"
    assert as_text["Priority"] == "high"


@contextmanager
def hanging(drip: bytes = b"") -> Iterator[str]:
    """A receiver that takes a request and never ends its answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                    while drip:
                        kept[-1].sendall(drip)
                        time.sleep(0.05)
                except OSError:
                    return

        Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for one in kept:
            one.close()


def test_a_webhook_and_a_program_hear_that_a_run_is_done(own: rig.Rig, fake: FakeVast) -> None:
    program = own.folder / "tell.sh"
    program.write_text('#!/bin/sh\ncat >"$MILKTEA_OUT"; env >"$MILKTEA_OUT.env"; exit 3\n')
    program.chmod(0o755)
    with Receiver(200) as receiver, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILKTEA_OUT", str(own.folder / "told"))
        patch.setenv("VAST_API_KEY", "the-key-to-the-money")
        notify = Notify(url=receiver.url, command=str(program))
        plan = own.plan(notify=notify.model_dump(), max_usd=1.0)
        with Journal(own.runs / plan.run_id) as held:
            supervise(rig.client(plan, held, fake.url, fake.api_key))
            telling.wait_for_messages(60)
    [(_, _, body)] = receiver.told
    told = json.loads(body)
    assert (told["event"], told["run_id"], told["max_usd"]) == ("done", plan.run_id, 1.0)
    assert (
        told["text"].startswith(f"{plan.run_id}: the adapter is at home") and told["milktea"] == 1
    )
    assert json.loads((own.folder / "told").read_text()) == told
    env = (own.folder / "told.env").read_text()
    assert "MILKTEA_EVENT=done" in env and "the-key" not in env
    lines = (own.runs / plan.run_id / telling.FILE).read_text().splitlines()
    rows = {row["way"]: row for row in map(json.loads, lines)}
    assert rows["url"]["arrived"] and rows["command"]["why"] == "exit code 3"


def test_a_receiver_that_hangs_or_drips_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hanging() as silent, hanging(b"HTTP/1.1 200 OK\r\nX: ") as dripping:
        for url in (silent, dripping):
            notifier = telling.Notifier(Notify(url=url), tmp_path, [])
            began = time.monotonic()
            notifier.look([line(0, "planned", max_usd=1.0), line(1, "leaked")], 0.0)
            telling.wait_for_messages(0.1)
            assert time.monotonic() - began < telling.ANSWER_S / 2
        monkeypatch.setattr(telling, "ANSWER_S", 0.05)
        assert "Timeout" in sent(silent)


def line(n: int, kind: str, **data: Any) -> Line:
    return Line(n, 1.0 + n, kind, data)


def test_each_thing_is_told_once_and_in_words_of_ours_alone(tmp_path: Path) -> None:
    hostile = "sk-SECRET <b>\x1b[2J row 7: my diagnosis"
    lines = [
        line(0, "planned", max_usd=1.0),
        line(1, "preempted", state=hostile),
        line(2, "destroyed"),
        line(3, "failed", what=hostile, said=hostile, error=hostile, exit_code=6),
        line(4, "failed", what="interrupted", error="Interrupted", exit_code=130),
        line(5, "failed", what=hostile, error="BoxLeaked", exit_code=70),
        line(6, "pulled"),
        line(7, "destroyed"),
        line(8, "destroyed"),
    ]
    told = [telling.event_of(one, lines) for one in lines]
    assert told == [None, "outbid", None, "failed", None, None, None, "done", None]
    for one in lines:
        if (event := telling.event_of(one, lines)) is not None:
            text = json.dumps(telling.payload(event, "one", lines, 9.0, one))
            assert "SECRET" not in text and "diagnosis" not in text and "x1b" not in text
    with Receiver(200) as receiver:
        notify = Notify(url=receiver.url, on=["budget"])
        spent = own_lines_that_spend()
        for _ in range(2):  # a second owner tells it no second time
            notifier = telling.Notifier(notify, tmp_path, spent[:1])
            notifier.look(spent, 3600 * 0.7)
            notifier.look(spent, 3600 * 0.9)
            notifier.look(spent, 3600 * 0.95)
            telling.wait_for_messages(60)
        assert [json.loads(body)["event"] for _, _, body in receiver.told] == ["budget"]


def own_lines_that_spend() -> list[Line]:
    """A box of a dollar an hour, of a run of a dollar."""
    free = {f.name: 0.0 for f in fields(Offer)} | {"gpu_name": "", "country": ""}
    offer = free | {"usd_per_hour": 1.0}
    return [
        line(0, "planned", max_usd=1.0),
        line(0, "renting", offer=offer, bid_usd_per_hour=None, disk_gib=0),
        line(0, "rented"),
        line(0, "booted"),
    ]


@pytest.mark.parametrize(
    "url",
    ["ftp://a/b", "https://", "https://me:pw@a/b", "a b", "https://a/#t", "https://[x", "//a"],
)
def test_an_address_that_cannot_be_told_is_refused_by_the_plan(url: str) -> None:
    with pytest.raises(ValueError, match=r"address|password|#"):
        Notify(url=url)


def test_the_plan_names_who_hears_and_not_the_address_and_refuses_what_is_not_there() -> None:
    notify = Notify(url="http://ntfy.example.org/my-secret-topic", on=["done"])
    assert describe(notify) == ["notify: ntfy at ntfy.example.org (not encrypted) hear of done"]
    with pytest.raises(PreflightError, match="no program"):
        describe(Notify(command="no-such-program --now"))
    with pytest.raises(PreflightError, match="NOT_SET_HERE"):
        describe(Notify(url="https://a/b", token="NOT_SET_HERE"), {})
