"""The compiled kernels of csrc/: `abi.py` is the header in ctypes, `loader.py` finds and loads the library, `calls.py` calls it.

Without the library, or without a GPU that it runs on, `ops` uses PyTorch instead; `why_not()` says why.
"""

from .abi import (
    ABI_VERSION,
    DTYPES,
    FAST_PATH,
    FAST_TOKENS,
    GENERIC_PATH,
    MAX_EXPERTS,
    MAX_GROUP,
    MAX_RANK,
    MAX_TOP_K,
    SM90_PATH,
    TUNING_IMPATIENT,
    TUNING_NARROW,
    TUNING_PERSISTENT,
    TUNING_REGISTERS,
    TUNING_STREAMING,
    TUNING_TWO_LAUNCHES,
    TUNING_WIDE,
)  # fmt: skip
from .calls import (
    Expansion,
    MergeTable,
    PackedGroup,
    empty_strided_cuda,
    expand,
    expansion,
    router,
    warn_if_generic,
    widen,
)  # fmt: skip
from .loader import available, build_info, check, give_workspace, library, log_once, why_not
