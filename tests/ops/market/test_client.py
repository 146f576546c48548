"""What of vast.ai's answers is believed, and which addresses of it are asked."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ops.errors import MarketError, NoAnswer, OfferGone, RateLimited, Refused
from ops.market import client, http
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.wait import RealClock

VAST = Vast(Provider("https://console.vast.ai", "key"), RealClock(1))


@pytest.mark.parametrize(
    "url",
    [
        "https://s3.amazonaws.com/vast.ai/instance_logs/0123.log",
        "https://vast.ai.s3.amazonaws.com/instance_logs/0123.log",
        "https://console.vast.ai/logs/1",
        "https://vast.ai/logs/1",
    ],
)
def test_a_log_at_vast_ai_s_own_places_is_fetched(url: str) -> None:
    VAST._validate_log_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/internal/metadata",
        "http://169.254.169.254/latest/meta-data/",
        "https://evil.example/x",
        "https://evilvast.ai/x",
        "https://vast.ai.evil.example/x",
        "https://ec2-1-2-3-4.compute.amazonaws.com/x",
        "https://abc.execute-api.us-east-1.amazonaws.com/x",
        "https://s3.amazonaws.com/evil/x",
        "https://s3.amazonaws.com/vast.ai/../evil/x",
        "https://console.vast.ai:8443/x",
        "https://console.vast.ai@evil.example/x",
        "http://console.vast.ai/x",
        "file:///etc/passwd",
        "https://[::1",
        "None",
        "",
    ],
)
def test_a_log_anywhere_else_is_not_asked_for(url: str) -> None:
    with pytest.raises(NoAnswer, match="the log is said to lie at"):
        VAST._validate_log_url(url)


def test_an_emulator_lays_logs_at_its_own_address_only() -> None:
    emulator = Vast(Provider("http://127.0.0.1:5000", "key"), RealClock(1))
    emulator._validate_log_url("http://127.0.0.1:5000/_fake/result/1")
    with pytest.raises(NoAnswer):
        emulator._validate_log_url("http://127.0.0.1:5001/_fake/result/1")


class Answers(BaseHTTPRequestHandler):
    """A vast.ai that says the same to everybody."""

    body = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *told: object) -> None: ...


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server with this handler."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[" * 100_000, "but not in JSON"),
        (b'{"credit": ' + b"9" * 5000 + b"}", "but not in JSON"),
        (b'{"credit": "\xff"}', "but not in JSON"),
        (b'{"credit": [1]}', "a credit that is no number"),
    ],
)
def test_an_answer_that_python_cannot_hold_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, body: bytes, words: str
) -> None:
    monkeypatch.setattr(Answers, "body", body)
    with serving(Answers) as url, pytest.raises(NoAnswer, match=words):
        Vast(Provider(url, "key"), RealClock(0.001)).credit_usd()


class Endless(Answers):
    """Answers of /api/v0/PATH without an end, each in a way of its own."""

    def do_GET(self) -> None:
        way = self.path.split("/")[3]
        self.send_response(302 if way == "redirect" else 200)
        if way == "redirect":
            self.send_header("Location", "/api/v0/redirect")
        if way == "bomb":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        piece = b" " * 100_000
        if way == "bomb":
            piece = gzip.compress(bytes(4_000_000))
        with suppress(OSError):
            while True:
                self.wfile.write(b" " if way == "drops" else piece)
                time.sleep(0.02 if way == "drops" else 0)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("flood", "more than 1,000,000 bytes"),
        ("bomb", "more than 1,000,000 bytes"),
        ("redirect", "more than 1,000,000 bytes"),
        ("drops", "did not end within"),
    ],
)
def test_an_answer_without_an_end_is_no_answer_and_says_so(
    monkeypatch: pytest.MonkeyPatch, way: str, words: str
) -> None:
    monkeypatch.setattr(http, "MAX_BYTES", 1_000_000)
    monkeypatch.setattr(http, "MAX_S", 0.3 if way == "drops" else 60.0)
    with serving(Endless) as url, pytest.raises(NoAnswer, match=words):
        Vast(Provider(url, "key"), RealClock(0.001))._call("show", "GET", f"/{way}")


def test_of_a_log_without_an_end_the_beginning_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_LOG_BYTES", 150_000)
    with serving(Endless) as url:
        vast = Vast(Provider(url, "key"), RealClock(0.001))
        said = {"result_url": f"{url}/api/v0/flood"}
        monkeypatch.setattr(vast, "_call", lambda *told: said)
        assert vast.container_log(1) == " " * 150_000


def refusing(status: int, body: dict[str, object]) -> type[Answers]:
    """A vast.ai that says this to everybody, and counts how often it was asked."""

    class Refusing(Answers):
        asked = 0

        def do_POST(self) -> None:
            Refusing.asked += 1
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        do_PUT = do_POST

    return Refusing


@pytest.mark.parametrize(
    ("more", "when"), [({"retry_after": 8181}, "again in 2.3 h"), ({}, "after midnight UTC")]
)
def test_searches_that_are_used_up_for_the_day_are_not_asked_for_again(
    more: dict[str, object], when: str
) -> None:
    handler = refusing(429, {"error": "search_quota_exceeded", "msg": "Daily quota", **more})
    with serving(handler) as url, pytest.raises(RateLimited, match="of this day") as refused:
        Vast(Provider(url, "key"), RealClock(0.001)).search({}, interruptible=False, disk_gib=8)
    assert handler.asked == 1 and when in refused.value.hint


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (409, {"error": "conflict", "msg": "machine is no longer available"}, OfferGone),
        (404, {"error": "not_found", "msg": "gone"}, OfferGone),
        (404, {"error": "auth_error", "msg": "Invalid user key"}, Refused),
        (400, {"error": "invalid_args", "msg": "disk"}, Refused),
        (409, {"error": "conflict", "msg": "made all the same", "new_contract": 7}, Refused),
    ],
)
def test_an_offer_that_is_gone_in_other_words_is_gone(
    status: int, body: dict[str, object], error: type[MarketError]
) -> None:
    with serving(refusing(status, body)) as url, pytest.raises(error) as refused:
        Vast(Provider(url, "key"), RealClock(0.001)).create(
            1, image="i", disk_gib=8, label="l", env={}, onstart="", bid_usd_per_hour=None
        )
    assert type(refused.value) is error
