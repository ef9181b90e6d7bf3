"""What is changed in PEFT, Transformers and huggingface_hub: everything, in this one file, but for our name in
`PeftType` (peft_names.py).

None of the three has a hook for these places. Each patch says what for, and which versions it was tested with; `docs/upstream.md`
has, under the same key, the change in the other library that would make it unnecessary. Models and files of other methods get
what they got before: what is put in place of a function is called with the original and its arguments, and hands on all that
is not ours.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft.optimizers
import peft.peft_model
import peft.tuners.tuners_utils
import peft.utils.other
import peft.utils.save_and_load
import transformers.modeling_utils
import transformers.utils
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel
from transformers.integrations import peft as transformers_peft
from transformers.models.auto import auto_factory
from transformers.trainer_callback import CallbackHandler
from transformers.utils.hub import PushToHubMixin

from . import patterns, switching
from .loading import load
from .peft_names import NAME, extend_peft_type
from .saving import model_card, safe_save
from .targets import trained_in_full
from .training_logs import log_after_all_is_added

PEFT = "peft 0.20.0 to 0.21.2"
TRANSFORMERS = "transformers 5.17.0 to 5.24.0"
HUB = "huggingface_hub 1.33.0 to 2.4.0"


@dataclass(frozen=True)
class Patch:
    """A function of another library and what takes its place.

    Attributes:
        owner: the class or module; name: of the function in it.
        instead: called with the original and the arguments.
        key: heading of `docs/upstream.md`; tested: versions of the other library.
    """

    owner: Any
    name: str
    instead: Callable[..., Any]
    key: str
    tested: str

    def apply(self) -> None:
        """Put it in place. Idempotent; after a re-import of this package the new code takes the place of the old."""
        raw = inspect.getattr_static(self.owner, self.name, None)  # it may be of a base class: then of this one only
        current = raw.__func__ if isinstance(raw, classmethod) else raw
        if current is None:
            raise ImportError(
                f"peft_loraswitch replaces {self.owner.__name__}.{self.name}, which is not there: it was tested with "
                f"{self.tested}. Install one of those, or a newer peft_loraswitch."
            )
        original = current
        if "loraswitch_patch" in vars(current):
            ours, original, instead = vars(current)["loraswitch_patch"]
            if instead is self.instead or ours is not current:  # the latter: somebody has wrapped ours
                return

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return self.instead(original, *args, **kwargs)

        replacement.loraswitch_patch = (replacement, original, self.instead)  # type: ignore[attr-defined]
        setattr(self.owner, self.name, classmethod(replacement) if isinstance(raw, classmethod) else replacement)


Mixin = transformers_peft.PeftAdapterMixin

# In place from the import of the package on.
PATCHES = (
    Patch(PeftModel, "load_adapter", load.watched_load, "load", PEFT),
    Patch(PeftModel, "from_pretrained", load.watched_load, "load", PEFT),
    Patch(Mixin, "load_adapter", load.watched_load, "load", TRANSFORMERS),
    Patch(PeftConfigMixin, "from_json_file", load.config_read_after_a_check, "config", PEFT),
    # transformers.pipelines, slow to import, takes it from `utils` if it comes later
    Patch(transformers.utils, "find_adapter_config_file", load.config_found_after_a_check, "config", TRANSFORMERS),
    Patch(transformers_peft, "find_adapter_config_file", load.config_found_after_a_check, "config", TRANSFORMERS),
    Patch(auto_factory, "find_adapter_config_file", load.config_found_after_a_check, "config", TRANSFORMERS),
    Patch(peft.peft_model, "safe_save_file", safe_save.watched_save_file, "save", PEFT),
    Patch(transformers.modeling_utils, "safe_save_file", safe_save.watched_save_file, "save", TRANSFORMERS),
    Patch(PeftModel, "save_pretrained", safe_save.watched_save_pretrained, "save", PEFT),
    Patch(PreTrainedModel, "save_pretrained", safe_save.watched_save_pretrained, "save", TRANSFORMERS),
    Patch(peft.utils.other, "match_target_against_key", patterns.match_target, "patterns", PEFT),
    Patch(peft.utils.save_and_load, "match_target_against_key", patterns.match_target, "patterns", PEFT),
    Patch(peft.tuners.tuners_utils, "match_target_against_key", patterns.match_target, "patterns", PEFT),
    Patch(PeftModel, "delete_adapter", switching.delete_in_peft_model, "switching", PEFT),
    Patch(Mixin, "set_adapter", switching.set_in_transformers, "switching", TRANSFORMERS),
    Patch(Mixin, "delete_adapter", switching.delete_in_transformers, "switching", TRANSFORMERS),
    Patch(Mixin, "active_adapters", switching.active_in_transformers, "switching", TRANSFORMERS),
    Patch(Mixin, "disable_adapters", switching.disable_in_transformers, "switching", TRANSFORMERS),
    Patch(Mixin, "enable_adapters", switching.enable_in_transformers, "switching", TRANSFORMERS),
    Patch(CallbackHandler, "on_log", log_after_all_is_added, "logs", TRANSFORMERS),
    Patch(TrainableTokensWrapper, "adapter_state_dict", trained_in_full.tensors_of_trained_tokens, "tokens", PEFT),
    Patch(
        TrainableTokensWrapper, "adapter_state_dict_load_map", trained_in_full.tensors_of_trained_tokens, "tokens", PEFT
    ),
)
# In place once a model has an adapter of ours: a process without one writes and uploads cards as before.
CARD_PATCHES = (
    Patch(ModelCard, "save", model_card.card_saved, "card", HUB),
    Patch(PushToHubMixin, "_upload_modified_files", model_card.model_pushed, "card", TRANSFORMERS),
    Patch(HfApi, "upload_folder", model_card.folder_uploaded, "card", HUB),
)


def install(config_class: type, model_class: type) -> None:
    """Make PEFT and Transformers know the method. Safe to call again (re-import, spawned worker, test runner)."""
    for patch in PATCHES:
        patch.apply()
    pipelines = sys.modules.get("transformers.pipelines")
    if pipelines is not None:
        Patch(pipelines, "find_adapter_config_file", load.config_found_after_a_check, "config", TRANSFORMERS).apply()
    _take_over_optimizers()
    peft_type = extend_peft_type()
    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class)
        return
    # A re-import (importlib.reload, a purged sys.modules) made new classes: point PEFT at those.
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_class
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_class.prefix  # type: ignore[attr-defined]


def install_card_patches() -> None:
    """From now on, the card of a LoRA-Switch adapter is renewed whenever somebody writes or uploads it. Idempotent."""
    for patch in CARD_PATCHES:
        patch.apply()


# ------------------------------------------------------------------------------------------------ optimizers ("optimizers")


def _take_over_optimizers() -> None:
    """Give PEFT's helpers that make optimizers, wherever they have been imported to, the code that looks at the model first."""
    for shim in (_create_loraplus_optimizer, _create_lorafa_optimizer, _create_riemannian_optimizer):
        helper = getattr(peft.optimizers, shim.__name__.removeprefix("_"), None)  # PEFT 0.20 lacks the third
        if helper is None or hasattr(helper, "before_loraswitch"):
            continue
        original = types.FunctionType(
            helper.__code__, helper.__globals__, helper.__name__, helper.__defaults__, helper.__closure__
        )
        original.__kwdefaults__ = helper.__kwdefaults__
        helper.before_loraswitch = original
        helper.__signature__ = inspect.signature(original)
        helper.__code__, helper.__defaults__, helper.__kwdefaults__ = shim.__code__, None, None


# Code for PEFT's functions: it runs among the globals of PEFT's modules, so it must import what it needs.


def _create_loraplus_optimizer(*args: Any, **kwargs: Any) -> Any:
    from peft_loraswitch.optimizers import run_helper

    return run_helper("create_loraplus_optimizer", args, kwargs)


def _create_lorafa_optimizer(*args: Any, **kwargs: Any) -> Any:
    from peft_loraswitch.optimizers import run_helper

    return run_helper("create_lorafa_optimizer", args, kwargs)


def _create_riemannian_optimizer(*args: Any, **kwargs: Any) -> Any:
    from peft_loraswitch.optimizers import run_helper

    return run_helper("create_riemannian_optimizer", args, kwargs)
