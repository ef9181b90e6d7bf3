"""Preference training (DPO) of a LoRA-Switch adapter with TRL; the reference is the backbone with the adapter off.

    python -m recipes.train.dpo recipes/train/configs/dpo_smoke.yaml
    accelerate launch -m recipes.train.dpo recipes/train/configs/dpo_llama31_8b.yaml --beta 0.05

Every option of TRL's ScriptArguments, DPOConfig and ModelConfig works in the YAML and, after it, on the command line; the
block `adapter` holds the fields of LoRASwitchConfig.
"""

from __future__ import annotations

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, ScriptArguments

from peft_loraswitch import RouterStatsCallback
from recipes.train import arguments, local_assets


def main() -> None:
    script, training, model_arguments, recipe = arguments.parse(DPOConfig, ScriptArguments)
    if recipe.local_assets:
        local_assets.make(model_arguments.model_name_or_path, script.dataset_name, preference=True)

    dataset = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    trainer = DPOTrainer(
        model=arguments.load_model(model_arguments, training.trust_remote_code),
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if training.eval_strategy != "no" else None,
        processing_class=arguments.load_tokenizer(model_arguments, training.trust_remote_code),
        peft_config=recipe.adapter_config,
        callbacks=[RouterStatsCallback()],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_state()  # trainer_state.json: the log, with the router's statistics next to the loss
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(f"Adapter saved to {training.output_dir}")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


if __name__ == "__main__":
    main()
