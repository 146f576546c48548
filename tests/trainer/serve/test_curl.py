"""The server through curl: what people type, and what a proxy or a script does that a browser does
not."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from machine import needs
from served import Running

ASKED = [{"role": "user", "content": "Where does Anton live?"}]
CHAT, BODY = "/v1/chat/completions", {"model": "base", "messages": ASKED, "max_tokens": 8}


def curl(
    server: Running, path: str, *words: str, body: Any = None, token: str | None = None
) -> tuple[int, str, dict[str, str]]:
    """(status, body, headers in small letters) of one request."""
    needs("curl")
    typed = ["curl", "-sS", "-D", "/dev/stderr", "-w", "\n%{http_code}", *words]
    typed += ["-H", f"Authorization: Bearer {server.token if token is None else token}"]
    if body is not None:
        text = body if isinstance(body, str) else json.dumps(body)
        named = any(word.startswith("Content-Type") for word in words)
        typed += [] if named else ["-H", "Content-Type: application/json"]
        typed += ["--data-binary", text]
    done = subprocess.run(
        [*typed, f"{server.url}{path}"], capture_output=True, text=True, timeout=60, check=True
    )
    text, _, status = done.stdout.rpartition("\n")
    lines = [line.partition(": ") for line in done.stderr.splitlines() if ": " in line]
    return int(status), text, {name.lower(): value for name, _, value in lines}


def answer(text: str) -> str:
    return str(json.loads(text)["choices"][0]["message"]["content"])


def test_a_question_is_answered_in_json(server: Running) -> None:
    status, text, headers = curl(server, CHAT, body=BODY)
    assert status == 200 and headers["content-type"].startswith("application/json")
    assert (
        answer(text)
        == server.chat(ASKED[0]["content"], model="base")["choices"][0]["message"]["content"]
    )


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--http1.0",), "an old proxy"),
        (("-H", "Expect: 100-continue"), "curl's way with large bodies"),
        (("-H", "Transfer-Encoding: chunked"), "a length that is not known before"),
        (("--compressed",), "what a client may ask for"),
        (("-H", "Connection: close"), "a client that asks once"),
    ],
)
def test_every_way_of_sending_gets_the_same_answer(
    server: Running, words: tuple[str, ...], why: str
) -> None:
    told = server.ask(CHAT, BODY).json()["choices"][0]["message"]["content"]
    status, text, _ = curl(server, CHAT, *words, body=BODY)
    assert (status, answer(text)) == (200, told), why


def test_a_stream_is_events_and_ends_with_done(server: Running) -> None:
    status, text, headers = curl(server, CHAT, "-N", body=BODY | {"stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = text.strip().split("\n\n")
    assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"
    pieces = [json.loads(event[6:])["choices"][0]["delta"] for event in events[:-1]]
    told = server.ask(CHAT, BODY).json()["choices"][0]["message"]["content"]
    assert "".join(piece.get("content") or "" for piece in pieces) == told


def test_several_requests_share_one_connection(server: Running) -> None:
    needs("curl")
    url, key = f"{server.url}/v1/models", f"Authorization: Bearer {server.token}"
    words = ["curl", "-sS", "-w", "%{num_connects} ", "-H", key, *[url, "-o", "/dev/null"] * 3]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert sum(map(int, done.stdout.split())) == 1


@pytest.mark.parametrize(
    ("path", "words", "body", "status", "code"),
    [
        (CHAT, (), "{", 400, "invalid_json"),
        (CHAT, (), BODY | {"model": "gpt-4"}, 404, "model_not_found"),
        (CHAT, (), BODY | {"messages": []}, 400, None),
        (CHAT, ("-H", "Content-Type: text/plain"), BODY, 415, "content_type"),
        (CHAT, ("-X", "GET"), None, 405, "method_not_allowed"),
        ("/v1/embeddings", (), BODY, 404, "not_found"),
        (CHAT, ("-H", "Host: evil.example"), BODY, 403, "host"),
        (CHAT, ("-H", "Origin: http://evil.example"), BODY, 403, "origin"),
    ],
)
def test_what_is_refused_has_openai_s_shape_and_a_status(
    server: Running, path: str, words: tuple[str, ...], body: Any, status: int, code: str | None
) -> None:
    got, text, headers = curl(server, path, *words, body=body)
    error = json.loads(text)["error"]
    assert got == status and {"message", "type", "param", "code"} == set(error)
    assert headers["content-type"].startswith("application/json")
    if code is not None:
        assert error["code"] == code


@pytest.mark.parametrize("token", ["", "x", "t" * 42, "t" * 44])
def test_a_wrong_token_is_401_and_says_how_one_is_given(server: Running, token: str) -> None:
    status, text, headers = curl(server, "/v1/models", token=token)
    assert status == 401 and headers["www-authenticate"] == "Bearer"
    assert "Authorization: Bearer TOKEN" in json.loads(text)["error"]["message"]
