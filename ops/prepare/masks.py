"""What a translation must not touch: code, links, numbers, placeholders are taken out of a text,
each for a mark ⟦1⟧, ⟦2⟧ ..., and put back once every mark is there exactly once. Pure."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

OPEN, CLOSE = "⟦", "⟧"
_CODE_WORDS = (
    r"def|class|import|return|elif|else:|try:|except|while|print|public|private|static|void"
    r"|function|func|fn|package|using"
)
# A line of code without a fence: how it begins and what stands in it, or how it ends.
_CODE_LINE = (
    rf"[ \t]*(?:(?:{_CODE_WORDS})\b[^\n]*[(){{}}\[\]=;:*][^\n]*"
    r"|for \w+ in [^\n]*:[ \t]*|if [^\n]*[=<>(][^\n]*:[ \t]*"
    r"|(?:import|from)[ \t]+[\w.]+(?:[ \t]+import\b[^\n]*)?[ \t]*|(?:const|let|var)\b[^\n]*=[^\n]*"
    r"|(?:SELECT|INSERT|UPDATE|DELETE|CREATE|FROM|WHERE|JOIN)\b[^\n]*|#include[^\n]*"
    r"|[\w.\[\]\"']+[ \t]*[-+*/]?=[ \t]*[\w\"'\[({][^\n]*|[\w.]+\([^\n]*\)[;:]?[ \t]*"
    r"|[^\n]*(?:=|\w\()[^\n]*;[ \t]*|[{}\])]+[;,]?[ \t]*|[^\n]*[)\w][ \t]*\{[ \t]*)"
)
_KEPT = re.compile(
    "|".join(
        [
            r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)",
            r"`[^`\n]+`",
            r"\$\$.+?\$\$|\\\(.+?\\\)|\\\[.+?\\\]|\$[^\s$](?:[^$\n]*[\\^_={}][^$\n]*)\$",
            rf"(?m:^{_CODE_LINE}(?:\n(?:{_CODE_LINE}|[ \t]+[^\n]+))*$)",
            r"(?:https?://|ftp://|www\.)[^\s<>\"'，。）】」]*[\w/=&#]",
            r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
            r"</?[A-Za-z!][^<>\n]{0,300}>",
            r"\{\{[^{}\n]*\}\}|\$?\{[^{}\n]*\}|%\(\w+\)[sd]|%[sd]\b",
            r"\b[A-Za-z]\w*_\w+(?:\(\))?|\b[A-Za-z_]\w*\(\)|\b__\w+__",
            rf"[{OPEN}{CLOSE}]",
            r"(?:(?<![\w.])[-+−])?(?<![A-Za-z0-9_])(?<![A-Za-z]-)"
            r"\d+(?:[.,:/]\d+)*%?(?![A-Za-z0-9_])",
        ]
    ),
    re.DOTALL,
)
_MARK = re.compile(rf"{OPEN}\s*(\d+)\s*{CLOSE}")
_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class Masked:
    """`text` with marks for `kept`, in order: ⟦1⟧ stands for the first."""

    text: str
    kept: tuple[str, ...]

    @property
    def says_something(self) -> bool:
        """Whether any letter is left to translate."""
        return bool(_LETTER.search(_MARK.sub("", self.text)))


def mask(text: str) -> Masked:
    """The text without what must stay as it is."""
    kept: list[str] = []

    def take(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"{OPEN}{len(kept)}{CLOSE}"

    return Masked(_KEPT.sub(take, text), tuple(kept))


def unmask(text: str, kept: tuple[str, ...]) -> str:
    """The text with what was taken out put back. Raises ValueError where a mark is missing, there
    twice, or changed."""
    found = Counter(int(match[1]) for match in _MARK.finditer(text))
    wanted = range(1, len(kept) + 1)
    if wrong := [n for n in wanted if found[n] != 1]:
        n = wrong[0]
        how = "missing" if not found[n] else f"there {found[n]} times"
        raise ValueError(f"{OPEN}{n}{CLOSE}, which stands for {kept[n - 1][:40]!r}, is {how}")
    bare = _MARK.sub("", text)
    if len(found) > len(kept) or OPEN in bare or CLOSE in bare:
        raise ValueError("it has a mark that the text has not")
    return _MARK.sub(lambda match: kept[int(match[1]) - 1], text)
