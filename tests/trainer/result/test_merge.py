"""Merged models: the same as base + adapter for stock transformers, and every wrong one refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import write_tokenizer
from transformers import AutoModelForCausalLM

from trainer.result import certificate
from trainer.result.adapter import identity
from trainer.result.certificate import NotCertified, certify
from trainer.result.held import round_base
from trainer.result.merge import certified_merge, main, merge
from trainer.result.merge_plan import MergeError

EXPERTS = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
LINEAR = {"target_modules": "all-linear"}
CONV = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, LINEAR) for name in ("llama", "gpt2", "qwen2", "qwen3", "gemma2", "gemma3")},
    **{name: (name, LINEAR) for name in ("glm4", "phi3_window", "mistral_window")},
    "mixture": ("qwen3_moe", EXPERTS),
    "fused mixture": ("gpt_oss", EXPERTS),
    "dora": ("llama", LINEAR | {"use_dora": True}),
    "rslora": ("llama", LINEAR | {"use_rslora": True}),
    "ranks": ("llama", LINEAR | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding": ("gemma2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied head": ("gemma2", {"target_modules": ["q_proj", "lm_head"]}),
    "tied under other names": ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    "tied head under other names": ("gpt2", CONV | {"modules_to_save": ["lm_head"]}),
    "dora of a transposed weight": ("gpt2", CONV | {"use_dora": True}),
    "dora of an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved experts": ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
}
pytestmark = [  # what PEFT says of embeddings when it saves them
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning"),
]
IDS = torch.arange(3, 27).reshape(2, 12) * 7 % 300


def made(folder: Path, kind: str, seed: int = 0, **lora: Any) -> tuple[Path, Path]:
    """A base and an adapter that does something, each in a folder."""
    torch.manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    architectures.build(kind).save_pretrained(base)
    write_tokenizer(base)
    torch.manual_seed(seed + 1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, **lora)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(adapter)
    return base, adapter


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return torch.Tensor(model.eval()(IDS).logits)


@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_computes_base_and_adapter_from_the_written_files(
    tmp_path: Path, case: str
) -> None:
    kind, lora = CASES[case]
    base, adapter = made(tmp_path, kind, **lora)
    certificate = certified_merge(adapter, base, tmp_path / "out", "fp32", [], "cpu")
    right, found, plain = logits(base, adapter), logits(tmp_path / "out"), logits(base)
    assert (right - found).abs().max() < 1e-5 < 0.05 < (right - plain).abs().max()
    numbers = certificate["numbers"]
    assert numbers["kl_nats"] < 1e-6 < numbers["effect_nats"] and numbers["same_top_token"] > 0.99
    assert json.loads((tmp_path / "out" / "certificate.json").read_text()) == certificate


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_certified_with_what_it_loses(tmp_path: Path, dtype: str) -> None:
    base, adapter = made(tmp_path, "llama", **LINEAR)
    numbers = certified_merge(adapter, base, tmp_path / "out", dtype, ["a text"], "cpu")["numbers"]
    assert 0 < numbers["kl_nats"] < 2 * numbers["bf16_noise_nats"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] in (
        "bfloat16",
        "float16",
    )


def _tensors(change: Callable[[dict[str, torch.Tensor], Path, Path], None]) -> Any:
    def spoil(out: Path, base: Path, adapter: Path) -> None:
        path = out / "model.safetensors"
        held = load_file(path)
        change(held, base, adapter)
        save_file(held, path, metadata={"format": "pt"})

    return spoil


def _delta(held: dict[str, torch.Tensor], base: Path, share: float) -> None:
    for name, value in load_file(base / "model.safetensors").items():
        held[name] = value + share * (held[name] - value)


def _one_layer(held: dict[str, torch.Tensor], base: Path, _: Path) -> None:
    own = load_file(base / "model.safetensors")
    held.update({n: t for n, t in own.items() if n.startswith("model.layers.1.self_attn")})


def _swap(held: dict[str, torch.Tensor], *_: Path) -> None:
    q, v = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    held[q], held[v] = held[v], held[q]


def _tie(held: dict[str, torch.Tensor], *_: Path) -> None:
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()


def _transpose(held: dict[str, torch.Tensor], *_: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    held[name] = held[name].T.contiguous()


def _nan(held: dict[str, torch.Tensor], *_: Path) -> None:
    held["model.norm.weight"][0] = float("nan")


def _other_base(held: dict[str, torch.Tensor], base: Path, _: Path) -> None:
    torch.manual_seed(9)
    for value in held.values():
        value += 0.02 * torch.randn_like(value)


def _rounded(held: dict[str, torch.Tensor], *_: Path) -> None:
    for name, value in held.items():
        held[name] = (value * 16).round() / 16


def _tokenizer(out: Path, *_: Path) -> None:
    path = out / "tokenizer.json"
    told = json.loads(path.read_text())
    words = told["model"]["vocab"]
    first, second = [word for word in words if len(word) == 1][:2]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(told))


FAULTS = {
    "the adapter added twice": _tensors(lambda held, base, _: _delta(held, base, 2)),
    "the adapter not added": _tensors(lambda held, base, _: _delta(held, base, 0)),
    "a wrong scale": _tensors(lambda held, base, _: _delta(held, base, 0.5)),
    "the root of r forgotten": _tensors(lambda held, base, _: _delta(held, base, 4**-0.5)),
    "the sign turned": _tensors(lambda held, base, _: _delta(held, base, -1)),
    "one layer's attention missed": _tensors(_one_layer),
    "two matrices exchanged": _tensors(_swap),
    "the head tied to the embedding": _tensors(_tie),
    "a matrix transposed": _tensors(_transpose),
    "a number that is none": _tensors(_nan),
    "another revision of the base": _tensors(_other_base),
    "weights rounded to sixteenths": _tensors(_rounded),
    "another tokenizer": _tokenizer,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_merge_gets_no_certificate(tmp_path: Path, fault: str) -> None:
    base, adapter = made(tmp_path, "llama", **LINEAR)
    merge(adapter, base, tmp_path / "out", "fp32")
    certify(adapter, base, tmp_path / "out")
    FAULTS[fault](tmp_path / "out", base, adapter)
    with pytest.raises(NotCertified):
        certify(adapter, base, tmp_path / "out")


def test_a_certificate_holds_one_model_at_a_time_and_says_the_same_in_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = made(tmp_path, "llama", **LINEAR)
    merge(adapter, base, tmp_path / "out", "bf16")
    at_once = certify(adapter, base, tmp_path / "out")
    models: list[Any] = []
    opened: Any = certificate._open

    def watched(folder: Path, device: str) -> Any:
        assert not any(p.numel() for m in models for p in m.parameters()), "another is in memory"
        models.append(opened(folder, device))
        return models[-1]

    monkeypatch.setattr(certificate, "_open", watched)
    said = 4 * 320 * at_once["tokens"]  # bytes, in fp32
    monkeypatch.setattr(certificate, "ROUND_BYTES", said // 2)
    in_rounds = certify(adapter, base, tmp_path / "out")
    assert 4 <= len(models) <= 8 and in_rounds == at_once


@pytest.mark.parametrize("precision", ["nf4", "int8", "fp8"])
def test_a_certificate_tells_how_far_the_files_are_from_what_was_trained(
    tmp_path: Path, precision: str
) -> None:
    base, adapter = made(tmp_path, "llama", **LINEAR)
    told = certified_merge(adapter, base, tmp_path / "out", "fp32", [], "cpu", precision=precision)
    numbers = told["numbers"]
    assert numbers["trained_in"] == precision and numbers["kl_nats"] < 1e-6
    assert 10 * numbers["kl_nats"] < numbers["trained_kl_nats"] < numbers["effect_nats"]
    assert f"held the base in {precision}" in certificate.certificate_text(tmp_path, told)
    assert "trained_in" not in certify(adapter, base, tmp_path / "out", precision="bf16")


@pytest.mark.parametrize(
    ("kind", "lora"), [("llama", LINEAR), ("gpt2", LINEAR), ("qwen3_moe", EXPERTS)]
)
def test_a_base_in_int8_is_rounded_where_bitsandbytes_rounds(
    tmp_path: Path, kind: str, lora: dict[str, Any]
) -> None:
    base, adapter = made(tmp_path, kind, **lora)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = round_base(model, "int8")
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert rounded >= len(changed) > 0
    assert all("layers." in name or ".h." in name for name in changed), changed
    assert not any(word in name for name in changed for word in ("lora", "norm", "gate.weight"))
    weight = next(iter(changed))
    assert (model.state_dict()[weight] - before[weight]).abs().max() < before[
        weight
    ].abs().max() / 200


def test_a_merge_stands_under_its_name_once_it_is_certified(tmp_path: Path) -> None:
    """Who is killed before that can ask for the same folder again."""
    base, adapter = made(tmp_path, "llama", **LINEAR)
    out, heard = tmp_path / "out", []

    def tell(line: str) -> None:
        heard.append(line)
        assert not out.exists()
        if len(heard) == 2:
            assert line.startswith("certificate")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certified_merge(adapter, base, out, "fp32", [], "cpu", tell)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    certified_merge(adapter, base, out, "fp32", [], "cpu", tell)
    assert (out / "certificate.json").is_file() and len(heard) > 4


def test_an_adapter_that_does_nothing_is_no_merge(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "llama", **LINEAR)
    path = adapter / "adapter_model.safetensors"
    save_file({k: 0 * v if "lora_B" in k else v for k, v in load_file(path).items()}, path)
    with pytest.raises(NotCertified, match="changes nothing"):
        certified_merge(adapter, base, tmp_path / "out", "fp32", [], "cpu")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.refused").is_dir()


def test_a_model_in_several_files_keeps_its_files(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "llama", **LINEAR)
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="60KB")
    merge(adapter, base, tmp_path / "out", "fp32")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors*"))
    assert files == sorted(p.name for p in base.glob("*.safetensors*")) and len(files) > 2
    assert (logits(base, adapter) - logits(tmp_path / "out")).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda base, adapter: shutil.rmtree(base) or base.mkdir(), "has no weights"),
        (lambda base, adapter: _settings(adapter, peft_type="IA3"), "peft_type"),
        (lambda base, adapter: _settings(adapter, init_lora_weights="pissa"), "pissa changed"),
        (lambda base, adapter: _settings(adapter, alora_invocation_tokens=[3]), "another kind"),
        (lambda base, adapter: _settings(adapter, lora_bias=True), "biases are trained"),
        (lambda base, adapter: _settings(adapter, use_superlora=True), "does not know"),
        (lambda base, adapter: _settings(adapter, r=5), "another rank"),
        (lambda base, adapter: _spoil(adapter, float("nan")), "not finite"),
        (lambda base, adapter: _settings(adapter, target_modules=["q_proj"]), "belongs to no"),
        (lambda base, adapter: _narrow(base), "another base"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_words(
    tmp_path: Path, spoil: Callable[[Path, Path], object], why: str
) -> None:
    base, adapter = made(tmp_path, "llama", **LINEAR)
    spoil(base, adapter)
    with pytest.raises((MergeError, ValueError), match=why):
        merge(adapter, base, tmp_path / "out", "fp32")
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def _spoil(adapter: Path, value: float) -> None:
    path = adapter / "adapter_model.safetensors"
    held = load_file(path)
    save_file({name: tensor * value for name, tensor in held.items()}, path)


def test_a_base_that_is_not_the_trained_one_is_refused(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "llama", **LINEAR)
    told = {"base": "org/base", "base_sha256": identity(base), "template": "t"}
    (adapter / "chain.json").write_text(json.dumps(told))
    certified_merge(adapter, base, tmp_path / "out", "fp32", [], "cpu")
    path = base / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(MergeError, match="other weights or settings than the org/base"):
        certified_merge(adapter, base, tmp_path / "again", "fp32", [], "cpu")


def test_what_a_base_holds_of_numbers_that_are_none_stays(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "llama", **LINEAR)
    path = base / "model.safetensors"
    mask = torch.tensor([0.0, float("-inf")])
    save_file(load_file(path) | {"model.mask": mask}, path, metadata={"format": "pt"})
    merge(adapter, base, tmp_path / "out", "bf16")
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["model.mask"].float(), mask
    )


@pytest.mark.parametrize("spoil", [b"", b"{}"])
def test_a_tokenizer_that_cannot_be_read_is_told_before_anything_is_merged(
    tmp_path: Path, spoil: bytes
) -> None:
    base, adapter = made(tmp_path, "llama", **LINEAR)
    (base / "tokenizer.json").write_bytes(spoil)
    with pytest.raises(ValueError, match="cannot be read"):
        certified_merge(adapter, base, tmp_path / "out", "fp32", [], "cpu")
    assert not (tmp_path / "out").exists()


def _settings(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _narrow(base: Path) -> None:
    held = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(held | {name: held[name][:8].contiguous()}, base / "model.safetensors")


def test_the_command_says_what_the_merge_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = made(tmp_path, "llama", **LINEAR)
    words = ["merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    assert main() == 0 and "certificate: passed on" in capsys.readouterr().out
    assert main() == 3 and "exists: name a new folder" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*words, "--json"])
    assert main() == 3 and "exists" in json.loads(capsys.readouterr().out)["refused"]
    monkeypatch.setattr("sys.argv", [*words[:3], str(tmp_path / "none"), *words[4:]])
    assert main() == 3 and "there is no folder" in capsys.readouterr().err


def test_a_run_folder_says_adapter_base_and_rows_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = made(tmp_path, "llama", **LINEAR)
    run = tmp_path / "run-1"
    (run / "result").mkdir(parents=True)
    base.rename(run / "model")
    job = {"run_id": "run-1", "model": {"base": "tiny", "path": "model", "precision": "bf16"}}
    data = [{"path": "data/a.json", "name": "a.json", "sha256": "0" * 64, "size_bytes": 1}]
    (run / "job.json").write_text(json.dumps(job | {"data": {"files": data}}))
    monkeypatch.setattr("sys.argv", ["merge", str(run), "--out", str(run / "merge/model")])
    assert main() == 3 and "has no finished result" in capsys.readouterr().err
    shutil.make_archive(str(run / "result/adapter"), "zip", adapter)
    (run / "result/manifest.json").write_text("{}")
    assert main() == 0 and "certificate: passed on" in capsys.readouterr().out
    told = json.loads((run / "merge/model/certificate.json").read_text())
    sizes = {name: (run / "merge/model" / name).stat().st_size for name in told["files_sha256"]}
    assert told["files_bytes"] == sizes and sizes["model.safetensors"] > 1000


def test_the_base_of_a_result_is_the_one_with_adapters_merged_into_it(tmp_path: Path) -> None:
    from trainer.result.open import base_of_result
    from trainer.wire.job import Job

    one = {"path": "adapters/a", "name": "a", "sha256": "0" * 64}
    data = {"files": [{"path": "d", "name": "d", "sha256": "0" * 64, "size_bytes": 1}]}
    model = {"base": "tiny", "path": "model", "precision": "bf16"}
    job = Job.model_validate({"run_id": "run-1", "model": model, "data": data, "merged": [one]})
    assert base_of_result(job, tmp_path) == tmp_path / "merged"
    chain = [{"name": "sft"}, {"name": "sft", "how": "merge"}]
    told = {"run_id": "run-1", "model": model, "data": data, "stages": chain}
    found = base_of_result(Job.model_validate(told), tmp_path)
    assert found.resolve() == (tmp_path / "merged-1").resolve()


def test_the_certificate_reads_the_users_rows_as_they_were_trained(tmp_path: Path) -> None:
    from trainer.data.prepare import Prepared
    from trainer.data.template import load
    from trainer.data.tokenised import Rows
    from trainer.data.tokens import open_vocabulary, stop_token, token_hash
    from trainer.result.open import texts_of
    from trainer.result.words import write_words

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tokenizer(base)
    adapter.mkdir()
    vocabulary, template = open_vocabulary(base), load("alpaca")
    asked = token_hash(vocabulary, template), stop_token(vocabulary, template)
    write_words(base, adapter, Prepared(Rows.empty(), vocabulary, template, asked[1], asked[0]))
    rows = [{"instruction": f"say {n}", "input": "", "output": f"it is {n}"} for n in range(70)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    texts = texts_of(adapter, base, tmp_path / "rows.json")
    assert len(texts) == 64 and texts[3].endswith("### Response:\nit is 3</s>")
    (tmp_path / "rows.json").write_text('[{"instruction": "q"}]')
    with pytest.raises(ValueError, match="1 defect"):
        texts_of(adapter, base, tmp_path / "rows.json")
