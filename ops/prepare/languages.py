"""Languages to translate into: their names, their scripts, and what a translation must look like.
Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainer.data.stats import letters

SCRIPTS = {  # what the letters of a language are; Latin where it is not named
    "zh": ("Han",),
    "zh-hant": ("Han",),
    "ja": ("Kana", "Han"),
    "ko": ("Hangul",),
    **dict.fromkeys(("ru", "uk", "bg"), ("Cyrillic",)),
    **dict.fromkeys(("ar", "fa", "ur"), ("Arabic",)),
    "he": ("Hebrew",),
    "el": ("Greek",),
    "th": ("Thai",),
    "hi": ("Devanagari",),
}
NAMES = {
    "zh": "Simplified Chinese", "zh-hant": "Traditional Chinese", "ja": "Japanese",
    "ko": "Korean", "en": "English", "fr": "French", "de": "German", "es": "Spanish",
    "pt": "Portuguese", "it": "Italian", "nl": "Dutch", "pl": "Polish", "cs": "Czech",
    "sv": "Swedish", "tr": "Turkish", "vi": "Vietnamese", "id": "Indonesian", "ru": "Russian",
    "uk": "Ukrainian", "bg": "Bulgarian", "ar": "Arabic", "fa": "Persian", "ur": "Urdu",
    "he": "Hebrew", "el": "Greek", "th": "Thai", "hi": "Hindi",
}  # fmt: skip
OWN_SHARE = 0.3  # of a translation's letters that are of the language's script, at least
FEW = 5  # letters of which nothing can be told
_NO_QUESTION_MARK = ("ja", "th", "el", "ko")  # where a question needs none
_ABOUT = re.compile(
    r"\b(translat\w*|rhym\w*|spell(ing|ed)?|misspell\w*|grammar\w*|grammatical\w*|pronounc\w*"
    r"|syllab\w*|idiom\w*|synonym\w*|antonym\w*|acronym\w*|anagram\w*|palindrom\w*|homophon\w*"
    r"|prefix|suffix|plural|past tense|parts? of speech|(how many|count the) (letters|vowels"
    r"|characters|words)|in (english|french|spanish|german|chinese|japanese))\b"
    r"|翻译|押韵|拼音|拼写|语法|成语|同义词|反义词|用英[文语]",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"as an ai\b|as a language model|i('m| am) (sorry|unable)|i can(no|')t (help|assist|translate)"
    r"|作为(一个|一名)?(人工智能|ai|语言模型)|(很)?抱歉[，,]我|我(无法|不能)(翻译|提供|回答)"
    r"|here (is|are) the translat|以下是.{0,6}翻译",
    re.IGNORECASE,
)
_LOOP = re.compile(r"(.{4,60}?)\1{5,}", re.DOTALL)


@dataclass(frozen=True)
class Language:
    code: str

    @property
    def name(self) -> str:
        return NAMES[self.code]

    @property
    def scripts(self) -> tuple[str, ...]:
        return SCRIPTS.get(self.code, ("Latin",))

    def share(self, text: str) -> tuple[float, int]:
        """(the share of letters that are of the language's script, how many letters)."""
        found = letters(text)
        own = sum(found.get(script, 0) for script in self.scripts)
        if self.code.startswith("zh"):
            own -= found.get("Kana", 0)
        every = sum(found.values())
        return (max(own, 0) / every if every else 0.0), every

    def has(self, text: str) -> bool:
        """Whether a text is in the language already, as far as its script tells: never where the
        script is Latin, which many languages share."""
        share, count = self.share(text)
        return self.scripts != ("Latin",) and count > 0 and share > 0.5


def about_language(text: str) -> bool:
    """Whether an instruction is about its own language (rhyme, spelling, translating): what it asks
    is another thing after a translation."""
    return bool(_ABOUT.search(text))


def fault(source: str, made: str, to: Language) -> str:
    """Why `made` is no translation of `source`, "" where nothing is seen. Both without what was
    taken out of them."""
    if not made.strip():
        return "it is empty"
    if _REFUSAL.search(made) and not _REFUSAL.search(source):
        return "it answers instead of translating"
    if _LOOP.search(made) and not _LOOP.search(source):
        return "it repeats itself"
    share, count = to.share(made)
    _, said = to.share(source)
    if made.strip() == source.strip() and said >= FEW:
        return "it is the text as it was"
    if count >= FEW and share < OWN_SHARE:
        return f"only {share:.0%} of its letters are {' or '.join(to.scripts)}"
    before, after = _weight(source), _weight(made)
    if not 0.35 * before - 12 <= after <= 2.8 * before + 24:
        return f"it is {after / before:.2f} times as long as the text"
    asks = source.rstrip().endswith(("?", "？")) and to.code not in _NO_QUESTION_MARK
    if asks and not re.search("[?？؟]", made):
        return "it answers a question instead of translating it"
    return ""


def _weight(text: str) -> float:
    """Characters, where one of Chinese, Japanese or Korean says as much as 2.2 others."""
    return sum(2.2 if c >= "⺀" else 1.0 for c in text) or 1.0
