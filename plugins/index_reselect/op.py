"""index_reselect: index_select among the keys of some blocks."""

from __future__ import annotations

import torch

from v4export.plugins.index_select.op import LOWEST, best_numbers, index_scores


@torch.library.custom_op("v4::index_reselect", mutates_args=())
def index_reselect(
    q_MHI: torch.Tensor,
    weights_MH: torch.Tensor,
    new_BUI: torch.Tensor,
    cache_BCI: torch.Tensor,
    blocks_MB: torch.Tensor,
    position_B: torch.Tensor,
    top_k: int,
    ratio: int,
    scale: float,
    block_size: int,
) -> torch.Tensor:
    """The second level of DeepSeek-V4.1's two-level top-k: ``index_select`` among the keys of the query's blocks.

    Args:
        q_MHI: as in ``index_select``, like all but the blocks.
        weights_MH: float32.
        new_BUI: keys that the step may complete, the first being number ``position // ratio``.
        cache_BCI: keys held, by number; those from ``position // ratio`` on are ignored.
        blocks_MB: numbers of the blocks each query looks in, int64, in any order; -1 is none.
        position_B: tokens already held by each sequence.
        top_k: most that a query attends to.
        ratio: tokens that a key stands for.
        scale: factor on the scores.
        block_size: keys of a block.

    Returns:
        int64 [M, min(top_k, C + U)]: numbers by falling score, of equal ones the lower first; -1 where the blocks have
        fewer that the query can see.
    """
    score_MN, number_MN = index_scores(q_MHI, weights_MH, new_BUI, cache_BCI, position_B, ratio, scale)
    count = -(-score_MN.shape[1] // block_size)
    # Whatever is no block is marked in a last column, which no key has.
    marked = torch.zeros(len(q_MHI), count + 1, dtype=torch.bool)
    marked = marked.scatter(1, blocks_MB.masked_fill(blocks_MB < 0, count), True)
    return best_numbers(score_MN.masked_fill(~marked.gather(1, number_MN // block_size), LOWEST), number_MN, top_k)


@index_reselect.register_fake
def _(q_MHI, weights_MH, new_BUI, cache_BCI, blocks_MB, position_B, top_k, ratio, scale, block_size):  # type: ignore[no-untyped-def]
    K = torch.sym_min(top_k, cache_BCI.shape[1] + new_BUI.shape[1])
    return q_MHI.new_empty((q_MHI.shape[0], K), dtype=torch.int64)
