"""Tiny backbones, adapters on them, and what PEFT makes of them: tokens and logprobs that a server must give, too."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from peft_loraswitch import LoRASwitchConfig, from_loras

TOKENS = 12  # that each answer has
SEED_PROMPTS, SEED_TOKENS = 2, 4  # of the adapters that differ in their seed alone
BEGIN, END = "<s>", "</s>"
PROMPTS = [
    "def f(x):",
    "class A:\n    pass",
    "return",
    "The quick brown fox jumps over the lazy dog. It did so before. ",  # more than one block of the prefix cache
    "user: hi\nassistant:",  # the chat template's text for CHAT
]
_LONG = "It was the best of times, it was the worst of times, it was the age of wisdom, it was "  # 86 tokens
# For routers that see context: a text, and others that share with it two blocks, a block and a part of one, and all of it.
LONG_PROMPTS = [_LONG, _LONG[:64], _LONG[:50] + "def f(x): return x", _LONG + "the age"]
CHAT = [{"role": "user", "content": "hi"}]
FAMILIES = ("llama", "qwen3", "phi3")
BLOCK = 32  # tokens in a block of vLLM's KV cache; on CPUs a multiple of 32
BASE = "base"
# Adapters of imported LoRAs whose router sees context, with answers to LONG_PROMPTS, too.
CONTEXT: dict[str, dict[str, Any]] = {
    "context_0.98": {"router_decay": 0.98, "top_k": 1, "normalize_gates": True},  # a hard gate
    "context_0.9": {"router_decay": 0.9, "top_k": 2, "base_expert": True},
    "context_1": {"router_decay": 1.0, "top_k": 1, "normalize_gates": False},  # the softmax' value
}


@dataclass(frozen=True)
class Answer:
    """Greedy tokens after a prompt, and the logprob of each."""

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class ServedFiles:
    """A folder with a backbone in `base`, an adapter in each other folder, and PEFT's answers.

    Attributes:
        prompts: token ids of PROMPTS, then of LONG_PROMPTS.
        answers: by the name of the adapter, or "base": one for each of PROMPTS; CONTEXT's also for LONG_PROMPTS.
    """

    folder: Path
    prompts: list[list[int]]
    answers: dict[str, list[Answer]]

    def save(self) -> None:
        rows = {name: [asdict(answer) for answer in answers] for name, answers in self.answers.items()}
        (self.folder / "answers.json").write_text(json.dumps({"prompts": self.prompts, "answers": rows}))


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([BEGIN, END, *alphabet])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token=BEGIN, eos_token=END, pad_token=END)
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    return fast


def backbone_config(family: str, vocabulary: int) -> Any:
    settings = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
        "initializer_range": 0.15,
    }  # fmt: skip
    if family == "qwen3":
        return tf.Qwen3Config(**settings, head_dim=32)
    return (tf.LlamaConfig if family == "llama" else tf.Phi3Config)(**settings)


def adapter_configs(family: str) -> dict[str, Any]:
    """The adapters that are served, by name: the paper's, and between them all that a configuration can say about routing."""
    q, v = ("qkv_proj", "qkv_proj") if family == "phi3" else ("q_proj", "v_proj")
    mlp = ["gate_up_proj", "down_proj"] if family == "phi3" else ["gate_proj", "up_proj", "down_proj"]
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_weights": False}
    return {
        "paper": LoRASwitchConfig(r=4, num_experts=8, top_k=2, lora_alpha=8, **common),
        "deep": LoRASwitchConfig(
            r=2,
            num_experts=6,
            top_k=3,
            num_shared_experts=1,
            lora_alpha=4,
            use_rslora=True,
            router_module=f"layers.1.self_attn.{q}",
            rank_pattern={r"layers\.0\..*": 8, "mlp.down_proj": 4},
            alpha_pattern={"self_attn.o_proj": 7},
            **common,
        ),  # fmt: skip
        "top_1": LoRASwitchConfig(
            r=4,
            num_experts=4,
            top_k=1,
            num_shared_experts=2,
            lora_alpha=6,
            router_module=f"layers.0.self_attn.{v}",
            **common,
        ),  # fmt: skip
        "mlp": LoRASwitchConfig(
            r=4, num_experts=4, top_k=3, top_p=0.6, lora_alpha=8, **{**common, "target_modules": mlp}
        ),
        "all": LoRASwitchConfig(
            r=3, num_experts=5, top_k=5, normalize_gates=False, base_expert=True, lora_alpha=12, **common
        ),
        "row_parallel": LoRASwitchConfig(
            r=4,
            num_experts=4,
            top_k=2,
            num_shared_experts=1,
            lora_alpha=8,
            router_module="layers.1.mlp.down_proj",
            **common,
        ),  # fmt: skip
        "context_row": LoRASwitchConfig(
            r=4,
            num_experts=5,
            top_k=2,
            num_shared_experts=1,
            lora_alpha=8,
            router_decay=0.8,
            router_module="layers.1.mlp.down_proj",
            **common,
        ),  # fmt: skip
        "lora": LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        ),
    }


def declared_routers(family: str) -> list[str]:
    """What the server must be told: linears, other than the first, that the adapters above route at."""
    q = "qkv_proj" if family == "phi3" else "q_proj"
    gate = "gate_up_proj" if family == "phi3" else "gate_proj"
    return [f"layers.1.self_attn.{q}", f"layers.0.mlp.{gate}", "layers.1.mlp.down_proj"]


def arguments(files: ServedFiles, family: str) -> list[str]:
    """Of a server that has all adapters from the start and can hold all in one batch."""
    names = [name for name in files.answers if name != BASE]
    ours = json.dumps({"loraswitch": {"router_modules": declared_routers(family)}})
    return [
        "--enable-lora", "--max-loras", str(len(names)), "--max-lora-rank", "64", "--additional-config", ours,
        "--lora-modules", *(f"{name}={files.folder / name}" for name in names),
    ]  # fmt: skip


def make(folder: Path, family: str, seeds: int = 0) -> ServedFiles:
    """Write backbone and adapters, and compute PEFT's answers.

    Args:
        seeds: so many adapters more, named seed_0, seed_1, ...: small, with answers to the first prompts alone, and short.
    """
    folder.mkdir(parents=True)
    fast = tokenizer()
    fast.save_pretrained(folder / BASE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone_class = tf.AutoModelForCausalLM.from_config
        backbone_class(backbone_config(family, len(fast))).float().save_pretrained(folder / BASE)
    prompts = [fast(prompt)["input_ids"] for prompt in (*PROMPTS, *LONG_PROMPTS)]
    named = adapter_configs(family)
    for name, config in named.items():
        _save_adapter(folder, name, config)
    if family != "phi3":
        _save_composed(folder)
        named |= dict.fromkeys(("composed", *CONTEXT))
    seeded = [f"seed_{seed}" for seed in range(seeds)]
    for name in seeded:
        config = LoRASwitchConfig(
            r=2,
            num_experts=4,
            top_k=2,
            lora_alpha=6,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            init_weights=False,
        )
        _save_adapter(folder, name, config)
    answers = {
        name: _answers(folder, name, prompts if name in CONTEXT else prompts[: len(PROMPTS)], TOKENS)
        for name in (BASE, *named)
    }
    answers |= {name: _answers(folder, name, prompts[:SEED_PROMPTS], SEED_TOKENS) for name in seeded}
    files = ServedFiles(folder, prompts, answers)
    files.save()
    return files


def _backbone(folder: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder / BASE, dtype=torch.float32)


def _save_adapter(folder: Path, name: str, config: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        model = get_peft_model(_backbone(folder), config)
        for parameter_name, parameter in model.named_parameters():
            if "router" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
            elif "_B." in parameter_name:
                torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(folder / name)


def _save_composed(folder: Path) -> None:
    """Adapters of two LoRAs of different rank: one with the hard gate, the choice of none, and experts with names; CONTEXT."""
    with torch.random.fork_rng(devices=[]):
        for seed, rank in ((1, 4), (2, 3)):
            torch.manual_seed(seed)
            config = LoraConfig(
                r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
            )
            get_peft_model(_backbone(folder), config).save_pretrained(folder / "loras" / f"lora_{seed}")
        loras = [str(folder / "loras" / f"lora_{seed}") for seed in (1, 2)]
        composed = {"top_k": 1, "normalize_gates": True, "base_expert": True}
        for name, settings in (("composed", composed), *CONTEXT.items()):
            model = from_loras(_backbone(folder), loras, **settings)
            for parameter_name, parameter in model.named_parameters():
                if "router" in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folder / name)


def _answers(folder: Path, name: str, prompts: list[list[int]], length: int) -> list[Answer]:
    model = _backbone(folder)
    if name != BASE:
        model = PeftModel.from_pretrained(model, folder / name)
    model.eval()
    answers = []
    for prompt in prompts:
        made = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=length, eos_token_id=None, pad_token_id=1, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        tokens = made.sequences[0, len(prompt) :].tolist()
        logprobs = [
            torch.log_softmax(row[0].float(), -1)[token].item() for row, token in zip(made.logits, tokens, strict=True)
        ]
        answers.append(Answer(tokens, logprobs))
    return answers
