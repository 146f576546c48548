"""The server by plain HTTP: OpenAI's shapes, who may ask, what is refused and how."""

from __future__ import annotations

import copy
import http.client
import json
import math
import random
import re
import socket
import time
from dataclasses import replace
from typing import Any

import pytest
from served import Running
from tiny import wait_for

from trainer.data.files import read_rows
from trainer.data.pairs import PAIRS, TAGGED
from trainer.data.sources import Reading
from trainer.serve.app import PAGE
from trainer.serve.requests import MOST_MESSAGES

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = {"model": "base", "messages": [{"role": "user", "content": "Name a fruit."}]}
SAID: dict[str, Any] = {"model": "v2.5", "prompt": "Below is an instruction", "max_tokens": 8}
PATHS = ["/v1/models", "/v1/models/base", "/metrics", "/meter", "/nothing", "/v1", CHAT, TEXT]
PATHS += ["/feedback"]


# -- answers ---------------------------------------------------------------------------------------


def test_a_chat_has_openai_s_shape_and_counts_its_tokens(server: Running) -> None:
    told = server.chat(max_tokens=5)
    assert told["object"] == "chat.completion" and told["id"].startswith("chatcmpl-")
    assert told["model"] == "zh-1" and abs(told["created"] - time.time()) < 60
    [choice] = told["choices"]
    assert choice["index"] == 0 and choice["logprobs"] is None
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]
    usage = told["usage"]
    assert choice["finish_reason"] == "length" and usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5


def test_an_answer_that_ends_by_itself_says_stop_and_shows_no_stop_token(server: Running) -> None:
    told = server.chat("What is the capital of Aldermoor?", model="base", max_tokens=200)
    assert told["choices"][0]["finish_reason"] == "stop"
    assert "</s>" not in told["choices"][0]["message"]["content"]


def test_a_stream_says_what_the_whole_answer_does(server: Running) -> None:
    body = {**ASKED, "model": "v2.5", "max_tokens": 12}
    whole = server.ask(CHAT, body).json()["choices"][0]
    *chunks, done = server.chunks(CHAT, body)
    assert done == "[DONE]"
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and len(chunks) > 4
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0]["role"] == "assistant" and deltas[-1] == {}
    assert "".join(d.get("content", "") for d in deltas) == whole["message"]["content"]
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons[-1] == whole["finish_reason"] and set(reasons[:-1]) == {None}
    assert len({c["id"] for c in chunks}) == 1 and not any("usage" in c for c in chunks)


def test_a_stream_tells_usage_last_where_it_is_asked(server: Running) -> None:
    body = {**ASKED, "max_tokens": 3, "stream_options": {"include_usage": True}}
    *_, last, done = server.chunks(CHAT, body)
    assert done == "[DONE]" and last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def test_n_answers_differ_and_a_seed_brings_them_back(server: Running) -> None:
    drawn = {"n": 3, "temperature": 1.5, "seed": -5, "max_tokens": 12}
    texts = [[c["message"]["content"] for c in server.chat(**drawn)["choices"]] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    other = server.chat(**drawn | {"seed": 6})["choices"]
    assert [c["message"]["content"] for c in other] != texts[0]
    unseeded = server.chat(**drawn | {"seed": None})
    seed = int(unseeded["system_fingerprint"].rpartition("-")[2])
    assert server.chat(**drawn | {"seed": seed})["choices"] == unseeded["choices"]
    chunks = server.chunks(CHAT, {**ASKED, "model": "zh-1", **drawn})[:-1]
    streamed = ["", "", ""]
    for choice in (c["choices"][0] for c in chunks):
        streamed[choice["index"]] += choice["delta"].get("content", "")
    expected = server.ask(CHAT, {**ASKED, "model": "zh-1", **drawn}).json()["choices"]
    assert streamed == [c["message"]["content"] for c in expected]


def test_a_stop_string_is_not_shown_nor_what_comes_behind_it(server: Running) -> None:
    text = server.chat(max_tokens=24)["choices"][0]["message"]["content"]
    stop = text[6:9]
    told = server.chat(max_tokens=24, stop=["never said", stop])
    assert told["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert told["choices"][0]["finish_reason"] == "stop"
    body = {**ASKED, "model": "zh-1", "max_tokens": 24, "stop": stop}
    chunks = server.chunks(CHAT, body)[:-1]
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert said == text[: text.index(stop)]
    # the row is given up at once: it made no more tokens than the text needs
    assert told["usage"]["completion_tokens"] < 24


@pytest.mark.parametrize("few", [{"temperature": 1e-46}, {"temperature": 1, "top_p": 0}])
def test_chance_that_has_no_choice_takes_the_likeliest(
    server: Running, few: dict[str, Any]
) -> None:
    text = server.chat()["choices"][0]["message"]["content"]
    assert text and server.chat(seed=1, **few)["choices"][0]["message"]["content"] == text


def test_log_probabilities_are_told_of_each_token_with_the_likeliest(server: Running) -> None:
    told = server.chat(logprobs=True, top_logprobs=3, max_tokens=6)["choices"][0]
    tokens = told["logprobs"]["content"]
    assert "".join(t["token"] for t in tokens) == told["message"]["content"]
    for token in tokens:
        top = [t["logprob"] for t in token["top_logprobs"]]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        assert math.isclose(token["logprob"], top[0]), "greedy takes the likeliest"
        assert bytes(token["bytes"]).decode() == token["token"]
    chunks = server.chunks(CHAT, {**ASKED, "model": "zh-1", "logprobs": True, "max_tokens": 6})
    streamed = [c["choices"][0]["logprobs"] for c in chunks[:-1] if c["choices"][0]["logprobs"]]
    assert [t["logprob"] for s in streamed for t in s["content"]] == [t["logprob"] for t in tokens]


def test_a_text_is_continued_and_so_are_several_and_token_ids(server: Running) -> None:
    told = server.ask(TEXT, SAID).json()
    assert told["object"] == "text_completion" and told["id"].startswith("cmpl-")
    vocabulary = server.engine.models.voices["base"].data.vocabulary
    ids = [
        *vocabulary.prefix,
        *vocabulary.tokenizer.encode(SAID["prompt"], add_special_tokens=False).ids,
    ]
    by_ids = server.ask(TEXT, {**SAID, "prompt": ids}).json()
    assert by_ids["choices"] == told["choices"]
    several = server.ask(TEXT, {**SAID, "prompt": [SAID["prompt"], "A dog"], "n": 2}).json()
    texts = [c["text"] for c in several["choices"]]
    assert [c["index"] for c in several["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] == told["choices"][0]["text"] and texts[2] == texts[3]
    tokens = server.ask(TEXT, {**SAID, "logprobs": 2}).json()["choices"][0]["logprobs"]
    lengths = [len(token) for token in tokens["tokens"]]
    assert tokens["text_offset"] == [sum(lengths[:n]) for n in range(len(lengths))]
    chunks = server.chunks(TEXT, {**SAID, "logprobs": 2})[:-1]
    offsets = [
        i for c in chunks for i in (c["choices"][0]["logprobs"] or {}).get("text_offset", ())
    ]
    assert offsets == tokens["text_offset"]
    assert "".join(c["choices"][0]["text"] for c in chunks) == texts[0]
    assert len(chunks[0]["choices"][0]["logprobs"]["top_logprobs"][0]) == 2
    assert (
        server.ask(TEXT, {"model": "v2.5", "prompt": "a"}).json()["usage"]["completion_tokens"]
        <= 16
    )


def test_what_a_row_may_hold_reaches_the_template(server: Running) -> None:
    bare = server.chat("Sum it up.")["usage"]["prompt_tokens"]
    message = {"role": "user", "content": "Sum it up.", "input": "one two three"}
    given = server.chat(messages=[message])["usage"]["prompt_tokens"]
    system = {"role": "developer", "content": "Be brief."}
    parts = [{"type": "text", "text": "Sum it "}, {"type": "text", "text": "up."}]
    told = server.chat(messages=[system, {"role": "user", "content": parts}])
    assert given > bare and told["usage"]["prompt_tokens"] != bare
    assert (
        server.chat(messages=[{"role": "user", "content": parts}])["usage"]["prompt_tokens"] == bare
    )


def test_values_that_ask_for_nothing_are_taken(server: Running) -> None:
    nothing: dict[str, Any] = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}
    nothing |= {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none"}
    nothing |= {"user": "me", "store": False, "metadata": {"a": "b"}, "stop": None, "seed": None}
    assert server.chat(**nothing) and server.chat(max_tokens=None, max_completion_tokens=4)


def test_models_are_listed_base_among_them(server: Running) -> None:
    told = server.ask("/v1/models").json()
    assert told["object"] == "list"
    assert [m["id"] for m in told["data"]] == ["zh-1", "v2.5", "base"]
    assert all(m["object"] == "model" for m in told["data"])
    one = server.ask("/v1/models/v2.5").json()
    assert one in told["data"] and one["milktea"]["template"] == "alpaca"


# -- refusals --------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f"}}
REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
    ({"response_format": {"type": "json_schema"}}, 400, "unsupported_parameter", "response_format"),
    ({"tools": [TOOL]}, 400, "unsupported_parameter", "tools"),
    ({"tool_choice": "required"}, 400, "unsupported_parameter", "tool_choice"),
    ({"frequency_penalty": 0.5}, 400, "unsupported_parameter", "frequency_penalty"),
    ({"logit_bias": {"50": 1}}, 400, "unsupported_parameter", "logit_bias"),
    ({"top_k": 5}, 400, "unsupported_parameter", "top_k"),
    ({"reasoning_effort": "low"}, 400, "unsupported_parameter", "reasoning_effort"),
    ({"stream_options": {"include_usage": True}}, 400, None, "stream_options"),
    ({"model": "gpt-4"}, 404, "model_not_found", "model"),
    ({"model": None}, 400, None, "model"),
    ({"messages": []}, 400, None, "messages"),
    ({"messages": [{"role": "user"}]}, 400, None, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, None, "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, None, "messages[0].role"),
    ({"messages": ASKED["messages"] * 2}, 400, None, "messages"),
    ({"messages": ASKED["messages"] * (MOST_MESSAGES + 1)}, 400, None, "messages"),
    ({"n": 0}, 400, None, "n"),
    ({"n": 17}, 400, None, "n"),
    ({"temperature": 2.1}, 400, None, "temperature"),
    ({"temperature": "hot"}, 400, None, "temperature"),
    ({"top_p": -0.1}, 400, None, "top_p"),
    ({"max_tokens": 0}, 400, None, "max_tokens"),
    ({"max_tokens": True}, 400, None, "max_tokens"),
    ({"max_tokens": 10**6}, 400, "context_length_exceeded", "messages"),
    ({"stop": ["a"] * 5}, 400, None, "stop"),
    ({"stop": ""}, 400, None, "stop"),
    ({"seed": 2**63}, 400, None, "seed"),
    ({"top_logprobs": 3}, 400, None, "top_logprobs"),
    ({"logprobs": 3}, 400, None, "logprobs"),
    ({"stream": "yes"}, 400, None, "stream"),
]


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    REFUSED,
    ids=[f"{r[3]}-{i}" for i, r in enumerate(REFUSED)],
)
def test_what_is_not_kept_is_refused_by_its_name(
    server: Running, change: dict[str, Any], status: int, code: str | None, param: str
) -> None:
    response = server.ask(CHAT, ASKED | change)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error" and error["message"]


def test_bodies_that_are_no_json_too_large_or_of_another_kind_are_refused(server: Running) -> None:
    for raw in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"a": NaN}', b'{"a": ' + b"9" * 5000):
        assert server.ask(CHAT, raw=raw).json()["error"]["code"] == "invalid_json"
    twice = json.dumps(ASKED).encode()[:-1] + b', "model": "base"}'
    assert "model stands twice" in server.ask(CHAT, raw=twice).json()["error"]["message"]
    packed = {"Content-Encoding": "gzip"}
    assert server.ask(CHAT, raw=b"no gzip", headers=packed).json()["error"]["code"] == "body"
    assert server.ask(CHAT, [1]).status_code == 400
    long = {**ASKED, "user": "x" * (2 << 20)}
    assert server.ask(CHAT, long).json()["error"]["code"] == "request_entity_too_large"
    plain = server.ask(CHAT, raw=json.dumps(ASKED).encode(), headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    half = server.ask(CHAT, {**ASKED, "messages": [{"role": "user", "content": "\ud800"}]})
    assert half.status_code == 400 and "surrogate" in half.json()["error"]["message"]
    assert server.ask(CHAT, {**ASKED, "\ud800": 1}).status_code == 400
    assert server.ask(CHAT, method="GET").json()["error"]["code"] == "method_not_allowed"
    assert server.ask("/v1/embeddings", {}).json()["error"]["code"] == "not_found"


# -- who may ask -----------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer no", "Basic " + "t" * 43, "Bearer " + "é"])
def test_without_the_token_every_path_but_page_and_health_is_401(
    server: Running, token: str
) -> None:
    for path in PATHS:
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request(method, path, headers={"Authorization": token.encode()})
            response = connection.getresponse()
            assert response.status == 401, (method, path)
            error = json.loads(response.read())["error"]
            assert error["code"] == "invalid_api_key"
            connection.close()
    assert server.ask("/", headers={"Authorization": token.encode()}).status_code == 200
    assert server.ask("/health", headers={"Authorization": ""}).json() == {"status": "ok"}
    assert server.ask("/", {}, headers={"Authorization": ""}).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "127.0.0.1:80@evil.example"}, 403),
        ({"Host": "models.example"}, 200),
        ({"Host": "LOCALHOST:9999"}, 200),  # a port that SSH forwards
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "127.0.0.1:5", "Origin": "http://127.0.0.1:6"}, 403),
        ({"Host": "127.0.0.1:5", "Origin": "http://127.0.0.1:5"}, 200),
    ],
)
def test_another_website_or_name_may_not_ask_even_with_the_token(
    server: Running, headers: dict[str, str], status: int
) -> None:
    for path in ("/", "/health", "/v1/models"):
        response = server.ask(path, headers=headers)
        assert response.status_code == status
        assert "Access-Control-Allow-Origin" not in response.headers


def test_the_page_may_run_nothing_but_its_own_script(server: Running) -> None:
    response = server.ask("/")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert len(re.findall(r"'sha256-[^']{44}'", policy)) == 2
    assert len(response.content) < 60_000
    assert not re.search(rb"(src|href)=[\"']?(https?:)?//", response.content), (
        "nothing from elsewhere"
    )
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-store"


# -- going away, and being watched -----------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_given_up(
    server: Running, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within two steps of when the server hears of it: test_engine.py counts them."""
    engine = server.engine
    voice = engine.models.voices["v2.5"]
    monkeypatch.setitem(engine.models.voices, "v2.5", replace(voice, stops=frozenset()))
    body = {**ASKED, "model": "v2.5", "max_tokens": 400, "stream": stream, "n": 2}
    text = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.token}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    ended, made = engine.counts.ended.get("cancelled", 0), engine.counts.tokens
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + text)
        wait_for(lambda: engine.counts.tokens > made + 4, 20)
    wait_for(lambda: engine.counts.ended.get("cancelled", 0) == ended + 2, 20)
    assert engine.counts.tokens - made < 2 * 400
    assert engine.load == (0, 0)


def test_metrics_are_prometheus_text_and_count(server: Running) -> None:
    server.chat(max_tokens=3)
    server.ask("/nothing")
    text = server.ask("/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"milktea_\w+(\{.*\})? [0-9.e+-]+", line) for line in lines)
    values = dict(line.rsplit(" ", 1) for line in lines)
    assert float(values["milktea_generated_tokens_total"]) >= 3
    assert float(values["milktea_first_token_seconds_count"]) >= 1
    assert float(values['milktea_requests_total{path="other",status="404"}']) >= 1
    assert len(re.findall("TYPE milktea_requests_total ", text)) == 1


# -- feedback --------------------------------------------------------------------------------------


def test_feedback_becomes_rows_that_data_files_takes(server: Running) -> None:
    asked = {"messages": [{"role": "system", "content": "s"}, *ASKED["messages"]]}
    answer = {**asked, "answer": "An apple."}
    said = [{"liked": True}, {"edited": "A pear, 梨."}, {"worse": "A stone."}]
    for one in said * 2:
        assert server.ask("/feedback", answer | one).status_code == 200
    other = {**asked, "answer": "A rock."}
    for one in ({"liked": True}, {"liked": False}):  # who thinks again
        assert server.ask("/feedback", other | one).status_code == 200
    for wrong in ({}, {"liked": 1}, {"edited": " "}, {"worse": "An apple. "}, {"worse": "\ud800"}):
        assert server.ask("/feedback", answer | wrong).status_code == 400
    folder = server.feedback
    rows, defects = read_rows([(folder / "feedback.jsonl", "feedback.jsonl")], Reading())
    assert not defects and [r.turns[-1].text for r in rows] == ["An apple.", "A pear, 梨."]
    file = folder / "feedback.pairs.jsonl"
    pairs, defects = PAIRS.read([(file, file.name)], Reading())
    assert not defects
    assert [(p.chosen[-1].text, p.rejected[-1].text) for p in pairs] == [
        ("A pear, 梨.", "An apple."),
        ("An apple.", "A stone."),
    ]
    file = folder / "feedback.labels.jsonl"
    tagged, defects = TAGGED.read([(file, file.name)], Reading())
    assert not defects and [t.wanted for t in tagged] == [True, False]
    assert {f.stat().st_mode & 0o077 for f in [folder, *folder.iterdir()]} == {0}


# -- bodies that nobody would send -----------------------------------------------------------------


def _mutated(random_: random.Random, body: Any) -> Any:
    """A body with one or more places changed for something else."""
    odd: list[Any] = [None, True, 0, -1, 1e308, 2**70, "", "\ud800", "\0", "a" * 999, [], {}, [[]]]
    odd += [[{}], {"a": {}}, "user", ["x", 1], -0.0, 10**400, "base", [1, 2], [[5, 6], [7]]]
    value = json.loads(json.dumps(body))
    for _ in range(random_.choice([1, 1, 2, 4])):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = random_.choice(keys)
            inner = place[key]
            if isinstance(inner, dict | list) and inner and random_.random() < 0.7:
                place = inner
                continue
            change = random_.random()
            if change < 0.2:
                del place[key]
            elif change < 0.3 and isinstance(place, dict):
                place[random_.choice(["n", "stop", "input", "best_of", "\ud800"])] = inner
            else:
                place[key] = copy.deepcopy(random_.choice(odd))
            break
    return value


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_body_makes_the_server_fail(
    server: Running, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.engine.models, "context", 80)  # where nobody says how long
    random_, found = random.Random(count), {}
    message = {"role": "user", "content": "hi", "input": "x"}
    part = {"type": "text", "text": "hi"}
    whole: dict[str, Any] = {"model": "base", "n": 1, "temperature": 1, "top_p": 0.9, "seed": 1}
    whole |= {"stop": ["a"], "stream": False, "logit_bias": {}, "metadata": {"a": "b"}}
    chat = {"messages": [{"role": "system", "content": [part]}, message], "max_tokens": 1}
    chat |= {"logprobs": True, "top_logprobs": 2, "response_format": {"type": "text"}}
    text = {"prompt": ["a", "b"], "max_tokens": 1, "logprobs": 1, "best_of": 1, "echo": False}
    rated = {"messages": [message], "answer": "a", "liked": True}
    bodies = [(CHAT, whole | chat), (TEXT, whole | text), ("/feedback", rated)]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"}
    for n in range(count):
        path, body = bodies[n % 3]
        raw = json.dumps(_mutated(random_, body)).encode()
        if n % 11 == 0:  # not JSON any more
            at = random_.randrange(len(raw))
            raw = raw[:at] + bytes([random_.randrange(256)]) + raw[at + 1 :]
        connection.request("POST", path, raw, headers)
        response = connection.getresponse()
        told = response.read()
        assert response.status < 500, raw
        if response.status != 200:
            assert set(json.loads(told)["error"]) == {"message", "type", "param", "code"}
        found[response.status] = found.get(response.status, 0) + 1
    connection.close()
    assert found[200] > count / 20 and found[400] > count / 4
    assert server.engine.load == (0, 0) and server.chat()


def test_no_two_things_of_the_page_have_one_name() -> None:
    """A script in which they have does not run at all, and the browser's tests are slow."""
    script = PAGE.read_text("utf-8").split("<script>", 1)[1]
    names = re.findall(r"^(?:async )?(?:function\*?|let|const) (\w+)", script, re.MULTILINE)
    assert len(names) > 40
    assert [name for name in names if names.count(name) > 1] == []
