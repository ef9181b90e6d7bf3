"""Experts that exist already: plain PEFT LoRAs become the experts of one adapter, and experts become plain LoRAs again.

`lora_files.py` reads a LoRA and refuses what an expert cannot be; `stacks.py` says how experts of different rank and scale
share one stack. On these stand `import_loras.py` (`from_loras`), `export.py` (`export_expert`) and `resize.py` (`add_expert`,
`remove_expert`). `initial_router.py` (`router_from_texts`, `router_from_weights`) gives experts a router without training; its
linear algebra is in `linear_classifiers.py`.
"""
