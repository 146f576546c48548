"""Results with random adapters, and asks whose answers are kept."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.prepare import prompt_ids
from trainer.data.template import Turn
from trainer.serve.engine import Ask, Choice, Engine, Token


def write_adapter(folder: Path, base: Path, seed: int, **settings: Any) -> Path:
    """An adapter as a result has it, with random weights, asked in Alpaca's words."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trainer.data.prepare import Prepared, Rows
    from trainer.data.template import load
    from trainer.data.tokens import open_vocabulary, stop_token, token_hash
    from trainer.result.words import write_words

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.4)
    model.save_pretrained(str(folder))
    vocabulary, template = open_vocabulary(base), load("alpaca")
    stop, found = stop_token(vocabulary, template), token_hash(vocabulary, template)
    write_words(base, folder, Prepared(Rows.empty(), vocabulary, template, stop, found))
    return folder


@dataclass
class Heard:
    """What an ask was told; `enough` is after how many tokens it says to stop."""

    tokens: list[Token] = field(default_factory=list)
    why: str = ""
    enough: int = 10**9
    over: threading.Event = field(default_factory=threading.Event)
    ask: Ask | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def tell(self, token: Token) -> bool:
        self.tokens.append(token)
        return len(self.tokens) < self.enough

    def ended(self, why: str) -> None:
        self.why = why
        self.over.set()


def asked(
    engine: Engine,
    question: str,
    name: str = "base",
    most: int = 16,
    choice: Choice | None = None,
    heard: Heard | None = None,
) -> Heard:
    """Submits a question; its answer comes to what is returned."""
    voice, heard = engine.models.voices[name], heard or Heard()
    prompt = prompt_ids(voice.data, [Turn("user", question)])
    heard.ask = Ask(voice, prompt, most, choice or Choice(), heard.tell, heard.ended)
    engine.submit(heard.ask)
    return heard
