"""Rules by name that find rows which are sound and yet teach little or harm. Pure.

Each is a guess from the text alone: what it finds is to be looked at. None makes a row a defect.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.data import near
from trainer.data.records import Record
from trainer.data.stats import letters

SHOWN = 60  # characters of a row's first lines
LONG_LINES, LOOPS = 4, 5  # equal lines of an answer; how often a piece of it follows itself
PACKS = 0.35  # of its bytes, what says one thing over and over is packed to less
LOOKED_AT = 20_000  # characters of an answer in which repeats are looked for
FEW = 20  # letters of which a script can be told
OWN_SHARE = 0.3
Rule = Callable[[Record], bool]


@dataclass(frozen=True)
class Found:
    """What a rule found: `rows` are file:line and the beginning of each."""

    rule: str
    what: str
    rows: list[tuple[str, str]]


_REFUSAL = re.compile(
    r"\bas an? (ai|artificial intelligence)( language)? (model|assistant)"
    r"|\bas a (large )?language model"
    r"|\Ai('m| am) (sorry|afraid|unable)\b.{0,60}\b(can't|cannot|can not|unable|not able)"
    r"|\A(sorry, )?(but )?i (can't|cannot|can not) (help|assist|provide|access|open|see|fulfil)"
    r"|作为一?[个名]?(ai|人工智能)(语言)?(模型|助手)|作为一?[个名]?语言模型"
    r"|\A(非常|很)?(抱歉|对不起)[，,]?.{0,10}我?(无法|不能|没法)",
    re.IGNORECASE | re.DOTALL,
)
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2028\u2029\u202a-\u202e\ufeff]")
_BYTES = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"  # of UTF-8, read as Windows' Latin
_MOJIBAKE = re.compile(
    f"Ã[\x80-\xbf]|â€{_BYTES}|Â[\xa0-\xbf]|ï»¿|锟斤拷|烫烫烫|屯屯屯|(?:[ä-é]{_BYTES}{{2}}){{2}}"
)
_PLACEHOLDER = re.compile(
    r"⟦[^⟧\n]*⟧|\{\{\w+\}\}|\[(insert|your|enter|add)\b[^\]\n]{1,40}\]|lorem ipsum"
    r"|<(no ?(out|in)put|placeholder|your [^>\n]{1,40}|insert [^>\n]{1,40})>|\bTODO:|［此处|【此处",
    re.IGNORECASE,
)
_TEMPLATE = re.compile(
    r"<\|[\w ]{1,30}\|>|\[/?INST\]|<</?SYS>>|^### (Instruction|Response|Input):"
    r"|<(start|end)_of_turn>|</s>\s*\Z|\A(Human|Assistant|User): ",
    re.MULTILINE,
)
_LOOP = re.compile(rf"(.{{4,40}}?)\1{{{LOOPS - 1},}}", re.DOTALL)
_LINK = re.compile(r"https?://\S+|www\.\S+")
_SAYS = re.compile(r"\w")


def _no_answer(row: Record) -> bool:
    bare = row.answer.strip().strip(".!。 ").lower()
    return not _SAYS.search(bare) or bare in ("n/a", "na", "none", "null", "nan", "nil", "无")


def _echo(row: Record) -> bool:
    if len(row.question) < 10 or len(row.answer) > 2 * len(row.question) + 20:
        return False
    asked, said = near.normal(row.question), near.normal(row.answer)
    return asked == said or (said.startswith(asked) and len(said) < 1.3 * len(asked))


def _repeats(row: Record) -> bool:
    lines = [line.strip() for line in row.answer.splitlines() if len(line.strip()) > 3]
    if len(lines) >= LONG_LINES:
        most = Counter(lines).most_common(1)[0][1]
        if most >= LONG_LINES and most > len(lines) / 2:
            return True
    said = row.answer[:LOOKED_AT].encode("utf-8", "replace")
    if len(said) < 60 or len(zlib.compress(said, 1)) > PACKS * len(said):
        return False
    return any(len(set(m[1])) > 2 for m in _LOOP.finditer(row.answer[:LOOKED_AT]))


def _open_fence(row: Record) -> bool:
    return row.answer.count("```") % 2 == 1


def _cut_short(row: Record) -> bool:
    return len(row.answer) > 40 and row.answer.rstrip()[-1:] in ",，、:：;；(（-—"


def _link_only(row: Record) -> bool:
    if "http" not in row.question and "www." not in row.question:
        return False
    return len(_SAYS.findall(_LINK.sub("", row.question))) < 80


RULES: dict[str, tuple[str, Rule]] = {
    "no-answer": ("the answer says nothing", _no_answer),
    "echo": ("the answer is the question again", _echo),
    "repeats": ("the answer is mostly one line or phrase, again and again", _repeats),
    "refusal": ("the answer refuses, or speaks as a language model", lambda r: _hit(_REFUSAL, r)),
    "control": ("control or invisible characters", lambda r: bool(_CONTROL.search(_both(r)))),
    "mojibake": ("a broken decoding", lambda r: bool(_MOJIBAKE.search(_both(r)))),
    "placeholder": ("a placeholder is left", lambda r: _hit(_PLACEHOLDER, r)),
    "template": (
        "marks of a chat template in the text",
        lambda r: bool(_TEMPLATE.search(_both(r))),
    ),
    "open-fence": ("a code fence that is not closed", _open_fence),
    "cut-short": ("the answer ends in the middle", _cut_short),
    "link-only": ("the question is about a link that no model can open", _link_only),
}
LANGUAGE = "language"  # a rule that wants to be told which


def _hit(pattern: re.Pattern[str], row: Record) -> bool:
    return bool(pattern.search(row.answer))


def _both(row: Record) -> str:
    return f"{row.question}\n{row.answer}"


def in_scripts(scripts: Sequence[str]) -> Rule:
    """A rule for answers whose letters are of other scripts."""

    def other(row: Record) -> bool:
        found = letters(row.answer)
        every = sum(found.values())
        return every >= FEW and sum(found.get(s, 0) for s in scripts) < OWN_SHARE * every

    return other


def judge(rows: Sequence[Record], names: Sequence[str], scripts: Sequence[str] = ()) -> list[Found]:
    """What each of the rules `names` finds; the rule LANGUAGE where `scripts` are given."""
    rules = {name: RULES[name] for name in names if name in RULES}
    if scripts:
        rules[LANGUAGE] = (f"the answer is not in {' or '.join(scripts)}", in_scripts(scripts))
    hits: dict[str, list[tuple[str, str]]] = {name: [] for name in rules}
    for row in rows:
        for name, (_, rule) in rules.items():
            if rule(row):
                hits[name].append((row.where, _beginning(row)))
    return [Found(name, rules[name][0], rows) for name, rows in hits.items() if rows]


def _beginning(row: Record) -> str:
    text = " ".join(f"{row.question} -> {row.answer}".split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
