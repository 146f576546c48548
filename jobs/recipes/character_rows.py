"""Rows of a script whose lines are `NAME: what is said`: what is said to HERO, and the answer.

python character_rows.py script.txt HERO > character.jsonl
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

text = Path(sys.argv[1]).read_text(encoding="utf-8")
lines = [line.partition(":") for line in text.splitlines()]
said = [(name.strip(), words.strip()) for name, colon, words in lines if colon]
for (asks, question), (answers, answer) in pairwise(said):
    if answers == sys.argv[2] != asks:
        print(json.dumps({"instruction": question, "output": answer}, ensure_ascii=False))
