"""The server through the clients that people have: the `openai` package and curl.

`openai` is no dependency of milktea. To run these tests: `pip install --target FOLDER openai`, then
`PYTHONPATH=FOLDER pytest tests/trainer/serve/test_openai.py`; without it they skip.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from machine import NOT_HERE, needs
from served import Running
from tiny import wait_for

openai: Any = pytest.importorskip("openai", reason=f"openai: {NOT_HERE}")

ASKED: Any = [{"role": "user", "content": "Where does Anton live?"}]


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.token, max_retries=0) as made:
        yield made


def said(client: Any, **more: Any) -> Any:
    settings = {"model": "zh-1", "messages": ASKED, "max_tokens": 12} | more
    return client.chat.completions.create(**settings)


def test_models_are_listed_and_one_is_retrieved(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["zh-1", "v2.5", "base"]
    assert client.models.retrieve("base").owned_by == "milktea"


def test_a_chat_is_answered_and_streams_the_same(client: Any) -> None:
    whole = said(client)
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(said(client, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    last = list(said(client, stream=True, stream_options={"include_usage": True}))[-1]
    assert last.usage == whole.usage and last.choices == []


def test_the_streaming_helper_collects_a_whole_answer(client: Any) -> None:
    whole = said(client)
    settings = {"model": "zh-1", "messages": ASKED, "max_tokens": 12}
    with client.chat.completions.stream(**settings) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason


def test_n_seed_temperature_and_stop_are_kept(client: Any) -> None:
    drawn = {"n": 2, "seed": 3, "temperature": 1.3, "top_p": 0.9}
    one, two = (said(client, **drawn) for _ in range(2))
    assert one.choices == two.choices and one.choices[0].message != one.choices[1].message
    text = said(client).choices[0].message.content
    stopped = said(client, stop=[text[4:7]])
    assert stopped.choices[0].message.content == text[: text.index(text[4:7])]
    assert stopped.choices[0].finish_reason == "stop"


def test_log_probabilities_are_read(client: Any) -> None:
    tokens = said(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in tokens)
    assert tokens[0].top_logprobs[0].token == tokens[0].token


def test_texts_are_completed_and_stream(client: Any) -> None:
    settings = {"model": "v2.5", "prompt": ["Below is an instruction", "A"], "max_tokens": 6}
    whole = client.completions.create(**settings)
    texts = ["", ""]
    for chunk in client.completions.create(**settings, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in whole.choices]


def test_errors_are_the_client_s_own_classes(client: Any, server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        said(client, model="gpt-4")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as refused:
        said(client, response_format={"type": "json_object"})
    assert refused.value.param == "response_format"
    assert refused.value.code == "unsupported_parameter"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        said(client, tools=[tool])
    with pytest.raises(openai.BadRequestError, match="context"):
        said(client, max_tokens=10**6)
    with pytest.raises(openai.AuthenticationError):
        said(client.with_options(api_key="wrong"))
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="base", input="x")


def test_a_user_s_message_may_have_alpaca_s_input(client: Any) -> None:
    message = {"role": "user", "content": "Sum it up.", "input": "one two three"}
    assert said(client, messages=[message]).usage.prompt_tokens > 20


def test_many_at_once_say_what_each_says_alone(server: Running) -> None:
    async def all_at_once(questions: list[str]) -> list[str]:
        made = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.token)
        async with made as client:
            asked = [
                client.chat.completions.create(
                    model=name, messages=[{"role": "user", "content": q}], max_tokens=24
                )
                for q, name in zip(questions, ["zh-1", "base", "v2.5", "zh-1"] * 4, strict=False)
            ]
            return [a.choices[0].message.content for a in await asyncio.gather(*asked)]

    questions = [f"Where does {name} live?" for name in ("Anton", "Bo", "Paco", "Mei")] * 4
    together = asyncio.run(all_at_once(questions))
    names = ["zh-1", "base", "v2.5", "zh-1"] * 4
    alone = [
        server.chat(q, model=n, max_tokens=24)["choices"][0]["message"]["content"]
        for q, n in zip(questions, names, strict=True)
    ]
    assert together == alone


def test_who_closes_a_stream_gives_the_answer_up(
    client: Any, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = server.engine
    endless = replace(engine.models.voices["zh-1"], stops=frozenset())
    monkeypatch.setitem(engine.models.voices, "zh-1", endless)
    before = engine.counts.ended.get("cancelled", 0)
    stream = said(client, stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()
    wait_for(lambda: engine.counts.ended.get("cancelled", 0) == before + 1)


def test_curl_asks_and_streams(server: Running) -> None:
    needs("curl")
    body = {"model": "base", "messages": ASKED, "max_tokens": 8, "stream": True}
    words = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-d", json.dumps(body)]
    words += ["-H", f"Authorization: Bearer {server.token}", "-H", "Content-Type: application/json"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    assert told.startswith('data: {"id": "chatcmpl-') and told.endswith("data: [DONE]\n\n")
