"""Models of the real 7B and 8B shapes with random weights, and conversations made from local text: what a configuration needs
where no Hub is within reach."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from recipes import corpora, tiny_llama

VOCABULARY = 8_000  # tokens of the local tokenizer; the embedding keeps the model's own size
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_EIGHT_BILLION = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
# As in config.json of meta-llama/Llama-3.1-8B-Instruct, mistralai/Mistral-7B-Instruct-v0.3 and Qwen/Qwen3-8B.
SHAPES: dict[str, PreTrainedConfig] = {
    "llama31_8b": LlamaConfig(
        **_EIGHT_BILLION, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256, max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "mistral_7b": MistralConfig(
        **_EIGHT_BILLION, intermediate_size=14336, num_hidden_layers=32, vocab_size=32768, max_position_embeddings=32768,
        rms_norm_eps=1e-5, sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "qwen3_8b": Qwen3Config(
        **_EIGHT_BILLION, intermediate_size=12288, num_hidden_layers=36, vocab_size=151936, max_position_embeddings=40960,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 1024,
}  # fmt: skip


def make_model(shape: str, folder: Path, tiny: bool = False) -> None:
    """Random bfloat16 weights (float32 if `tiny`) and a tokenizer with a chat template, saved in `folder`."""
    settings = SHAPES[shape].to_dict()
    if tiny:
        settings = {key: value for key, value in settings.items() if key != "layer_types"} | TINY
    config = SHAPES[shape].__class__.from_dict(settings)
    tokenizer = make_tokenizer(min(VOCABULARY, config.vocab_size))
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if tiny else torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Without a padding token, as Llama's and Mistral's."""
    texts = [document.text for document in corpora.standard_library()[:60]] + [d.text for d in corpora.manual()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_llama.train_bpe(texts, vocabulary), bos_token=tiny_llama.END, eos_token=tiny_llama.END,
        model_max_length=131072,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_conversations(folder: Path, preference: bool, rows: dict[str, int], words: int) -> None:
    """`train.jsonl` and `test.jsonl` with as many conversations as `rows` says, of about `words` words (fewer for preferences):
    column `messages`, or `prompt`, `chosen` and `rejected` (the same words backwards) for preferences."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, documents in zip(("train", "test"), corpora.split(corpora.standard_library()), strict=True):
        # An answer must not be cut off behind a long prompt: some four tokens a word of code.
        talks = (
            _conversations(documents, 2, words // 8)
            if preference
            else _conversations(documents, max(2, words // 60), 60)
        )
        lines = []
        for _ in range(rows[split]):
            talk = next(talks)
            if preference:
                *prompt, last = talk
                backwards = " ".join(reversed(last["content"].split(" ")))
                row = {"prompt": prompt, "chosen": [last], "rejected": [{**last, "content": backwards}]}
            else:
                row = {"messages": talk}
            lines.append(json.dumps(row) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))


def _conversations(documents: list[corpora.Document], turns: int, words: int) -> Iterator[list[dict[str, str]]]:
    """So many turns of so many words. Endless: from the beginning again when the text ends."""
    size = turns * words
    while True:
        for document in documents:
            found = document.text.split(" ")
            for begin in range(0, len(found) - size + 1, size):
                pieces = [" ".join(found[i : i + words]) for i in range(begin, begin + size, words)]
                yield [{"role": ("user", "assistant")[i % 2], "content": piece} for i, piece in enumerate(pieces)]
