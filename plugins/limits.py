"""What TensorRT takes at most. Bodies of custom ops are written within it; lint and preflight hold graphs to it."""

from __future__ import annotations

#: Elements of one tensor. TensorRT-RTX 1.7 builds larger ones; whether it addresses them has not been seen.
MAX_ELEMENTS = 2**31 - 1

#: K of TopK.
MAX_TOPK = 3840
