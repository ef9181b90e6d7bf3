"""Fused decoding: the same model, its adapted linears served by the fused ops.

From the top down: `fuse.py` (`fuse_for_inference()`, `unfuse()`), `shared_inputs.py` (which linears receive the same tensor),
`fused_layer.py` (what an adapted linear is meanwhile), `group_outputs.py` (what a group of linears computes),
`merged_weights.py` (strategy "merge"), `fused_group.py` (a group as the ops take it), `eager_launch.py` (a group as the kernels
take it, without a compiler), `live_linear.py` (a linear's present tensors and settings), `expert_casts.py` (experts in the dtype
of the backbone), `four_bit.py` (weights in 4 bits, as the kernels read them), `joined_weights.py` (weights of a group in one
matrix), `counted_writes.py` (parameters that count all writes), `capabilities.py` (what the ops can serve). Whether any of what
is kept is old: `fingerprint.py`, beside this folder.
"""
