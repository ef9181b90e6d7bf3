"""Tiny models with several token streams, and what to call them with."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from helpers import HEADS, HIDDEN, INTERMEDIATE, LAYERS, VOCAB, _seeded, bert_config, tiny_t5, tokens

IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BART = {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INTERMEDIATE,
    "decoder_ffn_dim": INTERMEDIATE,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "init_std": 0.2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
    **IDS,
}
VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    **IDS,
}
IMAGE_TOKEN = VOCAB - 1


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seq2seq_inputs() -> dict[str, torch.Tensor]:
    """As many encoder tokens as decoder tokens, on purpose: a count cannot tell the streams apart. The first sample is
    padded on the encoder's side."""
    source, target = tokens(2, 6), tokens(2, 6, seed=1)
    mask = torch.ones_like(source)
    mask[0, 4:] = 0
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}


def switch_transformers() -> Any:
    """Experts are linears of their own, each called with some of the tokens."""
    config = tf.SwitchTransformersConfig(
        **{k: v for k, v in IDS.items() if k != "bos_token_id"},
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=INTERMEDIATE,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=HEADS,
        num_experts=2,
        expert_capacity=64,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        decoder_start_token_id=0,
    )
    return _seeded(tf.SwitchTransformersForConditionalGeneration, config, 0)


def fsmt() -> Any:
    """Encoder and decoder are plain modules, not models."""
    settings = {k: v for k, v in BART.items() if k != "vocab_size"}
    config = tf.FSMTConfig(**settings, langs=["en", "de"], src_vocab_size=VOCAB, tgt_vocab_size=VOCAB)
    return _seeded(tf.FSMTForConditionalGeneration, config, 0)


def encoder_decoder() -> Any:
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(
        bert_config(), bert_config(is_decoder=True, add_cross_attention=True)
    )
    config.decoder_start_token_id = config.pad_token_id = 0
    config.eos_token_id = 2
    return _seeded(tf.EncoderDecoderModel, config, 0)


def whisper() -> Any:
    settings = {k: v for k, v in BART.items() if k not in ("max_position_embeddings", "forced_eos_token_id")}
    config = tf.WhisperConfig(
        **settings,
        num_mel_bins=8,
        max_source_positions=6,
        max_target_positions=32,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return _seeded(tf.WhisperForConditionalGeneration, config, 0)


def llava() -> Any:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        image_seq_length=4,
    )
    return _seeded(tf.LlavaForConditionalGeneration, config, 0)


def llava_inputs() -> dict[str, torch.Tensor]:
    ids = tokens(2, 9, vocab=VOCAB - 4)
    ids[:, 1:5] = IMAGE_TOKEN  # 16x16 pixels are 4 patches
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": noise(2, 3, 16, 16)}


def qwen2_5_vl() -> Any:
    vision = {
        "depth": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_heads": HEADS,
        "out_hidden_size": HIDDEN,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = tf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    )
    return _seeded(tf.Qwen2_5_VLForConditionalGeneration, config, 0)


def qwen2_5_vl_inputs() -> dict[str, torch.Tensor]:
    ids = tokens(2, 9, vocab=VOCAB - 4)
    ids[:, 0], ids[:, 1:5], ids[:, 5] = VOCAB - 3, IMAGE_TOKEN, VOCAB - 4  # 4x4 patches, merged 2x2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": noise(2 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
    }


def clip() -> Any:
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    config = tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return _seeded(tf.CLIPModel, config, 0)


def clip_inputs() -> dict[str, torch.Tensor]:
    ids = tokens(2, 5)
    ids[:, -1] = 2  # 2x2 patches and a class token: as many as there are text tokens
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": noise(2, 3, 16, 16)}


def whisper_inputs() -> dict[str, torch.Tensor]:
    return {"input_features": noise(2, 8, 12), "decoder_input_ids": tokens(2, 6)}


# name: (model, inputs, target_modules that select one stream other than the suggested)
SEQ2SEQ: dict[str, tuple[Any, Any, str]] = {
    "t5": (tiny_t5, seq2seq_inputs, r"encoder\.block\..*\.(q|k|v|o|wi|wo)"),
    "switch_transformers": (switch_transformers, seq2seq_inputs, r"encoder\.block\..*\.(q|k|v|o)"),
    "bart": (
        lambda: _seeded(tf.BartForConditionalGeneration, tf.BartConfig(**BART), 0),
        seq2seq_inputs,
        r"model\.encoder\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    ),
    "marian": (
        lambda: _seeded(tf.MarianMTModel, tf.MarianConfig(**BART), 0),
        seq2seq_inputs,
        r"model\.encoder\..*\.(q_proj|v_proj)",
    ),
    "m2m_100": (
        lambda: _seeded(tf.M2M100ForConditionalGeneration, tf.M2M100Config(**{**BART, "decoder_start_token_id": 3}), 0),
        seq2seq_inputs,
        r"model\.encoder\..*\.(q_proj|v_proj)",
    ),
    "fsmt": (fsmt, seq2seq_inputs, r"model\.encoder\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"),
    "encoder_decoder": (encoder_decoder, seq2seq_inputs, r"encoder\.encoder\..*\.(query|key|value|dense)"),
    "whisper": (whisper, whisper_inputs, r"model\.encoder\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"),
}
TWO_TOWERS: dict[str, tuple[Any, Any, str]] = {
    "llava": (llava, llava_inputs, r"model\.vision_tower\..*\.(q_proj|v_proj|fc1)"),
    "qwen2_5_vl": (qwen2_5_vl, qwen2_5_vl_inputs, r"model\.visual\.blocks\..*\.(qkv|gate_proj|down_proj)"),
    "clip": (clip, clip_inputs, r"vision_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"),
}
SEVERAL_STREAMS = {**SEQ2SEQ, **TWO_TOWERS}


def vit() -> Any:
    return _seeded(tf.ViTForImageClassification, tf.ViTConfig(**VISION, num_labels=3), 0)


def wav2vec2() -> Any:
    config = tf.Wav2Vec2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        conv_dim=(16, 16),
        conv_kernel=(4, 4),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        layerdrop=0.0,
        mask_time_prob=0.0,
    )
    return _seeded(tf.Wav2Vec2ForSequenceClassification, config, 0)
