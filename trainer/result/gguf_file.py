"""A model's folder as one GGUF file, for llama.cpp and Ollama: F16 (every weight as it is in an
fp16 folder) or Q8_0. Names are the `gguf` package's; order of rows, offsets of norms and keys are
those of llama.cpp's convert_hf_to_gguf.py. Written tensor by tensor, then read back and compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import dequantize, quantize
from safetensors import safe_open
from transformers import AutoConfig

from trainer.data.tokens import open_vocabulary

KINDS = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}
_FILE_TYPES = {"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
_GEMMAS = ("gemma", "gemma2", "gemma3_text")
_BLOCK = 32  # numbers that Q8_0 quantises together
# every so many layers llama.cpp attends without a window
_PATTERN = {"gemma2": 2, "gemma3_text": 6}
# llama.cpp's name of a byte-level tokenizer's pre-tokenizer, by its regular expression
_CUTS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
Tell = Callable[[str], None]


class NoGguf(ValueError):
    """The model cannot be written rightly; the text says why."""


@dataclass(frozen=True)
class GgufSummary:
    """`largest_error` is of a weight that Q8_0 rounded, as a share of the largest in its tensor."""

    tensors: int
    bytes: int
    largest_error: float


def write(
    folder: Path, out: Path, kind: str = "f16", tell: Tell = lambda line: None
) -> GgufSummary:
    """Write the model of `folder` (safetensors, tokenizer.json) to the file `out`. Raises NoGguf
    for an architecture, a tokenizer or a setting that llama.cpp would read otherwise."""
    config = AutoConfig.from_pretrained(folder).get_text_config()
    if config.model_type not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise NoGguf(
            f"{config.model_type} is not written ({known} are): merge it, and convert the folder "
            "with llama.cpp's convert_hf_to_gguf.py"
        )
    architecture = _ARCHITECTURES[config.model_type]
    part = out.with_name(f".{out.name}.part")
    writer = GGUFWriter(part, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(folder.name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _settings(writer, config)
    _words(writer, folder, config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    every = list(_tensors(folder, config, names, kind))
    for name, type_, shape, _ in every:
        stored = gguf.quant_shape_to_byte_shape(shape, type_) if type_ == KINDS["q8_0"] else shape
        size = int(np.prod(stored)) * _bytes(type_)
        writer.add_tensor_info(name, stored, _dtype(type_), size, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (name, type_, _, made) in enumerate(every, 1):
        tell(f"writing {name}, {number} of {len(every)}")
        writer.write_tensor_data(_stored(made(), type_))
    writer.close()
    error = _read_back(part, {name: made for name, _, _, made in every}, tell)
    part.rename(out)
    return GgufSummary(len(every), out.stat().st_size, error)


# -- weights ---------------------------------------------------------------------------------------

Made = tuple[str, GGMLQuantizationType, tuple[int, ...], Callable[[], np.ndarray]]


def _tensors(folder: Path, config: Any, names: Any, kind: str) -> Iterator[Made]:
    """(name, type, shape, what makes it as fp32) of each tensor of the file."""
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        factors = _llama3_factors(config, rope)
        yield "rope_freqs.weight", GGMLQuantizationType.F32, factors.shape, lambda: factors
    tied = bool(config.tie_word_embeddings)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            held = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        for name, shape in held.items():
            if name == "lm_head.weight" and tied:
                continue
            short = name.replace("language_model.", "")
            called = names.get_name(short, try_suffixes=(".weight", ".bias"))
            if called is None:
                raise NoGguf(f"llama.cpp has no name for the tensor {name} of {config.model_type}")
            suffix = "bias" if name.endswith(".bias") else "weight"
            called = called if called.endswith(suffix) else f"{called}.{suffix}"
            type_ = GGMLQuantizationType.F32 if len(shape) == 1 else KINDS[kind]
            if type_ == KINDS["q8_0"] and shape[-1] % _BLOCK:
                type_ = KINDS["f16"]
            yield called, type_, shape, _maker(path, name, config)


def _maker(path: Path, name: str, config: Any) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        with safe_open(path, "pt") as file:
            value = file.get_tensor(name).to(torch.float32).numpy()
        return _as_llama_cpp(name, value, config)

    return make


def _as_llama_cpp(name: str, value: np.ndarray, config: Any) -> np.ndarray:
    """Llama's q and k with the two halves of a head's rotated pairs interleaved; Gemma's norms,
    which multiply by 1 + weight, with the 1."""
    kind, part = config.model_type, name.rsplit(".", 2)[-2]
    if kind in ("llama", "mistral") and part in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))
    if kind in _GEMMAS and name.endswith("norm.weight"):
        return value + 1
    return value


def _stored(value: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
    if type_ == GGMLQuantizationType.F32:
        return value
    if type_ == GGMLQuantizationType.F16 and not np.isfinite(value.astype(np.float16)).all():
        raise NoGguf("a weight does not fit F16: take q8_0")
    return np.asarray(quantize(value, type_))


def _bytes(type_: GGMLQuantizationType) -> int:
    return {GGMLQuantizationType.F32: 4, GGMLQuantizationType.F16: 2}.get(type_, 1)


def _dtype(type_: GGMLQuantizationType) -> Any:
    known = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    return np.dtype(known.get(type_, np.uint8))


def _read_back(path: Path, made: dict[str, Callable[[], np.ndarray]], tell: Tell) -> float:
    """Compare every tensor in the file with what it was to hold. Raises NoGguf; returns the largest
    error, as a share of the largest weight of its tensor."""
    reader, worst = GGUFReader(path), 0.0
    found = {tensor.name: tensor for tensor in reader.tensors}
    if set(found) != set(made):
        raise NoGguf(f"{path.name} does not hold the tensors that were written")
    for number, (name, make) in enumerate(made.items(), 1):
        tell(f"reading back {name}, {number} of {len(made)}")
        tensor, wanted = found[name], make()
        value = dequantize(tensor.data, tensor.tensor_type)
        off = float(np.abs(value.reshape(wanted.shape) - wanted).max())
        share = off / max(float(np.abs(wanted).max()), 1e-30)
        most = {GGMLQuantizationType.F32: 0.0, GGMLQuantizationType.F16: 2**-11}
        if not share <= most.get(tensor.tensor_type, 1 / 127):
            raise NoGguf(f"{name} reads back {share:.2%} off: the file is not whole")
        worst = max(worst, share)
    return worst


# -- settings --------------------------------------------------------------------------------------


def _rope(config: Any) -> dict[str, Any]:
    """The rotary settings of layers without a window."""
    told = getattr(config, "rope_parameters", None) or {}
    return dict(told.get("full_attention", told))


def _settings(writer: GGUFWriter, config: Any) -> None:
    heads, kind = config.num_attention_heads, config.model_type
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if kind in ("llama", "mistral"):
        writer.add_rope_dimension_count(head)
    _write_rope(writer, config)
    windows = [t == "sliding_attention" for t in getattr(config, "layer_types", None) or []]
    if kind in _PATTERN:
        wanted = [(n + 1) % _PATTERN[kind] != 0 for n in range(config.num_hidden_layers)]
        if windows != wanted:
            raise NoGguf(f"llama.cpp gives other layers of {kind} a window than this model has")
        writer.add_sliding_window(config.sliding_window)
    elif any(windows) or (kind == "mistral" and getattr(config, "sliding_window", None)):
        raise NoGguf(f"llama.cpp reads {kind} without the window that this model has")
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_rope(writer: GGUFWriter, config: Any) -> None:
    rope = _rope(config)
    scaling = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise NoGguf("a part of each head is rotated: llama.cpp reads it otherwise")
    if theta := rope.get("rope_theta"):
        writer.add_rope_freq_base(theta)
    if scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif scaling == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif scaling not in ("default", "llama3"):
        raise NoGguf(f"positions of the kind {scaling} are not written")


def _llama3_factors(config: Any, rope: dict[str, Any]) -> np.ndarray:
    """The divisor of each frequency, fp32 (head / 2,): the tensor in which llama.cpp keeps Llama
    3.1's scaling of positions."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    old = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    frequencies = rope["rope_theta"] ** -(np.arange(0, head, 2) / head)
    lengths = 2 * np.pi / frequencies
    smooth = (old / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = np.where(lengths < old / high, 1.0, np.where(lengths > old / low, factor, between))
    return found.astype(np.float32)


# -- words -----------------------------------------------------------------------------------------


def _words(writer: GGUFWriter, folder: Path, config: Any) -> None:
    """Writes tokenizer, stop tokens and chat template."""
    told = json.loads((folder / "tokenizer.json").read_bytes())
    tokens, types = _token_list(told, config.vocab_size)
    if (folder / "tokenizer.model").is_file() and told["model"].get("byte_fallback"):
        _sentencepiece(writer, folder, tokens, types)
    else:
        _byte_level(writer, told, tokens, types)
    vocabulary = open_vocabulary(folder)
    settings = folder / "generation_config.json"
    ends = json.loads(settings.read_bytes()).get("eos_token_id") if settings.is_file() else None
    ends = [ends] if isinstance(ends, int) else ends or [vocabulary.id_of(vocabulary.eos)]
    writer.add_eos_token_id(ends[0])  # an answer ends at either
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    bos = vocabulary.id_of(vocabulary.bos) if vocabulary.bos else None
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_add_bos_token(bool(vocabulary.prefix))
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _token_list(told: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every id's text and type; ids that no token has are named, and never made. Raises NoGguf."""
    added = [token["id"] for token in told.get("added_tokens", [])]
    if (count := max([*told["model"]["vocab"].values(), *added]) + 1) > size:
        raise NoGguf(f"the tokenizer has {count} tokens, the model has a row for {size} of them")
    tokens = [f"[PAD{n}]" for n in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, n in told["model"]["vocab"].items():
        tokens[n], types[n] = text, int(TokenType.NORMAL)
    for added in told.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    return tokens, types


def _byte_level(
    writer: GGUFWriter, told: dict[str, Any], tokens: list[str], types: list[int]
) -> None:
    if told["model"].get("type") != "BPE" or told["model"].get("byte_fallback"):
        raise NoGguf(
            "the tokenizer is no byte-level BPE, and tokenizer.model is not beside it: copy it "
            "from the base's repository"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut(told))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = told["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])


def _cut(told: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises NoGguf."""
    pre = told.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    patterns = [p["pattern"].get("Regex") for p in parts if p.get("type") == "Split"]
    plain = [p for p in parts if p.get("type") == "ByteLevel"]
    if len(patterns) == 1 and patterns[0] in _CUTS and plain and len(parts) == 2:
        return _CUTS[patterns[0]]
    if not patterns and len(parts) == 1 and plain and plain[0].get("use_regex", True):
        if not plain[0].get("add_prefix_space"):
            return "gpt-2"
    raise NoGguf(
        "llama.cpp's name for the way in which this tokenizer cuts texts is not known here: "
        "convert the merged folder with llama.cpp's convert_hf_to_gguf.py"
    )


def _sentencepiece(writer: GGUFWriter, folder: Path, tokens: list[str], types: list[int]) -> None:
    from transformers.convert_slow_tokenizer import import_protobuf

    # a process may hold one copy of these classes: sentencepiece's where it is installed
    model = import_protobuf().ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    scores = [-1000.0] * len(tokens)
    for n, piece in enumerate(model.pieces[: len(tokens)]):
        tokens[n], scores[n] = piece.piece, piece.score
        if types[n] in (int(TokenType.NORMAL), int(TokenType.UNUSED)):
            types[n] = int(piece.type)  # the numbers are the same in both formats
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(bool(model.normalizer_spec.add_dummy_prefix))
