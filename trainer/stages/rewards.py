"""Rewards of answers by rules: numbers from 0 to 1, weighted and added. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.wire.stages import Reward


def reward(rules: Sequence[Reward], text: str, tokens: int, expected: str) -> float:
    """The sum of what each rule gives to an answer of `tokens` tokens, times its weight."""
    return sum(rule.weight * part(rule, text, tokens, expected) for rule in rules)


def part(rule: Reward, text: str, tokens: int, expected: str) -> float:
    """What one rule gives to an answer, from 0 to 1."""
    said, wanted = text.strip(), expected.strip()
    if rule.kind == "match":
        return float(said == wanted)
    if rule.kind == "contains":
        return float(bool(wanted) and wanted in said)
    if rule.kind == "format":
        return float(re.search(rule.regex, said) is not None)
    return max(0.0, 1 - abs(tokens - rule.tokens) / rule.tokens)
