"""Registers LORASWITCH with PEFT. PEFT has no plug-in hook, so this is the one place that reaches into its closed enum."""

from __future__ import annotations

import enum

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "LORASWITCH"


def extend_peft_type(name: str = NAME) -> PeftType:
    """Add a member to PEFT's closed `PeftType` enum, once, and return it.

    `PeftType` is a `str` enum: members are strings, so JSON, comparisons and `PeftType("LORASWITCH")` work as for PEFT's
    own methods. Python offers no public call for this; the maps written here exist in Python 3.10 to 3.13.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # later 3.12 and 3.13: what `name in PeftType` looks at
        getattr(PeftType, "_hashable_values_").append(name)  # noqa: B009 (mypy does not know it)
    # Python 3.12+ resolves members through class attributes as well; EnumType.__setattr__ only refuses *re*assignment
    type.__setattr__(PeftType, name, member)
    assert isinstance(PeftType, enum.EnumMeta) and PeftType(name) is member
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Make PEFT know the method. Safe to call again (re-import, spawned worker, test runner)."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from .loading.load import watch_loads
    from .optimizers import take_over_helpers
    from .patterns import limit_peft
    from .saving.safe_save import watch_saves
    from .switching import watch_switching
    from .targets.trained_in_full import pass_over_other_adapters

    watch_loads()
    watch_saves()
    limit_peft()
    take_over_helpers()
    watch_switching()
    pass_over_other_adapters()

    peft_type = extend_peft_type()
    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
        return
    # A re-import (importlib.reload, a purged sys.modules) made new classes: point PEFT at those.
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_cls.prefix  # type: ignore[attr-defined]
