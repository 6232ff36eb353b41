"""The vocabulary of reasoning layers, below ``model.reasoning.``; the layers themselves are dense layers as any.

The head that judges a thought is numbered as Quiet-STaR's, whose inputs are the plain hidden state and the thought's.
"""

from __future__ import annotations

from v4export.checkpoint.table import Table

#: What a thought's first step and its last enter with, in place of a token's embedding.
VECTORS: Table = {
    "start_embedding": (lambda c: (c.hidden_size,), "embedding"),
    "end_embedding": (lambda c: (c.hidden_size,), "embedding"),
}
TALK_HEAD: Table = {
    "talk_head.0.weight": (lambda c: (c.hidden_size, 2 * c.hidden_size), "projection"),
    "talk_head.0.bias": (lambda c: (c.hidden_size,), "projection"),
    "talk_head.2.weight": (lambda c: (c.hidden_size, c.hidden_size), "projection"),
    "talk_head.2.bias": (lambda c: (c.hidden_size,), "projection"),
    "talk_head.4.weight": (lambda c: (1, c.hidden_size), "projection"),
}
