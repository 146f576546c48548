"""From tokens to text as they come, without half characters and what follows a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

HALF = "\ufffd"  # what an incomplete character decodes to
LONGEST_HALF = 16  # tokens after which it is taken as it stands


class Speech:
    """The text of one answer. `add` gives what may be shown once a token more is known, `rest` what
    was kept back when none follows. `stopped` says that a stop string came; it is not shown."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._begin, self._read = 0, 0  # a token's text depends on the one before it
        self._kept = ""
        self.stopped = False

    def add(self, token: int) -> str:
        self._ids.append(token)
        return self._show(self._decoded(whole=False), last=False)

    def rest(self) -> str:
        return "" if self.stopped else self._show(self._decoded(whole=True), last=True)

    @property
    def whole(self) -> str:
        """All that was said so far, stop strings and half characters too."""
        return str(self._tokenizer.decode(self._ids)).strip()

    def _decoded(self, whole: bool) -> str:
        """The text of the tokens that were not told of yet, "" while a character is half."""
        known = self._tokenizer.decode(self._ids[self._begin : self._read])
        text: str = self._tokenizer.decode(self._ids[self._begin :])
        half = text.endswith(HALF) and len(self._ids) - self._read < LONGEST_HALF
        if len(text) <= len(known) or (half and not whole):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _show(self, text: str, last: bool) -> str:
        self._kept += text
        places = [at for stop in self._stops if (at := self._kept.find(stop)) >= 0]
        if places:
            self.stopped = True
            shown, self._kept = self._kept[: min(places)], ""
            return shown
        back = 0 if last else max((_overlap(self._kept, stop) for stop in self._stops), default=0)
        at = len(self._kept) - back
        shown, self._kept = self._kept[:at], self._kept[at:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may begin."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
