"""LoRA-Switch adapters served by vLLM as it serves LoRAs: a general plugin, found by vLLM through the entry point `loraswitch`.

Base model, plain LoRAs and LoRA-Switch adapters share a batch; vLLM loads, evicts and unloads them. Each adapter is loaded as one
wide LoRA per linear (`wide_lora.py`); at the linear that routes, the decision of every token is made once and left as a mask
(`routing_tables.py`), which all linears put between the two products of their LoRA (`masked_lora.py`). `managers.py` brings
that into vLLM, `internals.py` is all that is touched of it.

Importing this folder needs neither PEFT nor vLLM.
"""

from .versions import UnsupportedVLLM


def register() -> None:
    """What vLLM calls in each of its processes, perhaps more than once, before it loads a model.

    Raises:
        UnsupportedVLLM: this vLLM was not tested, or has changed. vLLM does not start then.
    """
    check()
    from . import internals, managers

    internals.replace_worker_manager(managers.LoRASwitchWorkerManager)


def check() -> None:
    """Raise an UnsupportedVLLM unless the vLLM that is installed can serve LoRA-Switch adapters."""
    from .versions import check_version, unsupported

    check_version()
    try:
        from . import internals
    except ImportError as error:
        raise unsupported(str(error)) from error
    internals.check()
