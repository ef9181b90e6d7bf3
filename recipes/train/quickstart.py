"""From nothing to a working routed adapter, on a CPU in a few minutes, without downloading anything.

    python -m recipes.train.quickstart

1. pretrains a tiny Llama on the Python source of the standard library (`corpora.py` says which text and why)
2. adapts it with TRL's SFTTrainer to five domains at once: a LoRA-Switch adapter, and a plain LoRA of the same size
3. compares held-out loss per domain: base, LoRA, LoRA-Switch
4. shows which domain uses which expert: a table, and outputs/quickstart/experts.png
5. saves the adapter, loads it in a fresh process, generates there, and compares the tokens

The exit status is 0 only if every check at the end holds. All files go to outputs/quickstart.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STARTED = time.perf_counter()
print("importing torch, transformers, peft and trl ...", flush=True)

import torch  # noqa: E402  (the imports take seconds: say so first)
from datasets import Dataset  # noqa: E402
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from peft_loraswitch import LoRASwitchConfig, RouterStatsCallback  # noqa: E402
from recipes import corpora, tiny_llama  # noqa: E402
from recipes.checkout import module_command, module_environment, processor, versions  # noqa: E402

LENGTH = 128  # tokens per block

# Matrices this small gain little from a second thread, and lose a lot where another program wants that core: each of some
# thousand operations a step then waits for whichever thread is not running (seen: 100 times slower on a busy machine).
torch.set_num_threads(1)


@dataclass(frozen=True)
class Size:
    """How much of everything. The smoke size only proves that each step works."""

    pretrain_steps: int
    adapt_steps: int
    held_out_blocks: int  # per domain
    new_tokens: int
    every_domain: bool  # whether there are enough steps to expect progress on each domain, or only on their mean


FULL = Size(pretrain_steps=320, adapt_steps=80, held_out_blocks=32, new_tokens=32, every_domain=True)
SMOKE = Size(pretrain_steps=12, adapt_steps=6, held_out_blocks=4, new_tokens=8, every_domain=False)


@contextmanager
def phase(title: str):
    """One line when a step begins, one with its time when it ends."""
    begun, worked = time.perf_counter(), time.process_time()
    print(f"\n[{begun - STARTED:5.1f} s] {title}", flush=True)
    yield
    spent, worked = time.perf_counter() - begun, time.process_time() - worked
    print(f"          done in {spent:.1f} s ({worked:.1f} s of processor time)", flush=True)


def routed_config() -> LoRASwitchConfig:
    """The adapter. It routes at the first adapted linear, the default."""
    return LoRASwitchConfig(
        r=4,
        num_experts=8,
        top_k=2,
        lora_alpha=128,  # s = 32: in 80 steps B must grow from zero, and a larger scale served both methods well
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def lora_config(parameters: int, base: Path) -> LoraConfig:
    """Plain LoRA on every linear of every layer, with the rank whose number of parameters is nearest to `parameters`."""
    linears = AutoModelForCausalLM.from_pretrained(base).model.layers.modules()
    per_rank = sum(m.in_features + m.out_features for m in linears if isinstance(m, torch.nn.Linear))
    rank = max(1, round(parameters / per_rank))
    return LoraConfig(r=rank, lora_alpha=8 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def make_base(folder: Path, size: Size) -> PreTrainedTokenizerBase:
    """Tokenizer and base model, trained on the standard library; both saved in `folder`."""
    documents, _ = corpora.split(corpora.standard_library(), held_out=0.05)
    tokenizer = tiny_llama.train_tokenizer([document.text for document in documents[:100]])
    blocks = corpora.token_blocks(documents, tokenizer, LENGTH, size.pretrain_steps * 8)
    random.Random(0).shuffle(blocks)
    model = tiny_llama.new_model(tokenizer)
    loss = tiny_llama.pretrain(model, blocks, size.pretrain_steps)
    tiny_llama.save(model, tokenizer, folder)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"          {parameters / 1e6:.2f} M parameters, {len(blocks) * LENGTH / 1e3:.0f} k tokens of Python source, "
          f"loss {loss:.2f} nats a token (an untrained model: {math.log(len(tokenizer)):.2f})")  # fmt: skip
    return tokenizer


def make_domains(tokenizer: PreTrainedTokenizerBase, size: Size, batch: int = 16) -> tuple[Dataset, dict[str, list]]:
    """The training mix, the same number of tokens from each domain, and the held-out blocks of each domain."""
    each = math.ceil(size.adapt_steps * batch / len(corpora.DOMAINS))
    train, held_out = [], {}
    for name, documents_of in corpora.DOMAINS.items():
        documents, others = corpora.split(documents_of())
        train += corpora.token_blocks(documents, tokenizer, LENGTH, each, per_document=100)
        held_out[name] = corpora.token_blocks(others, tokenizer, LENGTH, size.held_out_blocks, per_document=4)
    return Dataset.from_dict({"input_ids": train}), held_out


def adapt(
    base: Path, tokenizer: PreTrainedTokenizerBase, train: Dataset, config: PeftConfig, steps: int, learning_rate: float
) -> PeftModel:
    """SFTTrainer with any PEFT configuration; the seed fixes the order of the data."""
    arguments = SFTConfig(
        output_dir=str(base.parent / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        max_length=LENGTH,
        gradient_checkpointing=False,  # saves memory that a model of this size does not need
        logging_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=0,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=arguments,
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[RouterStatsCallback()] if isinstance(config, LoRASwitchConfig) else None,
    )
    trainer.train()
    return trainer.model.eval()


@torch.no_grad()
def starts_unchanged(base: Path, held_out: dict[str, list]) -> bool:
    """Whether a fresh adapter leaves the base's output as it was, to the bit."""
    rows = torch.tensor([blocks[0] for blocks in held_out.values()])
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    before = model(input_ids=rows).logits
    return torch.equal(before, get_peft_model(model, routed_config()).eval()(input_ids=rows).logits)


@torch.no_grad()
def losses(model: torch.nn.Module, held_out: dict[str, list]) -> dict[str, float]:
    """Mean next-token loss per domain, in nats."""
    model.eval()
    result = {}
    for name, blocks in held_out.items():
        rows = torch.tensor(blocks)
        result[name] = model(input_ids=rows, labels=rows).loss.item()
    return result


@torch.no_grad()
def expert_use(model: PeftModel, held_out: dict[str, list]) -> dict[str, list[float]]:
    """Per domain, the share of routed tokens that each expert gets; sums to 1."""
    result = {}
    for name, blocks in held_out.items():
        with model.record_routing() as recorded:
            model(input_ids=torch.tensor(blocks))
        result[name] = recorded.summary()["load"]
    return result


def draw(use: dict[str, list[float]], path: Path) -> None:
    """A heat map, experts ordered by the domain that uses them most."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    names = list(use)
    shares = torch.tensor([use[name] for name in names])
    order = sorted(range(shares.shape[1]), key=lambda e: (int(shares[:, e].argmax()), -float(shares[:, e].max())))
    figure, axes = plt.subplots(figsize=(1.6 + 0.75 * len(order), 1.5 + 0.5 * len(names)), layout="constrained")
    image = axes.imshow(100 * shares[:, order], cmap="Blues", vmin=0, aspect="auto")
    axes.set_xticks(range(len(order)), [str(e) for e in order])
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("expert")
    even = 100 / len(order)
    axes.set_title(f"Share of routed tokens per expert, held-out text (even use: {even:.1f} %)", fontsize=10)
    axes.tick_params(length=0)
    dark = 60 * float(shares.max())
    for row in range(len(names)):
        for column, expert in enumerate(order):
            percent = 100 * float(shares[row, expert])
            color = "white" if percent > dark else "black"
            axes.text(column, row, f"{percent:.0f}", ha="center", va="center", color=color)
    figure.colorbar(image, label="% of the domain's picks")
    figure.savefig(path, dpi=110)


@torch.no_grad()
def generate(model: PeftModel, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuation of prompts of equal length, with the KV cache."""
    rows = torch.tensor(prompts)
    out = model.generate(
        input_ids=rows,
        attention_mask=torch.ones_like(rows),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
    )
    return out[:, rows.shape[1] :].tolist()


def reload(folder: Path) -> None:
    """What the fresh process does: load by the adapter's folder alone, continue the prompts, print tokens as JSON."""
    task = json.loads((folder / "prompts.json").read_text())
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
    print(json.dumps(generate(model, task["prompts"], task["new_tokens"])))


def print_table(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    print(f"\n{title}")
    print("  " + " " * 10 + "".join(f"{column:>12}" for column in columns))
    for name, cells in rows.items():
        print(f"  {name:<10}" + "".join(f"{cell:>12}" for cell in cells))


def main(folder: Path, size: Size) -> int:
    base = folder / "base"
    folder.mkdir(parents=True, exist_ok=True)
    with phase("pretraining a tiny Llama on the standard library's source"):
        tokenizer = make_base(base, size)
    with phase("reading five domains that the base has never seen"):
        train, held_out = make_domains(tokenizer, size)
        base_loss = losses(AutoModelForCausalLM.from_pretrained(base), held_out)
        unchanged = starts_unchanged(base, held_out)
    with phase("adapting with LoRA-Switch: 8 experts, 2 per token, one decision per token for all layers"):
        routed = adapt(base, tokenizer, train, routed_config(), size.adapt_steps, learning_rate=4e-3)
        parameters = routed.get_nb_trainable_parameters()[0]
    with phase("adapting with plain LoRA: same number of parameters, same data in the same order"):
        baseline = lora_config(parameters, base)
        lora = adapt(base, tokenizer, train, baseline, size.adapt_steps, learning_rate=5e-3)
        lora_parameters = lora.get_nb_trainable_parameters()[0]
    with phase("measuring on held-out text"):
        lora_loss, routed_loss = losses(lora, held_out), losses(routed, held_out)
        use = expert_use(routed, held_out)
        draw(use, folder / "experts.png")

    rows = {name: [f"{x[name]:.3f}" for x in (base_loss, lora_loss, routed_loss)] for name in held_out}
    mean = [sum(x.values()) / len(x) for x in (base_loss, lora_loss, routed_loss)]
    rows["mean"] = [f"{x:.3f}" for x in mean]
    rows["trainable"] = ["0", f"{lora_parameters:,}", f"{parameters:,}"]
    print_table("Held-out loss, nats per token", ["base", f"LoRA r={baseline.r}", "LoRA-Switch"], rows)
    experts = len(next(iter(use.values())))
    percent = {name: [f"{100 * share:.0f} %" for share in loads] for name, loads in use.items()}
    print_table("Which domain uses which expert", [f"expert {e}" for e in range(experts)], percent)
    print(f"  as a picture: {folder / 'experts.png'}")

    with phase("saving, loading in a fresh process, generating there"):
        prompts = [blocks[0][:32] for blocks in held_out.values()]
        here = generate(routed, prompts, size.new_tokens)
        routed.save_pretrained(folder / "adapter")
        (folder / "prompts.json").write_text(json.dumps({"prompts": prompts, "new_tokens": size.new_tokens}))
        command = module_command("recipes.train.quickstart", "--reload", str(folder))
        done = subprocess.run(command, env=module_environment(), check=True, stdout=subprocess.PIPE, text=True)
        there = json.loads(done.stdout.splitlines()[-1])
    for name, prompt, tokens in zip(held_out, prompts, there, strict=True):
        print(f"  {name:<10}{tokenizer.decode(prompt)[-50:]!r} -> {tokenizer.decode(tokens)!r}")

    overall = [sum(use[name][e] for name in use) / len(use) for e in range(experts)]
    # exp(entropy): how many experts, used evenly, would be as diverse
    effective = math.exp(-sum(share * math.log(share) for share in overall if share > 0))
    distance = max(sum(abs(a - b) for a, b in zip(use[x], use[y], strict=True)) / 2 for x in use for y in use)
    better_in = [routed_loss[name] < base_loss[name] for name in held_out]
    improved = all(better_in) if size.every_domain else mean[2] < mean[0]
    checks = {
        "a fresh adapter leaves the base's output unchanged to the bit": unchanged,
        f"LoRA-Switch lowers the held-out loss {'of every domain' if size.every_domain else 'on average'}": improved,
        f"the router uses {effective:.1f} of {experts} experts, more than the two of one token": effective > 2.5,
        f"domains are routed differently (largest distance {100 * distance:.0f} %)": distance > 0.02,
        "a fresh process generates the same tokens": here == there,
    }
    print()
    for text, holds in checks.items():
        print(f"  {'ok  ' if holds else 'FAIL'}  {text}")
    header = {**versions("torch", "transformers", "peft", "trl"), "cpu": processor()}
    result = {"header": header, "size": "smoke" if size is SMOKE else "full"}
    result |= {"mean_loss": dict(zip(("base", "lora", "lora_switch"), mean, strict=True)), "trainable": parameters}
    result |= {"base": base_loss, "lora": lora_loss, "lora_switch": routed_loss, "expert_use": use}
    result |= {"tokens": here, "checks": checks, "seconds": round(time.perf_counter() - STARTED)}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    better = "LoRA-Switch" if mean[2] < mean[1] else "plain LoRA"
    numbers = f"{mean[2]:.3f} LoRA-Switch, {mean[1]:.3f} LoRA, {mean[0]:.3f} base"
    print(
        f"\nLower mean loss in this run: {better} ({numbers}). At this size either may be: recipes/quality compares them."
    )
    print(f"Total {time.perf_counter() - STARTED:.0f} s. Files: {folder}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train, compare, save and reload a routed adapter on a CPU.")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="folder for all files")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to test that it runs")
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)  # used by the script itself
    options = parser.parse_args()
    if options.reload:
        reload(options.reload)
    else:
        sys.exit(main(options.output, SMOKE if options.smoke else FULL))
