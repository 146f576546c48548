"""Score what a run made, on held-out rows: BLEU-4, ROUGE-1, ROUGE-2, ROUGE-L, chrF and exact match,
0 to 100. Reads the run folder (job.json, data, model, result/adapter.zip).

    python -m trainer.eval.score RUN_FOLDER [DATA.json]
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from trainer.data.files import Reading, read_rows
from trainer.data.prepare import model_folder, prompt_ids, reading_of
from trainer.eval import metrics
from trainer.model import decode
from trainer.result.open import open_adapter, unpacked
from trainer.wire.job import Job


def scores(answers: list[str], expected: list[str]) -> dict[str, float]:
    """Mean scores of all rows; without jieba the three of ROUGE are left out."""
    found = {"bleu-4": fmean(map(metrics.bleu4, answers, expected))}
    try:
        rouges = [metrics.rouge(a, e) for a, e in zip(answers, expected, strict=True)]
        found |= {name: fmean(row[name] for row in rouges) for name in rouges[0]}
    except metrics.MissingWords as missing:
        print(f"left out: {missing}", file=sys.stderr)
    return found | {
        "chrf": metrics.chrf(answers, expected),
        "exact": fmean(map(metrics.exact, answers, expected)),
    }


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
    reading = reading_of(job.data) if data_file is None else Reading()
    rows, defects = read_rows([(path, path.name)], reading)
    if defects or not rows:
        raise SystemExit(
            "\n".join(["refused:", *map(str, defects[:10])])
            + f"\ndo this: mend {path.name}, or leave these rows out"
        )
    rows = [row for row in rows if row.turns and row.turns[-1].text.strip()]
    expected = [row.turns[-1].text.strip() for row in rows]
    with unpacked(run / "result" / "adapter.zip") as folder:
        chat = open_adapter(folder, model_folder(job, run))
    prompts = [prompt_ids(chat.data, row.turns[:-1], row.tools) for row in rows]
    scores_of = {}
    for name in ("base", "adapter"):
        model: Any = chat.model
        with model.disable_adapter() if name == "base" else nullcontext(), torch.inference_mode():
            answers = decode.answer(chat.model, prompts, chat.data, chat.device)
        scores_of[name] = scores(answers, expected)
    for name, values in scores_of.items():
        print(f"{name:8}", "  ".join(f"{k} {v:.2f}" for k, v in values.items()))
    (run / "evaluation.json").write_text(
        json.dumps({"data": path.name, "rows": len(rows), **scores_of}, indent=1)
    )
    return 0


def main(arguments: list[str]) -> int:
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    return evaluate(Path(arguments[0]), Path(arguments[1]) if len(arguments) == 2 else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
