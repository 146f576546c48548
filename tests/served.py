"""Results with random adapters, asks whose answers are kept, and a server on loopback."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from aiohttp import web

from trainer.data.prepare import prompt_ids
from trainer.data.template import Turn
from trainer.serve.app import application
from trainer.serve.engine import Ask, Engine, SamplingParams, Token


def write_adapter(folder: Path, base: Path, seed: int, **settings: Any) -> Path:
    """An adapter as a result has it, with random weights, asked in Alpaca's words."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trainer.data.prepare import Prepared
    from trainer.data.template import load
    from trainer.data.tokenised import Rows
    from trainer.data.tokens import open_vocabulary, stop_token, token_hash
    from trainer.result.words import write_words

    torch.manual_seed(seed)
    plain: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    config = LoraConfig(**{**plain, **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.4)
    model.save_pretrained(str(folder))
    vocabulary, template = open_vocabulary(base), load("alpaca")
    stop, found = stop_token(vocabulary, template), token_hash(vocabulary, template)
    write_words(base, folder, Prepared(Rows.empty(), vocabulary, template, stop, found))
    return folder


@dataclass
class Heard:
    """What an ask was told; `enough` is after how many tokens it says to stop."""

    tokens: list[Token] = field(default_factory=list)
    why: str = ""
    enough: int = 10**9
    over: threading.Event = field(default_factory=threading.Event)
    ask: Ask | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def tell(self, token: Token) -> bool:
        self.tokens.append(token)
        return len(self.tokens) < self.enough

    def ended(self, why: str) -> None:
        self.why = why
        self.over.set()


def asked(
    engine: Engine,
    question: str,
    name: str = "base",
    most: int = 16,
    choice: SamplingParams | None = None,
    heard: Heard | None = None,
) -> Heard:
    """Submits a question; its answer comes to what is returned."""
    voice, heard = engine.models.voices[name], heard or Heard()
    prompt = prompt_ids(voice.data, [Turn("user", question)])
    heard.ask = Ask(voice, prompt, most, choice or SamplingParams(), heard.tell, heard.ended)
    engine.submit(heard.ask)
    return heard


class Running:
    """The application on a free port of loopback, in a thread of its own, until `end`."""

    def __init__(self, engine: Engine, feedback: Path, token: str = "t" * 43) -> None:
        self.engine, self.feedback, self.token = engine, feedback, token
        self.meter = feedback.parent / "meter"  # nobody rented this machine until it is there
        self.loop, self._up = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(60)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        names = ("models.example",)
        app = application(self.engine, self.token, self.feedback, names, self.meter)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        self.loop.run_until_complete(self._runner.setup())
        self.loop.run_until_complete(web.TCPSite(self._runner, "127.0.0.1", 0).start())
        self.port = int(self._runner.addresses[0][1])
        self._up.set()
        self.loop.run_forever()
        self.loop.run_until_complete(self._runner.cleanup())
        self.loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.engine.close()

    def ask(self, path: str, body: Any = None, **more: Any) -> requests.Response:
        """A request with the token; POST where there is a body. `raw` are bytes of a body."""
        headers = {"Authorization": f"Bearer {self.token}"} | more.pop("headers", {})
        raw = more.pop("raw", None)
        if raw is not None:
            headers = {"Content-Type": "application/json"} | headers
        method = more.pop("method", "GET" if body is None and raw is None else "POST")
        return requests.request(
            method, self.url + path, json=body, data=raw, headers=headers, timeout=30, **more
        )

    def chat(self, text: str = "Name a fruit.", **more: Any) -> dict[str, Any]:
        """The answer to one message, sound."""
        body = {"model": "zh-1", "messages": [{"role": "user", "content": text}]}
        response = self.ask("/v1/chat/completions", {"max_tokens": 8} | body | more)
        assert response.status_code == 200, response.text
        return response.json()

    def chunks(self, path: str, body: Any) -> list[Any]:
        """The events of a stream; its last is "[DONE]"."""
        with self.ask(path, body | {"stream": True}, stream=True) as response:
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            lines = [line for line in response.iter_lines() if line and line[:1] != b":"]
        assert all(line.startswith(b"data: ") for line in lines)
        texts = [line[6:].decode() for line in lines]
        return [t if t == "[DONE]" else json.loads(t) for t in texts]
