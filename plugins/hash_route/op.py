"""hash_route: experts named by a table for each token id, weighted as the router scores them."""

from __future__ import annotations

import torch

from v4export.plugins.moe_route.op import expert_scores, expert_weights


@torch.library.custom_op("v4::hash_route", mutates_args=())
def hash_route(
    logits_ME: torch.Tensor, table_VK: torch.Tensor, ids_M: torch.Tensor, scoring: str, norm: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up experts (DeepSeek-V4, arXiv 2606.19348, section 2.1).

    Args:
        logits_ME: router outputs, float32 [M, E].
        table_VK: experts of each token id, int64 [V, K].
        ids_M: token ids, int64 [M].
        scoring: as for ``moe_route``.
        norm: divide the K weights by their sum.
        scale: factor on the weights.

    Returns:
        weights float32 [M, K] and expert indices int64 [M, K].
    """
    idx_MK = table_VK[ids_M]
    return expert_weights(expert_scores(logits_ME, scoring), idx_MK, norm, scale), idx_MK


@hash_route.register_fake
def _(logits_ME, table_VK, ids_M, scoring, norm, scale):  # type: ignore[no-untyped-def]
    shape = (logits_ME.shape[0], table_VK.shape[1])
    return logits_ME.new_empty(shape), logits_ME.new_empty(shape, dtype=torch.int64)
