"""Sums of adapters, against the deltas that stock PEFT computes of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from results import write_result
from safetensors.torch import load_file, save_file
from tiny import write_model
from transformers import AutoModelForCausalLM

from trainer.result import combine
from trainer.result.engines import loads_in
from trainer.result.files import read

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 9},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "fewer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    write_model(root / "base", "gqa")
    kinds = {
        n: write_result(root / n, root / "base", seed=i, **KINDS[n]) for i, n in enumerate(KINDS)
    }
    return {"base": root / "base", **kinds}


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What stock PEFT adds to each weight."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, str(adapter))
    return {
        name: module.get_delta_weight("default")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def mixed(made: dict[str, Path], out: Path, rank: int | None = None, **weights: float) -> Any:
    adapters = [combine.open_adapter(n, w, made[n]) for n, w in weights.items()]
    return combine.combine(adapters, out, rank)


@pytest.mark.parametrize("other", ["rslora", "patterns", "fewer"])
def test_the_sum_is_what_peft_adds_for_each(
    made: dict[str, Path], tmp_path: Path, other: str
) -> None:
    told = mixed(made, tmp_path / "mix", plain=1.0, **{other: -0.5})
    first, second = deltas(made["base"], made["plain"]), deltas(made["base"], made[other])
    found = deltas(made["base"], tmp_path / "mix")
    for name, value in found.items():
        wanted = first[name] - 0.5 * second.get(name, torch.zeros(()))
        assert torch.allclose(value, wanted, atol=1e-5 * float(wanted.abs().max())), name
    assert set(found) == set(first) | set(second) and not told["lost"]
    assert all(e.loads for e in loads_in(*read(tmp_path / "mix"), "llama") if e.name != "Ollama")


def test_a_cut_sum_is_the_nearest_and_its_loss_is_told(
    made: dict[str, Path], tmp_path: Path
) -> None:
    mixed(made, tmp_path / "whole", plain=1.0, rslora=1.0)
    told = mixed(made, tmp_path / "cut", 5, plain=1.0, rslora=1.0)
    whole, cut = deltas(made["base"], tmp_path / "whole"), deltas(made["base"], tmp_path / "cut")
    for name, value in whole.items():
        _, values, _ = torch.linalg.svd(value.double())
        lost = float(values[5:].norm() / values.norm())
        assert float((cut[name] - value).norm() / value.norm()) == pytest.approx(lost, rel=1e-3)
        assert told["lost"][name] == pytest.approx(lost, rel=1e-3)
    assert json.loads((tmp_path / "cut/adapter_config.json").read_text())["r"] == 5
    assert "% lost" in (tmp_path / "cut/README.md").read_text()


def test_one_adapter_twice_at_half_weight_is_itself(made: dict[str, Path], tmp_path: Path) -> None:
    halves = [combine.open_adapter("a", 0.5, made["rslora"]) for _ in range(2)]
    combine.combine(halves, tmp_path / "mix")
    right, found = (deltas(made["base"], p) for p in (made["rslora"], tmp_path / "mix"))
    assert all(torch.allclose(found[n], right[n], atol=1e-6) for n in right)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use_dora": True}, "it is a DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"task_type": "SEQ_CLS"}, "no language model's"),
        ({"init_lora_weights": "pissa"}, "pissa changed"),
        ({"trainable_token_indices": [1]}, "single rows"),
        ({"use_superlora": True}, "PEFT 0.21 does not know"),
        ({"alora_invocation_tokens": [1]}, "another kind of LoRA"),
        ({"base_model_name_or_path": "other/base"}, "differ in base_model"),
    ],
)
def test_what_is_no_sum_is_refused_in_words(
    made: dict[str, Path], tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in made["plain"].iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "adapter_config.json").read_text()) | changes
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(combine.NoSum, match=why):
        mixed({**made, "other": other}, tmp_path / "mix", plain=1.0, other=1.0)
    assert not (tmp_path / "mix").exists()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda name, tensor: (name.replace("layers", "vision"), tensor), "reads images"),
        (lambda name, tensor: (name, tensor * float("nan")), "not finite"),
        (lambda name, tensor: (name, tensor.to(torch.int8)), "whole numbers"),
        (lambda name, tensor: (name, tensor[:1] if "lora_A" in name else tensor), "no one rank"),
    ],
)
def test_factors_that_are_none_of_a_language_model_are_refused(
    made: dict[str, Path], tmp_path: Path, spoil: Any, why: str
) -> None:
    shutil.copytree(made["plain"], tmp_path / "other")
    path = tmp_path / "other" / "adapter_model.safetensors"
    save_file(dict(spoil(n, t) for n, t in load_file(path).items()), path)
    with pytest.raises(combine.NoSum, match=why):
        mixed({**made, "other": tmp_path / "other"}, tmp_path / "mix", plain=1.0, other=1.0)


def test_another_template_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    other = write_result(tmp_path / "other", made["base"], template="vicuna")
    with pytest.raises(combine.NoSum, match="different templates"):
        mixed({**made, "other": other}, tmp_path / "mix", plain=1.0, other=1.0)


def test_the_command_writes_an_archive_or_says_why_not(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{made['plain']}=1.0", f"{made['rslora']}=0.5", "--out", str(tmp_path / "mix.zip")]
    assert combine.main(words) == 0
    assert "rank 13" in (said := capsys.readouterr().out) and "The sum is exact" in said
    assert read(tmp_path / "mix.zip")[0]["lora_alpha"] == 13
    for wrong, why in (
        (words, "exists"),
        ([words[0], *words[2:]], "exists"),
        ([words[0], "--out", str(tmp_path / "x.zip")], "two adapters or more"),
        ([words[0], f"{made['plain']}=much", *words[2:]], "with a number"),
        ([*words[:3], str(tmp_path / "y.zip"), "--rank", "13"], "the exact sum has rank 13"),
    ):
        assert combine.main(wrong) == 3
        assert why in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mix.zip"]
