"""A mixture that answers with its weights in NF4: as small as the plan says, and with the tokens of
stock transformers and PEFT over the values that the quantised weights stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel
from served import write_adapter
from tiny import write_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.kernels import experts
from trainer.kernels.frozen import freeze_weight
from trainer.model.decode import generate
from trainer.model.parts import ModelError
from trainer.result.open import load_answering
from trainer.serve.models import NO_ADAPTER, open_models

pytestmark = [
    # PEFT looks among modules only, and experts are parameters
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match"),
]
CPU = torch.device("cpu")
WIDE = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
WIDE |= {"initializer_range": 0.1, "max_position_embeddings": 128}
PROMPTS = [[5, 17, 200, 31, 8], [44, 3, 9]]
NEW = 5
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases that are not zero, and values that bf16 has, in which a GPU reads them: NF4 of
    others would choose other experts."""
    kind, settings = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**settings, **WIDE})
    model = AutoModelForCausalLM.from_config(config)
    for key, p in model.named_parameters():
        if key.endswith("_bias"):
            nn.init.normal_(p, 0.0, 0.3)
    model.bfloat16().float()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def results(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("results")
    asked = {"target_modules": ATTENTION, "target_parameters": EXPERTS}
    return {
        name: write_adapter(root / name, base, seed, **asked)
        for seed, name in enumerate(["first", "second"])
    }


def experts_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if "down_proj" in m._parameters and hasattr(m, "has_gate")]


@torch.no_grad()
def stock(base: Path, precision: str) -> Any:
    """transformers' own model of the folder, in fp32, with the values of `precision` in place of
    the decoder layers' matrices."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if precision == "fp32":
        return model
    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            module.weight.copy_(freeze_weight(module.weight.data, precision).dense())
    for layer in experts_of(model):
        for name in experts.names_of(layer):
            weight = getattr(layer, name).data
            for matrix in weight.transpose(1, 2) if layer.is_transposed else weight:
                matrix.copy_(freeze_weight(matrix.contiguous(), precision).dense())
    return model


def said_by(model: Any) -> list[list[int]]:
    """Greedy answers by transformers' own loop, one prompt after the other."""
    rules = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    made = [model.generate(input_ids=torch.tensor([ids]), **rules)[0].tolist() for ids in PROMPTS]
    return [ids[-NEW:] for ids in made]


@pytest.mark.parametrize(("precision", "fast"), [("nf4", False), ("nf4", True), ("fp32", False)])
def test_a_mixture_and_its_adapters_answer_as_stock_peft_over_the_same_values(
    base: Path, results: dict[str, Path], precision: str, fast: bool
) -> None:
    models = open_models(results, base, CPU, precision=precision, fast=fast)
    judge: Any = PeftModel.from_pretrained(
        stock(base, precision), str(results["first"]), adapter_name="first"
    )
    judge.load_adapter(str(results["second"]), adapter_name="second")
    found = {}
    for name in ("second", "first", "base"):
        models.read_as(models.voices[name].adapter)
        # one by one: a step then unpacks the experts of its token alone
        made = generate(models.model, PROMPTS, {-1}, CPU, NEW, width=1)
        if name == "base":
            assert models.voices[name].adapter == NO_ADAPTER
            with judge.disable_adapter():
                wanted = said_by(judge)
        else:
            judge.set_adapter(name)
            wanted = said_by(judge)
        assert [a.ids for a in made] == wanted, name
        found[name] = str(wanted)
    assert len(set(found.values())) == 3, "each name answers otherwise"


def held_bytes(model: nn.Module) -> int:
    """Of all parameters, buffers and quantised weights."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    for module in model.modules():
        packed = [held.rows for held in experts.held_in(module).values()]
        routed = getattr(vars(module).get("forward"), "keywords", {}).get("weight")
        for weight in [*packed, *([routed] if routed is not None else [])]:
            tensors |= {id(t): t for t in vars(weight).values() if isinstance(t, torch.Tensor)}
    return sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("fast", [False, True])
def test_a_mixture_in_nf4_takes_half_a_byte_for_each_weight_of_its_layers(
    base: Path, results: dict[str, Path], fast: bool
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base)
    layers = experts_of(plain)
    inside = sum(getattr(m, n).numel() for m in layers for n in experts.names_of(m))
    linears = [m for m in plain.model.layers.modules() if type(m) is nn.Linear]
    inside += sum(m.weight.numel() for m in linears)
    rest = 4 * (plain.num_parameters() - inside)  # embeddings, norms, biases, in fp32 on a CPU
    model = load_answering(base, CPU, "nf4", fast=fast)
    codebooks = 64 * 8 * len(layers)
    assert held_bytes(model) <= 0.5625 * inside + rest + codebooks
    del model
    models = open_models(results, base, CPU, precision="nf4", fast=fast)
    adapters = 4 * sum(p.numel() for n, p in models.model.named_parameters() if "lora_" in n)
    copies = adapters if fast else 0  # of attention's adapters, padded
    assert held_bytes(models.model) <= 0.5625 * inside + rest + codebooks + adapters + copies


def test_fp8_without_a_card_that_computes_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"fp8 needs an NVIDIA GPU .* --precision nf4 or bf16"):
        load_answering(tmp_path, CPU, "fp8")


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "most"), [("nf4", 0.1), ("fp8", 0.3)])
@pytest.mark.parametrize("fast", [False, True])
def test_a_mixture_on_a_gpu_is_as_sure_of_its_tokens_as_stock_peft(
    base: Path, results: dict[str, Path], precision: str, most: float, fast: bool
) -> None:
    """By the log-probability of each first token: greedy choices may differ by a rounding."""
    models = open_models(results, base, torch.device("cuda"), precision=precision, fast=fast)
    judge: Any = PeftModel.from_pretrained(stock(base, precision), str(results["first"]))
    models.read_as(models.voices["first"].adapter)
    made = generate(models.model, PROMPTS, {-1}, torch.device("cuda"), NEW)
    for ids, answer in zip(PROMPTS, made, strict=True):
        wanted = judge(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert abs(answer.log_probs[0] - float(wanted[answer.ids[0]])) < most
