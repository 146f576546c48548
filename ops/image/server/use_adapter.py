"""Inside the image: talk to what a run made, or score it. Reads the run folder (job.json, data, model, result/adapter.zip).

python use_adapter.py chat RUN_FOLDER [PROMPT]
python use_adapter.py evaluate RUN_FOLDER [DATA.json]       BLEU-4, ROUGE-1, ROUGE-2, ROUGE-L and exact match, 0 to 100
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

TOKEN = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_]+|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Chinese and Japanese by character, other scripts by word, punctuation by sign; lower case."""
    return TOKEN.findall(text.lower())


def bleu4(answers: list[str], expected: list[str]) -> float:
    """Corpus BLEU-4 with brevity penalty (Papineni et al. 2002), 0 to 100; orders without a match count as half a match
    (smoothing of Chen and Cherry 2014, method 1, with 0.5), orders for which no text is long enough do not count."""
    matched, total, length, wanted = [0] * 4, [0] * 4, 0, 0
    for answer, reference in zip(answers, expected, strict=True):
        a, r = tokens(answer), tokens(reference)
        length, wanted = length + len(a), wanted + len(r)
        for n in range(4):
            mine, theirs = _grams(a, n + 1), _grams(r, n + 1)
            matched[n] += sum((mine & theirs).values())
            total[n] += sum(mine.values())
    orders = [(m or 0.5) / t for m, t in zip(matched, total, strict=True) if t]
    if not orders or not sum(matched):
        return 0.0
    brevity = min(1.0, math.exp(1 - wanted / length))
    return 100 * brevity * math.exp(sum(map(math.log, orders)) / len(orders))


def rouge(answers: list[str], expected: list[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), 0 to 100."""
    sums = {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    for answer, reference in zip(answers, expected, strict=True):
        a, r = tokens(answer), tokens(reference)
        for n in (1, 2):
            mine, theirs = _grams(a, n), _grams(r, n)
            sums[f"rouge-{n}"] += _f1(sum((mine & theirs).values()), sum(mine.values()), sum(theirs.values()))
        sums["rouge-l"] += _f1(_common(a, r), len(a), len(r))
    return {name: 100 * value / max(1, len(answers)) for name, value in sums.items()}


def _grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _f1(both: int, mine: int, theirs: int) -> float:
    return 2 * both / (mine + theirs) if mine + theirs else 0.0


def _common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def open_run(run: Path) -> tuple[Any, Any, Any, Any]:
    """(job, prepared data, model with the adapter of result/adapter.zip, device)."""
    import torch
    from peft import PeftModel

    from trainer.job import Job
    from trainer.model import load_base
    from trainer.prepare import model_folder, prepare

    if not (run / "result" / "manifest.json").is_file():
        raise SystemExit(f"refused: {run.name} has no finished result\ndo this: milktea-run train JOB.toml --run {run.name} goes on with it")
    job = Job.model_validate_json((run / "job.json").read_bytes())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(job, model_folder(job, run), device).to(device)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(run / "result" / "adapter.zip") as archive:
        archive.extractall(folder)
        model = PeftModel.from_pretrained(base, folder).eval()
    return job, prepare(job, run), model, device


def evaluate(run: Path, data_file: Path | None) -> int:
    from trainer.data import read_rows
    from trainer.evaluate import answer, encode_prompt, match

    job, data, model, device = open_run(run)
    if data_file is None and job.data.held_out is None:
        raise SystemExit("refused: the job has no held_out rows\ndo this: milktea-run evaluate RUN DATA.json")
    path = data_file or run / job.data.held_out.path
    rows = list(read_rows(path, path.name, job.data.format if data_file is None else "auto"))
    prompts = [encode_prompt(data, row.turns[:-1]) for row in rows]
    expected = [row.turns[-1].text.strip() for row in rows]
    found = {}
    for name in ("base", "adapter"):
        if name == "base":
            with model.disable_adapter():
                answers = answer(model, prompts, data, device)
        else:
            answers = answer(model, prompts, data, device)
        found[name] = {"bleu-4": bleu4(answers, expected), **rouge(answers, expected), "exact": 100 * match(answers, expected)}
    for name, scores in found.items():
        print(f"{name:8}", "  ".join(f"{k} {v:.2f}" for k, v in scores.items()))
    (run / "evaluation.json").write_text(json.dumps({"data": path.name, "rows": len(rows), **found}, indent=1))
    return 0


def chat(run: Path, prompt: str | None) -> int:
    """One pair at a time; an empty line or the end of input ends it."""
    from trainer.evaluate import answer, encode_prompt
    from trainer.prompt import alpaca_turns

    _, data, model, device = open_run(run)

    def reply(text: str) -> str:
        turns = alpaca_turns({"instruction": text, "input": "", "output": ""})
        return answer(model, [encode_prompt(data, turns[:-1])], data, device, 512)[0]

    if prompt is not None:
        print(reply(prompt))
        return 0
    while text := _ask():
        print(reply(text))
    return 0


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def main(arguments: list[str]) -> int:
    if len(arguments) not in (2, 3) or arguments[0] not in ("chat", "evaluate"):
        print(__doc__, file=sys.stderr)
        return 2
    run, extra = Path(arguments[1]), arguments[2] if len(arguments) == 3 else None
    return chat(run, extra) if arguments[0] == "chat" else evaluate(run, Path(extra) if extra else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
