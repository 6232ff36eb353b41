"""The vocabulary of a multi-token prediction layer: what it has besides the tensors of any layer.

A layer joins a token's embedding with what the model has made of the tokens before it. DeepSeek-V3 joins them in one
matrix, DeepSeek-V4 in two, of which one serves every stream. Embedding and head are the model's own.
"""

from __future__ import annotations

from v4export.checkpoint.table import Table

NORMS: Table = {
    "enorm.weight": (lambda c: (c.hidden_size,), "norm"),
    "hnorm.weight": (lambda c: (c.hidden_size,), "norm"),
}
JOINED: Table = {"eh_proj.weight": (lambda c: (c.hidden_size, 2 * c.hidden_size), "linear")}
APART: Table = {
    "e_proj.weight": (lambda c: (c.hidden_size, c.hidden_size), "linear"),
    "h_proj.weight": (lambda c: (c.hidden_size, c.hidden_size), "linear"),
}
FINAL_NORM: Table = {"shared_head.norm.weight": (lambda c: (c.hidden_size,), "norm")}
#: What some checkpoints have of the model's own once more.
COPIES = ("embed_tokens.weight", "shared_head.head.weight")
#: DeepSeek-V4's name of its first prediction layer.
STORED = "mtp.0."
#: What only drafters of later releases have, which go by another scheme.
DSPARK = r"mtp\.\d+\.(main_proj|main_norm|markov_head|confidence_head)\..+"
