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
from typing import Any, cast

from tokenizers import Tokenizer, processors

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
    tokenizer.json or no end token."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TemplateError(
            f"{folder.name}/ has no tokenizer.json: save the fast tokenizer there "
            "(AutoTokenizer...save_pretrained)"
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    eos, bos = _token(settings.get("eos_token")), _token(settings.get("bos_token"))
    if not eos:
        eos_id = _json(folder / "config.json").get("eos_token_id")
        eos_id = eos_id[0] if isinstance(eos_id, list) else eos_id
        eos = (tokenizer.id_to_token(eos_id) if isinstance(eos_id, int) else None) or ""
    if not eos or tokenizer.token_to_id(eos) is None:
        raise TemplateError(
            f"the tokenizer in {folder.name}/ names no end token (eos_token={eos!r}): set "
            "eos_token in tokenizer_config.json"
        )
    jinja = folder / "chat_template.jinja"
    chat = (
        jinja.read_text(encoding="utf-8")
        if jinja.is_file()
        else settings.get("chat_template") or ""
    )
    if isinstance(chat, list):  # several named templates: the default one
        chat = next((c["template"] for c in chat if c.get("name") == "default"), "")
    added = tokenizer.encode("", add_special_tokens=True).ids
    prefix = tuple(i for i in added if i != tokenizer.token_to_id(eos) or eos == bos)
    tokenizer.post_processor = processors.Sequence([])  # it would trim blanks off the offsets
    return Vocabulary(tokenizer, eos, bos, prefix, chat, folder, _stops(tokenizer, folder))


def _stops(tokenizer: Tokenizer, folder: Path) -> tuple[str, ...]:
    ids = _json(folder / "generation_config.json").get("eos_token_id")
    texts = [
        tokenizer.id_to_token(i)
        for i in (ids if isinstance(ids, list) else [ids])
        if isinstance(i, int)
    ]
    return tuple(t for t in texts if t)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))


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
