"""Learned prompts: what every row sees in front of its own tokens, and nothing else is trained.

A prefix (prefix tuning, P-Tuning v2) is keys and values in each layer; a prompt (P-tuning, prompt
tuning) is input embeddings. PEFT has the parameters, their networks and their file; the trainer's
own attention computes them, so that rows may be packed: each document of a pack sees the learned
places and its own tokens. As in PEFT, k learned places take the positions 0 to k - 1, and a row's
first token stands at position k.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.cache_utils import Cache

from trainer.model.parts import ModelError, causal, family_of
from trainer.wire.chain import WEIGHTS
from trainer.wire.job import Job


def add_prompt(job: Job, model: nn.Module) -> nn.Module:
    """Put the job's learned prompt on a frozen model, in PEFT's wrapper. Raises ModelError for a
    family that it does not go with."""
    validate_family(model)
    settings, method = job.prompt_learning, job.training.method
    told: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": settings.num_virtual_tokens,
        "base_model_name_or_path": job.model.base,
    }
    if method in ("prefix_tuning", "p_tuning"):
        told["encoder_hidden_size"] = settings.encoder_hidden_size
    config: Any
    if method == "p_tuning":
        told["encoder_reparameterization_type"] = settings.encoder_reparameterization_type
        config = PromptEncoderConfig(**told)
    elif method == "prompt_tuning":
        text = settings.prompt_tuning_init_text
        config = PromptTuningConfig(**told, **_start(text, model))
    else:
        config = PrefixTuningConfig(**told, prefix_projection=method == "prefix_tuning")
    torch.manual_seed(job.training.seed)  # the prompt's start values
    with warnings.catch_warnings():
        # trainer/result/adapter.py writes the right name
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path`")
        made: nn.Module = get_peft_model(model, config)
    return made


def _start(text: str | None, model: nn.Module) -> dict[str, Any]:
    """PEFT's settings for where prompt tuning begins: tokens of the vocabulary, or a text's."""
    if text is None:
        return {"prompt_tuning_init": "SAMPLE_VOCAB"}
    folder: str = causal(model).config.name_or_path
    asked = {"prompt_tuning_init_text": text, "tokenizer_name_or_path": folder}
    return {"prompt_tuning_init": "TEXT", **asked}


def validate_family(model: nn.Module) -> None:
    """Raises ModelError for a model that no learned prompt goes with."""
    family = family_of(model)
    if why := family.why_no_prompt():
        raise ModelError(
            f'{family.model_type} takes no learned prompt: {why}: set training.method = "lora"'
        )


def is_prompted(model: nn.Module) -> bool:
    """Whether PEFT's wrapper holds a learned prompt."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def continue_prompt(model: Any, folder: Path) -> None:
    """Lets a learned prompt without a network go on from that in an adapter's folder. Raises
    ModelError for one of another shape."""
    table = model.prompt_encoder[model.active_adapter].embedding.weight
    found = load_file(folder / WEIGHTS).get("prompt_embeddings")
    if found is None or found.shape != table.shape:
        what = "no learned prompt" if found is None else f"one of {list(found.shape)}"
        raise ModelError(
            f"{folder.name}/ holds {what}, and this base has {list(table.shape)}: start from one "
            "of the same base, with as many learned places"
        )
    with torch.no_grad():
        table.copy_(found)


class Prompt(NamedTuple):
    """The learned values of one forward pass, differentiable, in the model's dtype: `embeddings`
    [k, H], or of each layer `keys` and `values` [k, KV, D]."""

    embeddings: Tensor | None
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.keys[0] if self.embeddings is None else self.embeddings)


def prompt_of(model: Any) -> Prompt | None:
    """The learned prompt of a model as it is now; None where it has none, or where PEFT's
    `disable_adapter` has it switched off."""
    # within disable_adapter the wrapper's forward is the base's own
    if not is_prompted(model) or getattr(model.forward, "__self__", None) is not model:
        return None
    peft: Any = model
    config, base = peft.active_peft_config, causal(peft)
    encoder = peft.prompt_encoder[peft.active_adapter]
    if config.inference_mode:
        made = encoder.embedding.weight
    else:
        numbers = torch.arange(config.num_virtual_tokens, device=encoder.embedding.weight.device)
        made = encoder(numbers[None])[0]
    embeddings = base.get_input_embeddings().weight
    made = made.to(embeddings.device, base.dtype)
    if config.peft_type != "PREFIX_TUNING":
        return Prompt(made)
    heads = config.num_attention_heads  # of keys: PEFT has counted them so
    parts = made.view(len(made), config.num_layers * 2, heads, -1).unbind(1)
    return Prompt(None, parts[::2], parts[1::2])


class Places(NamedTuple):
    """Where the tokens of a pack stand once k learned ones are in front of each document: `own`
    int64 (M,) the new places of its tokens, `learned` int64 (documents x k,) the others, `cu`
    int32 (documents + 1,) the new boundaries."""

    own: Tensor
    learned: Tensor
    cu: Tensor

    @classmethod
    def of(cls, cu: Tensor, tokens: int, k: int) -> Places:
        """Of a pack of M = `tokens` with boundaries `cu` int32 (documents + 1,)."""
        at = torch.arange(tokens, device=cu.device)
        document = torch.bucketize(at, cu[1:], right=True)
        number = torch.arange(len(cu), device=cu.device)
        wide = cu + k * number
        learned = wide[:-1, None] + torch.arange(k, device=cu.device)
        return cls(at + (document + 1) * k, learned.flatten(), wide.to(cu.dtype))

    def spread(self, own: Tensor, each: list[int]) -> Tensor:
        """own [M] and a number of each document -> [M + documents x k]."""
        k = len(self.learned) // len(each)
        made = own.new_empty(len(self.own) + len(self.learned))
        made[self.own] = own
        made[self.learned] = torch.tensor(each, device=own.device).repeat_interleave(k)
        return made

    def join(self, own: Tensor, learned: Tensor) -> Tensor:
        """own [M, ...] and learned [k, ...] -> [M + documents x k, ...]."""
        documents = len(self.cu) - 1
        made = own.new_zeros(len(self.own) + len(self.learned), *own.shape[1:])
        again = learned.to(own.dtype).repeat(documents, *[1] * (learned.ndim - 1))
        return made.index_copy(0, self.own, own).index_copy(0, self.learned, again)


class PrefixCache(Cache):
    """Gives attention the learned keys and values in front of each document's own, or in front of
    each row's where `places` is None. Keeps nothing."""

    def __init__(self, prompt: Prompt, places: Places | None) -> None:
        super().__init__(layers=[])
        self.prompt, self.places = prompt, places

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """[B, KV, M, D] each -> [B, KV, M + k a document, D] each."""
        learned = (self.prompt.keys[layer_idx], self.prompt.values[layer_idx])
        pairs = zip((key_states, value_states), learned, strict=True)
        keys, values = (in_front(x, one, self.places) for x, one in pairs)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def in_front(own: Tensor, learned: Tensor, places: Places | None) -> Tensor:
    """own [B, KV, M, D], learned [k, KV, D] -> [B, KV, N, D] with the learned ones in front of each
    document, or without `places` of each row."""
    if places is not None:
        return places.join(own[0].transpose(0, 1), learned).transpose(0, 1)[None]
    again = learned.to(own.dtype).transpose(0, 1)[None].expand(len(own), -1, -1, -1)
    return torch.cat([again, own], 2)


def prompt_tokens(model: nn.Module) -> int:
    """Learned places in front of each row of a model as it is now."""
    prompt = prompt_of(model)
    return 0 if prompt is None else prompt.tokens


def run_with(
    core: Any, prompt: Prompt, cache_name: str, inputs: dict[str, Any], **more: Any
) -> Any:
    """The decoder `core` on a batch (input_ids and what model_inputs gives), with the prompt in
    front of each row: its output, whose last_hidden_state has the rows' own tokens only."""
    cu, k = inputs.get("cu_seq_lens_q"), prompt.tokens
    places = None if cu is None else Places.of(cu, inputs["input_ids"].shape[1], k)
    given = behind(core, prompt, inputs, places)
    if prompt.embeddings is None:
        return core(**given, **{cache_name: PrefixCache(prompt, places)}, **more)
    out = core(**given, **more)
    states = out.last_hidden_state
    out.last_hidden_state = states[:, k:] if places is None else states[:, places.own]
    return out


def behind(
    core: Any, prompt: Prompt, inputs: dict[str, Any], places: Places | None
) -> dict[str, Any]:
    """The arguments of a batch whose rows have the prompt in front of them. A prefix itself comes
    by the cache; embeddings take places of their own in the batch."""
    given, k = dict(inputs), prompt.tokens
    given["position_ids"] = given["position_ids"] + k
    if places is not None:
        given |= {"cu_seq_lens_k": places.cu, "max_length_k": given["max_length_q"] + k}
    if prompt.embeddings is not None:
        given |= _embedded(core, prompt.embeddings, given, places)
        del given["input_ids"]
    return given


def _embedded(
    core: Any, learned: Tensor, given: dict[str, Any], places: Places | None
) -> dict[str, Any]:
    """The arguments that differ once the embeddings `learned` [k, H] stand in front."""
    ids, positions, k = given["input_ids"], given["position_ids"], len(learned)
    own, first = core.get_input_embeddings()(ids), torch.arange(k, device=ids.device)
    if places is not None:
        wide = {"cu_seq_lens_q": places.cu, "max_length_q": given["max_length_k"]}
        return wide | {
            "inputs_embeds": places.join(own[0], learned)[None],
            "position_ids": places.join(positions[0], first)[None],
        }
    rows = len(ids)
    again = learned.to(own.dtype)[None].expand(rows, -1, -1)
    made = {
        "inputs_embeds": torch.cat([again, own], 1),
        "position_ids": torch.cat([first.expand(rows, -1), positions], 1),
    }
    if (mask := given.get("attention_mask")) is not None:
        made["attention_mask"] = torch.cat([mask.new_ones(rows, k), mask], 1)
    return made
