"""Which programs load an adapter."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer.result.engines import loads_in, table
from trainer.result.files import NoAdapter, read

PLAIN: dict[str, Any] = {"r": 16, "lora_alpha": 32, "base_model_name_or_path": "org/base"}
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
NAMES = [f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"]
EVERYONE = ["PEFT", "vLLM", "SGLang", "llama.cpp", "Ollama"]


@pytest.mark.parametrize(
    ("settings", "names", "loads"),
    [
        ({}, NAMES, EVERYONE),
        ({"use_rslora": True}, NAMES, ["PEFT", "vLLM"]),
        ({"use_dora": True}, NAMES, ["PEFT"]),
        ({"lora_alpha": 45.25}, NAMES, ["PEFT", "vLLM", "SGLang", "llama.cpp"]),
        ({"init_lora_weights": "pissa"}, NAMES, ["PEFT"]),
        ({"r": 1024}, NAMES, ["PEFT", "SGLang", "llama.cpp", "Ollama"]),
        ({"rank_pattern": {"q_proj": 4}}, NAMES, ["PEFT", "vLLM"]),
        ({}, [*NAMES, "base_model.model.lm_head.weight"], ["PEFT"]),
        ({"modules_to_save": ["embed_tokens"]}, NAMES, ["PEFT"]),
        ({"trainable_token_indices": [5]}, NAMES, ["PEFT"]),
        ({"target_parameters": ["experts.down_proj"]}, NAMES, ["PEFT"]),
        ({"alora_invocation_tokens": [3]}, NAMES, ["PEFT"]),
        ({"layer_replication": [[0, 2]]}, NAMES, ["PEFT"]),
        ({"lora_bias": True}, NAMES, ["PEFT"]),
        ({"task_type": "SEQ_CLS"}, NAMES, ["PEFT"]),
        ({}, [name.replace("model.layers", "visual.blocks") for name in NAMES], ["PEFT"]),
        ({"use_superlora": False}, NAMES, EVERYONE),
        ({"use_superlora": True}, NAMES, []),
    ],
)
def test_each_engine_is_named_that_would_load_it_right(
    settings: dict[str, Any], names: list[str], loads: list[str]
) -> None:
    engines = loads_in(PLAIN | settings, names)
    assert [e.name for e in engines if e.loads] == loads
    assert all(e.command for e in engines if e.loads)
    assert all(e.why and not e.command for e in engines if not e.loads)


def test_a_rank_between_vllms_is_given_the_next_one() -> None:
    vllm = loads_in(PLAIN | {"r": 33}, NAMES)[1]
    assert "--max-lora-rank 64" in vllm.command and "above its default" in vllm.why


def test_vllm_takes_no_adapter_of_some_families() -> None:
    fused = [NAMES[0].replace("self_attn.q_proj", "mlp.gate_up_proj")]
    assert not loads_in(PLAIN, NAMES, "gpt2")[1].loads
    assert loads_in(PLAIN, NAMES, "glm4")[1].loads and loads_in(PLAIN, fused, "phi3")[1].loads
    assert "splits glm4's gate_up_proj" in loads_in(PLAIN, fused, "glm4")[1].why


def test_a_command_cannot_be_steered_by_the_name_of_a_base() -> None:
    engines = loads_in(PLAIN | {"base_model_name_or_path": "x; rm -rf ~"}, NAMES)
    assert all("'x; rm -rf ~'" in e.command for e in engines if "x; rm" in e.command)
    assert any("x; rm" in e.command for e in engines)


def test_ollama_reads_adapters_of_two_architectures_only() -> None:
    assert not loads_in(PLAIN, NAMES, "qwen3")[-1].loads
    assert loads_in(PLAIN, NAMES, "llama")[-1].loads
    assert "| Ollama | no | its converter knows" in table(loads_in(PLAIN, NAMES, "qwen3"))


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN))
    save_file({name: torch.zeros(1, 2) for name in NAMES}, folder / "adapter_model.safetensors")
    return folder


def test_folder_and_archive_are_read_alike(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    assert read(folder) == read(tmp_path / "a.zip") == (PLAIN, NAMES)


def told(folder: Path, **settings: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | settings))


def holds(folder: Path, names: list[str]) -> None:
    save_file({name: torch.zeros(1, 2) for name in names}, folder / "adapter_model.safetensors")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "adapter_config.json").unlink(),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        lambda folder: (folder / "adapter_config.json").write_text('{"r": "x", "lora_alpha": 1}'),
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 20),
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\1"),
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000),
        lambda folder: told(folder, r=0),
        lambda folder: told(folder, lora_alpha=float("nan")),
        lambda folder: told(folder, rank_pattern="x"),
        lambda folder: told(folder, alpha_pattern={"q_proj": None}),
        lambda folder: told(folder, peft_type="IA3"),
        lambda folder: told(folder, base_model_name_or_path="a\x1b[31m"),
        lambda folder: holds(folder, NAMES[:1]),
        lambda folder: holds(folder, [n.removeprefix("base_model.model.") for n in NAMES]),
        lambda folder: cut_off(folder / "adapter_model.safetensors"),
    ],
)
def test_what_is_no_adapter_is_told_in_a_sentence(tmp_path: Path, spoil: Any) -> None:
    folder = adapter(tmp_path / "a")
    spoil(folder)
    with pytest.raises(NoAdapter, match="adapter"):
        read(folder)


def test_the_command_prints_every_engine_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from trainer.result import engines; sys.argv = ['x', sys.argv[1]]; "
        "code = engines.main(); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(adapter(tmp_path / "a"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line[0] != " "] == EVERYONE
    none = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert none.returncode == 3 and b"adapter_config.json" in none.stderr
