"""One decoder block, and the two ends of the stack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from v4export.config import CSA, FULL, HCA, REINDEX, REUSE, WINDOW, ModelConfig
from v4export.config.sharding import Sharding
from v4export.model.attended import Attended
from v4export.model.engram import EngramMemory
from v4export.model.linear import Linear, parameter
from v4export.model.mla import LatentAttention
from v4export.model.moe import MixtureOfExperts, SwiGLU
from v4export.model.norm import RMSNorm
from v4export.model.residual import HyperConnection, HyperHead, Residual, collapse, first_shares
from v4export.model.rope import angles, entry_rotation, rotations, token_rotation
from v4export.model.rows import IN_PLACE_OF, read
from v4export.model.shared_entries import HELD, NEW, SharedEntryAttention
from v4export.model.window import EntryAttention, WindowAttention
from v4export.plugins.all_reduce.op import all_reduce
from v4export.state_contract import kept_as, state_tensors

#: How the names of a layer's state tensors among what its block reads begin.
STATE = "state."


class BlockOutput(NamedTuple):
    """What a block returns.

    Attributes:
        hidden: [M, D], or [M, X, D] with hyper-connections.
        rows: new rows of each state tensor of the layer, by name.
        experts: taken, [M, K]; None in a dense layer.
        selected: tokens or entries that the layer's indexer selected, [M, K]; None without one.
        candidates: blocks of entries that it kept for later layers, [M, K], or None.
        pre: shares of the streams in the next layer's input, float32 [M, X], where that goes by them.
    """

    hidden: torch.Tensor
    rows: dict[str, torch.Tensor]
    experts: torch.Tensor | None = None
    selected: torch.Tensor | None = None
    candidates: torch.Tensor | None = None
    pre: torch.Tensor | None = None

    def named(self) -> dict[str, torch.Tensor]:
        """All that there is, rows by their own names."""
        rest = {name: value for name, value in self._asdict().items() if name != "rows" and value is not None}
        return rest | self.rows


class Embed(nn.Module):
    """Token ids to hidden states, and the rotations that blocks share."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        table = parameter(config.vocab_size, config.hidden_size, dtype=dtype)
        self.embed_tokens = nn.ParameterDict({"weight": table})

    def forward(self, ids_BS: torch.Tensor, position_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As ``embed_returns`` says: hidden states [M, D] or [M, X, D]; cos and sin of each rotation; shares."""
        hidden = self.embedded(ids_BS)
        if self.config.hyper:
            hidden = hidden.unsqueeze(1).expand(-1, self.config.hyper.streams, -1).contiguous()
        shares = [first_shares(hidden)] if self.config.hyper and self.config.hyper.single_pass else []
        return hidden, *self.turned(ids_BS, position_B), *shares

    def embedded(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Rows of the table, [M, D]."""
        return nn.functional.embedding(ids_BS.reshape(-1), self.embed_tokens["weight"])

    def turned(self, ids_BS: torch.Tensor, position_B: torch.Tensor) -> list[torch.Tensor]:
        """cos and sin of each rotation."""
        width = self.config.qk_rope_head_dim
        pairs = [angles(one, width, position_B, ids_BS.shape[1]) for one in rotations(self.config).values()]
        return [part for pair in pairs for part in pair]

    def shared(
        self,
        ids_BS: torch.Tensor,
        position_B: torch.Tensor,
        decoder_start_B: torch.Tensor | None = None,
        **given: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Hidden states, and everything else that blocks read, by name; ``given`` is what else a subclass takes."""
        hidden, *rest = self(ids_BS, position_B, **given)
        shared = dict(zip(embed_returns(self.config)[1:], rest, strict=True))
        start_B = torch.zeros_like(position_B) if decoder_start_B is None else decoder_start_B
        return hidden, shared | {"input_ids": ids_BS, "position": position_B, "decoder_start": start_B}


def embed_returns(config: ModelConfig) -> list[str]:
    """What the embedding returns."""
    turned = [f"{part}.{name}" for name in rotations(config) for part in ("cos", "sin")]
    return ["hidden", *turned, *(["pre"] if config.hyper and config.hyper.single_pass else [])]


# kind of attention -> rows of layers before it that it reads
_READS_OF_OTHERS = {REINDEX: ("entry", "index_key"), REUSE: ("entry",)}


def block_reads(config: ModelConfig, layer: int) -> list[str]:
    """What a block reads besides hidden states and its own state."""
    c = config.compressed
    kind, ratio = (c.layers[layer], c.ratios[layer]) if c else (WINDOW, 0)
    turned = {token_rotation(config, layer), *([entry_rotation(ratio)] if kind in (CSA, HCA, FULL) else [])}
    names = [
        *(["input_ids"] if layer in config.hash_layers else []),
        *(["engram"] if config.has_engram(layer) else []),
        *(["pre"] if config.hyper and config.hyper.single_pass else []),
        *(["decoder_start"] if config.is_decoder(layer) else []),
        *(f"{when}{name}" for name in kept_as(config, *_READS_OF_OTHERS.get(kind, ())) for when in (HELD, NEW)),
        *(["selected"] if kind == REUSE else []),
        *(["candidates"] if c and c.shared and c.shared.among_candidates(layer) else []),
    ]
    return ["position", *names, *(f"{part}.{name}" for name in sorted(turned) for part in ("cos", "sin"))]


def block_returns(config: ModelConfig, layer: int) -> list[str]:
    """What a block returns, named as ``BlockOutput.named`` does."""
    shared = config.compressed and config.compressed.shared
    there = {
        "experts": config.is_moe(layer),
        "selected": config.has_indexer(layer),
        "candidates": bool(shared) and shared.keeps_candidates(layer),  # type: ignore[union-attr]
        "pre": config.hyper is not None and config.hyper.single_pass,
    }
    rows = [tensor.name for tensor in state_tensors(config, layer)]
    return ["hidden", *rows, *(name for name, is_there in there.items() if is_there)]


def block_shares(config: ModelConfig, layer: int) -> dict[str, str]:
    """What later layers read of a block: their name for it, and its own among what it returns and its state."""
    if layer >= config.num_layers:
        return block_shares(config.drafter, layer - config.num_layers)
    own = [name for name in block_returns(config, layer) if name in ("hidden", "pre", "selected", "candidates")]
    shares = {name: name for name in own}
    if config.compressed and config.compressed.layers[layer] == FULL:
        for name in kept_as(config, "entry", "index_key"):
            shares |= {HELD + name: STATE + name, NEW + name: name}
    return shares


class Block(nn.Module):
    """Engram where there is any; norm, attention, residual; norm, feed-forward, residual.

    Of a model shared among ranks, what each adds is summed before it meets the residual stream, which all of them hold.

    Args:
        config: the model.
        layer: index of the layer, which decides its kind.
        dtype: of activations and weights.
        absorbed: form of latent attention.
        experts: how many experts to hold; fewer than the router knows is enough to trace.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        dtype: torch.dtype = torch.float32,
        absorbed: bool = True,
        experts: int | None = None,
    ):
        super().__init__()
        c = config
        self.engram = EngramMemory(c, layer, dtype) if c.has_engram(layer) else None
        self.attn_hc = HyperConnection(c) if c.hyper else Residual()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.self_attn = self._attention(c, layer, dtype, absorbed)
        self.ffn_hc = HyperConnection(c) if c.hyper else Residual()
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.sharding = c.sharding or Sharding()
        self.routed = c.is_moe(layer)
        self.mlp: nn.Module = (
            MixtureOfExperts(c, dtype, c.num_experts if experts is None else experts, layer in c.hash_layers)
            if self.routed
            else SwiGLU(c.hidden_size, c.intermediate_size, dtype, c.swiglu_limit)
        )

    @staticmethod
    def _attention(config: ModelConfig, layer: int, dtype: torch.dtype, absorbed: bool) -> nn.Module:
        c = config.compressed
        if c is None:
            return LatentAttention(config, dtype, absorbed)
        kinds = {WINDOW: WindowAttention, CSA: EntryAttention, HCA: EntryAttention}
        return kinds.get(c.layers[layer], SharedEntryAttention)(config, layer, dtype)

    def forward(
        self,
        x: torch.Tensor,
        shared: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor],
        chosen_MK: torch.Tensor | None = None,
        selected_MK: torch.Tensor | None = None,
        rows: Mapping[str, torch.Tensor] | None = None,
    ) -> BlockOutput:
        """One step of one block; ``chosen_MK`` overrules the router, ``selected_MK`` the indexer.

        Attention reads ``rows`` in place of new ones of their names, which are returned all the same.
        """
        shared, state = read(shared, x.dtype), read(state, x.dtype)
        shared |= {IN_PLACE_OF + name: given for name, given in (rows or {}).items()}
        x, remembered = self.remember(x, shared, state)
        entered = self.attn_hc.enter(x, shared.get("pre"))
        attended: Attended = self.self_attn(self.input_layernorm(entered.z_MD), shared, state, selected_MK)
        added_MD = attended.output
        if self.sharding.tp > 1:
            added_MD = all_reduce(added_MD, self.sharding.width)
        x = self.attn_hc.leave(x, added_MD, *entered.passing)
        entered = self.ffn_hc.enter(x, entered.pre_MX)
        normed, idx_MK = self.post_attention_layernorm(entered.z_MD), None
        if self.routed:
            y_MD, idx_MK = self.mlp(normed, shared.get("input_ids"), chosen_MK)
        else:
            y_MD = self.mlp(normed)
        if self.sharding.width > 1:
            y_MD = all_reduce(y_MD, self.sharding.width)
        hidden = self.ffn_hc.leave(x, y_MD, *entered.passing)
        kept = attended.rows | remembered
        return BlockOutput(hidden, kept, idx_MK, attended.selected, attended.candidates, entered.pre_MX)

    def remember(
        self, x: torch.Tensor, shared: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The hidden states with what Engram adds, and new rows of its state."""
        if self.engram is None:
            return x, {}
        return self.engram(x, shared["engram"], shared["position"], state.get("engram"))

    def entries(
        self, x: torch.Tensor, shared: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """All that a layer that makes entries needs to do for tokens that are only remembered: its new rows."""
        assert isinstance(self.self_attn, SharedEntryAttention)
        x, remembered = self.remember(x, shared, state)
        z_MD = self.attn_hc.enter(x, shared.get("pre")).z_MD
        kept, _ = self.self_attn.made(self.input_layernorm(z_MD), shared, state)
        return kept | remembered


class Head(nn.Module):
    """Final norm and logits of the wanted positions."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        if config.hyper and not config.hyper.single_pass:
            self.hc_head = HyperHead(config, config.hyper)
        self.config, self.hidden_shape = config, config.hidden_shape
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype)

    def forward(
        self, hidden: torch.Tensor, logits_at_BQ: torch.Tensor, pre_MX: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """As ``head_returns`` says, of steps ``logits_at`` (0 .. S-1) of every sequence; ``pre_MX`` where single-pass.

        Logits float32 [B, Q, V]; where thoughts may follow, also the hidden states [B, Q, D] that they start from;
        where drafts may, what they go on from, of all tokens of the step, [B, S, D], or the streams [B, S, X, D].
        """
        drafts_from = [self.features(hidden).unflatten(0, (logits_at_BQ.shape[0], -1))] if self.config.drafts else []
        if pre_MX is not None:
            assert self.config.hyper is not None
            pre_MX = _at(pre_MX, logits_at_BQ, (self.config.hyper.streams,))
        trunk_MD = self.collapsed(_at(hidden, logits_at_BQ, self.hidden_shape), pre_MX)
        logits = self.logits(self.norm(trunk_MD)).unflatten(0, logits_at_BQ.shape)
        thinks_from = [trunk_MD.unflatten(0, logits_at_BQ.shape)] if self.config.thinks else []
        return logits, *thinks_from, *drafts_from

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """What a layer that drafts is given of the last hidden states: the streams as they are, or else normed."""
        return hidden if self.config.hyper else self.norm(hidden)

    def collapsed(self, hidden: torch.Tensor, pre_MX: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states without streams, [M, D]."""
        if pre_MX is not None:
            return collapse(hidden, pre_MX)
        return self.hc_head(hidden) if self.config.hyper else hidden

    def logits(self, normed_MD: torch.Tensor) -> torch.Tensor:
        """float32 [M, V]."""
        return self.lm_head(normed_MD).float()


def head_reads(config: ModelConfig) -> list[str]:
    """What the head reads, in order."""
    return ["hidden", "logits_at", *(["pre"] if config.hyper and config.hyper.single_pass else [])]


def head_returns(config: ModelConfig) -> list[str]:
    """What it returns, in order."""
    return ["logits", *(["trunk"] if config.thinks else []), *(["features"] if config.drafts else [])]


def _at(values: torch.Tensor, logits_at_BQ: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Of values [M, *shape] of every token those that are wanted, [B*Q, *shape]."""
    width = math.prod(shape)
    every_BSP = values.reshape(logits_at_BQ.shape[0], -1, width)
    return every_BSP.gather(1, logits_at_BQ[..., None].expand(-1, -1, width)).reshape(-1, *shape)
