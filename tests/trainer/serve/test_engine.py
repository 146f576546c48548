"""Answers for many at once: who asks beside me changes nothing of mine."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from served import Heard, asked, write_adapter
from tiny import write_tokenizer
from transformers import StableLmConfig, StableLmForCausalLM

from trainer.data.prepare import prompt_ids
from trainer.data.template import Turn
from trainer.model.decode import generate
from trainer.model.steps import steps_of
from trainer.practice.model import HERE as PRACTICE
from trainer.result.open import open_adapter
from trainer.serve.engine import Ask, Busy, Engine, SamplingParams, choose

QUESTIONS = [
    "Where does the cat live?",
    "Name a fruit.",
    "What is the colour of the sky? Answer in one word, if you please.",
    "hi",
    "Count to three.",
    "Who sells tea?",
    "Say it again, and then once more, and then a third time.",
    "What time is it?",
]
DRAWN = SamplingParams(temperature=0.9, top_p=0.95, seed=7)


def answers(heard: list[Heard]) -> list[list[int]]:
    assert all(h.over.wait(60) for h in heard)
    assert {h.why for h in heard} <= {"stop", "length", "cancelled"}
    assert all(h.ids or h.why == "cancelled" for h in heard)
    return [h.ids for h in heard]


@pytest.mark.parametrize("choice", [SamplingParams(), DRAWN], ids=["greedy", "drawn"])
def test_eight_at_once_say_what_each_says_alone_token_for_token(
    serving: Callable[..., Engine], choice: SamplingParams
) -> None:
    engine = serving(width=8)
    names = cycle(["zh-1", "base", "v2.5"])
    asks = [(question, next(names)) for question in QUESTIONS]
    alone = [answers([asked(engine, q, n, choice=choice)])[0] for q, n in asks]
    before = engine.counts.steps
    together = answers([asked(engine, q, n, choice=choice) for q, n in asks])
    assert together == alone
    assert engine.counts.steps - before < sum(map(len, alone)), "steps were shared"
    assert len({tuple(ids) for ids in alone}) > 4, "answers that tell something"


def test_each_name_answers_as_its_own_result_does(
    serving: Callable[..., Engine], results: dict[str, Path]
) -> None:
    engine, cpu = serving(), torch.device("cpu")
    names = ["base", *results]
    heard = answers([asked(engine, QUESTIONS[2], name) for name in names])
    for name, ids in zip(names, heard, strict=True):
        chat = open_adapter(results.get(name, results["zh-1"]), PRACTICE, cpu)
        model: Any = chat.model
        voice = engine.models.voices[name]
        prompt = prompt_ids(voice.data, [Turn("user", QUESTIONS[2])])
        if name == "base":
            with model.disable_adapter():
                [expected] = generate(model, [prompt], voice.stops, cpu, 16)
        else:
            [expected] = generate(model, [prompt], voice.stops, cpu, 16)
        assert ids == expected.ids
    assert len({tuple(ids) for ids in heard}) == 3


def test_adapters_that_peft_does_not_mix_take_turns_within_a_step(
    serving: Callable[..., Engine], results: dict[str, Path], tmp_path: Path
) -> None:
    dora = write_adapter(tmp_path / "dora", PRACTICE, 5, use_dora=True)
    engine = serving({**results, "dora": dora})
    assert not engine.models.mixes
    names = ["dora", "base", "zh-1", "dora"]
    asks = list(zip(QUESTIONS, names, strict=False))
    alone = [answers([asked(engine, q, n, 5)])[0] for q, n in asks]
    assert answers([asked(engine, q, n, 5) for q, n in asks]) == alone


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of an adapted embedding
@pytest.mark.parametrize(
    ("more", "mixes"),
    [
        ({"r": 20, "target_modules": "all-linear", "lora_dropout": 0.1, "use_rslora": True}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    ],
    ids=["all in the layers", "one beside them"],
)
def test_by_the_fused_layers_each_says_what_it_says_by_transformers(
    serving: Callable[..., Engine],
    results: dict[str, Path],
    tmp_path: Path,
    more: dict[str, Any],
    mixes: bool,
) -> None:
    chosen = {**results, "other": write_adapter(tmp_path / "other", PRACTICE, 6, **more)}
    asks = list(zip(QUESTIONS, cycle(["other", "zh-1", "base", "v2.5"]), strict=False))
    said = []
    for fast in (True, False):
        engine = serving(chosen, width=6, fast=fast)
        assert bool(steps_of(engine.models.model)) == fast
        assert engine.models.mixes == (mixes or not fast)
        heard = [asked(engine, q, name) for q, name in asks]
        said.append(answers(heard))
    assert said[0] == said[1]
    assert len({tuple(ids) for ids in said[0]}) > 4, "answers that tell something"


def test_an_adapter_that_the_fused_layers_do_not_compute_leaves_the_model_as_it_is(
    serving: Callable[..., Engine], results: dict[str, Path], tmp_path: Path
) -> None:
    wide = write_adapter(tmp_path / "wide", PRACTICE, 5, r=65)
    engine = serving({**results, "wide": wide}, fast=True)
    assert not steps_of(engine.models.model) and engine.models.mixes
    assert len(answers([asked(engine, QUESTIONS[0], "wide")])[0]) > 0


def test_a_model_with_transformers_own_attention_is_served_too(
    serving: Callable[..., Engine], tmp_path: Path
) -> None:
    torch.manual_seed(7)
    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64}
    layers: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}
    layers |= {"num_key_value_heads": 4}
    StableLmForCausalLM(StableLmConfig(**sizes, **layers)).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", tmp_path / "base", 3)
    engine = serving({"a": adapter}, tmp_path / "base")
    assert type(engine._rows).__name__ == "Apart"
    asks = list(zip(QUESTIONS[:4], cycle(["a", "base"]), strict=False))
    alone = [answers([asked(engine, q, n)])[0] for q, n in asks]
    assert answers([asked(engine, q, n) for q, n in asks]) == alone


def test_who_is_cancelled_leaves_at_a_step_boundary_and_the_others_go_on(
    serving: Callable[..., Engine],
) -> None:
    engine = serving(width=2)

    class Leaves(Heard):
        def tell(self, token: Any) -> bool:
            if len(self.tokens) == 3 and self.ask:
                self.ask.cancel()
                self.at = engine.counts.steps
            return super().tell(token)

        def ended(self, why: str) -> None:
            self.took = engine.counts.steps - self.at
            super().ended(why)

    stays = asked(engine, QUESTIONS[6], "zh-1", 60)
    [expected] = answers([stays])
    stays, leaves = asked(engine, QUESTIONS[6], "zh-1", 60), Leaves()
    asked(engine, QUESTIONS[2], "v2.5", 200, heard=leaves)
    waits = asked(engine, QUESTIONS[0], "zh-1", 60)  # for a row
    assert waits.ask
    waits.ask.cancel()
    answers([stays, leaves, waits])
    assert (leaves.why, waits.why) == ("cancelled", "cancelled")
    assert leaves.took <= 2 and len(leaves.ids) <= 5
    assert stays.ids == expected
    assert engine.load == (0, 0)


def test_an_answer_ends_at_a_stop_token_at_its_length_or_when_it_is_told(
    serving: Callable[..., Engine],
) -> None:
    engine = serving()
    whole = asked(engine, "What is the capital of Aldermoor?", "base", 200)
    short = asked(engine, "What is the capital of Aldermoor?", "base", 2)
    told = asked(engine, "What is the capital of Aldermoor?", "base", 200, heard=Heard(enough=3))
    answers([whole, short, told])
    assert whole.why == "stop" and whole.ids[-1] in engine.models.voices["base"].stops
    assert (short.why, short.ids) == ("length", whole.ids[:2])
    assert (told.why, told.ids) == ("stop", whole.ids[:3])


def test_a_prompt_without_room_and_a_queue_without_end_are_refused(
    serving: Callable[..., Engine],
) -> None:
    engine = serving()
    with pytest.raises(ValueError, match="do not fit"):
        asked(engine, "hi", most=engine.models.context)
    heard = Heard()
    voice = engine.models.voices["base"]
    ask = Ask(voice, [5], 4, SamplingParams(), heard.tell, heard.ended)
    with pytest.raises(Busy):
        engine.submit(*[ask] * 1000)
    engine.close()
    with pytest.raises(Busy):
        asked(engine, "hi")


def test_a_step_that_fails_is_told_and_the_next_question_is_answered(
    serving: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = serving()
    fails = Heard()
    fails.tell = lambda token: 1 / 0 > 0  # type: ignore[method-assign]
    [broken] = [asked(engine, "hi", heard=fails)]
    assert broken.over.wait(60) and broken.why == "error"
    assert answers([asked(engine, "hi", most=4)])[0]
    assert "the model failed" in caplog.text


def test_top_p_keeps_the_likeliest_tokens_that_make_it_up_and_draws_from_them_alone() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    count = 20_000
    choices = [SamplingParams(1.0, 0.65, seed=1, number=n) for n in range(count)]
    ids, log_probs, _, _ = choose(logits.expand(count, -1), choices, torch.zeros(count).long())
    shares = torch.bincount(ids, minlength=4) / count
    assert shares.tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.02)
    assert torch.allclose(log_probs, logits[ids], atol=1e-6), "of the model's own distribution"
