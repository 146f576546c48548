"""Scores of a result beside its base: what a model holds likely as stock transformers computes it,
and the command as a user types it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from results import write_both
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trainer.data.errors import InvalidJob
from trainer.eval import choices, likelihood, score, table
from trainer.model.parts import ModelError
from trainer.result.open import Chat, load_model, open_words, precision_of_job, rows_in
from trainer.train import run_job
from trainer.wire.job import Job

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)
CPU = torch.device("cpu")
ROWS = [
    {"instruction": "Say one", "input": "", "output": "it is one"},
    {"instruction": "Say two please", "input": "", "output": "你好, it is two"},
    {"instruction": "Say", "input": "", "output": "three is it, is it three"},
]
QUESTIONS = """id,Question,A,B,C,D,Answer,Subject
0,What is 1 + 2?,one,two,three,four,C,sums
1,今天天气？,晴,雨,雪,风,A,weather
2,What is it?,a,b,c,d,D,sums
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_both(tmp_path_factory.mktemp("result"))


@pytest.fixture(scope="module")
def chat(result: tuple[Path, Path]) -> Chat:
    base, adapter = result
    return Chat(load_model(adapter, base, CPU), open_words(adapter, base), CPU, [])


def stock(result: tuple[Path, Path]) -> tuple[Any, Any]:
    base, adapter = result
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))
    return PeftModel.from_pretrained(model, str(adapter)).eval(), tokenizer


@torch.no_grad()
def stock_nats(model: Any, tokenizer: Any, question: str, answer: str) -> tuple[float, int]:
    """(nats, target tokens) of an answer and its end token by stock transformers."""
    before = len(tokenizer(PROMPT.format(question))["input_ids"])
    ids = torch.tensor([tokenizer(PROMPT.format(question) + answer + "</s>")["input_ids"]])
    log_probs = model(input_ids=ids).logits.log_softmax(-1)[0, before - 1 : -1]
    return float(-log_probs.gather(1, ids[0, before:, None]).sum()), ids.shape[1] - before


def test_a_file_of_the_users_is_read_as_the_jobs_files_or_as_its_own_layout_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"instruction": "问题", "output": "回答"}
    file = {"path": "data/0.jsonl", "name": "a.jsonl", "sha256": "0" * 64, "size_bytes": 1}
    data = {"files": [file], "columns": columns}
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    told = {"run_id": "a-run", "model": {"base": "stub", "precision": "fp32"}, "data": data}
    job = tmp_path / "job.json"
    job.write_text(Job.model_validate({**told, "lora": lora}).model_dump_json())
    (tmp_path / "like.json").write_text(json.dumps([{"问题": "1+1", "回答": "2"}] * 30))
    (tmp_path / "other.json").write_text(json.dumps(ROWS))
    (tmp_path / "bad.json").write_text(json.dumps([{"Q": "1+1", "A": "2"}] * 30))
    assert [row.turns[1].text for row in rows_in(tmp_path / "like.json", job)] == ["2"] * 30
    assert len(rows_in(tmp_path / "other.json", job)) == len(ROWS)
    words = [
        str(tmp_path / "result"),
        "--base",
        str(tmp_path),
        "--data",
        str(tmp_path / "bad.json"),
    ]
    assert score.main([*words, "--job", str(job)]) == 3
    refused = capsys.readouterr().err
    assert "60 defects" in refused and len(refused.splitlines()) < 30


def test_nats_of_answers_are_those_of_stock_transformers(
    result: tuple[Path, Path], chat: Chat, tmp_path: Path
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    rows = rows_in(tmp_path / "rows.json")
    tokens = likelihood.tokens_of(rows, chat.data)
    told: list[int] = []
    found = likelihood.nats(chat.model, tokens, CPU, told.append)
    model, tokenizer = stock(result)
    wanted = [stock_nats(model, tokenizer, r["instruction"], r["output"]) for r in ROWS]
    assert found.tolist() == pytest.approx([nats for nats, _ in wanted], rel=1e-5)
    assert tokens.targets() == [count for _, count in wanted] and told[-1] == 3
    assert likelihood.bytes_of(tokens, rows) == [len(r["output"].encode()) for r in ROWS]


def test_the_likeliest_letter_is_that_of_stock_transformers(
    result: tuple[Path, Path], chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q.csv").write_text(QUESTIONS, encoding="utf-8")
    questions = choices.read(tmp_path / "q.csv") or []
    assert [q.answer for q in questions] == [2, 0, 3] and questions[1].asked().endswith("答案：")
    model, tokenizer = stock(result)
    wanted = []
    for question in questions:
        ids = tokenizer(PROMPT.format(question.asked()), return_tensors="pt")["input_ids"]
        letters = [tokenizer.convert_tokens_to_ids(c) for c in "ABCD"]
        with torch.no_grad():
            wanted.append(int(model(input_ids=ids).logits[0, -1, letters].argmax()))
    found = choices.choose(chat.model, chat.data, questions, CPU)
    assert found.taken == wanted
    assert found.right == [t == q.answer for t, q in zip(wanted, questions, strict=True)]
    monkeypatch.setattr(choices, "packs", lambda *_: False)
    assert choices.choose(chat.model, chat.data, questions, CPU).taken == wanted


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "q", "choices": ["x", "y"], "answer": 1}, 1),
        ({"question": "q", "A": "x", "B": "y", "answer": "b"}, 1),
        ({"question": "q", "choices": ["x", "y"], "answer": "A"}, 0),
    ],
)
def test_questions_are_read_as_each_benchmark_writes_them(
    tmp_path: Path, row: dict[str, Any], answer: int
) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    [question] = choices.read(tmp_path / "q.jsonl") or []
    assert (question.answer, question.options) == (answer, ("x", "y"))


def test_cmmlus_own_files_are_read_with_their_row_numbers(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(",Question,A,B,C,D,Answer\n0,q,w,x,y,z,D\n")
    [question] = choices.read(tmp_path / "q.csv") or []
    assert (question.text, question.options, question.answer) == ("q", tuple("wxyz"), 3)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("q,w,x,y,z,AB", "the answer is 'AB'"),
        ("q,w,x,y,z,A.", "the answer is 'A.'"),
        ("q,w,x,y,z,", "the answer is ''"),
        ("q,w,x,y,z,²", "the answer is '²'"),
        ("q,w,,y,z,A", "the option B is empty"),
    ],
)
def test_a_question_of_which_nobody_knows_the_answer_is_refused(
    tmp_path: Path, row: str, why: str
) -> None:
    (tmp_path / "q.csv").write_text(f"question,A,B,C,D,answer\n{row}\n")
    with pytest.raises(InvalidJob) as refused:
        choices.read(tmp_path / "q.csv")
    assert why in refused.value.samples[0]


def test_a_file_of_rows_is_no_file_of_questions_and_a_wrong_answer_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert choices.read(tmp_path / "rows.json") is None
    (tmp_path / "q.csv").write_text("question,A,B,answer\nq,x,y,A\nq,x,y,C\n")
    with pytest.raises(InvalidJob) as refused:
        choices.read(tmp_path / "q.csv")
    assert "q.csv:3:1: answer: the answer is 'C'" in refused.value.samples[0]


def test_the_command_compares_tuned_and_base(
    result: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = result
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    words = [str(adapter), "--base", str(base), "--data", str(tmp_path / "rows.json")]
    to = tmp_path / "made.json"
    assert score.main([*words, "--new-tokens", "5", "--rows", "2", "--to", str(to)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 of 3 rows of rows.json") and "BLEU-4" in printed
    told = json.loads(to.read_text())
    tuned, other = told["scores"]["tuned"], told["scores"]["base"]
    model, tokenizer = stock(result)
    both = [stock_nats(model, tokenizer, r["instruction"], r["output"]) for r in ROWS[:2]]
    nats, targets = (sum(column) for column in zip(*both, strict=True))
    size = sum(len(r["output"].encode()) for r in ROWS[:2])
    assert tuned["perplexity"]["value"] == pytest.approx(math.exp(nats / targets), rel=1e-5)
    assert tuned["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert other["perplexity"]["value"] != pytest.approx(tuned["perplexity"]["value"], rel=1e-3)
    assert tuned["answer_tokens"]["value"] <= 5 and set(told["examples"][0]) == {
        *("prompt", "expected", "base", "tuned")
    }
    assert score.main([*words, "--json", "--rows", "1", "--new-tokens", "2", "--to", str(to)]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(to)


def test_a_result_is_compared_with_another_result(
    result: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = result
    (tmp_path / "q.csv").write_text(QUESTIONS, encoding="utf-8")
    asked = score.asked_of(tmp_path / "q.csv", None, 200, 5)
    told = score.evaluated(adapter, base, asked, against=(adapter, base))
    assert told["scores"]["other"] == told["scores"]["tuned"] and told["chance"] == 25
    assert told["difference"]["accuracy"] == {"value": 0, "low": 0, "high": 0}
    assert told["subjects"]["sums"]["questions"] == 2
    assert "accuracy, %" in table.text(told) and "weather:" in table.text(told)


def test_a_result_is_asked_in_the_precision_that_its_base_was_quantised_to(
    result: tuple[Path, Path], tmp_path: Path
) -> None:
    file = {"path": "data/0.jsonl", "name": "a.jsonl", "sha256": "0" * 64, "size_bytes": 1}
    card = torch.device("cuda")
    for trained, asked_in in {"nf4": "nf4", "fp8": "fp8", "bf16": "auto", "fp16": "auto"}.items():
        job = Job.model_validate({
            "run_id": "a-1",
            "stages": [{"name": "sft"}],
            "model": {"base": "practice", "path": "model", "precision": trained},
            "data": {"files": [file], "template": "alpaca"},
        })  # fmt: skip
        assert precision_of_job(job, card) == asked_in
        assert precision_of_job(job, CPU) == "auto"
    base, adapter = result
    (tmp_path / "q.csv").write_text(QUESTIONS, encoding="utf-8")
    asked = score.asked_of(tmp_path / "q.csv", None, 200, 5)
    with pytest.raises(ModelError, match="fp8 needs an NVIDIA GPU"):
        score.evaluated(adapter, base, asked, precision="fp8")


def test_the_difference_is_taken_row_by_row() -> None:
    from trainer.data.formats import Row
    from trainer.data.template import Turn

    rows = [Row("r", (Turn("user", "q"), Turn("assistant", "right"))) for _ in range(20)]
    right = [n % 2 == 0 for n in range(20)]
    first = table.Side("base", ["right" if r else "wrong" for r in right], [1] * 20, right)
    last = table.Side("tuned", ["right"] * 20, [2] * 20, [True] * 20)
    told = table.compared([first, last], rows, [], 1)
    assert told["scores"]["base"]["exact"]["value"] == 50
    assert told["difference"]["exact"]["value"] == told["difference"]["ended"]["value"] == 50
    assert told["difference"]["answer_tokens"] == {"value": 1, "low": 1, "high": 1}
    assert 20 < told["difference"]["exact"]["low"] < told["difference"]["exact"]["high"] < 80


def test_what_cannot_be_scored_is_told_in_a_sentence(
    result: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = result
    (tmp_path / "job.json").write_text("{}")
    (tmp_path / "none.json").write_text('[{"instruction": "q"}]')
    for words, why in (
        ([str(tmp_path)], "has no finished result"),
        ([str(adapter)], "--base and --data are needed"),
        ([str(adapter), "--base", str(base), "--data", "nowhere.json"], "there is no file"),
        ([str(adapter), "--base", str(base), "--data", str(tmp_path / "none.json")], "1 defect"),
    ):
        assert score.main(words) == 3
        assert why in capsys.readouterr().err


def test_a_reward_model_is_not_asked_questions(result: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = result
    (tmp_path / "template.json").write_bytes((adapter / "template.json").read_bytes())
    (tmp_path / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    with pytest.raises(ModelError, match="this is a reward model"):
        open_words(tmp_path, base)


@pytest.mark.slow
def test_a_trained_adapter_scores_full_marks_where_its_base_has_none(
    run_folder: Callable[..., Path],
) -> None:
    data = [
        {"instruction": f"say {w}", "input": "", "output": f"{w} it is"}
        for w in ("tea", "milk", "rice")
    ] * 8
    job = run_folder(
        data=data, held_out=data[:3], training={"num_train_epochs": 25, "learning_rate": 1e-2}
    )
    assert run_job(job) == 0
    assert score.main([str(job.parent)]) == 0
    told = json.loads((job.parent / "evaluation.json").read_text())
    base, tuned = (told["scores"][name] for name in ("base", "tuned"))
    assert told["rows"] == 3
    assert base["exact"]["value"] == 0 and base["rouge-l"]["value"] < 50
    assert tuned["exact"]["value"] == 100
    assert tuned["rouge-l"]["value"] == pytest.approx(100)


@pytest.mark.parametrize("stage", ["rm", "dpo", "kto"])
def test_judgements_are_no_answers_and_the_next_word_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    run = tmp_path / "mine-1"
    (run / "result").mkdir(parents=True)
    (run / "result" / "manifest.json").write_text("{}")
    file = {"path": "data/0-pairs.jsonl", "name": "pairs.jsonl", "sha256": "0" * 64}
    file |= {"size_bytes": 1}
    job = {
        "run_id": "mine-1",
        "stages": [{"name": stage}],
        "model": {"base": "practice", "path": "model"},
        "data": {"files": [file], "held_out": file, "template": "alpaca"},
    }
    (run / "job.json").write_text(Job.model_validate(job).text())
    assert score.main([str(run)]) != 0
    said = capsys.readouterr().err
    assert f"held-out rows of {stage} are judgements" in said
    assert "milktea-run evaluate mine-1 DATA.json" in said
