"""Two-layer models of many architectures, by transformers' model type."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "num_labels": 3,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
SPARSE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}

CAUSAL: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma2": GROUPED,
    "gemma3_text": {**GROUPED, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {"num_key_value_heads": 2, "original_max_position_embeddings": 128},
    "gpt2": {"n_positions": 128},  # Conv1D
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},  # lists k, v, q; runs q, k, v
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4, "n_positions": 128},
    "bloom": {},
    "falcon": {},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "gpt_bigcode": {"n_positions": 128},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "codegen": {"n_positions": 128, "rotary_dim": 4, "n_ctx": 128},
    "stablelm": GROUPED,
    "olmo2": {"num_key_value_heads": 2},
    "granite": GROUPED,
    "cohere": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 2},
    # mixture-of-experts backbones: attention, shared experts
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**GROUPED, **SPARSE},
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "gpt_oss": {**GROUPED, "num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    # no attention, or not only
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "jamba": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "recurrent_gemma": {"num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 64, "num_hidden_layers": 3},
    "nemotron_h": {
        **GROUPED,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "chunk_size": 16,
    },
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "modernbert-decoder": {},
}

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "electra": {"embedding_size": 16},  # the router sees 16 features, the layers 32
    "albert": {"embedding_size": 16, "num_hidden_layers": 3},  # one layer, run three times
    "deberta": {},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "modernbert": {},
    "convbert": {},
    "mpnet": {},
    "longformer": {"attention_window": 4},
    "big_bird": {"attention_type": "original_full"},
    "roformer": {},
    "nystromformer": {},
    "fnet": {},  # no attention
    "layoutlm": {},
}


def build(model_type: str, auto_class: Any, **overrides: Any) -> Any:
    """A seeded model in eval mode, without dropout."""
    table = CAUSAL.get(model_type, ENCODERS.get(model_type, {}))
    config = tf.AutoConfig.for_model(model_type, **{**COMMON, **table, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class.from_config(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()
