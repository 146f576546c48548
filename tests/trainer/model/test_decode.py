"""Answers of a model: greedy, token by token from the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from trainer.data.prepare import prepare, prompt_ids
from trainer.data.template import Turn
from trainer.model.decode import answer
from trainer.model.dropout import TokenKeys
from trainer.model.load import causal, load
from trainer.wire.job import Job

QUESTIONS = ["What is 1 + 2?", "What is 2 + 1?", "hi", "instruction that describes"]


@pytest.mark.parametrize("kind", ["gqa", "gpt2"])
def test_answers_are_what_the_model_says_when_it_reads_everything_anew_for_each_token(
    run_folder: Callable[..., Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = run_folder(kind)
    job = Job.model_validate_json(path.read_bytes())
    device = torch.device("cpu")
    model, _ = load(job, path.parent / "model", device, TokenKeys())
    data = prepare(job, path.parent)
    prompts = [prompt_ids(data, [Turn("user", text)]) for text in QUESTIONS]
    assert len({len(p) for p in prompts}) > 1, "prompts of several lengths"
    transformers_logging.enable_propagation()
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, logger="transformers"):
        answers = answer(model, prompts, data, device, 12)
    transformers_logging.disable_propagation()
    assert caplog.text == "", "no argument by a name that this transformers has given up"

    model.eval()
    for prompt, found in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                logits = causal(model)(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == data.stop_id:
                break
        new = [i for i in ids[len(prompt) :] if i != data.stop_id]
        tokenizer = data.vocabulary.tokenizer
        assert found == tokenizer.decode(new, skip_special_tokens=True).strip()
