"""Tiny random models of every architecture the engine is claimed for, with their parts named by hand."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig


VOCAB = 512
IDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
SHAPE: dict[str, Any] = IDS | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# Windows shorter than the prompts, so that the sliding mask matters; two kinds of layers take turns.
WINDOW = {"sliding_window": 6}
TURNS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SHAPE),
    "gpt2": ("GPT2", IDS | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "mistral": ("Mistral", SHAPE | WINDOW),
    "qwen2": ("Qwen2", SHAPE | WINDOW | TURNS | {"use_sliding_window": True}),
    "qwen3": ("Qwen3", SHAPE | {"head_dim": 16}),
    "gemma2": ("Gemma2", SHAPE | WINDOW | TURNS | {"head_dim": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", SHAPE | WINDOW | TURNS | {"head_dim": 16}),
    "phi3": ("Phi3", SHAPE),
    "olmo2": ("Olmo2", SHAPE),
    "gpt_neox": ("GPTNeoX", SHAPE | {"rotary_pct": 0.25}),
    "starcoder2": ("Starcoder2", SHAPE | WINDOW),
    "mixtral": ("Mixtral", SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
_SMALL: dict[str, Any] = IDS | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_OPT: dict[str, Any] = _SMALL | {"word_embed_proj_dim": 32, "ffn_dim": 64, "init_std": 0.3}
SPLIT_MLPS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPT", _OPT),
    "opt_post_norm": ("OPT", _OPT | {"do_layer_norm_before": False}),
    "biogpt": ("BioGpt", _SMALL | {"intermediate_size": 64}),
}
"""Their layers hold the MLP's two matrices, and no module around them."""
_HEAD = {"head_dim": 8}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
VERIFIED: dict[str, tuple[str, dict[str, Any]]] = SPLIT_MLPS | {
    "granite": ("Granite", SHAPE | {"residual_multiplier": 0.22, "logits_scaling": 8.0}),
    "glm": ("Glm", SHAPE | _HEAD),
    "glm4": ("Glm4", SHAPE | _HEAD),
    "cohere": ("Cohere", SHAPE),
    "phi": ("Phi", SHAPE),
    "stablelm": ("StableLm", SHAPE),
    "nemotron": ("Nemotron", SHAPE),
    "olmo": ("Olmo", SHAPE),
    "gemma": ("Gemma", SHAPE | _HEAD),
    "smollm3": ("SmolLM3", SHAPE),
    "persimmon": ("Persimmon", SHAPE),
    "helium": ("Helium", SHAPE | _HEAD),
    "gpt_bigcode": ("GPTBigCode", IDS | {"n_embd": 32, "n_layer": 3, "n_head": 4}),
    "exaone4": ("Exaone4", SHAPE),
    "apertus": ("Apertus", SHAPE),
    "olmoe": ("Olmoe", SHAPE | _EXPERTS),
    "qwen2_moe": (
        "Qwen2Moe",
        SHAPE | _EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "qwen3_moe": ("Qwen3Moe", SHAPE | _EXPERTS | _HEAD | {"moe_intermediate_size": 32}),
}
"""Others that `subjattn verify` passes."""
PARTS = {
    "gpt2": ("attn", "mlp", "attn.c_proj"),
    "gpt_neox": ("attention", "mlp", "attention.dense"),
}
"""Attention, MLP and output projection inside a decoder layer, where they are not called as Llama's."""


def config(name: str) -> PretrainedConfig:
    """The configuration of one of CONFIGS or VERIFIED."""
    prefix, settings = (CONFIGS | VERIFIED)[name]
    return getattr(transformers, f"{prefix}Config")(**settings)  # type: ignore[no-any-return]


def parts(name: str) -> tuple[str, str, str]:
    return PARTS.get(name, ("self_attn", "mlp", "self_attn.o_proj"))
