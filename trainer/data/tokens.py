"""From rendered text to token ids and labels, by character offset. The tokenizers library only: no
torch, no transformers.

One pass over the whole text, so that what is learned is what a user's prompt will be cut into. A
token is trained when it reaches into an answer (of a chat template, when it stands in one). Every
answer must end with a stop token as a trained label; `stop_token` refuses a template that cannot do
that.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from trainer.data.chat import SpecialTokens, open_chat
from trainer.data.render import examples
from trainer.data.template import Segment, Template, TemplateError, Turn


@dataclass(frozen=True)
class Vocabulary:
    """A model folder's tokenizer. `prefix` are the ids that it puts before a text by itself
    (Llama's <s>); `stops` the tokens at which generation_config.json says that an answer ends."""

    tokenizer: Tokenizer
    eos: str
    bos: str
    prefix: tuple[int, ...]
    chat_template: str
    folder: Path | None = None
    stops: tuple[str, ...] = ()

    def id_of(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    @property
    def size(self) -> int:
        """Highest id in use plus one: what the model's embedding must hold."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_texts(self) -> list[str]:
        """Texts that become special tokens wherever they stand, in a user's data too."""
        return [t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special]

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """What a template is told of the tokenizer."""
        return SpecialTokens(self.eos, self.bos, tuple(self.special_texts), self.stops)


def open_vocabulary(folder: Path) -> Vocabulary:
    """Reads tokenizer.json and the config files beside it. Raises TemplateError when there is no
    tokenizer.json, no end token, or a file that cannot be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TemplateError(
            f"{folder.name}/ has no tokenizer.json: save the fast tokenizer there "
            "(AutoTokenizer...save_pretrained)"
        )
    tokenizer = _open(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    told = _json(folder / "tokenizer_config.json")
    settings = _json(folder / "special_tokens_map.json") | told
    _add_told(tokenizer, told)
    eos, bos = _token(settings.get("eos_token")), _token(settings.get("bos_token"))
    if not eos:
        found = _texts_of(tokenizer, _json(folder / "config.json").get("eos_token_id"))
        eos = found[0] if found else ""
    if not eos or tokenizer.token_to_id(eos) is None:
        raise TemplateError(
            f"the tokenizer in {folder.name}/ names no end token (eos_token={eos!r}): set "
            "eos_token in tokenizer_config.json"
        )
    added = tokenizer.encode("", add_special_tokens=True).ids
    prefix = tuple(i for i in added if i != tokenizer.token_to_id(eos) or eos == bos)
    tokenizer.post_processor = processors.Sequence([])  # it would trim blanks off the offsets
    stops = _texts_of(tokenizer, _json(folder / "generation_config.json").get("eos_token_id"))
    return Vocabulary(tokenizer, eos, bos, prefix, chat_text(folder), folder, stops)


def _open(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as why:  # the library raises no narrower one
        raise TemplateError(
            f"{path.parent.name}/{path.name} is no tokenizer ({str(why)[:200]}): fetch it again"
        ) from why


def _add_told(tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Adds the tokens of tokenizer_config.json that tokenizer.json lacks, as transformers does."""
    held = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    told = settings.get("added_tokens_decoder")
    numbered = {int(k): v for k, v in told.items() if k.isdecimal()} if told else {}
    for _, token in sorted(numbered.items()):
        if isinstance(token, dict) and (text := _token(token)) and text not in held:
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            kept = {name: bool(token[name]) for name in flags if name in token}
            tokenizer.add_tokens([AddedToken(text, **kept)])


def _texts_of(tokenizer: Tokenizer, ids: Any) -> tuple[str, ...]:
    """The tokens with these ids (one or a list), without those that there are not."""
    listed = ids if isinstance(ids, list) else [ids]
    sound = (i for i in listed if type(i) is int and 0 <= i < 1 << 32)
    return tuple(t for t in map(tokenizer.id_to_token, sound) if t)


def chat_text(folder: Path) -> str:
    """The chat template of a model's folder, "" where it has none. Of several named ones it is the
    default, and what is called tool_use for rows with tools, as transformers chooses."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return _text(jinja)
    # transformers keeps a processor's own in the last two, which servers of such models take
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        if told := _json(folder / name).get("chat_template"):
            break
    if not isinstance(told, list):
        return told if isinstance(told, str) else ""
    named = {t.get("name"): t.get("template") for t in told if isinstance(t, dict)}
    chat, tools = (named.get(name) or "" for name in ("default", "tool_use"))
    if not (chat and tools):
        return chat
    # "+" and a line's end keep Jinja from taking blanks off the texts
    chat, tools = chat.removesuffix("\n"), tools.removesuffix("\n")
    return f"{{% if tools %}}\n{tools}{{%+ else %}}\n{chat}{{%+ endif %}}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as why:
        raise TemplateError(
            f"{path.parent.name}/{path.name} is not UTF-8 ({why}): fetch it again"
        ) from why


def _json(path: Path) -> dict[str, Any]:
    """The object of a file, empty where there is none. Raises TemplateError."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as why:
        raise TemplateError(
            f"{path.parent.name}/{path.name} is not JSON ({why}): fetch it again"
        ) from why
    if not isinstance(found, dict):
        raise TemplateError(f"{path.parent.name}/{path.name} is no object: fetch it again")
    return found


def _token(value: object) -> str:
    return (
        value.get("content", "")
        if isinstance(value, dict)
        else value
        if isinstance(value, str)
        else ""
    )


def stop_token(vocabulary: Vocabulary, template: Template) -> int:
    """The id of the one token that ends an answer. Raises TemplateError when the template emits
    none."""
    if not template.stop:
        raise TemplateError(
            f"template {template.name} has no stop token, so the model would never stop: use "
            f"stop = 'eos' ({vocabulary.eos!r})"
        )
    if template.name == "chat":
        return _chat_stop(vocabulary, template)
    ids, labels = _probe_ids(vocabulary, template)[-1]
    text = vocabulary.eos if template.stop == "eos" else template.stop
    stop = vocabulary.id_of(text)
    if stop is None:
        pieces = len(vocabulary.tokenizer.encode(text, add_special_tokens=False).ids)
        raise TemplateError(
            f"template {template.name} ends answers with {text!r}, which is {pieces} tokens "
            "in this tokenizer, not one: "
            f"use stop = 'eos' ({vocabulary.eos!r}) or another template"
        )
    if not labels[-1] or ids[-1] != stop:
        raise TemplateError(
            f"template {template.name}: {text!r} is not the last trained token of an answer: "
            "let the assistant piece end with it"
        )
    return stop


def _chat_stop(vocabulary: Vocabulary, template: Template) -> int:
    text = open_chat(template.jinja, vocabulary.special_tokens).stop
    stop = vocabulary.id_of(text) if text in vocabulary.special_texts else None
    if stop is None:
        raise TemplateError(
            "the tokenizer's chat template ends an answer with no special token, so the "
            "model would never stop: name another template"
        )
    for ids, _ in _probe_ids(vocabulary, template):
        if ids[:2] == [vocabulary.id_of(vocabulary.bos)] * 2:
            raise TemplateError(
                f"the tokenizer's chat template writes {vocabulary.bos!r} twice: mend the template"
            )
    return stop


def stop_ids(vocabulary: Vocabulary, template: Template) -> frozenset[int]:
    """The ids with which a trained stretch may end: the template's stop, the end token, and, of a
    chat template, what else servers stop at."""
    texts = [vocabulary.eos, *(vocabulary.stops if template.name == "chat" else ())]
    found = [vocabulary.id_of(text) for text in texts]
    return frozenset([stop_token(vocabulary, template), *(i for i in found if i is not None)])


def _probe_ids(vocabulary: Vocabulary, template: Template) -> list[tuple[list[int], list[bool]]]:
    turns = [
        Turn("user", "Hello 你好"),
        Turn("assistant", "Hi 你好"),
        Turn("user", "Bye"),
        Turn("assistant", "Bye 再见"),
    ]
    made = examples(template, turns, vocabulary.special_tokens)
    return encode(vocabulary, template, [example.segments for example in made])


def token_hash(vocabulary: Vocabulary, template: Template) -> str:
    """sha256 of the ids that a fixed conversation becomes: equal where template and tokenizer agree
    to the token."""
    made = _probe_ids(vocabulary, template)
    return hashlib.sha256(json.dumps(made[0] if len(made) == 1 else made).encode()).hexdigest()


def encode(
    vocabulary: Vocabulary, template: Template, rows: Sequence[Sequence[Segment]]
) -> list[tuple[list[int], list[bool]]]:
    """(ids, trained) of each row; `trained[i]` says that token i is a target. A chat template's
    prompt becomes the ids that it becomes alone: no token reaches from it into an answer."""
    texts = ["".join(s.text for s in row) for row in rows]
    chat = template.name == "chat"
    prefix = () if chat else prefix_ids(vocabulary, template)  # a chat template writes <s> itself
    encoded = []
    for row, coding in zip(
        rows, vocabulary.tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        spans, at = [], 0
        for segment in row:
            if segment.trained:
                spans.append((at, at + len(segment.text)))
            at += len(segment.text)
        if chat and _straddled(coding.offsets, [start for start, _ in spans]):
            encoded.append(_encode_apart(vocabulary, row))
            continue
        ids, own = coding.ids, _trained(coding.offsets, spans)
        if prefix and tuple(ids[: len(prefix)]) != prefix:
            ids, own = [*prefix, *ids], [False] * len(prefix) + own
        encoded.append((ids, own))
    return encoded


def _straddled(offsets: Sequence[tuple[int, int]], starts: Sequence[int]) -> bool:
    """Whether a token reaches over one of `starts`."""
    for start in starts:
        k = bisect_left(offsets, (start, start))  # the first token that begins there or behind
        if k and offsets[k - 1][1] > start:
            return True
    return False


def unjoined(vocabulary: Vocabulary, row: Sequence[Segment]) -> list[list[Segment]]:
    """A chat template's conversation cut so that every prompt becomes the ids that it becomes
    alone: whole, or, where a token reaches from a prompt into one of several answers, one row for
    each answer."""
    text = "".join(s.text for s in row)
    starts, ends, at = [], [], 0
    for segment in row:
        if segment.trained:
            starts.append(at)
            ends.append(at + len(segment.text))
        at += len(segment.text)
    if len(starts) < 2 or not any(_may_join(text[i - 1], text[i]) for i in starts):
        return [list(row)]
    coding = vocabulary.tokenizer.encode(text, add_special_tokens=False)
    if not _straddled(coding.offsets, starts):
        return [list(row)]
    return [
        [Segment(text[:start], False), Segment(text[start:end], True)]
        for start, end in zip(starts, ends, strict=True)
    ]


def _may_join(before: str, after: str) -> bool:
    """Whether a token may hold both characters, of which the first ends a prompt."""
    return after.isspace() or (before.isspace() and before not in "\r\n")


def _encode_apart(vocabulary: Vocabulary, row: Sequence[Segment]) -> tuple[list[int], list[bool]]:
    """Each segment for itself, as inference does: it makes tokens of the prompt, then of more."""
    ids: list[int] = []
    trained: list[bool] = []
    for segment in row:
        own = vocabulary.tokenizer.encode(segment.text, add_special_tokens=False).ids
        ids += own
        trained += [segment.trained] * len(own)
    return ids, trained


def prefix_ids(vocabulary: Vocabulary, template: Template) -> tuple[int, ...]:
    """Ids before everything: the tokenizer's own, or else those that the template names and the
    tokenizer has."""
    if vocabulary.prefix:
        return vocabulary.prefix
    named = [vocabulary.id_of(token) for token in template.prefix]
    return tuple(i for i in named if i is not None) if None not in named else ()


def _trained(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Marks tokens that reach into a span. Both run left to right, so one sweep does."""
    marks, k = [], 0
    for start, end in offsets:
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        marks.append(k < len(spans) and end > spans[k][0] and start < spans[k][1])
    return marks
