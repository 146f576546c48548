"""Learned prompts in the job file: their methods, their settings, and what does not go with them.

Data and pure functions; trainer/model/prompts.py builds them.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

PromptMethod = Literal["prefix_tuning", "p_tuning_v2", "p_tuning", "prompt_tuning"]
PROMPT_METHODS: tuple[str, ...] = get_args(PromptMethod)
PREFIXES = ("prefix_tuning", "p_tuning_v2")  # keys and values in each layer, not embeddings
PEFT_TYPES = {
    "prefix_tuning": "PREFIX_TUNING",
    "p_tuning_v2": "PREFIX_TUNING",  # without the projection
    "p_tuning": "P_TUNING",
    "prompt_tuning": "PROMPT_TUNING",
}
TAKEN_UP = {  # types of a file that such a training goes on from; a network is in no file
    "p_tuning_v2": ("PREFIX_TUNING",),
    "prompt_tuning": ("PROMPT_TUNING", "P_TUNING"),
}
PRECISIONS = ("fp32", "bf16")
MOST_TOKENS = 1024

Encoder = Literal["MLP", "LSTM"]


class PromptLearning(BaseModel):
    """PEFT's own names and meanings; frozen, and an unknown key is an error with its path.
    `encoder_hidden_size` belongs to prefix_tuning and p_tuning, `encoder_reparameterization_type`
    to p_tuning, `prompt_tuning_init_text` to prompt_tuning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_virtual_tokens: Annotated[
        int, Field(gt=0, le=MOST_TOKENS, description="Learned places in front of every row")
    ] = 20
    encoder_hidden_size: Annotated[
        Annotated[int, Field(gt=0, le=1 << 16)] | None,
        Field(description="Of the network that makes the prompt; left out, as wide as the prompt"),
    ] = None
    encoder_reparameterization_type: Annotated[
        Encoder, Field(description="That network: MLP or LSTM")
    ] = "MLP"
    prompt_tuning_init_text: Annotated[
        Annotated[str, Field(min_length=1, max_length=4000)] | None,
        Field(description="Whose tokens' embeddings it begins as; left out, tokens are drawn"),
    ] = None


_BELONGS = {
    "encoder_hidden_size": ("prefix_tuning", "p_tuning"),
    "encoder_reparameterization_type": ("p_tuning",),
    "prompt_tuning_init_text": ("prompt_tuning",),
}


def settings_defect(method: str, settings: PromptLearning) -> str:
    """Why [prompt_learning] must not be what it is beside this training.method; empty where it
    may."""
    plain = PromptLearning()
    told = [n for n in PromptLearning.model_fields if getattr(settings, n) != getattr(plain, n)]
    if told and method not in PROMPT_METHODS:
        return (
            f'[prompt_learning] says nothing to training.method = "{method}": remove it, or take '
            f"one of {', '.join(PROMPT_METHODS)}"
        )
    for name in told:
        if method not in _BELONGS.get(name, PROMPT_METHODS):
            return f'prompt_learning.{name} says nothing to training.method = "{method}": remove it'
    return ""


def prompt_defect(method: str, precision: str, lora_is_told: bool) -> str:
    """Why a job with this training.method must not have the precision, or the [lora], that it has;
    empty where it may, and for other methods."""
    if method not in PROMPT_METHODS:
        return ""
    if precision not in PRECISIONS:
        return (
            f'training.method = "{method}" runs in transformers\' own layers, and a base in '
            f'{precision} is not proven there: set model.precision = "bf16" or "fp32"'
        )
    if lora_is_told:
        return f'[lora] says nothing to training.method = "{method}": remove it'
    return ""


def prompt_start_defect(method: str, how: str, settings: PromptLearning) -> str:
    """Why a training by this method must not start from a learned prompt; empty where it may."""
    if method not in TAKEN_UP:
        other = "p_tuning_v2" if method in PREFIXES else "prompt_tuning"
        return (
            f'start: the network of "{method}" is in no file, only what it gives: go on with '
            f'training.method = "{other}"'
        )
    if how != "continue":
        return f'how = "{how}" is of a LoRA: a learned prompt is continued'
    if settings.prompt_tuning_init_text is not None:
        return (
            "start: its prompt says how it begins: remove prompt_learning.prompt_tuning_init_text"
        )
    return ""


def places_of(method: str, settings: PromptLearning) -> int:
    """Learned places in front of each row of a job with this training.method."""
    return settings.num_virtual_tokens if method in PROMPT_METHODS else 0
