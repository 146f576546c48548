"""The server: OpenAI's interface over an engine, the page, feedback, health and metrics."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from trainer.data.prepare import prompt_ids
from trainer.data.template import TemplateError
from trainer.serve import requests
from trainer.serve.engine import Busy, Engine
from trainer.serve.feedback import Feedback, rows_of
from trainer.serve.guard import Guard, Handler, add_headers
from trainer.serve.meter import read_meter
from trainer.serve.models import BASE, Voice
from trainer.serve.replies import Delta, Reply, Shapes, event
from trainer.serve.requests import RequestError, Wish
from trainer.wire.browser import content_policy

PAGE = Path(__file__).with_name("page.html")
BODY_BYTES, BODY_S = 2 << 20, 30.0  # of one request, and within which it must have come
HEARTBEAT_S = 15.0  # of a stream in which nothing is said
ENGINE = web.AppKey("engine", Engine)


def application(
    engine: Engine,
    token: str,
    feedback: Path,
    hosts: tuple[str, ...] = (),
    meter: Path | None = None,
) -> Any:
    """The aiohttp application; run it with handler_cancellation, so that a closed connection ends
    its request. `hosts` are names by which it is reached beside loopback's, `meter` the file that
    says what a rented machine costs."""
    server = _Server(engine, Feedback(feedback), meter)
    guard = Guard(token, hosts)
    app = web.Application(
        middlewares=[server.counted, guard.middleware], client_max_size=BODY_BYTES
    )
    app[ENGINE] = engine
    app.on_response_prepare.append(add_headers)
    app.add_routes(
        [
            web.get("/", server.page),
            web.get("/health", server.health),
            web.get("/metrics", server.metrics),
            web.get("/meter", server.meter),
            web.get("/v1/models", server.models),
            web.get("/v1/models/{name}", server.model),
            web.post("/v1/chat/completions", server.chat),
            web.post("/v1/completions", server.completions),
            web.post("/feedback", server.feedback),
        ]
    )
    return app


class _Server:
    def __init__(self, engine: Engine, feedback: Feedback, meter: Path | None) -> None:
        self.engine, self._feedback, self._meter = engine, feedback, meter
        self._outbox = Outbox()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._page = PAGE.read_bytes()
        self._policy = content_policy(self._page.decode())

    @web.middleware
    async def counted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        route = request.match_info.route.resource
        known = route.canonical if route is not None else "other"
        self._requests[known, response.status] += 1
        return response

    # -- small answers -----------------------------------------------------------------------------

    async def page(self, request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": self._policy}
        return web.Response(
            body=self._page, content_type="text/html", charset="utf-8", headers=headers
        )

    async def health(self, request: web.Request) -> web.Response:
        alive = self.engine.alive
        status = "ok" if alive else "the model's thread ended"
        return web.json_response({"status": status}, status=200 if alive else 503)

    async def meter(self, request: web.Request) -> web.Response:
        """What the rented machine costs; null on one that nobody rented."""
        told = read_meter(self._meter) if self._meter is not None else None
        return web.json_response(told and {key: round(value, 6) for key, value in told.items()})

    async def models(self, request: web.Request) -> web.Response:
        listed = [self._told(voice) for voice in self.engine.models.voices.values()]
        return web.json_response({"object": "list", "data": listed})

    async def model(self, request: web.Request) -> web.Response:
        return web.json_response(self._told(self._voice(request.match_info["name"])))

    def _told(self, voice: Voice) -> dict[str, Any]:
        told = {"id": voice.name, "object": "model", "created": 0, "owned_by": "milktea"}
        more = {"template": voice.data.template.name, "base": voice.name == BASE}
        return told | {"milktea": more | {"context": self.engine.models.context}}

    def _voice(self, name: str) -> Voice:
        voice = self.engine.models.voices.get(name)
        if voice is None:
            known = ", ".join(self.engine.models.voices)
            raise RequestError(
                f"there is no model {name[:100]!r} here, but: {known}",
                "model",
                "model_not_found",
                404,
            )
        return voice

    async def feedback(self, request: web.Request) -> web.Response:
        rows = rows_of(await _body(request))
        return web.json_response({"files": await asyncio.to_thread(self._feedback.add, rows)})

    async def metrics(self, request: web.Request) -> web.Response:
        counts, (running, waiting) = self.engine.counts, self.engine.load
        rows: list[tuple[str, str, str, float]] = [
            ("steps_total", "counter", "", counts.steps),
            ("prompt_tokens_total", "counter", "", counts.prompt_tokens),
            ("generated_tokens_total", "counter", "", counts.tokens),
            ("running", "gauge", "", running),
            ("waiting", "gauge", "", waiting),
            ("first_token_seconds_sum", "counter", "", counts.first_token_s),
            ("first_token_seconds_count", "counter", "", counts.first_tokens),
        ]
        for why, n in sorted(counts.ended.items()):
            rows.append(("answers_total", "counter", f'{{ended="{why}"}}', n))
        for (path, status), n in sorted(self._requests.items()):
            rows.append(("requests_total", "counter", f'{{path="{path}",status="{status}"}}', n))
        lines: list[str] = []
        for name, kind, labels, value in rows:
            head = f"# TYPE milktea_{name} {kind}"
            lines += [*([] if head in lines else [head]), f"milktea_{name}{labels} {value:g}"]
        return web.Response(text="\n".join(lines) + "\n")

    # -- answers of the model ----------------------------------------------------------------------

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, requests.chat(await _body(request)), chat=True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, requests.completion(await _body(request)), chat=False)

    async def _answer(self, request: web.Request, wish: Wish, chat: bool) -> web.StreamResponse:
        voice = self._voice(wish.model)
        prompts = await asyncio.to_thread(_prompt_ids, voice, wish)
        most = self._room(prompts, wish)
        seed = secrets.randbits(31) if wish.seed is None else wish.seed
        shapes = Shapes(
            chat,
            f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            wish.model,
            voice,
            seed,
            wish.logprobs is not None,
        )
        queue: asyncio.Queue[Delta] = asyncio.Queue()
        post = partial(self._outbox.post, asyncio.get_running_loop(), queue)
        each = [prompt for prompt in prompts for _ in range(wish.n)]
        replies = [Reply(i, voice, p, wish, most, seed, post) for i, p in enumerate(each)]
        async with _asked(self.engine, replies):
            if wish.stream:
                return await _stream(request, wish, shapes, replies, prompts, queue)
            parts: list[list[Delta]] = [[] for _ in replies]
            while not all(its and its[-1].why for its in parts):
                delta = await queue.get()
                _validate_end(delta)
                parts[delta.index].append(delta)
            return web.json_response(shapes.whole(parts, _usage(prompts, replies)), dumps=_dumps)

    def _room(self, prompts: list[list[int]], wish: Wish) -> int:
        """The most tokens of each answer. Raises RequestError where the prompt is too long."""
        context, longest = self.engine.models.context, max(map(len, prompts))
        most = context - longest if wish.most is None else wish.most
        if most < 1 or longest + most > context:
            raise RequestError(
                f"this model's context is {context} tokens; the prompt has {longest}, and the "
                f"answer is to have {wish.most or 'at least 1'}: ask shorter, or for less",
                "messages" if wish.prompts and isinstance(wish.prompts[0], list) else "prompt",
                "context_length_exceeded",
            )
        return most


def _prompt_ids(voice: Voice, wish: Wish) -> list[list[int]]:
    """The ids of each prompt. Raises RequestError where the template has no place for a message."""
    vocabulary = voice.data.vocabulary
    made: list[list[int]] = []
    for prompt in wish.prompts:
        if isinstance(prompt, str):
            ids = vocabulary.tokenizer.encode(prompt, add_special_tokens=False).ids
            made.append([*vocabulary.prefix, *ids])
        elif isinstance(prompt[0], int):
            if not all(0 <= i < vocabulary.size for i in prompt):
                raise RequestError(f"a token id is not of 0 to {vocabulary.size - 1}", "prompt")
            made.append(list(prompt))
        else:
            try:
                made.append(prompt_ids(voice.data, prompt))
            except TemplateError as error:
                raise RequestError(str(error), "messages") from None
    if not all(made):
        raise RequestError("the prompt is empty", "prompt")
    return made


@asynccontextmanager
async def _asked(engine: Engine, replies: list[Reply]) -> AsyncIterator[None]:
    """Submits the replies, and cancels them behind the block, however it ends."""
    try:
        engine.submit(*(reply.ask for reply in replies))
    except Busy:
        raise RequestError("too many requests wait here", None, "busy", 429) from None
    try:
        yield
    finally:
        for reply in replies:
            reply.ask.cancel()


async def _stream(
    request: web.Request,
    wish: Wish,
    shapes: Shapes,
    replies: list[Reply],
    prompts: list[list[int]],
    queue: asyncio.Queue[Delta],
) -> web.StreamResponse:
    response = web.StreamResponse()
    response.content_type, response.charset = "text/event-stream", "utf-8"
    await response.prepare(request)
    openings = [shapes.opening(reply.index) for reply in replies]
    await response.write(b"".join(event(o) for o in openings if o))
    going = len(replies)
    try:
        while going:
            ready = [await _next(response, queue)]
            while not queue.empty():
                ready.append(queue.get_nowait())
            for delta in ready:
                _validate_end(delta)
                going -= bool(delta.why)
            events = [made for delta in ready for made in shapes.events(delta)]
            await response.write(b"".join(events))
        if wish.stream_usage:
            await response.write(event(shapes.usage(_usage(prompts, replies))))
        await response.write(b"data: [DONE]\n\n")
    except RequestError as error:  # the status has been sent
        await response.write(event(error.body))
    return response


async def _next(response: web.StreamResponse, queue: asyncio.Queue[Delta]) -> Delta:
    while True:
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                return await queue.get()
        except TimeoutError:
            await response.write(b": waiting\n\n")


def _validate_end(delta: Delta) -> None:
    if delta.why == "error":
        raise RequestError("the model failed; the log says why", None, None, 500, "server_error")
    if delta.why == "cancelled":
        raise RequestError("this server is ending", None, None, 503, "server_error")


def _usage(prompts: list[list[int]], replies: list[Reply]) -> dict[str, int]:
    asked, said = sum(map(len, prompts)), sum(reply.ask.made for reply in replies)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


class Outbox:
    """Deltas on their way from the engine's thread to the requests' queues. The loop is woken once
    for all that it has not fetched: waking it for each of 32 answers costs more than the rest."""

    def __init__(self) -> None:
        self._held: deque[tuple[asyncio.Queue[Delta], Delta]] = deque()
        self._woken = False

    def post(
        self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Delta], delta: Delta
    ) -> None:
        """From any thread."""
        self._held.append((queue, delta))
        if self._woken:
            return
        self._woken = True
        try:
            loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: nobody listens any more
            pass

    def _deliver(self) -> None:
        self._woken = False  # before it looks: what comes from now on wakes it again
        while self._held:
            queue, delta = self._held.popleft()
            queue.put_nowait(delta)


async def _body(request: web.Request) -> Any:
    """The JSON of a request. Raises RequestError."""
    try:
        async with asyncio.timeout(BODY_S):
            raw = await request.read()
    except TimeoutError:
        raise RequestError("the body did not come", None, "timeout", 408) from None
    except web.RequestPayloadError:
        raise RequestError("the body is not what its headers say", None, "body") from None
    if request.content_type != "application/json":
        raise RequestError("send application/json", "Content-Type", "content_type", 415)
    try:
        return json.loads(raw, parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON", None, "invalid_json") from None


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; which of two values of one key is meant nobody can know."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RequestError(f"{key[:100]} stands twice in one object", key[:100], "invalid_json")
        found[key] = value
    return found


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
