"""What rows are like: characters, tokens, scripts, turns, repeats. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trainer.data.estimate import AROUND_TURN, WIDE, Density
from trainer.data.records import Record
from trainer.data.words import number_of

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
TOGETHER = 1000  # rows that are tokenised at a time
LONGEST = 5  # rows that are named
_SCRIPTS = (  # first code point, its script; "" is counted as none
    (0, ""), (0x41, "Latin"), (0x5B, ""), (0x61, "Latin"), (0x7B, ""), (0xC0, "Latin"),
    (0x250, ""), (0x370, "Greek"), (0x400, "Cyrillic"), (0x530, ""), (0x590, "Hebrew"),
    (0x600, "Arabic"), (0x700, ""), (0x900, "Devanagari"), (0x980, ""), (0xE00, "Thai"),
    (0xE80, ""), (0x1100, "Hangul"), (0x1200, ""), (0x3040, "Kana"), (0x3100, ""),
    (0x3400, "Han"), (0x4DC0, ""), (0x4E00, "Han"), (0xA000, ""), (0xAC00, "Hangul"),
    (0xD7B0, ""), (0xF900, "Han"), (0xFB00, ""), (0x20000, "Han"), (0x32000, ""),
)  # fmt: skip
_BOUNDS = np.array([begin for begin, _ in _SCRIPTS], np.uint32)


@dataclass(frozen=True)
class Stats:
    """`characters`, `question`, `answer` (characters) and `tokens` of a row: quantile -> value.
    Tokens are told from characters, for a vocabulary of 150,000 (trainer/data/estimate.py), or
    `counted` by a tokenizer. A
    script's share is of letters; `main_script` counts rows by the script of most of theirs. `equal`
    rows repeat an earlier one but for case and blanks."""

    rows: int
    total_characters: int
    total_tokens: int
    characters: dict[str, int]
    question: dict[str, int]
    answer: dict[str, int]
    tokens: dict[str, int]
    scripts: dict[str, float]
    main_script: dict[str, int]
    turns: dict[int, int]
    equal: int
    longest: list[str]
    counted: bool = False

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{number_of(self.rows, 'row')}, {self.total_characters:,} characters, "
            f"{'' if self.counted else 'about '}{self.total_tokens:,} tokens",
            "of a row     " + "".join(f"{name:>9}" for name in self.characters),
        ]
        for name in ("characters", "question", "answer", "tokens"):
            values = "".join(f"{value:>9,}" for value in getattr(self, name).values())
            lines.append(f"  {name:<11}{values}")
        scripts = ", ".join(f"{name} {share:.1%}" for name, share in self.scripts.items())
        mains = ", ".join(f"{name} {count:,}" for name, count in self.main_script.items())
        turns = ", ".join(f"{n}: {count:,}" for n, count in self.turns.items())
        lines += [f"letters      {scripts or 'none'}", f"rows by script  {mains or 'none'}"]
        lines += [f"rows by turns  {turns}", f"equal rows   {self.equal:,}"]
        return "\n".join([*lines, f"longest      {', '.join(self.longest)}"])


def stats(rows: Sequence[Record], tokenizer: Tokenizer | None = None) -> Stats:
    """Of sound rows; all zero without any. Tokens are those of the row's texts by `tokenizer`,
    without what a template puts around them."""
    density, letters, mains = Density.of(150_000), Counter[str](), Counter[str]()
    tokens = np.zeros(len(rows), np.int64)
    for n, row in enumerate(rows):
        codes = _codes(f"{row.question}{row.answer}")
        narrow, wide = int((codes < 0x80).sum()), int((codes >= WIDE).sum())
        other = len(codes) - narrow - wide
        said = narrow / density.ascii + wide / density.wide + other / density.other
        tokens[n] = math.ceil(said) + AROUND_TURN * row.turns // 2 + 1
        found = _scripts(codes)
        letters.update(found)
        mains[max(found, key=lambda name: found[name]) if found else "none"] += 1
    if tokenizer is not None:
        tokens = _counted(rows, tokenizer)
    whole = np.array([row.characters for row in rows], np.int64)
    order = np.argsort(-whole, kind="stable")[:LONGEST]
    every = sum(letters.values()) or 1
    return Stats(
        rows=len(rows),
        total_characters=int(whole.sum()),
        total_tokens=int(tokens.sum()),
        characters=_quantiles(whole),
        question=_quantiles(np.array([len(row.question) for row in rows], np.int64)),
        answer=_quantiles(np.array([len(row.answer) for row in rows], np.int64)),
        tokens=_quantiles(tokens),
        scripts={name: round(count / every, 4) for name, count in letters.most_common()},
        main_script=dict(mains.most_common()),
        turns=dict(sorted(Counter(row.turns for row in rows).items())),
        equal=len(rows) - len({row.key for row in rows}),
        longest=[f"{rows[n].where} ({whole[n]:,})" for n in order],
        counted=tokenizer is not None,
    )


def _counted(rows: Sequence[Record], tokenizer: Tokenizer) -> NDArray[np.int64]:
    found = np.zeros(len(rows), np.int64)
    for begin in range(0, len(rows), TOGETHER):
        part = rows[begin : begin + TOGETHER]
        for texts in ([row.question for row in part], [row.answer for row in part]):
            sure = [text.encode("utf-8", "replace").decode() for text in texts]
            codings = tokenizer.encode_batch_fast(sure, add_special_tokens=False)
            found[begin : begin + len(part)] += [len(coding.ids) for coding in codings]
    return found


def letters(text: str) -> dict[str, int]:
    """Script -> letters of it in a text."""
    return _scripts(_codes(text))


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _scripts(codes: NDArray[np.uint32]) -> dict[str, int]:
    """Script -> letters of it; Japanese has Kana and Han."""
    counts = np.bincount(np.searchsorted(_BOUNDS, codes, "right") - 1, minlength=len(_SCRIPTS))
    found: Counter[str] = Counter()
    for n in np.flatnonzero(counts):
        found[_SCRIPTS[n][1]] += int(counts[n])
    del found[""]
    return dict(found)


def _quantiles(values: NDArray[np.int64]) -> dict[str, int]:
    names = ["least", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "most"]
    if not len(values):
        return dict.fromkeys(names, 0)
    found = np.quantile(values, QUANTILES, method="nearest")
    return {name: int(value) for name, value in zip(names, found, strict=True)}
