"""Pre-training: windows hold every token once, ends are trained once, bits per byte fall."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import events_of, finish, manifest_of, start

from trainer.data.errors import InvalidJob
from trainer.data.prepare import Prepared
from trainer.data.stage_rows import prepare
from trainer.data.windows import windows
from trainer.train import run_job
from trainer.wire.job import Job

Make = Callable[..., Path]
EOS, BOS = 2, 1
LONG = "Once upon a time there was a fox. " * 40 + "\n\nIt ate rice! " * 30 + "晚安。"
TEXTS = [{"text": LONG}, {"text": "short"}, {"text": "the end " * 20}]
CHAT = {"instruction": "Say number 3", "input": "", "output": "it is 3"}
SHORT = {"max_length": 64}  # tokens of a window


def prepared(job: Path) -> Prepared:
    return prepare(Job.model_validate_json(job.read_bytes()), job.parent)


def rows_of(data: Prepared) -> list[tuple[list[int], list[bool]]]:
    rows = data.rows
    cut = rows.starts[1:-1]
    return [
        (ids.tolist(), marks.tolist())
        for ids, marks in zip(np.split(rows.ids, cut), np.split(rows.trained, cut), strict=True)
    ]


@pytest.mark.parametrize("overlap", [0, 9])
def test_windows_hold_every_token_of_a_document_once_and_its_end_once(
    stage_run: Make, overlap: int
) -> None:
    data = prepared(stage_run("pt", TEXTS, SHORT, pt={"overlap": overlap}))
    for number, row in enumerate(TEXTS):
        mine = [
            r
            for r, d in zip(rows_of(data), data.rows.extra["document"], strict=True)
            if d == number
        ]
        trained = [i for ids, marks in mine for i, on in zip(ids, marks, strict=True) if on]
        whole = data.vocabulary.tokenizer.encode(row["text"], add_special_tokens=False).ids
        assert trained == [*whole, EOS]
        assert all(len(ids) <= 64 for ids, _ in mine)
    sizes = data.rows.extra["bytes"]
    assert int(sizes.sum()) == sum(len(r["text"].encode()) for r in TEXTS)
    assert any("no token is left out" in note for note in data.rows.summary)


def test_each_window_begins_as_the_tokenizer_begins_a_text(
    stage_run: Make, tmp_path: Path, models: Callable[..., Path]
) -> None:
    from tokenizers import Tokenizer, processors

    model = tmp_path / "with_bos"
    model.mkdir()
    for file in models("gqa").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer.save(str(model / "tokenizer.json"))
    told = prepared(stage_run("pt", TEXTS, SHORT, model=model))
    assert len(told.rows) > 5
    for ids, marks in rows_of(told):
        assert ids[0] == BOS and not marks[0] and all(marks[1:]) and ids.count(BOS) == 1
    without = prepared(stage_run("pt", TEXTS, SHORT))
    assert all(BOS not in ids for ids, _ in rows_of(without))


def test_without_a_first_token_the_one_before_a_window_is_repeated(stage_run: Make) -> None:
    """Else nothing would predict the first token of any window but the first."""
    data = prepared(stage_run("pt", TEXTS[:1], SHORT))
    (first, first_marks), (second, marks) = rows_of(data)[:2]
    assert second[0] == first[-1] and first_marks[0] and not marks[0] and all(marks[1:])


def test_a_window_rather_ends_after_a_paragraph_than_in_a_word() -> None:
    text = "ab cd ef\ngh ij kl mn"
    ends = list(range(1, len(text) + 1))
    assert windows(ends, text, 16, 0)[0] == (0, 0, 16)  # no break in the last eighth
    assert windows(ends, text, 10, 0)[0] == (0, 0, 9)
    assert windows(ends, text, 10, 3)[1] == (6, 9, 16)


def test_conversations_among_the_texts_are_trained_as_fine_tuning_does(stage_run: Make) -> None:
    alone, pt = prepared(stage_run("sft", [CHAT])), stage_run("pt", [CHAT])
    told = json.loads(pt.read_text())
    (pt.parent / "data" / "texts.txt").write_text("first\nsecond\n")
    told["data"]["files"].append(
        {
            "path": "data/texts.txt",
            "name": "texts.txt",
            "sha256": hashlib.sha256(b"first\nsecond\n").hexdigest(),
            "size_bytes": 13,
        }
    )
    pt.write_text(json.dumps(told))
    both = prepared(pt)
    assert both.rows.where == ["texts.txt:1", "texts.txt:2", "train.jsonl:1"]
    assert rows_of(both)[2] == rows_of(alone)[0]
    assert both.rows.extra["bytes"].tolist()[:2] == [5, 6]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"text": "a </s> in the middle"}, "</s>"),
        ({"text": "   "}, "is empty"),
        ({"text": 3}, "is a number, not a text"),
        ({"txet": "x"}, "has no"),
        ({"text": "half \ufffd"}, "U+FFFD"),
    ],
)
def test_a_faulty_text_is_refused_by_line(stage_run: Make, row: object, said: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        prepared(stage_run("pt", [*TEXTS, row]))
    assert "train.jsonl:4" in str(caught.value.samples) and said in str(caught.value.samples)


def test_windows_smaller_than_their_overlap_are_refused(stage_run: Make) -> None:
    job = stage_run("pt", TEXTS, {"max_length": 16}, pt={"overlap": 8})
    with pytest.raises(InvalidJob, match=r"leave no room beside pt\.overlap"):
        prepared(job)


def test_bits_per_byte_of_held_out_texts_fall_and_are_told(stage_run: Make) -> None:
    job = stage_run("pt", TEXTS * 6, SHORT, held_out=TEXTS[:1])
    assert run_job(job) == 0
    [told] = [e for e in events_of(job) if e["event"] == "measured"]
    before, after = told["numbers"]["bits per byte"]
    assert 0 < after < 0.8 * before
    assert manifest_of(job)["held_out"]["bits per byte"] == [before, after]
    page = (job.parent / "result" / "report.html").read_text()
    assert "held-out bits per byte" in page


@pytest.mark.slow  # its loop is the others', whose resume is tested in the quick suite
def test_a_resumed_pre_training_ends_in_the_same_bytes(stage_run: Make) -> None:
    whole, stopped = (stage_run("pt", TEXTS * 6, SHORT, held_out=TEXTS[:1]) for _ in range(2))
    assert finish(start(whole)) == [0]
    told = json.loads(stopped.read_text())
    stopped.write_text(json.dumps(told | {"limits": {"deadline_unix_s": 1.0}}))
    assert finish(start(stopped)) == [4]
    stopped.write_text(json.dumps(told))
    assert finish(start(stopped)) == [0]
    ours, theirs = manifest_of(stopped), manifest_of(whole)
    assert ours["files"]["adapter.zip"] == theirs["files"]["adapter.zip"]
    assert ours["held_out"] == theirs["held_out"]


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_a_job_is_read_again_from_all_that_it_says(stage_run: Make, stage: str) -> None:
    job = Job.model_validate_json(stage_run(stage, TEXTS).read_bytes())
    assert Job.model_validate_json(job.model_dump_json()) == job
