"""Answers in OpenAI's shapes: one at the end, or chunk by chunk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from trainer.serve.engine import Ask, SamplingParams, Token
from trainer.serve.models import Voice
from trainer.serve.requests import Wish
from trainer.serve.speech import HALF, Speech

Shape = dict[str, Any]
_ENCODER = json.JSONEncoder(ensure_ascii=False)
_MARK = "\0"  # no name of a model holds it


def event(shape: Shape) -> bytes:
    """A shape as one event of a stream."""
    return f"data: {_ENCODER.encode(shape)}\n\n".encode()


@dataclass(frozen=True)
class Delta:
    """What one more token brought to choice `index`; `why` is set in its last delta."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    why: str = ""


class Reply:
    """One choice: an ask, its text, its tokens. `post` gets each delta, in the engine's thread."""

    def __init__(
        self,
        index: int,
        voice: Voice,
        prompt: list[int],
        wish: Wish,
        most: int,
        seed: int,
        post: Callable[[Delta], None],
    ) -> None:
        self.index, self._post = index, post
        self._speech = Speech(voice.data.vocabulary.tokenizer, wish.stop)
        sampling = SamplingParams(wish.temperature, wish.top_p, seed, index, wish.logprobs or 0)
        self.ask = Ask(voice, prompt, most, sampling, self._tell, self._ended)

    def _tell(self, token: Token) -> bool:
        if token.id in self.ask.voice.stops:
            return True
        text = self._speech.add(token.id)
        self._post(Delta(self.index, text, (token,)))
        return not self._speech.stopped

    def _ended(self, why: str) -> None:
        self._post(Delta(self.index, self._speech.rest(), (), why))


@dataclass
class Shapes:
    """The objects of one request. `chat` says which of the two interfaces."""

    chat: bool
    id: str
    model: str
    voice: Voice
    seed: int
    logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))
    _characters: dict[int, int] = field(default_factory=dict)  # of the tokens of each choice
    _around: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)

    def _head(self, chunk: bool) -> Shape:
        name = "chat.completion" if self.chat else "text_completion"
        kind = name + (".chunk" if chunk and self.chat else "")
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"system_fingerprint": f"milktea-seed-{self.seed}"}

    def whole(self, parts: list[list[Delta]], usage: Shape) -> Shape:
        """The answer to a request without a stream; `parts` of each choice."""
        choices = []
        for index, its in enumerate(parts):
            text = "".join(delta.text for delta in its)
            choice: Shape = {"index": index, "finish_reason": its[-1].why}
            choice["logprobs"] = self._logprobs(index, [t for d in its for t in d.tokens])
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choices.append(choice)
        return self._head(False) | {"choices": choices, "usage": usage}

    def opening(self, index: int) -> Shape | None:
        """The first chunk of a choice: who speaks."""
        if not self.chat:
            return None
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk(index, {"delta": delta}, None, [])

    def chunk(self, delta: Delta) -> list[Shape]:
        """The chunks of a delta: text, and at the end why."""
        made = []
        if delta.text or (self.logprobs and delta.tokens):
            said: Shape = {"delta": {"content": delta.text}} if self.chat else {"text": delta.text}
            made.append(self._chunk(delta.index, said, None, list(delta.tokens)))
        if delta.why:
            said = {"delta": {}} if self.chat else {"text": ""}
            made.append(self._chunk(delta.index, said, delta.why, []))
        return made

    def events(self, delta: Delta) -> list[bytes]:
        """The chunks of a delta as events of a stream. Text alone, which is nearly all of them, is
        put into an event that is written once for each choice."""
        if delta.why or self.logprobs or not delta.text:
            return [event(shape) for shape in self.chunk(delta)]
        if delta.index not in self._around:
            [shape] = self.chunk(Delta(delta.index, _MARK))
            before, after = event(shape).split(_ENCODER.encode(_MARK).encode())
            self._around[delta.index] = (before, after)
        before, after = self._around[delta.index]
        return [before + _ENCODER.encode(delta.text).encode() + after]

    def usage(self, usage: Shape) -> Shape:
        """The chunk behind all others, for stream_options.include_usage."""
        return self._head(True) | {"choices": [], "usage": usage}

    def _chunk(self, index: int, said: Shape, why: str | None, tokens: list[Token]) -> Shape:
        told = self._logprobs(index, tokens)
        choice = {"index": index, "finish_reason": why, "logprobs": told}
        return self._head(True) | {"choices": [choice | said]}

    def _logprobs(self, index: int, tokens: list[Token]) -> Shape | None:
        if not self.logprobs or not tokens:
            return None
        if self.chat:
            each = [self._token(t.id, t.log_prob) | self._top(t) for t in tokens]
            return {"content": each, "refusal": None}
        texts = [self._text(t.id) for t in tokens]
        tops = [{self._text(id_): log_prob for id_, log_prob in t.top} for t in tokens]
        told: Shape = {"tokens": texts, "token_logprobs": [t.log_prob for t in tokens]}
        begin = self._characters.get(index, 0)
        ends = list(accumulate(map(len, texts), initial=begin))
        self._characters[index] = ends.pop()
        return told | {"top_logprobs": tops, "text_offset": ends}

    def _top(self, token: Token) -> Shape:
        return {"top_logprobs": [self._token(id_, log_prob) for id_, log_prob in token.top]}

    def _token(self, id_: int, log_prob: float) -> Shape:
        text = self._text(id_)
        whole = HALF not in text
        return {"token": text, "logprob": log_prob, "bytes": list(text.encode()) if whole else None}

    def _text(self, id_: int) -> str:
        tokenizer = self.voice.data.vocabulary.tokenizer
        text: str = tokenizer.decode([id_], skip_special_tokens=False)
        return text
