"""Chat templates: each answer of a conversation in the rendering that inference will see. Jinja
only: no torch, no transformers.

For an answer, `before` is the prompt that a server renders for it, with the flags of inference, and
`after` the rendering that ends with the answer; what `after` adds is learned, up to the token that
stops the answer. Where a template renders history otherwise than it rendered the answer (Qwen3
drops thinking, Harmony changes the end token), a conversation becomes several examples, one for
each rendering. What a template loses (reasoning, tool calls, a system prompt) is found by rendering
and raises; no marker of any model is known here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from trainer.data.template import Segment, TemplateError, Turn

DAY = datetime(2024, 7, 26)  # that strftime_now gives: today's date would change every training row
THINKING_FLAGS = ("enable_thinking", "thinking")  # what templates call it
MAX_OPENING = 64  # characters of an answer (such as <think>) that a prompt may end with
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Unicode noncharacters around what {% generation %} holds; no text of a row may hold them
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
_TAG = re.compile(r"<([^<>/]+)>\s*\Z")  # that a text ends with
_QUESTION, _ANSWER, _REASON, _CALL = "Quokkaask", "Quokkasay", "Quokkawhy", "quokkacall"


class SpecialTokens(NamedTuple):
    """What a tokenizer tells a template: `texts` are all special tokens, `stops` those at which a
    server ends an answer (generation_config.json's), empty where nobody says."""

    eos: str
    bos: str = ""
    texts: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()


@dataclass
class Example:
    """One text to train on: `segments` end to end. `thinking` is the flag of the prompts of its
    answers, None where the template has none; `empty_block` says that an answer without reasoning
    closes the block of reasoning that its prompt opens."""

    segments: list[Segment]
    thinking: bool | None = None
    empty_block: bool = False
    text: str = field(default="", repr=False)

    def add(self, text: str, trained: bool) -> None:
        if text:
            self.segments.append(Segment(text, trained))
            self.text += text


class RenderedAnswer(NamedTuple):
    """`before` is its prompt; `parts` are what follows, each trained or not, through the stop
    token; `rest` is what the template writes behind that."""

    before: str
    parts: list[Segment]
    rest: str
    thinking: bool | None


class ChatTemplate:
    """A tokenizer's Jinja text. `stop` is the token that ends a plain answer ('' where there is
    none). Raises TemplateError when the text is not Jinja."""

    def __init__(self, jinja: str, tokens: SpecialTokens) -> None:
        self._tokens = tokens
        self._compiled = _compile(jinja)
        self._arguments_as_text = False
        self._flags: list[str] = []
        self._tails: dict[bool | None, str] = {}
        ends = sorted((t for t in tokens.texts if t.strip()), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, ends))) if ends else None
        self._as_parts = False
        self._as_parts = _QUESTION not in self._probe([_user()]) and self._reads_parts()
        self._flags = [name for name in THINKING_FLAGS if self._reacts_to(name)]

    @property
    def flags(self) -> tuple[str, ...]:
        """The names under which the template reads whether the model is to reason."""
        return tuple(self._flags)

    # -- what is learned ---------------------------------------------------------------------------

    def examples(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Any] = (),
        *,
        thinking: bool | None = None,
        last_only: bool = False,
    ) -> list[Example]:
        """One example, or one for each rendering of the history; none where no answer is to be
        learned. `thinking` None: each answer as it is, with reasoning or without."""
        turns = [self._with_reasoning(turn) for turn in turns]
        numbers = [i for i, t in enumerate(turns) if t.role == "assistant" and t.learned]
        messages, found = self._messages(turns), list[Example]()
        rest = ""
        for i in numbers[-1:] if last_only else numbers:
            answer = self._answer(turns, messages, i, tools, thinking)
            if found and answer.before.startswith(found[-1].text):
                example = found[-1]
                if example.thinking != answer.thinking:
                    example.thinking = True
            else:
                if found:
                    found[-1].add(rest, False)
                example = Example([], answer.thinking)
                found.append(example)
                self._validate_shown(answer.before, turns[:i], tools)
            opened = self._block_end if not turns[i].reasoning else None
            label = answer.parts[0].text
            example.empty_block |= bool(opened and label.lstrip().startswith(opened.lstrip()))
            example.add(answer.before[len(example.text) :], False)
            for part in answer.parts:
                example.add(part.text, part.trained)
            rest = answer.rest
        if found:
            found[-1].add(rest, False)
        return found

    def prompt(self, turns: Sequence[Turn], tools: Sequence[Any] = (), thinking: Any = None) -> str:
        """The prompt that the model answers, rendered with the flags of inference."""
        messages = self._messages([self._with_reasoning(turn) for turn in turns])
        return self.render(messages, tools, True, thinking)

    def _answer(
        self,
        turns: Sequence[Turn],
        messages: list[dict[str, Any]],
        i: int,
        tools: Sequence[Any],
        thinking: bool | None,
    ) -> RenderedAnswer:
        number = sum(t.role == "assistant" for t in turns[: i + 1])
        flags = self._flags_for(turns[i], thinking)
        for flag in flags:
            before = self.render(messages[:i], tools, True, flag)
            marked = self._render_marked(messages[: i + 1], tools, False, flag)
            after = _MARKS.sub("", marked)
            if after.startswith(before):
                label, start = after[len(before) :], len(before)
                break
        else:
            flag, before, label = self._realigned(turns[i], messages[: i + 1], tools, flags, number)
            start = -1
        self._validate_answer(before, label, turns[i], number)
        end, appended = self._end(label, bool(turns[i].calls), flag, number)
        learned = label[:end]
        if start >= 0 and marked != after:
            parts = _generation_parts(marked, start, start + end)
            if not any(p.trained for p in parts):
                raise TemplateError(
                    f"answer {number} lies outside of the chat template's {{% generation %}} block:"
                    " name another data.template"
                )
        else:
            parts = [Segment(learned, True)]
        if appended:
            parts[-1:] = [Segment(parts[-1].text + appended, True)]
        return RenderedAnswer(before, parts, "" if appended else label[end:], flag)

    def _flags_for(self, turn: Turn, thinking: bool | None) -> tuple[bool | None, ...]:
        """Values of the flag to try, the likeliest first: an answer without reasoning belongs
        behind a prompt that asks for none."""
        if not self._flags:
            return (None,)
        if thinking is not None:
            return (thinking,)
        return (True, None) if turn.reasoning else (False, True)

    def _realigned(
        self,
        turn: Turn,
        messages: list[dict[str, Any]],
        tools: Sequence[Any],
        flags: Sequence[bool | None],
        number: int,
    ) -> tuple[bool | None, str, str]:
        """(flag, prompt, what is learned behind it) of the last of `messages`, although no prompt
        of `flags` begins the rendering with the answer. Raises TemplateError."""
        refused: list[TemplateError] = []
        for flag in reversed(flags):
            before = self.render(messages[:-1], tools, True, flag)
            after = self.render(messages, tools, False, flag)
            prompted = self.render(messages[:-1], tools, False, flag)
            opening = before[len(prompted) :] if before.startswith(prompted) else ""
            try:
                return flag, before, self._behind(before, after, opening, turn, flag, number)
            except TemplateError as error:
                refused.append(error)
        raise refused[0]

    def _behind(
        self,
        before: str,
        after: str,
        opening: str,
        turn: Turn,
        flag: bool | None,
        number: int,
    ) -> str:
        """What is learned behind `before` although `after` does not begin with it. `opening` is
        what add_generation_prompt adds."""
        if self._dropped_words and _TAG.search(before):
            at = before.rindex(self._dropped_words[0])
            if after.startswith(before[:at]):
                end = self._block_end or ""
                end = end.rstrip("\n") if after.startswith("\n", at) else end
                return turn.reasoning + end + after[at:]
        common = _common(before, after)
        supplied, rest = before[common:], after[common:]
        at = rest.find(supplied)
        if at >= 0 and (label := rest[at + len(supplied) :]):  # written otherwise before it
            return label
        if at := _aligned(before, after, opening):
            return after[at:]
        content = turn.text.strip()
        body = rest[rest.find(content) :] if content and content in rest else ""
        if body and not turn.reasoning:
            if self._block_end is not None and self._opens_block(flag):
                return self._block_end + body  # the prompt opened a block: it is closed, empty
            if flag is False and self._opens_block(True) is not None:
                return body  # the prompt holds a closed block
        raise TemplateError(
            f"answer {number} does not begin as the chat template's own prompt for it ends "
            f"({supplied[-30:]!r}): "
            + (
                "give each answer its reasoning (reasoning_content), or name another data.template"
                if not turn.reasoning
                else "name another data.template"
            )
        )

    def _end(self, label: str, calls: bool, flag: bool | None, number: int) -> tuple[int, str]:
        """(where the learned part of `label` ends, the stop to append when it has none)."""
        tail, stop = self._tail(flag), self.stop
        if not calls and stop and tail and label.endswith(tail) and stop in tail:
            return len(label) - len(tail) + tail.index(stop) + len(stop), ""
        bare = label.rstrip()
        for stop in self._tokens.stops or self._tokens.texts:
            if bare.endswith(stop):
                return len(bare), ""
        if not self._tokens.texts and self.stop and bare.endswith(self.stop):
            return len(bare), ""
        junction = self._after_call if calls else self._after_answer
        if not junction:
            raise TemplateError(
                f"answer {number}: the chat template ends it with no stop token, so the model "
                "would never stop: name another data.template"
            )
        return len(bare), junction

    # -- what a template loses ---------------------------------------------------------------------

    def _validate_answer(self, before: str, label: str, turn: Turn, number: int) -> None:
        written = _squeezed(label)
        lost = [
            what
            for what, text in (("its text", turn.text), ("its reasoning", turn.reasoning))
            if _squeezed(text) not in written
            and _squeezed(text) not in _squeezed(before[-MAX_OPENING:] + label)
        ]
        lost += [f"the call of {name!r}" for name in _call_names(turn.calls) if name not in label]
        if lost:
            raise TemplateError(
                f"the chat template drops or changes {lost[0]} in answer {number}: take it out of "
                "the row, or name another data.template"
            )

    def _validate_shown(self, before: str, turns: Sequence[Turn], tools: Sequence[Any]) -> None:
        written = _squeezed(before)
        for turn in turns:
            if turn.role not in ("system", "tool"):
                continue
            text = _squeezed(turn.text)
            if text not in written and _squeezed(json.dumps(turn.text)[1:-1]) not in written:
                raise TemplateError(
                    f"the chat template drops the {turn.role} turn {turn.text[:30]!r}: take it out "
                    "of the row, or name another data.template"
                )
        for name in _tool_names(tools):
            if name not in before:
                raise TemplateError(
                    f"the chat template drops the tool {name!r}: take the tools out of the row, or "
                    "name another data.template"
                )

    # -- what a template does, found by rendering a conversation of made-up words ------------------

    def _tail(self, flag: bool | None) -> str:
        """What stands behind the text of an answer that is the last."""
        if flag not in self._tails:
            self._tails[flag] = self._probe([_user(), _assistant()], flag).rpartition(_ANSWER)[2]
        return self._tails[flag]

    @cached_property
    def stop(self) -> str:
        """The token that ends a plain answer."""
        tail = self._tail(None)
        written = self._special.findall(tail) if self._special else [tail.strip()]
        for token in [*(t for t in written if t in self._tokens.stops), *written]:
            if token:
                return str(token)
        return self._after_answer.strip()

    @cached_property
    def _after_answer(self) -> str:
        """What the model must write behind an answer that the template does not end: the token
        that begins the next turn where servers stop at it, else the end token."""
        return self._junction([_user(), _assistant()], _user("Quokkanext"))

    @cached_property
    def _after_call(self) -> str:
        call = _assistant(calls=True)
        return self._junction([_user(), call], {"role": "tool", "content": "1", "name": _CALL})

    def _junction(self, messages: list[dict[str, Any]], following: dict[str, Any]) -> str:
        short, long = self._probe(messages), self._probe([*messages, following])
        bare = short.rstrip()
        if not long.startswith(bare) or self._special is None:
            return ""
        found = self._special.match(long[len(bare) :].lstrip())
        if not found:
            return ""
        if self._tokens.stops and found[0] not in self._tokens.stops:
            return self._tokens.eos
        space = long[len(bare) : len(long) - len(long[len(bare) :].lstrip())]
        return space + found[0]

    @cached_property
    def reasoning_key(self) -> str:
        """The key under which the template reads an answer's reasoning, '' where it reads none."""
        for key in REASONING_KEYS:
            for calls in (False, True):
                if _REASON in self._probe([_user(), _assistant(calls, **{key: _REASON})], True):
                    return key
        return ""

    def _reads_parts(self) -> bool:
        """Whether contents are lists of parts to the template, as those of SmolVLM and LLaVA."""
        self._as_parts = True
        return _QUESTION in self._probe([_user()])

    def _reacts_to(self, name: str) -> bool:
        def written(value: bool) -> list[str]:
            self._flags = [name]
            return [
                self._probe([_user()], value, prompt=True),
                self._probe([_user(), _assistant()], value),
            ]

        return written(True) != written(False)

    def _with_reasoning(self, turn: Turn) -> Turn:
        """`turn` with the reasoning that its text begins with, in the words in which the template
        writes reasoning, taken out of the text."""
        if turn.role != "assistant" or turn.reasoning or not self._block_words:
            return turn
        opens, closes = self._block_words
        head, found, text = turn.text.partition(closes)
        if not found or (opens in head) != head.lstrip().startswith(opens) or opens in text:
            return turn
        reasoning = head.lstrip().removeprefix(opens).strip("\n")
        # what the template drops ends with the word: history has the blank lines behind it
        text = text if self._dropped_words else text.lstrip("\n")
        return turn._replace(text=text, reasoning=reasoning) if reasoning else turn

    @cached_property
    def _dropped_words(self) -> tuple[str, str] | None:
        """The words before and behind reasoning of a template that reads none, whose prompt opens a
        block of it, and that drops from an answer's text all that stands before the block's end
        (DeepSeek-R1)."""
        found = _TAG.search(self._probe([_user()], prompt=True))
        if self.reasoning_key or not found:
            return None
        closes = f"</{found[1]}>"
        said = self._probe([_user(), _user(_REASON + closes + _ANSWER) | {"role": "assistant"}])
        return (found[0].strip(), closes) if _ANSWER in said and _REASON not in said else None

    @cached_property
    def _block_words(self) -> tuple[str, str] | None:
        """The words before and behind reasoning, such as <think> and </think>."""
        if not self.reasoning_key:
            return self._dropped_words
        answer = _assistant(False, **{self.reasoning_key: _REASON})
        written = self._probe([_user(), answer], True)
        before, found, behind = written.partition(_REASON)
        between, content, _ = behind.partition(_ANSWER)
        words = before.split()[-1:] + between.split()[:1]
        return (words[0], words[1]) if found and content and len(words) == 2 else None

    @cached_property
    def _block_end(self) -> str | None:
        """What closes the block of reasoning that the prompt opens; None where it opens none."""
        if not self.reasoning_key:
            return f"\n{self._dropped_words[1]}\n\n" if self._dropped_words else None
        answer = _assistant(False, **{self.reasoning_key: _REASON})
        before = self._probe([_user()], True, prompt=True)
        label = self._probe([_user(), answer], True)[len(before) :]
        if not label.startswith(_REASON) or _ANSWER not in label:
            return None
        return label[len(_REASON) : label.index(_ANSWER)]

    def _opens_block(self, flag: bool | None) -> bool | None:
        """True where the prompt of `flag` ends as one that opens a block of reasoning; None where
        the flag changes nothing."""
        if not self._flags:
            return self._block_end is not None
        opened = self._probe([_user()], True, prompt=True)
        closed = self._probe([_user()], False, prompt=True)
        if opened == closed:
            return None
        return self._block_end is not None and flag is not False

    def _probe(
        self, messages: list[dict[str, Any]], thinking: bool | None = None, prompt: bool = False
    ) -> str:
        try:
            return self.render(messages, (), prompt, thinking)
        except TemplateError:
            return ""

    # -- rendering ---------------------------------------------------------------------------------

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        return [self._message(turn, number) for number, turn in enumerate(turns)]

    def _message(self, turn: Turn, number: int) -> dict[str, Any]:
        joined = (
            f"{turn.text}\n{turn.extra}" if turn.text and turn.extra else turn.text + turn.extra
        )
        if _MARKS.search(joined):
            raise TemplateError(
                f"turn {number + 1} holds a Unicode noncharacter (U+FDD0 or U+FDD1): remove it"
            )
        message: dict[str, Any] = {"role": turn.role, "content": joined}
        if turn.reasoning and not self._dropped_words:
            if not self.reasoning_key:
                raise TemplateError(
                    "the chat template has no place for an answer's reasoning: take it out of the "
                    "row, or name another data.template"
                )
            message[self.reasoning_key] = turn.reasoning
        if turn.calls:
            message["tool_calls"] = [self._call(call) for call in turn.calls]
        if turn.name:
            message["name"] = turn.name
        if turn.call_id:
            message["tool_call_id"] = turn.call_id
        return message

    def _call(self, call: Any) -> Any:
        if not self._arguments_as_text:
            return call
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return call | {"function": function | {"arguments": arguments}}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any],
        prompt: bool,
        thinking: bool | None,
    ) -> str:
        """The text of messages as a server has them. Raises TemplateError where the template
        refuses them."""
        return _MARKS.sub("", self._render_marked(messages, tools, prompt, thinking))

    def _render_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any],
        prompt: bool,
        thinking: bool | None,
    ) -> str:
        """The text, with marks around what {% generation %} blocks hold."""
        flags = {} if thinking is None else dict.fromkeys(self._flags, thinking)
        try:
            return str(
                self._compiled.render(
                    messages=[_in_parts(m) for m in messages] if self._as_parts else messages,
                    tools=list(tools) or None,
                    add_generation_prompt=prompt,
                    eos_token=self._tokens.eos,
                    bos_token=self._tokens.bos,
                    **flags,
                )
            )
        except Exception as error:
            if not self._arguments_as_text and any(m.get("tool_calls") for m in messages):
                self._arguments_as_text = True  # DeepSeek V3 wants JSON text
                try:
                    again = [
                        dict(m) | {"tool_calls": [self._call(c) for c in m["tool_calls"]]}
                        if m.get("tool_calls")
                        else m
                        for m in messages
                    ]
                    return self._render_marked(again, tools, prompt, thinking)
                except TemplateError:
                    self._arguments_as_text = False
            raise TemplateError(
                f"the tokenizer's chat template refuses this conversation: {error}"
            ) from error


@lru_cache(maxsize=16)
def open_chat(jinja: str, tokens: SpecialTokens) -> ChatTemplate:
    return ChatTemplate(jinja, tokens)


def render_chat(
    jinja: str, messages: Sequence[Mapping[str, Any]], eos: str, bos: str, prompt: bool = False
) -> str:
    """What a chat template writes for `messages`, with the opening of the next answer where
    `prompt`. Raises TemplateError where the template refuses them."""
    return open_chat(jinja, SpecialTokens(eos, bos)).render(messages, (), prompt, None)


def _generation_parts(marked: str, start: int, end: int) -> list[Segment]:
    """The stretch `start` to `end` of a text whose marks do not count, cut at them: trained is what
    stands in a block."""
    parts: list[Segment] = []
    at, inside = 0, False
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if piece in (_OPEN, _CLOSE):
            inside = piece == _OPEN
            continue
        text = piece[max(0, start - at) : max(0, end - at)]
        at += len(piece)
        if text and parts and parts[-1].trained == inside:
            parts[-1] = Segment(parts[-1].text + text, inside)
        elif text:
            parts.append(Segment(text, inside))
    return parts


def _common(a: str, b: str) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _aligned(before: str, after: str, opening: str) -> int:
    """Where in `after` the answer to `before` begins: behind the `opening` that has most in common
    with the end of `before`; 0 where none has more than the others."""
    places = [m.end() for m in re.finditer(re.escape(opening), after)] if opening else []
    shared = [_common(before[::-1], after[:at][::-1]) for at in places]
    best = max(shared, default=0)
    return places[shared.index(best)] if best > len(opening) and shared.count(best) == 1 else 0


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _call_names(calls: Sequence[Any]) -> list[str]:
    return [str(call["function"]["name"]) for call in calls]


def _tool_names(tools: Sequence[Any]) -> list[str]:
    """Names of tools as OpenAI writes them, bare or wrapped in {"type", "function"}."""
    bare = [t.get("function", t) for t in tools if isinstance(t, dict)]
    return [t["name"] for t in bare if isinstance(t, dict) and isinstance(t.get("name"), str)]


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    text = message["content"]
    return dict(message) | {"content": [{"type": "text", "text": text}] if text else []}


def _user(text: str = _QUESTION) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(calls: bool = False, **more: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "" if calls else _ANSWER} | more
    if calls:
        function = {"name": _CALL, "arguments": {"x": "1"}}
        message["tool_calls"] = [{"type": "function", "id": "call00001", "function": function}]
    return message


@lru_cache(maxsize=16)
def _compile(jinja: str) -> Any:
    """The template in the sandbox that transformers uses. Raises TemplateError."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %}: marks around what stands between."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_marked")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = DAY.strftime
    try:
        return environment.from_string(jinja)
    except jinja2.exceptions.TemplateError as error:
        raise TemplateError(
            f"the tokenizer's chat template is not Jinja ({error}): name another data.template"
        ) from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
