"""DeepSeek-V4.1's attention: beside a window, entries that one layer makes and those after it read (CSA2).

An index source selects entries by keys that are projected from the entries themselves; layers after it reuse what it
selected. The last entries may be so many that selecting takes two levels: one layer keeps the best blocks of them, and
index sources after it select within those.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from v4export.config import FULL, ModelConfig
from v4export.model.attended import Attended
from v4export.model.compressor import projected, rotate_entries
from v4export.model.linear import Linear
from v4export.model.norm import RMSNorm
from v4export.model.rope import entry_rotation, rotate_last, rotation
from v4export.model.rows import keep
from v4export.model.window import WindowAttention
from v4export.plugins.candidate_select.op import candidate_select
from v4export.plugins.compress_tokens.op import compress_tokens
from v4export.plugins.index_reselect.op import index_reselect
from v4export.plugins.index_select.op import index_select
from v4export.plugins.sparse_attention.op import sparse_attention

#: What is shared of entries and of index keys: those held, and the new ones.
HELD, NEW = "held.", "new."


class SourceCompressor(nn.Module):
    """Latents of entries: a projection of one token, or of several pooled by a softmax over gates; then normed."""

    def __init__(self, config: ModelConfig, width: int, ratio: int, dtype: torch.dtype):
        super().__init__()
        self.ratio, self.width, self.dtype = ratio, width, dtype
        self.kv_proj = Linear(config.hidden_size, width, dtype)
        if ratio > 1:
            self.gate_proj = Linear(config.hidden_size, width, dtype)
        self.kv_norm = RMSNorm(width, config.rms_norm_eps, dtype)

    def forward(
        self, x_MD: Tensor, position_B: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents [B, U, W] of the entries that the step may complete, not rotated; rows of what they are made of."""
        B = position_B.shape[0]
        if self.ratio == 1:
            return self.kv_norm(projected(x_MD, B, self.kv_proj).to(self.dtype)), {}
        rows_BSP = projected(x_MD, B, self.kv_proj, self.gate_proj)
        even = rows_BSP.new_zeros(self.ratio, self.width)  # gates do not depend on a token's place
        pooled_BUW = compress_tokens(rows_BSP, state["open"], even, position_B, self.ratio, 1)
        return self.kv_norm(pooled_BUW.to(self.dtype)), {"open": rows_BSP}


class SharedIndexer(nn.Module):
    """Selects entries; where its layer makes them, it makes their index keys as well."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        index, c = config.indexer, config.compressed
        assert index is not None and c is not None and c.shared is not None and config.q_lora_rank is not None
        self.index, self.entries, self.layer, self.ratio = index, c.shared, layer, c.ratios[layer]
        if c.layers[layer] == FULL:
            self.wk = Linear(c.head_dim, index.head_dim, dtype)
            self.k_norm = RMSNorm(index.head_dim, config.rms_norm_eps, dtype)
        self.wq_b = Linear(config.q_lora_rank, index.num_heads * index.head_dim, dtype)
        self.weights_proj = Linear(config.hidden_size, index.num_heads, dtype)

    def keys(self, latent_BUW: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Index keys [B, U, I] of entries."""
        return rotate_entries(self.k_norm(self.wk(latent_BUW)), cos, sin)

    def forward(
        self, x_MD: Tensor, low_MQ: Tensor, shared: Mapping[str, Tensor], turn: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The selected entries int64 [M, K] or -1, and the blocks of entries that were kept, if the layer keeps any.

        Args:
            x_MD: normed hidden states.
            low_MQ: normed low-rank queries.
            shared: ``position``, the index keys held and new, and the candidates to select among.
            turn: cos and sin of the tokens.
        """
        index, entries = self.index, self.entries
        q_MHI = rotate_last(self.wq_b(low_MQ).reshape(-1, index.num_heads, index.head_dim), *turn)
        keys = (q_MHI, self.weights_proj(x_MD).float(), shared[NEW + "index_key"], shared[HELD + "index_key"])
        scale = (index.num_heads * index.head_dim) ** -0.5
        how = (shared["position"], index.top_k, self.ratio, scale)
        size = entries.candidate_block_size
        if entries.keeps_candidates(self.layer):
            return candidate_select(*keys, *how, entries.candidate_blocks, size)
        if entries.among_candidates(self.layer):
            return index_reselect(*keys, shared["candidates"], *how, size), None
        return index_select(*keys, *how), None


class SharedEntryAttention(WindowAttention):
    """The attention of a layer that makes entries, selects among them, or reads what others made and selected."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__(config, layer, dtype)
        c = config.compressed
        assert c is not None
        self.ratio = c.ratios[layer]
        makes = c.layers[layer] == FULL
        self.compressor = SourceCompressor(config, c.head_dim, self.ratio, dtype) if makes else None
        self.indexer = SharedIndexer(config, layer, dtype) if config.has_indexer(layer) else None

    def forward(
        self,
        x_MD: Tensor,
        shared: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        selected_MK: Tensor | None = None,
    ) -> Attended:
        """As ``WindowAttention.forward``; what no layer before it shares, the layer makes."""
        window = self.window(x_MD, shared)
        rows, made = self.made(x_MD, shared, state)
        shared = dict(shared) | {HELD + name: state[name] for name in made}
        shared |= {NEW + name: new for name, new in made.items()}
        candidates = None
        if self.indexer:
            own_MK, candidates = self.indexer(x_MD, window.low_MQ, shared, self.token_turn(shared))
            selected_MK = own_MK if selected_MK is None else selected_MK
        chosen_MK = shared["selected"] if selected_MK is None else selected_MK
        entries = (shared[NEW + "entry"], shared[HELD + "entry"], chosen_MK)
        rest = (shared["position"], self.sinks, self.ratio, self.config.softmax_scale, self.since(shared))
        z_MHW = sparse_attention(window.q_MHW, window.new_BSW, state["window"], *entries, *rest)
        return Attended(self.output(z_MHW, shared), window.kept | rows, selected_MK, candidates)

    def made(
        self, x_MD: Tensor, shared: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is kept of new entries, of their index keys and of tokens that entries are made of; and the former two
        as attention reads them. None where other layers make them.
        """
        if self.compressor is None:
            return {}, {}
        assert self.indexer is not None
        turn = rotation(shared, entry_rotation(self.ratio))
        latent_BUW, rows = self.compressor(x_MD, shared["position"], state)
        made = {"entry": rotate_entries(latent_BUW, *turn), "index_key": self.indexer.keys(latent_BUW, *turn)}
        kept = {name: keep(self.config, name, new, shared) for name, new in made.items()}
        tensors = {name: value for one in kept.values() for name, value in one.tensors.items()}
        return tensors | rows, {name: one.read for name, one in kept.items()}
