"""ChatGLM's own file of a learned prompt, both ways: what ChatGLM2 written anew computes with it is
what PEFT and the trainer compute with the adapter that it becomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm import GROUPS, HIDDEN, LAYERS, SIZE, forms, quiet, save, their_forward, weights
from peft import PeftModel
from tiny import manifest_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from trainer.model.decode import generate
from trainer.outcome import DONE
from trainer.result import export
from trainer.result.files import unpacked
from trainer.result.open import load_model, open_words
from trainer.tools.chatglm_prompt import convert
from trainer.tools.checkpoint import InvalidCheckpoint
from trainer.train import outcome_of

K, WIDTH, RATIO = 7, 2 * LAYERS * GROUPS * SIZE, 50
NAME = "transformer.prefix_encoder."
PLAIN_LORA = {"r": 16, "lora_alpha": 32}  # as where it is left out


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return forms(tmp_path_factory.mktemp("bases"), rope_ratio=RATIO)


def prefix() -> Tensor:
    return torch.randn(K, WIDTH, generator=torch.Generator().manual_seed(5))


def checkpoint_of(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """What ChatGLM's ptuning/main.py leaves."""
    folder.mkdir()
    torch.save({NAME + k: v for k, v in tensors.items()}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm", "pre_seq_len": K}))
    return folder


def exported(adapter: Path, base: Path, out: Path) -> dict[str, Any]:
    return export.export(adapter, base, out, export.ExportSettings("chatglm", "mine"))


def their_loading(folder: Path) -> Tensor:
    """The table as ptuning/web_demo.py takes it from a checkpoint."""
    found = torch.load(folder / "pytorch_model.bin", weights_only=True)
    encoder = torch.nn.Module()
    encoder.embedding = torch.nn.Embedding(K, WIDTH)
    encoder.load_state_dict({k[len(NAME) :]: v for k, v in found.items() if k.startswith(NAME)})
    return encoder.embedding.weight.detach()


def test_stock_peft_and_the_trainer_compute_what_chatglm2_computes_with_its_prefix(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    w, own, theta = weights(), prefix(), 10000.0 * RATIO
    tokens = torch.randint(3, 300, (23,), generator=torch.Generator().manual_seed(1))
    wanted, without = (their_forward(w, tokens, theta, p) for p in (own, None))
    greedy = tokens[:9]
    for _ in range(4):
        greedy = torch.cat([greedy, their_forward(w, greedy, theta, own)[-1:].argmax(1)])
    source = checkpoint_of(tmp_path / "theirs", {"embedding.weight": own})
    for form, base in bases.items():
        adapter = tmp_path / f"ours-{form}"
        convert(source, base, adapter, quiet)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        stock = PeftModel.from_pretrained(plain, str(adapter)).eval()
        with torch.no_grad():
            found = stock(input_ids=tokens[None], use_cache=False).logits[0]
        assert (found - wanted).abs().max() < 1e-5 < 0.1 < (wanted - without).abs().max(), form
        model = load_model(adapter, base, torch.device("cpu"))
        [answer] = generate(model, [tokens[:9].tolist()], set(), torch.device("cpu"), 4)
        assert answer.ids == greedy[9:].tolist(), form
        assert open_words(adapter, base).template.name == "chatglm2"


def test_the_way_to_peft_and_back_keeps_the_numbers(bases: dict[str, Path], tmp_path: Path) -> None:
    for name, own in {"halves": prefix().half(), "whole": prefix()}.items():
        source = checkpoint_of(tmp_path / name, {"embedding.weight": own})
        for form, base in bases.items():
            convert(source, base, tmp_path / f"{name}-{form}", quiet)
            out = tmp_path / f"{name}-{form}-back"
            told = exported(tmp_path / f"{name}-{form}", base, out)
            back = their_loading(out)
            if name == "halves":
                assert torch.equal(back.half(), own)
            parts = [x.view(K, LAYERS, 2, GROUPS, SIZE) for x in (back, own.float())]
            assert torch.equal(*(x[:, :, 1] for x in parts)), "values"
            assert torch.equal(*(x[:, :, 0, :, SIZE // 2 :] for x in parts)), "what is not turned"
            assert (back - own).abs().max() < 5e-7 * own.abs().max()
            assert json.loads((out / "config.json").read_text())["pre_seq_len"] == K
            assert f"--ptuning_checkpoint {out} --pre_seq_len {K}" in told["commands"][0]


def test_a_job_goes_on_from_a_prefix_of_chatglm(
    bases: dict[str, Path], run_folder: Callable[..., Path], tmp_path: Path
) -> None:
    own = prefix()
    source = checkpoint_of(tmp_path / "theirs", {"embedding.weight": own})
    convert(source, bases["qwen2"], tmp_path / "ours", quiet)
    job = run_folder(
        data=[{"instruction": "hi", "output": "phi"}],
        model=bases["qwen2"],
        start=tmp_path / "ours",
        lora=PLAIN_LORA,
        prompt_learning={"num_virtual_tokens": K},
        training={"method": "p_tuning_v2", "learning_rate": 1e-9, "max_steps": 1},
    )
    end = outcome_of(job)
    assert end.code == DONE, end.error
    chain = manifest_of(job)["chain"]["links"]
    assert [(link["run_id"], link["how"]) for link in chain] == [
        ("ours", "new"),
        ("test-run", "continue"),
    ]
    with unpacked(job.parent / "result/adapter.zip") as made:
        exported(made, bases["qwen2"], tmp_path / "back")
    assert (their_loading(tmp_path / "back") - own).abs().max() < 1e-5


def test_a_prefix_that_a_network_makes_is_what_the_network_gives(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(2)
    network = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, WIDTH)
    )
    table = prefix()
    parts = {f"trans.{name}": tensor.detach() for name, tensor in network.state_dict().items()}
    source = checkpoint_of(tmp_path / "theirs", {"embedding.weight": table} | parts)
    convert(source, bases["glm"], tmp_path / "ours", quiet)
    exported(tmp_path / "ours", bases["glm"], tmp_path / "back")
    with torch.no_grad():
        made = network(table)
    assert (their_loading(tmp_path / "back") - made).abs().max() < 1e-6


def test_what_is_no_prefix_of_this_base_is_refused_in_words(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    def refused(tensors: dict[str, Tensor], name: str, base: Path = bases["qwen2"]) -> str:
        source = checkpoint_of(tmp_path / name, tensors)
        with pytest.raises(InvalidCheckpoint) as caught:
            convert(source, base, tmp_path / f"{name}-out", quiet)
        assert not (tmp_path / f"{name}-out").exists()
        return str(caught.value)

    narrow = {"embedding.weight": prefix()[:, 2:].contiguous()}
    assert "belongs to another base" in refused(narrow, "narrow")
    assert "it holds trans.0.bias" in refused({"trans.0.bias": torch.zeros(3)}, "half")
    odd = save(tmp_path / "original", weights())
    assert "chatglm" in refused({"embedding.weight": prefix()}, "original-base", odd)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(export.ExportError, match="it is LORA: ChatGLM's own file is of a prefix"):
        exported(tmp_path / "lora", bases["glm"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
