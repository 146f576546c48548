"""The server through LangChain's `langchain-openai`, as its users write it.

It is no dependency of milktea. To run these tests: `pip install --target FOLDER langchain-openai`,
then `PYTHONPATH=FOLDER pytest tests/trainer/serve/test_langchain.py`; without it they skip.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from machine import NOT_HERE
from served import Running

langchain: Any = pytest.importorskip("langchain_openai", reason=f"langchain-openai: {NOT_HERE}")

QUESTION = "Where does Anton live?"


def chat(server: Running, **more: Any) -> Any:
    settings = {"model": "zh-1", "max_tokens": 12, "temperature": 0, "max_retries": 0}
    settings |= {"base_url": f"{server.url}/v1", "api_key": server.token} | more
    return langchain.ChatOpenAI(**settings)


def plain(server: Running, text: str = QUESTION, **more: Any) -> str:
    told = server.chat(text, max_tokens=12, **more)
    return str(told["choices"][0]["message"]["content"])


def test_it_asks_and_counts_tokens(server: Running) -> None:
    told = chat(server).invoke(QUESTION)
    assert told.content == plain(server)
    counted = told.usage_metadata
    assert counted["input_tokens"] + counted["output_tokens"] == counted["total_tokens"] > 0
    assert told.response_metadata["finish_reason"] in ("stop", "length")
    assert told.response_metadata["model_name"] == "zh-1"


def test_it_streams_what_it_says_whole(server: Running) -> None:
    pieces = [piece.content for piece in chat(server).stream(QUESTION)]
    assert len(pieces) > 2 and "".join(pieces) == plain(server)


def test_a_stream_ends_with_what_it_used(server: Running) -> None:
    made = chat(server, stream_usage=True)
    counted = [piece.usage_metadata for piece in made.stream(QUESTION) if piece.usage_metadata]
    assert len(counted) == 1 and counted[0]["output_tokens"] > 0


def test_a_batch_is_what_each_is_alone(server: Running) -> None:
    questions = [f"Where does {name} live?" for name in ("Anton", "Bo", "Paco", "Mei")]
    together = [told.content for told in chat(server).batch(questions)]
    assert together == [plain(server, question) for question in questions]


def test_it_asks_and_streams_in_asyncio(server: Running) -> None:
    async def both() -> tuple[str, str]:
        made = chat(server)
        whole = (await made.ainvoke(QUESTION)).content
        return whole, "".join([piece.content async for piece in made.astream(QUESTION)])

    whole, streamed = asyncio.run(both())
    assert whole == streamed == plain(server)


def test_turns_and_a_system_message_go_where_the_template_has_them(server: Running) -> None:
    turns = [("system", "Be brief."), ("human", "Hi"), ("ai", "Hello"), ("human", QUESTION)]
    names = {"system": "system", "human": "user", "ai": "assistant"}
    said = [{"role": names[role], "content": text} for role, text in turns]
    body = {"model": "base", "messages": said, "max_tokens": 12}
    direct = server.ask("/v1/chat/completions", body)
    assert direct.status_code == 200, direct.text
    asked = chat(server, model="base").invoke(turns)
    assert asked.content == direct.json()["choices"][0]["message"]["content"]


def test_a_stop_text_ends_the_answer(server: Running) -> None:
    whole = plain(server)
    told = chat(server).invoke(QUESTION, stop=[whole[4:7]])
    assert told.content == whole[: whole.index(whole[4:7])]


def test_a_seed_draws_the_same_again(server: Running) -> None:
    made = chat(server, temperature=1.3, seed=5, top_p=0.9)
    assert made.invoke(QUESTION).content == made.invoke(QUESTION).content


def test_several_answers_to_one_question(server: Running) -> None:
    from langchain_core.messages import HumanMessage

    made = chat(server, n=3, temperature=1.3, seed=2).generate([[HumanMessage(QUESTION)]])
    texts = [one.text for one in made.generations[0]]
    assert len(texts) == 3 and len(set(texts)) > 1


def test_log_probabilities_come_with_the_message(server: Running) -> None:
    told = chat(server, logprobs=True, top_logprobs=2).invoke(QUESTION)
    tokens = told.response_metadata["logprobs"]["content"]
    assert tokens and all(len(token["top_logprobs"]) == 2 for token in tokens)


def test_it_is_a_part_of_a_chain(server: Running) -> None:
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    chain = ChatPromptTemplate.from_template("Where does {name} live?") | chat(server)
    assert (chain | StrOutputParser()).invoke({"name": "Anton"}) == plain(server)


def test_texts_are_completed(server: Running) -> None:
    settings = {"model": "v2.5", "max_tokens": 6, "temperature": 0, "max_retries": 0}
    made = langchain.OpenAI(base_url=f"{server.url}/v1", api_key=server.token, **settings)
    body = {"model": "v2.5", "prompt": "Below is an", "max_tokens": 6}
    direct = server.ask("/v1/completions", body).json()
    assert made.invoke("Below is an") == direct["choices"][0]["text"]


def test_a_wrong_key_and_an_unknown_model_are_openai_s_errors(server: Running) -> None:
    import openai

    with pytest.raises(openai.AuthenticationError):
        chat(server, api_key="wrong").invoke(QUESTION)
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        chat(server, model="gpt-4").invoke(QUESTION)


def test_tools_and_schemas_are_refused_by_name_never_dropped(server: Running) -> None:
    import openai

    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        chat(server).bind_tools([tool]).invoke(QUESTION)
    shape = {"title": "Place", "type": "object", "properties": {"city": {"type": "string"}}}
    with pytest.raises(openai.BadRequestError, match="response_format"):
        chat(server).with_structured_output(shape, method="json_mode").invoke(QUESTION)
