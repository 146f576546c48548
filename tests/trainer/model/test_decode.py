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
from trainer.model.decode import answer, generate
from trainer.model.dropout import TokenKeys
from trainer.model.load import load
from trainer.model.parts import causal
from trainer.model.sampling import Sampling, choose
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


PROMPTS = [list(range(5, 5 + n)) for n in (3, 17, 1, 9, 30, 9, 4)]


@pytest.fixture
def loaded(run_folder: Callable[..., Path]) -> Callable[..., torch.nn.Module]:
    """loaded("gqa") -> a tiny model in fp32 with an adapter that says something."""

    def get(kind: str, model: Path | None = None) -> torch.nn.Module:
        path = run_folder(kind, model=model)
        job = Job.model_validate_json(path.read_bytes())
        made, _ = load(job, path.parent / "model", torch.device("cpu"), TokenKeys())
        torch.manual_seed(5)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, 0.0, 0.1)
        return made

    return get


def write_window(folder: Path) -> Path:
    """A Mistral whose layers see 8 tokens."""
    from tiny import write_tokenizer
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(7)
    config = MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = MistralForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.15)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", ["gqa", "qwen2", "gpt2", "window"])
@pytest.mark.parametrize("width", [1, 3, 64])
def test_greedy_tokens_are_those_of_transformers_generate(
    loaded: Callable[..., torch.nn.Module], kind: str, width: int, tmp_path: Path
) -> None:
    window = write_window(tmp_path / "window") if kind == "window" else None
    model = loaded("gqa" if window else kind, window)
    stops = {2, 260, 291}
    found = generate(model, PROMPTS, stops, torch.device("cpu"), 20, width=width)
    model.eval()
    inner = causal(model)
    for prompt, ours in zip(PROMPTS, found, strict=True):
        theirs = inner.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=sorted(stops),
            pad_token_id=0,
            use_cache=True,
        )[0, len(prompt) :].tolist()
        assert ours.ids == theirs
        assert ours.ended == (theirs[-1] in stops)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_a_forward_pass(
    loaded: Callable[..., torch.nn.Module], temperature: float
) -> None:
    model = loaded("gqa")
    sampling = Sampling(temperature, seed=3, step=2)
    found = generate(model, PROMPTS, {2}, torch.device("cpu"), 20, sampling)
    model.eval()
    for prompt, ours in zip(PROMPTS, found, strict=True):
        whole = torch.tensor([[*prompt, *ours.ids]])
        with torch.no_grad():
            logits = causal(model)(input_ids=whole, use_cache=False).logits[0].float()
        every = (logits / (temperature or 1.0)).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = every.gather(1, torch.tensor(ours.ids)[:, None])[:, 0].tolist()
        assert ours.log_probs == pytest.approx(expected, abs=1e-4)


def test_drawn_tokens_depend_on_nothing_but_seed_step_prompt_and_position(
    loaded: Callable[..., torch.nn.Module],
) -> None:
    model, device = loaded("gqa"), torch.device("cpu")
    sampling = Sampling(1.0, seed=3, step=2)
    numbers = list(range(len(PROMPTS)))
    whole = [a.ids for a in generate(model, PROMPTS, {2}, device, 12, sampling)]
    for width in (1, 2, 5):
        assert [
            a.ids for a in generate(model, PROMPTS, {2}, device, 12, sampling, width=width)
        ] == whole
    back = generate(model, PROMPTS[::-1], {2}, device, 12, sampling, numbers[::-1])
    assert [a.ids for a in back][::-1] == whole
    for other in (Sampling(1.0, 4, 2), Sampling(1.0, 3, 3)):
        assert [a.ids for a in generate(model, PROMPTS, {2}, device, 12, other)] != whole
    moved = [n + 100 for n in numbers]
    assert [a.ids for a in generate(model, PROMPTS, {2}, device, 12, sampling, moved)] != whole


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    count = 40_000
    rows, positions = torch.arange(count), torch.arange(count) % 7
    chosen, log_probs = choose(logits.expand(count, -1), Sampling(0.8, 11), rows, positions)
    p = (logits / 0.8).softmax(-1)
    shares = torch.bincount(chosen, minlength=5) / count
    # five standard deviations of a share
    assert ((shares - p).abs() < 5 * (p * (1 - p) / count).sqrt()).all()
    assert torch.allclose(log_probs, p.log()[chosen], atol=1e-6)


def test_no_prompt_has_no_answer(loaded: Callable[..., torch.nn.Module]) -> None:
    assert generate(loaded("gqa"), [], {2}, torch.device("cpu")) == []
