"""What PEFT calls us and ours: LORASWITCH among its methods, and the prefix of tensors in its files.

`PeftType` is a closed enum, and this is the one place that reaches into it.
"""

from __future__ import annotations

import enum

from peft.utils.peft_types import PeftType

NAME = "LORASWITCH"
PREFIX = "base_model.model."  # what PEFT puts before the names of the backbone's modules


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
    if hasattr(PeftType, "_hashable_values_"):  # late releases of Python 3.12 and 3.13 look here for `name in PeftType`
        getattr(PeftType, "_hashable_values_").append(name)  # noqa: B009 (mypy does not know it)
    # Python 3.12+ resolves members through class attributes as well; EnumType.__setattr__ only refuses *re*assignment
    type.__setattr__(PeftType, name, member)
    assert isinstance(PeftType, enum.EnumMeta) and PeftType(name) is member
    return member
