"""Chinese-Vicuna's chat rows as messages.

python chinese_vicuna_chat.py chat.json > chat.jsonl
"""

import json
import sys
from pathlib import Path

for row in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    messages = []
    for question, answer in zip(row["input"], row["output"], strict=True):
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    print(json.dumps({"messages": messages}, ensure_ascii=False))
