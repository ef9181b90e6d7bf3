"""What the Hub tests run in processes of their own: `python hub_process.py <step> <result file> [argument ...]`.

`HF_ENDPOINT` is read when `huggingface_hub` is imported, and "a fresh process loads what another one pushed" is the
thing to show, so each step is a process. A step puts tensors and texts into a dict, saved with `torch.save`. Any attempt
to reach something other than the loopback interface fails, and is reported.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

OUTSIDE: list[str] = []


def stay_inside(event: str, args: tuple) -> None:
    """Audit hook: refuse every connection and name look-up that leaves this machine."""
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost", None):
        OUTSIDE.append(str(host))
        raise OSError(f"a test wanted to reach {host}")


def tiny_llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def logits(model: Any) -> Any:
    import torch

    tokens = torch.arange(3, 25).reshape(2, 11)
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits.clone()


def error_of(call: Any, *args: Any, **kwargs: Any) -> str:
    """'TypeOfException: message' of a call that must fail."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def push(result: dict) -> None:
    """alice/base, and everything else that the other steps load, from one process."""
    import torch
    from huggingface_hub import HfApi
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

    from peft_loraswitch import LoRASwitchConfig

    def config(**options: Any) -> LoRASwitchConfig:
        # init_weights=False: B is random too, or a lost adapter would look like a loaded one.
        options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
        return LoRASwitchConfig(init_weights=False, **options)

    api = HfApi()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama()).push_to_hub("alice/base")
    model = AutoModelForCausalLM.from_pretrained("alice/base")
    result["base"] = logits(model)
    model = get_peft_model(model, config(r=2, num_experts=4, top_k=2))
    model.add_adapter("math", config(r=3, num_experts=5, top_k=1, router_module="layers.1.self_attn.q_proj"))
    for version in ("v1", "v2"):
        if version == "v2":
            # In between somebody edits the card on the Hub, and the adapter trains on.
            text = Path(api.hf_hub_download("alice/adapter", "README.md")).read_text()
            text = text.replace("---\n", "---\nlicense: apache-2.0\n", 1) + "\n## Notes\n\nWritten by hand.\n"
            api.upload_file(repo_id="alice/adapter", path_in_repo="README.md", path_or_fileobj=text.encode())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "loraswitch_" in name:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        model.push_to_hub("alice/adapter")
        api.create_tag("alice/adapter", tag=version)
        for name in ("default", "math"):
            model.set_adapter(name)
            result[f"adapter {name} {version}"] = logits(model)
        model.set_adapter("default")
    model.push_to_hub("alice/secret", private=True, revision="next")
    model.save_pretrained("local")

    native = AutoModelForCausalLM.from_pretrained("alice/base")
    native.add_adapter(config(r=2, num_experts=3, target_modules=["o_proj", "up_proj"]))
    native.push_to_hub("alice/native")
    result["native"] = logits(native)

    classifier = AutoModelForSequenceClassification.from_pretrained("alice/base", num_labels=3)
    classifier = get_peft_model(classifier, config(r=2, num_experts=2, task_type="SEQ_CLS"))
    classifier.push_to_hub("alice/classifier")
    result["classifier"] = logits(classifier)


def load(result: dict, secret_token: str) -> None:
    """Everything through stock calls; `import peft_loraswitch` is the only trace of this project."""
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    import peft_loraswitch  # noqa: F401

    for name, subfolder in (("config", None), ("config math", "math")):
        config = PeftConfig.from_pretrained("alice/adapter", subfolder=subfolder)
        result[name] = {"class": type(config).__name__, "k": config.top_k, "E": config.num_experts, "r": config.r}

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained("alice/base")

    model = PeftModel.from_pretrained(base(), "alice/adapter", revision="v2")
    result["adapter default v2"] = logits(model)
    model.load_adapter("alice/adapter", adapter_name="math", subfolder="math")
    model.set_adapter("math")
    result["adapter math v2"] = logits(model)
    model.load_adapter("alice/adapter", adapter_name="older", subfolder="math", revision="v1")
    model.set_adapter("older")
    result["adapter math v1"] = logits(model)
    with model.disable_adapter():
        result["base"] = logits(model)
    model = AutoPeftModelForCausalLM.from_pretrained("alice/adapter", revision="v1")
    result["adapter default v1"] = logits(model)
    result["AutoPeft latest"] = logits(AutoPeftModelForCausalLM.from_pretrained("alice/adapter"))
    result["transformers latest"] = logits(AutoModelForCausalLM.from_pretrained("alice/adapter"))
    result["native"] = logits(AutoModelForCausalLM.from_pretrained("alice/native"))
    result["native by PEFT"] = logits(PeftModel.from_pretrained(base(), "alice/native"))
    low = PeftModel.from_pretrained(base(), "alice/adapter", low_cpu_mem_usage=True)
    result["low memory"] = logits(low)

    result["secret without token"] = error_of(PeftModel.from_pretrained, base(), "alice/secret", revision="next")
    secret = PeftModel.from_pretrained(base(), "alice/secret", revision="next", token=secret_token)
    result["secret"] = logits(secret)
    result["no such revision"] = error_of(PeftModel.from_pretrained, base(), "alice/adapter", revision="v9")
    result["no such adapter"] = error_of(PeftModel.from_pretrained, base(), "alice/adapter", subfolder="physics")


def snippets(result: dict, *cards: str) -> None:
    """First what PEFT says about our adapters without the import, then the Python code of the given cards, as it is."""
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    result["without import"] = {
        "PeftModel": error_of(
            lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("alice/base"), "alice/adapter")
        ),
        "PeftConfig": error_of(PeftConfig.from_pretrained, "alice/adapter"),
        "AutoPeftModel": error_of(AutoPeftModelForCausalLM.from_pretrained, "alice/adapter"),
        "transformers": error_of(AutoModelForCausalLM.from_pretrained, "alice/adapter"),
    }
    assert "peft_loraswitch" not in sys.modules
    for card in cards:
        # A card that is a file is used in its folder, as its snippet says.
        os.chdir(Path(card).parent)
        for code in re.findall(r"```python\n(.*?)```", Path(card).read_text(), re.DOTALL):
            names: dict[str, Any] = {}
            exec(code, names)
            result[card] = {}
            for name in names["model"].peft_config:
                names["model"].set_adapter(name)
                result[card][name] = logits(names["model"])


def trainers(result: dict) -> None:
    """`Trainer` and TRL's `SFTTrainer` save checkpoints, train one step and push; both write cards of their own."""
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from peft_loraswitch import LoRASwitchConfig

    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama()).push_to_hub("alice/trainbase")
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(61))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")), pad_token="<pad>", eos_token="</s>"
    )
    config = LoRASwitchConfig(r=2, num_experts=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    data = Dataset.from_list([{"input_ids": [1, 3, 4, 5, 6, 2], "labels": [1, 3, 4, 5, 6, 2]}] * 4)
    common = {"max_steps": 1, "save_steps": 1, "report_to": [], "per_device_train_batch_size": 2, "use_cpu": True}

    model = get_peft_model(AutoModelForCausalLM.from_pretrained("alice/trainbase"), config)
    arguments = TrainingArguments("plain", hub_model_id="alice/trained-plain", **common)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.push_to_hub()
    result["plain"] = logits(model)

    arguments = SFTConfig("sft", hub_model_id="alice/trained-sft", max_length=16, bf16=False, **common)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained("alice/trainbase"), arguments, train_dataset=data.remove_columns("labels"),
        processing_class=tokenizer, peft_config=config,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    result["sft"] = logits(trainer.model)
    for folder in ("plain", "plain/checkpoint-1", "sft", "sft/checkpoint-1"):
        result[f"{folder}/README.md"] = Path(folder, "README.md").read_text()


if __name__ == "__main__":
    sys.addaudithook(stay_inside)
    step, file, *arguments = sys.argv[1:]
    outcome: dict[str, Any] = {}
    globals()[step](outcome, *arguments)
    assert not OUTSIDE, f"tried to reach {OUTSIDE}"
    assert "hf_xet" not in sys.modules  # compiled code that no audit hook sees
    import torch

    torch.save(outcome, file)
