"""Fused decoding: `fuse.py` is the way in (`fuse_for_inference()`), `fused_layer.py` what it makes of an adapted linear."""
