"""Tiny random models of the architectures that people fine-tune: two to four layers, 32 wide, a
window of 16 tokens where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WINDOW = 16
_COMMON = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}
_FOUR = {"num_hidden_layers": 4, "head_dim": 8}
_W = {"sliding_window": WINDOW}
_TWO_KINDS = {**_W, "layer_types": ["sliding_attention", "full_attention"]}
_FOUR_KINDS = {**_FOUR, **_W, "layer_types": ["sliding_attention", "full_attention"] * 2}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 32}
_ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}

# the fifteen that are downloaded most (families-field-notes), by the first name each
MOST_USED = (
    *("qwen3", "qwen2", "llama", "qwen3_5", "gemma4", "qwen3_5_moe", "gpt_oss", "qwen3_moe"),
    *("gemma3", "mistral_window", "phi3_window", "glm4", "gemma2", "olmo3", "nemotron_h"),
)


def _c(*more: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**_COMMON, **{k: v for part in more for k, v in part.items()}, **settings}


# name -> (model type, settings)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _c(head_dim=8, rope_parameters={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        **_ROPE})),
    "llama_tied": ("llama", _c(tie_word_embeddings=True)),
    "llama_biases": ("llama", _c(attention_bias=True)),
    "qwen2": ("qwen2", _c()),
    "qwen2_window": ("qwen2", _c(_W, use_sliding_window=True, max_window_layers=1)),
    "qwen3": ("qwen3", _c(head_dim=8)),
    "qwen3_moe": ("qwen3_moe", _c(_EXPERTS, head_dim=8, decoder_sparse_step=1)),
    "qwen2_moe": ("qwen2_moe", _c(_EXPERTS, _SHARED_EXPERT)),
    "qwen3_next": ("qwen3_next", _c(_DELTA, _EXPERTS, _SHARED_EXPERT)),
    "qwen3_5": ("qwen3_5_text", _c(_DELTA)),
    "qwen3_5_moe": ("qwen3_5_moe_text", _c(_DELTA, _EXPERTS, _SHARED_EXPERT)),
    "gemma": ("gemma", _c(head_dim=8)),
    "gemma2": ("gemma2", _c(_W, head_dim=8, query_pre_attn_scalar=8,
                            attn_logit_softcapping=5.0, final_logit_softcapping=10.0)),
    "gemma3": ("gemma3_text", _c(_FOUR, _W, query_pre_attn_scalar=8, sliding_window_pattern=2)),
    "gemma3n": ("gemma3n_text", _c(
        _FOUR_KINDS, hidden_size_per_layer_input=8, vocab_size_per_layer_input=320,
        num_kv_shared_layers=0, altup_num_inputs=2, laurel_rank=4, intermediate_size=[64] * 4,
        activation_sparsity_pattern=[0.0] * 4)),
    "gemma4": ("gemma4_text", _c(_FOUR_KINDS, global_head_dim=8, hidden_size_per_layer_input=0,
                                 num_kv_shared_layers=0, final_logit_softcapping=10.0)),
    "vaultgemma": ("vaultgemma", _c(_TWO_KINDS, head_dim=8, query_pre_attn_scalar=8,
                                    attn_logit_softcapping=5.0)),
    "mistral_window": ("mistral", _c(_W)),
    "mistral": ("mistral", _c(sliding_window=None)),
    "ministral": ("ministral", _c(_TWO_KINDS, head_dim=8)),
    "ministral3": ("ministral3", _c(rope_parameters={
        "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, **_ROPE})),
    "mixtral": ("mixtral", _c(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "phi3": ("phi3", _c(sliding_window=None)),
    "phi3_window": ("phi3", _c(_W)),
    "phi": ("phi", _c()),
    "phimoe": ("phimoe", _c(num_local_experts=4, num_experts_per_tok=2)),
    "glm": ("glm", _c(head_dim=8)),
    "glm4": ("glm4", _c(head_dim=8)),
    "glm4_moe": ("glm4_moe", _c(_ROUTED, head_dim=8, use_qk_norm=True)),
    "glm4_moe_lite": ("glm4_moe_lite", _c(_LATENT, _ROUTED)),
    "gpt_oss": ("gpt_oss", _c(_TWO_KINDS, head_dim=8, num_local_experts=4,
                              num_experts_per_tok=2)),
    "deepseek_v2": ("deepseek_v2", _c(_LATENT, _ROUTED)),
    "deepseek_v3": ("deepseek_v3", _c(_LATENT, _ROUTED)),
    "minicpm3": ("minicpm3", _c(_LATENT)),
    "olmo": ("olmo", _c()),
    "olmo2": ("olmo2", _c()),
    "olmo3": ("olmo3", _c(_TWO_KINDS)),
    "olmoe": ("olmoe", _c(num_experts=4, num_experts_per_tok=2)),
    "smollm3": ("smollm3", _c(_FOUR, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0])),
    "granite": ("granite", _c(_MULTIPLIERS)),
    "granitemoe": ("granitemoe", _c(_MULTIPLIERS, num_local_experts=4, num_experts_per_tok=2)),
    "granitemoehybrid": ("granitemoehybrid", _c(
        layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        mamba_expand=2, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32)),
    "falcon": ("falcon", {
        "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "alibi": False, "new_decoder_architecture": False, "multi_query": True}),
    "falcon_h1": ("falcon_h1", _c(head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
                                  mamba_d_state=8, mamba_n_groups=1)),
    "nemotron_h": ("nemotron_h", _c(
        _FOUR, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32, mamba_num_heads=4, mamba_head_dim=16,
        ssm_state_size=8, n_groups=1, layers_block_type=["mamba", "moe", "attention", "mlp"])),
    "gpt2": ("gpt2", dict(_GPT)),
    "gpt_bigcode": ("gpt_bigcode", dict(_GPT)),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 8}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 8, "n_ctx": 512}),
    "gpt_neox": ("gpt_neox", _c()),
    "opt": ("opt", {
        "vocab_size": 320, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"vocab_size": 320, "d_model": 32, "n_heads": 4, "n_layers": 2,
                    "max_seq_len": 512}),
    "cohere": ("cohere", _c(logit_scale=0.25)),
    "cohere2": ("cohere2", _c(_FOUR, _W, logit_scale=0.25,
                              layer_types=["sliding_attention"] * 3 + ["full_attention"])),
    "starcoder2": ("starcoder2", _c(_W)),
    "stablelm": ("stablelm", _c()),
    "persimmon": ("persimmon", _c()),
    "exaone4": ("exaone4", _c(_FOUR, _W, sliding_window_pattern=4)),
    "hunyuan": ("hunyuan_v1_dense", _c(head_dim=8)),
    "ernie4_5": ("ernie4_5", _c(head_dim=8)),
    "ernie4_5_moe": ("ernie4_5_moe", _c(moe_num_experts=4, moe_k=2, moe_intermediate_size=32)),
    "seed_oss": ("seed_oss", _c(head_dim=8)),
    "hyperclovax": ("hyperclovax", _c(_MULTIPLIERS)),
    "lfm2": ("lfm2", _c(layer_types=["conv", "full_attention"], block_ff_dim=64)),
    "mamba2": ("mamba2", {
        "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4,
        "head_dim": 16, "state_size": 8, "n_groups": 1}),
    "nemotron": ("nemotron", _c(head_dim=8)),
    "llama4": ("llama4_text", _c(
        _FOUR, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, attention_chunk_size=WINDOW, no_rope_layers=[1, 1, 1, 0],
        attn_temperature_tuning=True, floor_scale=8, attn_scale=0.1)),
    "apertus": ("apertus", _c()),
    "arcee": ("arcee", _c()),
    "bitnet": ("bitnet", _c()),
    "helium": ("helium", _c(head_dim=8)),
    "minimax_m2": ("minimax_m2", _c(head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    "dots1": ("dots1", _c(_ROUTED, head_dim=8)),
    "afmoe": ("afmoe", _c(_FOUR_KINDS, _EXPERTS, num_dense_layers=1)),
    "nanochat": ("nanochat", _c(head_dim=8)),
}  # fmt: skip


def config(name: str) -> Any:
    """transformers' configuration, without dropout."""
    from transformers import AutoConfig

    kind, settings = ARCHITECTURES[name]
    made = AutoConfig.for_model(kind, **settings)
    for key in (
        *("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"),
        *("dropout", "activation_dropout"),
    ):
        if getattr(made, key, None):
            setattr(made, key, 0.0)
    return made


def build(name: str, attention: str = "eager") -> Any:
    """A random model in fp32, the same values at each call; its weights are large enough that
    attention is not uniform."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    settings = config(name)
    try:
        model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
    except ValueError:  # a class without eager attention
        model = AutoModelForCausalLM.from_config(settings)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "sinks" in key:
                p.normal_(1.0, 1.0, generator=g)
            elif p.ndim >= 2:
                p.normal_(0.0, 0.7 if "conv" in key else 0.15, generator=g)
            elif "A_log" not in key and "dt" not in key:
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return model.eval()


def folder_of(name: str, root: Path) -> Path:
    """`build`'s model in the folder `root`, with a tokenizer."""
    from tiny import write_tokenizer

    build(name).save_pretrained(root)
    write_tokenizer(root)
    return root
