"""The ops that fused layers call: `torch.ops.loraswitch.*`, here by their short names.

`contract.py` has schemas, checks and fakes, `pytorch.py` the definition, `cuda.py` what calls the kernels, and
`dense_products.py` the products of which both are made for many tokens.
"""

import torch

from . import cuda, pytorch
from .contract import FEATURES_OF_A_SCALE, FLOATS, INT4_GROUPS, padded_to_tiles
from .cuda import drop_merge_tables, merge_table
from .dense_products import all_hidden, dense_linear, gated, group_hidden, wide

route = torch.ops.loraswitch.route.default
route_context = torch.ops.loraswitch.route_context.default
linear = torch.ops.loraswitch.linear.default
linear_4bit = torch.ops.loraswitch.linear_4bit.default
expand = torch.ops.loraswitch.expand.default
deltas = torch.ops.loraswitch.deltas.default
merge = torch.ops.loraswitch.merge.default

__all__ = [
    "FEATURES_OF_A_SCALE",
    "FLOATS",
    "INT4_GROUPS",
    "all_hidden",
    "deltas",
    "dense_linear",
    "drop_merge_tables",
    "expand",
    "gated",
    "group_hidden",
    "linear",
    "linear_4bit",
    "merge",
    "merge_table",
    "padded_to_tiles",
    "route",
    "route_context",
    "wide",
]
