"""NEFTune's noise: of the size that its paper says, a function of row and step, none outside
training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from architectures import build
from tiny import manifest_of
from transformers import AutoConfig, DbrxConfig, DbrxForCausalLM

from trainer.model.dropout import KeyedNoise, TokenKeys
from trainer.model.load import prepare, silence_dropout
from trainer.train import run_job

Make = Callable[..., Path]
WIDTH, ALPHA = 64, 5.0


def noisy(rows: list[int], lengths: list[int], padded: bool, step: int = 0) -> list[torch.Tensor]:
    """The noise on each row's tokens, of rows side by side or one below the other."""
    keys, embedding = TokenKeys(), torch.nn.Embedding(10, WIDTH)
    positions = [torch.arange(n) for n in lengths]
    numbers = [torch.full((n,), row) for row, n in zip(rows, lengths, strict=True)]
    if padded:
        longest = max(lengths)
        at = torch.stack([torch.nn.functional.pad(p, (0, longest - len(p))) for p in positions])
        row = torch.stack(
            [torch.nn.functional.pad(n, (0, longest - len(n)), value=int(n[0])) for n in numbers]
        )
    else:
        at, row = torch.cat(positions)[None], torch.cat(numbers)[None]
    keys.set(42, step, row, at)
    embedding.weight.data.zero_()
    embedding.register_forward_hook(KeyedNoise(ALPHA, keys))
    made = embedding.train()(torch.zeros_like(at)).detach()
    assert not embedding.eval()(torch.zeros_like(at)).any()
    if padded:
        return [made[i, :n] for i, n in enumerate(lengths)]
    return list(made[0].split(lengths))


def test_noise_is_uniform_within_alpha_over_the_root_of_tokens_times_width() -> None:
    for row, tokens in zip(noisy([3, 9], [400, 100], False), (400, 100), strict=True):
        bound = ALPHA / (tokens * WIDTH) ** 0.5
        assert row.abs().max() <= bound and row.abs().max() > 0.99 * bound
        assert abs(float(row.std()) / (bound / 3**0.5) - 1) < 0.02
        assert abs(float(row.mean())) < 0.02 * bound


def test_a_rows_noise_is_the_same_packed_and_padded_and_another_in_the_next_step() -> None:
    packed, padded = noisy([3, 9], [40, 17], False), noisy([3, 9], [40, 17], True)
    for a, b in zip(packed, padded, strict=True):
        assert torch.equal(a, b)
    later = noisy([3, 9], [40, 17], False, step=1)
    assert not torch.equal(packed[0], later[0])
    assert not torch.equal(packed[0][:17], packed[1])


def test_a_router_that_draws_in_training_chooses_as_at_inference() -> None:
    """PhiMoE's: training on a draw depends on the order of rows."""
    model, ids = build("phimoe"), torch.arange(3, 40)[None] * 7 % 300
    for module in model.modules():
        if hasattr(module, "router_jitter_noise"):
            module.router_jitter_noise = 0.5  # the draw is among experts that are nearly as good

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return torch.Tensor(model(input_ids=ids, use_cache=False).logits)

    want = logits()
    model.train()
    assert not torch.equal(logits(), want)
    assert prepare(model)["router"] == "as at inference"
    model.train()
    assert torch.equal(logits(), want)


def test_the_base_models_own_noise_is_off() -> None:
    """Mixtral's and MiniMax's; PhiMoE's router has a threshold of this name, which stays."""
    told = {"router_jitter_noise": 0.1, "input_jitter_noise": 0.1, "layerdrop": 0.1}
    for kind, kept in (("mixtral", 0.0), ("phimoe", 0.1)):
        config = AutoConfig.for_model(kind, **told)
        silence_dropout(config)
        assert (config.router_jitter_noise, config.layerdrop) == (kept, 0.0)
        assert config.input_jitter_noise == 0.0
    whole = AutoConfig.for_model("mpt")  # refuses a fraction in attn_config.attn_pdrop
    silence_dropout(whole)
    assert whole.attn_config.attn_pdrop == 0


def test_the_noise_of_dbrx_which_stands_in_a_config_of_its_own_is_off() -> None:
    attention = {"attn_pdrop": 0.5, "kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 1e4}
    experts = {"moe_jitter_eps": 0.5, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 50, "max_seq_len": 64}
    config = DbrxConfig(**sizes, attn_config=attention, ffn_config=experts, resid_pdrop=0.5)
    silence_dropout(config)
    model, ids = DbrxForCausalLM(config), torch.arange(3, 40)[None]
    generator = torch.get_rng_state()
    with torch.no_grad():
        drawn = model.train()(input_ids=ids, use_cache=False).logits
        assert torch.equal(torch.get_rng_state(), generator), "something was drawn"
        assert torch.equal(drawn, model.eval()(input_ids=ids, use_cache=False).logits)


def test_no_dropout_of_a_causal_model_is_left() -> None:
    """Seed-OSS drops a tenth of each layer's output, under a name of its own."""
    told = AutoConfig.for_model("seed_oss")
    assert told.residual_dropout > 0
    for kind in ("seed_oss", "phi", "gpt2", "opt", "bloom", "falcon", "stablelm", "bert"):
        config = AutoConfig.for_model(kind)
        silence_dropout(config)
        left = {k: v for k, v in config.to_dict().items() if "dropout" in k or "pdrop" in k}
        assert not any(v for v in left.values() if type(v) is float), kind


def test_a_run_with_noise_says_so_and_ends_elsewhere(run_folder: Make) -> None:
    ends = []
    for alpha in (None, ALPHA):
        path = run_folder(training={"neftune_noise_alpha": alpha, "max_steps": 2})
        assert run_job(path) == 0
        manifest = manifest_of(path)
        ends.append(manifest["final_loss"])
        assert ("noise" in manifest["kernels"]) == (alpha is not None)
    assert ends[0] != ends[1]
