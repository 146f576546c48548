"""Which programs load an adapter, by its configuration and its tensors' names alone. No torch.

    python -m trainer.result.engines ADAPTER [--base MODEL]     folder or adapter.zip, ours or not

Facts of 2026-11 (PEFT 0.21, vLLM 0.33, SGLang 0.5.23, llama.cpp, Ollama fb30760), read in their
sources: vllm/lora/peft_helper.py and config/lora.py, sglang/srt/lora, convert_lora_to_gguf.py,
ollama/convert.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.result.command import answer, parser_of
from trainer.result.files import PLAIN_STARTS, TOWERS, json_object, read, unknown, variant
from trainer.wire.prompts import PEFT_TYPES

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
OLLAMA_TYPES = ("llama", "gemma2")
# families whose classes take no adapter in vLLM 0.32, and those that it splits where the base does
# not
_VLLM_TAKES_NONE = (
    *("bloom", "cohere2_moe", "dbrx", "falcon", "falcon_mamba", "gemma3n", "gemma3n_text", "gpt2"),
    *("gptj", "mamba", "mamba2", "stablelm", "zamba2"),
)
_VLLM_SPLITS = {"glm4": ".gate_up_proj."}
_NO_PLAIN_LORA = "unknown variant replication biases task towers"
_REFUSES = {  # the faults of an adapter by engine
    "PEFT": "unknown",
    "vLLM": f"dora start rows modules experts rank family {_NO_PLAIN_LORA}",
    "SGLang": f"dora rslora start rows modules patterns experts {_NO_PLAIN_LORA}",
    "llama.cpp": f"dora rslora start rows modules patterns experts {_NO_PLAIN_LORA}",
    "Ollama": f"dora rslora alpha start rows modules patterns experts type {_NO_PLAIN_LORA}",
}


@dataclass(frozen=True)
class EngineSupport:
    """`why` says why not, or what to know; `command` makes it load."""

    name: str
    loads: bool
    why: str
    command: str = ""


def loads_in(
    config: Mapping[str, Any], tensors: Sequence[str], base_type: str | None = None
) -> list[EngineSupport]:
    """One verdict an engine. `config` is adapter_config.json, `tensors` the names in its
    safetensors file, `base_type` the base's model_type where it is known."""
    base = shlex.quote(config.get("base_model_name_or_path") or "BASE")
    if config.get("peft_type") in PEFT_TYPES.values():
        return _of_prompt()
    rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    room = next((r for r in VLLM_RANKS if r >= rank), None)
    jinja = "--chat-template FOLDER/chat_template.jinja"
    ends = "--generation-config FOLDER"  # the trained stop token, which vLLM asks of the base
    faults = _faults(config, tensors)
    if room is None:
        faults["rank"] = f"rank {rank} is above {VLLM_RANKS[-1]}"
    if base_type in _VLLM_TAKES_NONE:
        faults["family"] = f"it takes no adapter of {base_type}: merge it"
    split = _VLLM_SPLITS.get(base_type or "")
    if split and any(split in name for name in tensors):
        faults["family"] = f"it splits {base_type}'s gate_up_proj, which is adapted whole: merge it"
    if base_type is not None and base_type not in OLLAMA_TYPES:
        known = " and ".join(OLLAMA_TYPES)
        faults["type"] = f"its converter knows {known}, not {base_type}: merge it"
    commands = {
        "PEFT": "PeftModel.from_pretrained(base, FOLDER)",
        "vLLM": f"vllm serve {base} --enable-lora --max-lora-rank {room} "
        f"--lora-modules NAME=FOLDER {jinja} {ends}",
        "SGLang": f"python -m sglang.launch_server --model-path {base} --lora-paths NAME=FOLDER "
        f"--max-lora-rank {rank} {jinja}",
        "llama.cpp": f"python convert_lora_to_gguf.py --base {base} FOLDER && "
        "llama-server -m BASE.gguf --lora ADAPTER.gguf",
        "Ollama": "ollama create NAME -f Modelfile   (FROM the very base, ADAPTER FOLDER)",
    }
    engines = []
    for name, command in commands.items():
        why = "; ".join(why for kind, why in faults.items() if kind in _REFUSES[name].split())
        know = f"rank {rank} is above its default of 16" if name == "vLLM" and rank > 16 else ""
        engines.append(EngineSupport(name, not why, why or know, "" if why else command))
    return engines


def _of_prompt() -> list[EngineSupport]:
    """The verdicts on a learned prompt."""
    why = "it is a learned prompt, no LoRA: this engine has no place for one, nor can it be merged"
    verdicts = [EngineSupport(name, False, why) for name in _REFUSES if name != "PEFT"]
    know = "scores and training; PEFT 0.21's generate on transformers 5.24 and later drops it"
    return [EngineSupport("PEFT", True, know, "PeftModel.from_pretrained(base, FOLDER)"), *verdicts]


def _faults(config: Mapping[str, Any], tensors: Sequence[str]) -> dict[str, str]:
    """The properties of this adapter that some engine does not take, by kind."""
    alphas = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
    start = config.get("init_lora_weights", True)
    task, later, kind = config.get("task_type"), unknown(config), variant(config)
    found = {
        "dora": (config.get("use_dora"), "it is a DoRA: merge it"),
        "rslora": (
            config.get("use_rslora"),
            "use_rslora is read as plain LoRA, sqrt(r) times too weak: merge it",
        ),
        "alpha": (any(float(a) != int(a) for a in alphas), "lora_alpha is no whole number"),
        "start": (
            start not in PLAIN_STARTS,
            f"it stands on a base that {start} changed: convert it to a plain LoRA",
        ),
        "rows": (
            config.get("trainable_token_indices"),
            "single rows of the embedding are trained: merge it",
        ),
        "modules": (
            config.get("modules_to_save") or any("lora_" not in name for name in tensors),
            "whole modules are trained beside the LoRA: merge it",
        ),
        "patterns": (
            config.get("rank_pattern") or config.get("alpha_pattern"),
            "modules differ in rank or alpha: merge it",
        ),
        "experts": (
            config.get("target_parameters") or any(".experts." in name for name in tensors),
            "experts are adapted: merge it",
        ),
        "unknown": (later, f"its settings have {later}, which PEFT 0.21 does not know"),
        "variant": (kind, f"{kind} makes it another kind of LoRA"),
        "replication": (config.get("layer_replication"), "it repeats layers of the base"),
        "biases": (
            config.get("bias", "none") != "none" or config.get("lora_bias"),
            "biases are trained beside the LoRA",
        ),
        "task": (task not in (None, "CAUSAL_LM"), f"it is no language model's but {task}'s"),
        "towers": (
            any(part in name for name in tensors for part in TOWERS),
            "it adapts the part of the base that reads images or sound",
        ),
    }
    return {kind: why for kind, (is_so, why) in found.items() if is_so}


def table(engines: Sequence[EngineSupport]) -> str:
    """The table in Markdown, for the model card."""
    rows = [f"| {e.name} | {'yes' if e.loads else 'no'} | {_cell(e)} |" for e in engines]
    return "\n".join(["| loads in | | how, or why not |", "|---|---|---|", *rows])


def _cell(engine: EngineSupport) -> str:
    command = f"`{engine.command}`" if engine.command else ""
    return ": ".join(filter(None, (engine.why, command)))


def lines(engines: Sequence[EngineSupport]) -> str:
    """The lines for a terminal."""
    rows = []
    for engine in engines:
        rows.append(f"{engine.name:10} {'yes' if engine.loads else 'no':4} {engine.why}".rstrip())
        if engine.command:
            rows.append(f"{'':15} {engine.command}")
    return "\n".join(rows)


def main() -> int:
    parser = parser_of("trainer.result.engines", "Which programs load an adapter, and how.")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--base", type=Path, help="the base's folder, for its architecture")
    arguments = parser.parse_args()
    found: list[EngineSupport] = []

    def work() -> dict[str, Any]:
        config, tensors = read(arguments.adapter)
        base_type = None
        if arguments.base:
            base_type = json_object(arguments.base / "config.json").get("model_type")
        found.extend(loads_in(config, tensors, base_type))
        return {"loads_in": [asdict(engine) for engine in found]}

    return answer(work, lambda _: lines(found), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
