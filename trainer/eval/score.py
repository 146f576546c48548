"""Score what a run made, on held-out rows: BLEU-4, ROUGE-1, ROUGE-2, ROUGE-L and exact match, 0 to
100. Reads the run folder (job.json, data, model, result/adapter.zip).

    python -m trainer.eval.score RUN_FOLDER [DATA.json]
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import zipfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from trainer.data.files import read_rows
from trainer.data.prepare import model_folder, prompt_ids
from trainer.eval.held_out import match
from trainer.model import decode
from trainer.result.open import open_adapter
from trainer.wire.job import Job

TOKEN = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_]+|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Chinese and Japanese by character, other scripts by word, punctuation by sign; lower case."""
    return TOKEN.findall(text.lower())


def bleu4(answers: list[str], expected: list[str]) -> float:
    """Corpus BLEU-4 with brevity penalty (Papineni et al. 2002), 0 to 100; orders without a match
    count as half a match (smoothing of Chen and Cherry 2014, method 1, with 0.5), orders for which
    no text is long enough do not count."""
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
            sums[f"rouge-{n}"] += _f1(
                sum((mine & theirs).values()), sum(mine.values()), sum(theirs.values())
            )
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


def evaluate(run: Path, data_file: Path | None) -> int:
    """Print and write (evaluation.json) the scores of the base model and of the adapter on held-out
    rows.
    """
    if not (run / "result" / "manifest.json").is_file():
        raise SystemExit(
            f"refused: {run.name} has no finished result\n"
            f"do this: milktea-run train JOB.toml --run {run.name} goes on with it"
        )
    job = Job.model_validate_json((run / "job.json").read_bytes())
    if data_file is None and job.data.held_out is None:
        raise SystemExit(
            "refused: the job has no held_out rows\ndo this: milktea-run evaluate RUN DATA.json"
        )
    path = data_file or run / job.data.held_out.path  # type: ignore[union-attr]  # refused above
    rows, defects = read_rows([(path, path.name)], job.data.format if data_file is None else "auto")
    if defects or not rows:
        raise SystemExit(
            "\n".join(["refused:", *map(str, defects[:10])])
            + f"\ndo this: mend {path.name}, or leave these rows out"
        )
    rows = [row for row in rows if row.turns]
    expected = [row.turns[-1].text.strip() for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(run / "result" / "adapter.zip") as archive:
            archive.extractall(folder)
        chat = open_adapter(Path(folder), model_folder(job, run))
    prompts = [prompt_ids(chat.data, row.turns[:-1]) for row in rows]
    found = {}
    for name in ("base", "adapter"):
        model: Any = chat.model
        with model.disable_adapter() if name == "base" else nullcontext(), torch.inference_mode():
            answers = decode.answer(chat.model, prompts, chat.data, chat.device)
        found[name] = {
            "bleu-4": bleu4(answers, expected),
            **rouge(answers, expected),
            "exact": 100 * match(answers, expected),
        }
    for name, scores in found.items():
        print(f"{name:8}", "  ".join(f"{k} {v:.2f}" for k, v in scores.items()))
    (run / "evaluation.json").write_text(
        json.dumps({"data": path.name, "rows": len(rows), **found}, indent=1)
    )
    return 0


def main(arguments: list[str]) -> int:
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    return evaluate(Path(arguments[0]), Path(arguments[1]) if len(arguments) == 2 else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
