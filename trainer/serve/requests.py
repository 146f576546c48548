"""What an OpenAI client asks for, checked. Pure: a decoded body becomes a `Wish`, or RequestError.

Nothing is dropped in silence: what this server does not keep is refused by its name, but for values
that ask for nothing (null, an empty list, a penalty of 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.data.template import Turn

MOST_CHOICES, MOST_STOPS, MOST_MESSAGES, MOST_TOP = 16, 4, 1000, 20
SEEDS = 2**63
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class RequestError(Exception):
    """A refusal in OpenAI's shape. `kind` is its type, `param` the field, `code` for programs."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code
        self.status, self.kind = status, kind

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Wish:
    """One request. `prompts` are turns of a chat (one), or texts and token ids. `most` is None for
    as many tokens as there is room; `logprobs` None for none, else how many of the likeliest."""

    model: str
    prompts: list[list[Turn]] | list[str] | list[list[int]]
    n: int
    most: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    stream_usage: bool
    logprobs: int | None


def chat(body: Any) -> Wish:
    """The body of POST /v1/chat/completions. Raises RequestError."""
    fields = _Fields(body)
    turns = _turns(fields.take("messages"))
    wants = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, MOST_TOP)
    if top is not None and not wants:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    most = fields.whole("max_completion_tokens", 1, 10**9)
    older = fields.whole("max_tokens", 1, 10**9)
    return _wish(fields, [turns], older if most is None else most, (top or 0) if wants else None)


def completion(body: Any) -> Wish:
    """The body of POST /v1/completions. Raises RequestError."""
    fields = _Fields(body)
    prompts = _prompts(fields.take("prompt"))
    logprobs = fields.whole("logprobs", 0, MOST_TOP)
    most = fields.whole("max_tokens", 1, 10**9)
    best = fields.whole("best_of", 1, MOST_CHOICES)
    wish = _wish(fields, prompts, 16 if most is None else most, logprobs)
    if best is not None and best != wish.n:
        raise _not_kept("best_of")
    if wish.n * len(prompts) > MOST_CHOICES:
        raise RequestError(f"{wish.n} x {len(prompts)} answers are more than {MOST_CHOICES}", "n")
    return wish


def _wish(fields: _Fields, prompts: Any, most: int | None, logprobs: int | None) -> Wish:
    """The request from the fields that both interfaces share; refuses what is left over."""
    options = fields.take("stream_options")
    usage = _Fields(options, "stream_options.") if options is not None else None
    stream = fields.flag("stream")
    if usage and not stream:
        raise RequestError("stream_options is for streams: set stream: true", "stream_options")
    wish = Wish(
        model=fields.text("model"),
        prompts=prompts,
        n=fields.whole("n", 1, MOST_CHOICES) or 1,
        most=most,
        temperature=fields.number("temperature", 0.0, 2.0, 0.0),
        top_p=fields.number("top_p", 0.0, 1.0, 1.0),
        seed=fields.whole("seed", -SEEDS, SEEDS - 1),
        stop=_stops(fields.take("stop")),
        stream=stream,
        stream_usage=usage.flag("include_usage") if usage else False,
        logprobs=logprobs,
    )
    if usage:
        usage.flag("include_obfuscation")
        usage.nothing_left()
    fields.nothing_left()
    return wish


class _Fields:
    """A JSON object whose fields are taken one by one; null is as good as absent."""

    def __init__(self, body: Any, place: str = "") -> None:
        if not isinstance(body, dict):
            raise RequestError("the body is not a JSON object", place.rstrip(".") or None)
        self._left, self._place = {k: v for k, v in body.items() if v is not None}, place

    def take(self, name: str) -> Any:
        return self._left.pop(name, None)

    def text(self, name: str, default: str | None = None) -> str:
        value = self.take(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise RequestError(f"{name} is missing", self._place + name)
        return _string(value, self._place + name)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise RequestError(f"{name} is not true or false", self._place + name)

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if type(value) is not int or not least <= value <= most:
            raise RequestError(
                f"{name} is not a whole number of {least} to {most}", self._place + name
            )
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not least <= value <= most:
            raise RequestError(f"{name} is not a number of {least} to {most}", self._place + name)
        return float(value)

    def nothing_left(self) -> None:
        """Refuses the first field that nobody took and that asks for something."""
        for name, value in self._left.items():
            if not ASKS_NOTHING.get(name, lambda value: False)(value):
                raise _not_kept(self._place + name)


def _no_number(value: Any) -> bool:
    return type(value) in (int, float) and value == 0


def _nothing(value: Any) -> bool:
    return value in ([], {}, "", False, "none", "auto", "default")


# fields that may stand there with a value that changes nothing
ASKS_NOTHING: dict[str, Callable[[Any], bool]] = {
    "frequency_penalty": _no_number,
    "presence_penalty": _no_number,
    "logit_bias": _nothing,
    "response_format": lambda value: value == {"type": "text"},
    "modalities": lambda value: value == ["text"],
    "tools": _nothing,
    "tool_choice": _nothing,
    "functions": _nothing,
    "function_call": _nothing,
    "parallel_tool_calls": lambda value: isinstance(value, bool),
    "service_tier": _nothing,
    "store": _nothing,
    "metadata": lambda value: isinstance(value, dict),
    "user": lambda value: isinstance(value, str),
    "safety_identifier": lambda value: isinstance(value, str),
    "annotations": _nothing,
    "refusal": _nothing,
    "echo": _nothing,
    "suffix": _nothing,
}


def _not_kept(name: str) -> RequestError:
    return RequestError(
        f"this server does not keep {name[:100]}", name[:100], "unsupported_parameter"
    )


def _string(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{param} is not a string", param)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{param} holds half a character (a lone surrogate)", param) from None
    return value


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    given = value if isinstance(value, list) else [value]
    if len(given) > MOST_STOPS:
        raise RequestError(f"stop has more than {MOST_STOPS} strings", "stop")
    stops = tuple(_string(stop, "stop") for stop in given)
    if any(not 0 < len(stop) <= 1000 for stop in stops):
        raise RequestError("a stop string is empty or longer than 1,000 characters", "stop")
    return stops


def _turns(value: Any) -> list[Turn]:
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        raise RequestError(f"messages is not a list of 1 to {MOST_MESSAGES} messages", "messages")
    turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(value)]
    if turns[-1].role != "user":
        raise RequestError("the last message is not the user's", f"messages[{len(turns) - 1}].role")
    return turns


def messages_of(value: Any) -> list[dict[str, str]]:
    """Messages that end with the user's, as rows of data have them: role and content. Raises
    RequestError, also for Alpaca's input, which they have no place for."""
    turns = _turns(value)
    if any(turn.extra for turn in turns):
        raise RequestError("a row of messages has no place for input", "messages")
    named = [{"role": t.role, "content": t.text} for t in turns]
    reasons = [{"reasoning_content": t.reasoning} if t.reasoning else {} for t in turns]
    return [a | b for a, b in zip(named, reasons, strict=True)]


def _turn(message: Any, place: str) -> Turn:
    fields = _Fields(message, f"{place}.")
    role = fields.text("role")
    if role not in ROLES:
        raise RequestError(
            f"{place}.role {role[:40]!r} is none of {', '.join(ROLES)}", f"{place}.role"
        )
    text = _content(fields.take("content"), f"{place}.content")
    extra = reasoning = ""
    if role == "user":
        extra = fields.text("input", "")  # Alpaca's
    if role == "assistant":
        reasoning = fields.text("reasoning_content", "")
        if fields.take("tool_calls"):
            raise _not_kept(f"{place}.tool_calls")
    fields.nothing_left()
    return Turn(ROLES[role], text, extra, reasoning)


def _content(value: Any, place: str) -> str:
    if isinstance(value, list):
        return "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(value))
    return _string(value, place)


def _part(value: Any, place: str) -> str:
    fields = _Fields(value, f"{place}.")
    kind = fields.text("type")
    if kind != "text":
        raise _not_kept(f"{place}.type {kind}")
    text = fields.text("text")
    fields.nothing_left()
    return text


def _prompts(value: Any) -> list[str] | list[list[int]]:
    given = value if isinstance(value, list) else [value]
    if given and all(type(i) is int for i in given):
        given = [given]
    if not 0 < len(given) <= MOST_CHOICES:
        raise RequestError(
            f"prompt is not 1 to {MOST_CHOICES} texts or lists of token ids", "prompt"
        )
    if all(isinstance(p, list) and p and all(type(i) is int for i in p) for p in given):
        return given
    return [_string(prompt, "prompt") for prompt in given]
