"""A conversation in a terminal: a line to type in, answers as they come, commands that begin with a
slash. Ctrl-C stops an answer, Ctrl-D ends the conversation."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from io import TextIOWrapper
from pathlib import Path

from trainer.data.prepare import prompt_ids
from trainer.data.template import TemplateError, Turn
from trainer.serve.models import BASE, Models, Voice
from trainer.serve.speech import Speech
from trainer.serve.stream import ChatSettings, TooLong, stream

HELP = """/new               begin anew
/again             answer the last question once more (another seed where tokens are drawn)
/system TEXT       what the model is told of its task; /system alone takes it away
/compare           the base answers beside the result, each in its own conversation; again: no more
/temperature 0.7   0 takes the likeliest token, which is the default
/top-p 0.9         draw from the likeliest tokens that make up so much
/penalty 1.1       make what was said less likely; 1 does nothing
/seed 7            of the drawing
/tokens 500        of an answer at most
/save FILE         the conversation as a row that milktea trains on, added to FILE
/exit              or Ctrl-D; Ctrl-C stops an answer"""
_LIMITS = {  # of what a command sets: its field, the kind, least and most
    "/temperature": ("temperature", float, 0.0, 100.0),
    "/top-p": ("top_p", float, 1e-6, 1.0),
    "/penalty": ("repetition_penalty", float, 0.01, 100.0),
    "/seed": ("seed", int, 0, 2**31 - 1),
    "/tokens": ("most", int, 1, 1 << 20),
}
# what would steer a terminal: C0 but tab and newline, DEL, C1, what turns the direction of text
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass
class Conversation:
    """What was said, voice by voice; the system text comes before."""

    models: Models
    name: str  # of the voice that answers
    settings: ChatSettings = field(default_factory=ChatSettings)
    system: str = ""
    comparing: bool = False
    turns: dict[str, list[Turn]] = field(default_factory=dict)

    @property
    def voices(self) -> list[Voice]:
        """Who answers, the result first."""
        names = [self.name, *([BASE] if self.comparing else [])]
        return [self.models.voices[name] for name in names]

    def said(self, voice: Voice) -> list[Turn]:
        """A voice's own conversation; one that comes later has heard the result's."""
        return self.turns.setdefault(voice.name, list(self.turns.get(self.name, ())))

    def answer(self, question: str, extra: str = "") -> Generator[tuple[Voice, str], None, None]:
        """Pieces of text as they come, with who says them. What was said until the generator is
        closed stays in the conversation. Raises TemplateError, TooLong; then nothing was asked."""
        voices, asked = self.voices, Turn("user", question, extra)
        told = [*([Turn("system", self.system)] if self.system else [])]
        prompts = [prompt_ids(v.data, [*told, *self.said(v), asked]) for v in voices]
        texts = [Speech(v.data.vocabulary.tokenizer) for v in voices]
        with closing(stream(self.models, voices, prompts, self.settings)) as steps:
            try:
                for step in steps:
                    for voice, text, token in zip(voices, texts, step, strict=True):
                        if token is not None and (piece := text.add(token)):
                            yield voice, piece
            except TooLong:
                texts = []
                raise
            finally:
                for voice, text in zip(voices, texts, strict=bool(texts)):
                    self.said(voice).extend([asked, Turn("assistant", text.whole)])

    def forget_last(self) -> str:
        """Takes the last question and its answers out; "" where there is none."""
        last = self.turns.get(self.name, [])[-2:]
        for turns in self.turns.values():
            del turns[-2:]
        return last[0].text if last else ""

    def row(self) -> dict[str, object]:
        """The conversation as OpenAI's messages, which milktea trains on."""
        told = [Turn("system", self.system)] if self.system else []
        turns = [*told, *self.turns.get(self.name, [])]
        return {"messages": [{"role": t.role, "content": t.text} for t in turns]}


class ChatLoop:
    """The loop over lines. `say` writes; it gets text with its line ends."""

    def __init__(self, conversation: Conversation, say: Callable[[str], None]) -> None:
        self.conversation, self.say = conversation, say

    def line(self, line: str) -> bool:
        """One line that was typed; False ends the conversation."""
        word, _, rest = line.strip().partition(" ")
        if not word.startswith("/"):
            if word:
                self.answer(line.strip())
            return True
        if word in ("/exit", "/quit", "/bye"):
            return False
        known: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.say(HELP + "\n"),
            "/new": lambda _: self._new(),
            "/again": lambda _: self._again(),
            "/system": self._system,
            "/compare": lambda _: self._compare(),
            "/save": self._save,
            **dict.fromkeys(_LIMITS, lambda value: self._set(word, value)),
        }
        if word in known:
            known[word](rest.strip())
        else:
            self.say(f"{shown(word)} is no command; /help lists them\n")
        return True

    def answer(self, question: str) -> None:
        """Ctrl-C stops the answer and keeps what was said."""
        talk, waiting, began, pieces = self.conversation, list[str](), time.monotonic(), 0
        if talk.comparing:
            self.say(f"[{talk.name}] ")
        try:
            with closing(talk.answer(question)) as told:
                for voice, piece in told:
                    pieces += 1
                    if voice.name == talk.name:
                        self.say(shown(piece))
                    else:
                        waiting.append(piece)
        except KeyboardInterrupt:
            self.say(" [stopped]")
        except (TemplateError, TooLong) as error:
            self.say(f"not asked: {error}")
            self.say("\n")
            return
        self.say("\n")
        if talk.comparing:
            self.say(f"[{BASE}] {shown(''.join(waiting)).strip()}\n")
        if sys.stdin.isatty() and (took := time.monotonic() - began) > 2:
            self.say(f"\x1b[2m{pieces / took:.1f} pieces a second\x1b[0m\n")

    def _new(self) -> None:
        self.conversation.turns.clear()
        self.say("a new conversation\n")

    def _again(self) -> None:
        talk = self.conversation
        question = talk.forget_last()
        if not question:
            self.say("nothing was asked yet\n")
            return
        talk.settings = replace(talk.settings, seed=talk.settings.seed + 1)
        self.answer(question)

    def _system(self, text: str) -> None:
        self.conversation.system = text
        self.say("the model is told this first\n" if text else "the model is told nothing first\n")

    def _compare(self) -> None:
        talk = self.conversation
        if BASE not in talk.models.voices:
            self.say("this result is a whole model: its base is not loaded\n")
            return
        talk.comparing = not talk.comparing
        talk.turns.pop(BASE, None)
        self.say("the base answers too\n" if talk.comparing else "the result answers alone\n")

    def _save(self, name: str) -> None:
        row = self.conversation.row()
        if not name or not row["messages"]:
            self.say("/save FILE, once something was said\n")
            return
        path = Path(name).expanduser()
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except (OSError, ValueError) as error:  # a name with a NUL in it
            self.say(f"not saved: {error}\n")
            return
        self.say(f"added to {path}\n")

    def _set(self, word: str, value: str) -> None:
        name, kind, least, most = _LIMITS[word]
        try:
            number = kind(value)
            if not least <= number <= most:
                raise ValueError
        except ValueError:
            now = getattr(self.conversation.settings, name)
            self.say(f"{word} is {now}; give a number from {least:g} to {most:g}\n")
            return
        self.conversation.settings = replace(self.conversation.settings, **{name: number})
        self.say(f"{word[1:]} {number:g}\n")


def shown(text: str) -> str:
    """`text` with what would steer a terminal written out."""
    return _ODD.sub(lambda odd: f"\\x{ord(odd[0]):02x}", text)


def validated(settings: ChatSettings) -> ChatSettings:
    """Raises ValueError for a setting outside of what its command takes."""
    for name, kind, least, most in _LIMITS.values():
        value = kind(getattr(settings, name))
        if not least <= value <= most:
            raise ValueError(f"{name} is {value}; give a number from {least:g} to {most:g}")
    return settings


def run(conversation: Conversation) -> None:
    """Reads lines until the end, or until nobody reads the answers. In a pipe there is no prompt,
    and an empty line begins anew."""
    for stream_ in (sys.stdin, sys.stdout):
        if isinstance(stream_, TextIOWrapper):  # what is no text of this terminal is shown as such
            stream_.reconfigure(errors="replace")
    try:
        _read(conversation)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still held


def _read(conversation: Conversation) -> None:
    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    terminal = ChatLoop(conversation, say)
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if not line.strip():
                conversation.turns.clear()
            elif not terminal.line(line):
                return
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() editing and the lines before
    while True:
        try:
            if not terminal.line(input("you> ")):
                return
        except EOFError:
            say("\n")
            return
        except KeyboardInterrupt:
            say("\n/exit or Ctrl-D ends the conversation\n")
