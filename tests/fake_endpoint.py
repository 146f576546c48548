"""Stands in for an endpoint that speaks OpenAI's chat completions: translates word by word into
made-up Chinese, counts tokens, charges for them, and has bad days.

    with Fake(seed=7, bad=0.4) as fake:
        fake.url, fake.usd, fake.twice

The translation of a word follows from the word alone (`chinese`), so a test knows what each text
must become without asking milktea.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

USD_IN, USD_OUT = 2.0, 6.0  # for a million tokens
SAID = [  # what may become of the texts of an answer
    "shift", "swap", "drop", "merge", "twice", "invent", "cut", "prose", "echo", "answer", "loop",
    "mask_gone", "mask_other", "mask_twice", "empty", "object", "no_anchors", "english",
]  # fmt: skip
SENT = [  # what may become of a request
    "429", "429_later", "500", "500_charged", "503", "400", "gone", "gone_charged", "half",
    "no_json", "no_choice", "no_usage",
]  # fmt: skip
_WORD = re.compile(r"⟦[^⟧]*⟧|[A-Za-z]+")
Reply = Callable[[str], "list[str] | str"]


def chinese(text: str) -> str:
    """Each word as characters that follow from it; marks and all else as they are."""

    def word(match: re.Match[str]) -> str:
        if match[0].startswith("⟦"):
            return match[0]
        digest = hashlib.blake2b(match[0].lower().encode()).digest()
        size = max(1, round(len(match[0]) / 2.5))
        return "".join(chr(0x4E00 + 37 * digest[n] + digest[n + 20]) for n in range(size))

    return _WORD.sub(word, text)


def translated(content: str) -> list[str] | str:
    """The answer to a question of `milktea data translate`, whole and right."""
    at = content.rfind("\n[")
    if at < 0:
        return chinese(content.partition("\n")[2])
    return [chinese(text) for text in json.loads(content[at:])]


def tokens(text: str) -> int:
    return sum(0.3 if c < "\x80" else 1.2 for c in text).__ceil__() + 3


@dataclass
class Fake:
    """`bad` is the share of requests that something happens to, of `kinds` (all without). `usd` is
    what was charged, `charged` how often for each call, `twice` the calls that were charged after
    their answer had been `kept` by whoever asked (`keep`)."""

    seed: int = 0
    bad: float = 0.0
    kinds: list[str] = field(default_factory=lambda: SAID + SENT)
    reply: Reply = translated
    key: str = ""
    usd: float = 0.0
    requests: int = 0
    charged: Counter[str] = field(default_factory=Counter)
    kept: set[str] = field(default_factory=set)
    twice: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> Fake:
        self._rng, self._loop, ready = random.Random(self.seed), asyncio.new_event_loop(), None
        ready = threading.Event()

        async def serve() -> None:
            app = web.Application(client_max_size=1 << 26)
            app.router.add_post("/v1/chat/completions", self._handle)
            self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
            ready.set()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.create_task(serve())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    def keep(self, calls: set[str]) -> None:
        """These calls' answers are on the disk of who asked: charged again they are paid twice."""
        self.kept |= calls

    # -- one request -------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        call = request.headers["Idempotency-Key"]
        self.requests += 1
        self.bodies.append(body)
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "no such key"}}, status=401)
        what = self._rng.choice(self.kinds) if self._rng.random() < self.bad else "well"
        self.seen[what] += 1
        if what in ("429", "429_later"):
            later = {"Retry-After": "1"} if what == "429_later" else {}
            return web.Response(status=429, headers=later)
        if what in ("500", "503", "400"):
            return web.Response(status=int(what), text="a bad day")
        if what == "gone":
            return self._cut(request)
        content = body["messages"][-1]["content"]
        said = self.reply(content)
        text, finish = self._spoiled(said, what), "stop"
        out, most = tokens(text), body.get("max_tokens") or body["max_completion_tokens"]
        if out > most or what == "cut":
            finish, text, out = "length", text[: len(text) // 2], min(out, most)
        usage = {"prompt_tokens": tokens(content), "completion_tokens": out}
        self._charge(call, usage)
        if what == "500_charged":
            return web.Response(status=500)
        if what == "gone_charged":
            return self._cut(request)
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
        answer: dict[str, Any] = {"choices": [choice], "usage": usage}
        if what == "no_choice":
            answer["choices"] = []
        if what == "no_usage":
            del answer["usage"]
        sent = json.dumps(answer).encode()
        if what == "no_json":
            sent = sent[: len(sent) // 2]
        if what == "half":
            return await self._half(request, sent)
        return web.Response(body=sent, content_type="application/json")

    def _charge(self, call: str, usage: dict[str, int]) -> None:
        usd = (usage["prompt_tokens"] * USD_IN + usage["completion_tokens"] * USD_OUT) / 1e6
        self.usd += usd
        self.charged[call] += 1
        if call in self.kept:
            self.twice.append(call)

    def _cut(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def _half(self, request: web.Request, sent: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(sent))})
        await response.prepare(request)
        await response.write(sent[: len(sent) // 2])
        assert request.transport is not None
        request.transport.abort()
        return response

    def _spoiled(self, said: list[str] | str, what: str) -> str:
        if isinstance(said, str):
            return said + " " + said if what == "twice" else said
        texts, at = list(said), self._rng.randrange(len(said))
        bare = [re.sub(r"\A⟦[a-z]+⟧", "", text) for text in texts]
        anchor = [text[: len(text) - len(b)] for text, b in zip(texts, bare, strict=True)]
        other = (at + 1) % len(texts)
        match what:
            case "shift":
                texts = texts[1:] + texts[:1]
                texts = [a + t for a, t in zip(anchor, texts, strict=True)]
            case "swap":
                texts[at], texts[other] = anchor[at] + texts[other], anchor[other] + texts[at]
            case "drop":
                del texts[at]
            case "merge":
                texts[at] += texts[other]
                del texts[other]
            case "twice":
                texts.append(texts[at])
            case "invent":
                texts.append("⟦bbb⟧" + bare[at])
            case "echo":
                texts[at] = anchor[at] + "The very same words as they were asked"
            case "answer":
                texts[at] = anchor[at] + "很抱歉，我无法回答这个问题，因为我是语言模型。"
            case "loop":
                texts[at] += "重复的话说了又说" * 40
            case "mask_gone":
                texts[at] = anchor[at] + re.sub(r"⟦\d+⟧", "", bare[at], count=1)
            case "mask_other":
                texts[at] = anchor[at] + re.sub(r"⟦\d+⟧", "⟦77⟧", bare[at], count=1)
            case "mask_twice":
                texts[at] = anchor[at] + re.sub(r"(⟦\d+⟧)", r"\1\1", bare[at], count=1)
            case "empty":
                texts[at] = anchor[at]
            case "no_anchors":
                texts = bare
            case "english":
                texts[at] = anchor[at] + "It said something else in another language here"
        whole = json.dumps(texts, ensure_ascii=False)
        if what == "prose":
            return "Here are the translations:\n" + "\n".join(bare)
        if what == "object":
            return '```json\n{"translations": ' + whole + "}\n```"
        return whole
