"""(first cut) rows from files."""
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.prompt import Turn, alpaca_turns


@dataclass(frozen=True)
class Row:
    where: str
    turns: tuple[Turn, ...]
    text: str = ""

def read_rows(path: Path, name: str, form: str = "auto") -> Iterator[Row]:
    text = path.read_text(encoding="utf-8")
    data = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
    for n, row in enumerate(data):
        yield Row(f"{name}:{n + 2}", tuple(alpaca_turns(row)))
