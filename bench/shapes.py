"""The sizes of the models that are measured, as their config.json has them."""

from __future__ import annotations

from typing import Any

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-7b": ("llama", {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}),
    "llama-70b": ("llama", {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}),
    "qwen3-8b": ("qwen3", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936}),
    "qwen3-4b": ("qwen3", {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
        "tie_word_embeddings": True}),
    "tiny": ("qwen3", {  # to try a bench on a CPU
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4000}),
    "qwen2.5-7b": ("qwen2", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}),
    "gemma-3-4b": ("gemma3_text", {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "head_dim": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208,
        "sliding_window": 1024, "query_pre_attn_scalar": 256, "tie_word_embeddings": True}),
    "glm-4-9b": ("glm4", {
        "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 2, "vocab_size": 151552,
        "attention_bias": True}),
    "phi-4": ("phi3", {
        "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None}),
    "gemma-4-12b": ("gemma4_text", {
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "head_dim": 256,
        "global_head_dim": 512, "num_attention_heads": 16, "num_key_value_heads": 8,
        "vocab_size": 262144, "sliding_window": 1024, "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True, "num_global_key_value_heads": 4,
        "num_kv_shared_layers": 0, "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True}),
    "qwen3-30b-a3b": ("qwen3_moe", {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "head_dim": 128, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 151936, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1}),
    "qwen3.5-9b": ("qwen3_5_text", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "head_dim": 256,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 248320,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32}),
    "qwen3.5-35b-a3b": ("qwen3_5_moe_text", {
        "hidden_size": 2048, "num_hidden_layers": 40, "head_dim": 256,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 248320,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 256,
        "num_experts_per_tok": 8, "linear_num_key_heads": 16, "linear_num_value_heads": 32}),
    "tiny-delta": ("qwen3_5_text", {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4000,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32}),
    "gpt-oss-20b": ("gpt_oss", {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 201088,
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128}),
}  # fmt: skip
