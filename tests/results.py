"""Results as a run leaves them, made without training: an adapter that does something, with
template, tokenizer and stop tokens beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import write_model


def write_result(
    folder: Path, base: Path, template: str = "alpaca", seed: int = 1, **lora: Any
) -> Path:
    """`folder` with adapter_config.json, adapter_model.safetensors and the words, for stock PEFT
    and for milktea. `base` is a model's folder with a tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trainer.data.prepare import Prepared
    from trainer.data.template import from_chat_template, load
    from trainer.data.tokenised import Rows
    from trainer.data.tokens import open_vocabulary, stop_token, token_hash
    from trainer.result.words import write_words

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    vocabulary, known = open_vocabulary(base), load(template)
    if template == "chat":
        known = from_chat_template(vocabulary.chat_template)
    stop, found = stop_token(vocabulary, known), token_hash(vocabulary, known)
    write_words(base, folder, Prepared(Rows.empty(), vocabulary, known, stop, found))
    return folder


def write_both(folder: Path, kind: str = "gqa", **more: Any) -> tuple[Path, Path]:
    """(base, adapter), in folders of these names."""
    write_model(folder / "base", kind)
    return folder / "base", write_result(folder / "adapter", folder / "base", **more)
