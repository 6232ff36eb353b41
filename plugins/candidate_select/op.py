"""candidate_select: index_select, and which blocks of keys later layers look for theirs in."""

from __future__ import annotations

import torch

from v4export.plugins.index_select.op import LOWEST, best_numbers, index_scores


@torch.library.custom_op("v4::candidate_select", mutates_args=())
def candidate_select(
    q_MHI: torch.Tensor,
    weights_MH: torch.Tensor,
    new_BUI: torch.Tensor,
    cache_BCI: torch.Tensor,
    position_B: torch.Tensor,
    top_k: int,
    ratio: int,
    scale: float,
    top_blocks: int,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first level of DeepSeek-V4.1's two-level top-k: the best keys, and the best blocks of them.

    Block b has keys ``block_size*b .. block_size*(b+1) - 1``, and the score of the best that the query sees. The block
    of the newest key comes first whatever its score.

    Args:
        q_MHI: as in ``index_select``, like all up to ``scale``.
        weights_MH: float32.
        new_BUI: keys that the step may complete, the first being number ``position // ratio``.
        cache_BCI: keys held, by number; those from ``position // ratio`` on are ignored.
        position_B: tokens already held by each sequence.
        top_k: most that a query attends to.
        ratio: tokens that a key stands for.
        scale: factor on the scores.
        top_blocks: most blocks for a query.
        block_size: keys of a block.

    Returns:
        int64 [M, min(top_k, C + U)]: what ``index_select`` returns. int64 [M, min(top_blocks, N)] of the N blocks of
        C + U keys: numbers of blocks by falling score, of equal ones the lower first; -1 where a query sees fewer.
    """
    scores = index_scores(q_MHI, weights_MH, new_BUI, cache_BCI, position_B, ratio, scale)
    number_N = torch.arange(-(-scores[0].shape[1] // block_size))
    # Rows of the cache that hold no key have numbers of new keys, and the lowest score.
    block_MN = torch.full((len(q_MHI), len(number_N)), LOWEST)
    block_MN = block_MN.scatter_reduce(1, scores[1] // block_size, scores[0], "amax")
    steps_S = torch.arange(len(q_MHI) // len(position_B))
    newest_M1 = (position_B[:, None] + steps_S + 1).view(-1, 1) // ratio - 1
    block_MN = block_MN.masked_fill(number_N == newest_M1 // block_size, float("inf"))
    blocks = best_numbers(block_MN, number_N.expand_as(block_MN), top_blocks)
    return best_numbers(*scores, top_k), blocks


@candidate_select.register_fake
def _(q_MHI, weights_MH, new_BUI, cache_BCI, position_B, top_k, ratio, scale, top_blocks, block_size):  # type: ignore[no-untyped-def]
    count = cache_BCI.shape[1] + new_BUI.shape[1]
    kept = torch.sym_min(top_k, count), torch.sym_min(top_blocks, (count + block_size - 1) // block_size)
    numbers, blocks = (q_MHI.new_empty((q_MHI.shape[0], K), dtype=torch.int64) for K in kept)
    return numbers, blocks
