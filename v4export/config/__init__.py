"""ModelConfig: what a model is, read from a Hugging Face config.json.

Readers are in ``config/readers.py``, one table per family. A key that no table knows is an error: a config that is
half understood is how a graph gets built that runs and is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from v4export.config.sharding import Sharding


@dataclass(frozen=True)
class Yarn:
    """YaRN frequency scaling (arXiv 2309.00071), with DeepSeek's two mscale exponents."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @staticmethod
    def magnitude(factor: float, mscale: float) -> float:
        """0.1 * mscale * ln(factor) + 1, or 1 where nothing is stretched."""
        return 1.0 if factor <= 1 or not mscale else 0.1 * mscale * math.log(factor) + 1.0

    @property
    def softmax_correction(self) -> float:
        """What the softmax scale is multiplied by: the square of the all-dim magnitude."""
        return self.magnitude(self.factor, self.mscale_all_dim) ** 2

    @property
    def rotary_magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        return self.magnitude(self.factor, self.mscale) / self.magnitude(self.factor, self.mscale_all_dim)


@dataclass(frozen=True)
class Fp8Blocks:
    """How a checkpoint stores FP8 weights: E4M3 with one multiplier per [rows, columns] block."""

    rows: int = 128
    columns: int = 128
    power_of_two: bool = False


@dataclass(frozen=True)
class Indexer:
    """The lightning indexer, which chooses what a query attends to (DeepSeek-V3.2, arXiv 2512.02556, section 2.1)."""

    num_heads: int
    head_dim: int  # I
    top_k: int  # most tokens or entries a query attends to


#: Kinds of attention layer of DeepSeek-V4: a sliding window; beside it the entries that an indexer selects (compressed
#: sparse attention); beside it all of few entries (heavily compressed attention).
WINDOW, CSA, HCA = "window", "csa", "hca"
#: Of DeepSeek-V4.1, beside a window: makes entries and selects among them; selects among those of a layer before it;
#: reads what a layer before it selected.
FULL, REINDEX, REUSE = "full", "reindex", "reuse"


@dataclass(frozen=True)
class SharedEntries:
    """Entries that some layers make and those after them read (CSA2 of DeepSeek-V4.1).

    The layers from the last that makes entries on are the decoder: their entries need none of their hidden states, so
    tokens that only have to be remembered need not pass them (causal encoder-decoder).
    """

    kv_sources: tuple[int, ...]  # layers that make entries and index keys
    index_sources: tuple[int, ...]  # layers that select; the others go by the last of them
    candidate_source: int | None  # keeps the best blocks of entries, among which later index sources select
    candidate_blocks: int = 0  # kept for a token
    candidate_block_size: int = 0  # entries of a block

    @property
    def decoder(self) -> int:
        """The first layer of the decoder."""
        return self.kv_sources[-1]

    def keeps_candidates(self, layer: int) -> bool:
        """Whether later index sources only select among what this layer keeps."""
        return layer == self.candidate_source

    def among_candidates(self, layer: int) -> bool:
        """Whether this index source selects among what another layer kept."""
        return self.candidate_source is not None and layer in self.index_sources and layer > self.candidate_source

    def first_layers(self, count: int) -> SharedEntries | None:
        """The same of the first ``count`` layers; None where they make no entries."""
        kv, index = (tuple(i for i in layers if i < count) for layers in (self.kv_sources, self.index_sources))
        kept = self.candidate_source if (self.candidate_source or 0) < count else None
        return replace(self, kv_sources=kv, index_sources=index, candidate_source=kept) if kv else None


@dataclass(frozen=True)
class CompressedAttention:
    """Attention over a sliding window and entries that stand for several tokens (arXiv 2606.19348, section 2.3)."""

    head_dim: int  # W: of a query head, and of the one key that is also the value
    window: int
    o_groups: int
    o_lora_rank: int
    layers: tuple[str, ...]  # the kind of each layer
    ratios: tuple[int, ...]  # tokens of an entry that a layer reads; 0 where it reads none
    rope_theta: float  # of layers with entries, which also have the YaRN scaling; window layers have neither
    shared: SharedEntries | None = None
    norm_queries: bool = True  # each query head is divided by its root mean square

    def first_layers(self, count: int) -> CompressedAttention:
        """The same of the first ``count`` layers."""
        shared = self.shared and self.shared.first_layers(count)
        return replace(self, layers=self.layers[:count], ratios=self.ratios[:count], shared=shared)


@dataclass(frozen=True)
class HyperConnections:
    """Manifold-constrained hyper-connections in place of the residual stream (arXiv 2512.24880)."""

    streams: int  # X
    sinkhorn_iterations: int
    eps: float
    single_pass: bool = False  # a half is collapsed by the shares that the half before it computed (DeepSeek-V4.1)


@dataclass(frozen=True)
class Engram:
    """Engram: rows of tables, found by hashes of the last few tokens, mixed into some layers (arXiv 2601.07372).

    Two forms: DeepSeek-V4.1's, and the paper's, which adds a causal convolution.
    """

    layers: tuple[int, ...]
    max_order: int  # n-grams of 2 .. max_order tokens are looked up
    heads: int  # hashes of an n-gram
    width: int  # of a row
    buckets: int  # every hash has the next unused prime number of them, from here on
    compressed_vocab: int  # different tokens, once those that differ in case, accents or white space are one
    pad_token_id: int  # stands for what is before the first token
    seed: int = 0  # of the hashes
    kernel: int = 0  # taps of the convolution; 0 is none
    dilation: int = 1  # tokens between its taps
    inside: bool = False  # the tables are part of the graph, which is given numbers of rows in place of rows

    def first_layers(self, count: int) -> Engram | None:
        """The same of the first ``count`` layers; None where none of them looks anything up."""
        layers = tuple(i for i in self.layers if i < count)
        return replace(self, layers=layers) if layers else None

    @property
    def hashes(self) -> int:
        """Rows that a layer looks up for a token."""
        return (self.max_order - 1) * self.heads

    @property
    def row_dim(self) -> int:
        """Width of all of them."""
        return self.hashes * self.width


#: What shows that a prediction is not sure: its entropy is above a threshold, in nats; or the difference of its two
#: largest probabilities is below one.
ENTROPY, MARGIN = "entropy", "margin"


@dataclass(frozen=True)
class Reasoning:
    """Reasoning layers: a hidden thought of a few steps, mixed into a prediction (after Quiet-STaR, arXiv 2403.09629).

    They are dense layers with latent attention, applied to thoughts alone; their sizes are the model's own where none
    are given.
    """

    layers: int  # r
    steps: int  # of a thought: the first enters with the start vector, the last with the end vector; 0 leaves it out
    num_heads: int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    intermediate_size: int | None = None
    confidence: str = ENTROPY  # what decides where to pause
    threshold: float = 1.0  # of it

    @property
    def sizes(self) -> dict[str, int]:
        """Those that are given, by the names of ``ModelConfig``'s fields."""
        others = ("layers", "steps", "confidence", "threshold")
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class ModelConfig:
    """A mixture-of-experts decoder: latent attention, or a window with compressed entries where ``compressed`` is set.

    Field comments give the letter of the project's legend (``v4export/model/__init__.py``).
    """

    family: str
    vocab_size: int
    hidden_size: int  # D
    num_layers: int
    num_heads: int  # H
    q_lora_rank: int | None
    kv_lora_rank: int  # L; 0 where attention is not latent, as the next but one and the one after that
    qk_nope_head_dim: int  # N
    qk_rope_head_dim: int  # R
    v_head_dim: int  # V
    intermediate_size: int  # F of a dense layer; 0 where there is none
    moe_layers: tuple[int, ...]  # indices of the layers with routed experts
    moe_intermediate_size: int  # F of an expert
    num_experts: int  # E
    num_shared_experts: int
    experts_per_token: int  # K
    num_groups: int  # G
    topk_groups: int
    scoring: str  # softmax | sigmoid | sqrtsoftplus
    topk_method: str  # greedy | group_limited_greedy | noaux_tc
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    num_mtp_layers: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "bfloat16"  # what the checkpoint says its unquantised tensors are
    fp8: Fp8Blocks | None = None
    fp4_experts: bool = False  # experts are stored as packed E2M1 with a power of two per 32 numbers
    indexer: Indexer | None = None
    compressed: CompressedAttention | None = None
    hyper: HyperConnections | None = None
    engram: Engram | None = None
    reasoning: Reasoning | None = None
    hash_layers: tuple[int, ...] = ()  # routed layers that choose experts by token id
    swiglu_limit: float | None = None  # gates are cut off above it, and up-projections beyond it on both sides
    image_token_id: int | None = None  # stands for an image, which is not exported
    left_out_layers: int = 0  # layers of the checkpoint after ``num_layers`` that the user does not want
    drafts: bool = False  # the first multi-token prediction layer is exported, too, to draft tokens with
    state_fp8: bool = False  # cached rows of attention are E4M3 with multipliers (``state_contract``)
    sharding: Sharding | None = None  # sizes are those of one rank of this (``of_a_rank``)

    @property
    def qk_head_dim(self) -> int:
        """Width of one query head: N + R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached row: L + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """Shape of a token's hidden state between layers: [D], or [X, D] with hyper-connections."""
        return (self.hyper.streams, self.hidden_size) if self.hyper else (self.hidden_size,)

    @property
    def thinks(self) -> bool:
        """Whether there are reasoning layers, and they are not left out."""
        return self.reasoning is not None and self.reasoning.steps > 0

    @property
    def thinker(self) -> ModelConfig:
        """The reasoning layers as a model of their own: dense layers with latent attention.

        Beside compressed attention they are rotated as its entries are, which have YaRN's frequencies without its
        magnitudes.
        """
        assert self.reasoning is not None
        theta, yarn = self.rope_theta, self.yarn
        if self.compressed:
            theta, yarn = self.compressed.rope_theta, yarn and replace(yarn, mscale=0.0, mscale_all_dim=0.0)
        own = replace(
            self, num_layers=self.reasoning.layers, moe_layers=(), hash_layers=(), rope_theta=theta, yarn=yarn
        )
        own = replace(own, indexer=None, compressed=None, hyper=None, engram=None, reasoning=None)
        return replace(own, **self.reasoning.sizes)  # type: ignore[arg-type]

    @property
    def drafter(self) -> ModelConfig:
        """The first multi-token prediction layer as a model of its own.

        It is a layer as the last ones are, with routed experts, and beside compressed attention one that sees a window
        alone. It hands on what it can itself go on from, as the model does.
        """
        c = self.compressed and replace(self.compressed, layers=(WINDOW,), ratios=(0,))
        moe = (0,) if self.moe_layers else ()
        own = replace(self, num_layers=1, moe_layers=moe, hash_layers=(), compressed=c, num_mtp_layers=0)
        return replace(own, indexer=None) if c else own

    @property
    def state_layers(self) -> int:
        """Layers that remember something: the model's own, and its reasoning layers behind them."""
        return self.num_layers + (self.reasoning.layers if self.reasoning and self.thinks else 0)

    @property
    def shared_experts_width(self) -> int:
        """Width of all shared experts of a layer together."""
        whole = self.moe_intermediate_size * self.num_shared_experts
        return whole // self.sharding.width if self.sharding else whole

    @property
    def expert_width(self) -> int:
        """Width of a routed expert."""
        parts = self.sharding.expert_parts if self.sharding else 1
        return self.moe_intermediate_size // parts

    def of_a_rank(self, sharding: Sharding) -> ModelConfig:
        """The sizes of what one rank computes; its router still knows all experts."""
        c = self.compressed
        return replace(
            self,
            num_heads=self.num_heads // sharding.tp,
            intermediate_size=self.intermediate_size // sharding.width,
            compressed=c and replace(c, o_groups=c.o_groups // sharding.tp),
            sharding=sharding,
        )

    @property
    def expert_parameters(self) -> int:
        """Numbers in one routed expert's three matrices."""
        return 3 * self.moe_intermediate_size * self.hidden_size

    @property
    def softmax_scale(self) -> float:
        """1/sqrt of a query head's width, with YaRN's correction in latent attention where the config has it."""
        if self.compressed:
            return self.compressed.head_dim**-0.5
        return self.qk_head_dim**-0.5 * (self.yarn.softmax_correction if self.yarn else 1.0)

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has routed experts."""
        return layer in self.moe_layers

    def has_engram(self, layer: int) -> bool:
        """Whether a layer begins with a look-up."""
        return self.engram is not None and layer in self.engram.layers

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer selects what is attended to."""
        if self.compressed is None:
            return self.indexer is not None
        return self.compressed.layers[layer] in (CSA, FULL, REINDEX)

    def is_decoder(self, layer: int) -> bool:
        """Whether tokens that only have to be remembered need not pass a layer."""
        shared = self.compressed and self.compressed.shared
        return bool(shared) and layer >= shared.decoder  # type: ignore[union-attr]

    def kind(self, layer: int) -> str:
        """Which kind of block a layer is; blocks of a kind differ in their weights alone."""
        return " ".join(word for word in self._kind(layer) if word)

    def _kind(self, layer: int) -> Iterator[str]:
        c = self.compressed
        shared = c.shared if c else None
        if c is None:
            yield "routed" if self.is_moe(layer) else "dense"
        elif shared is None:
            yield c.layers[layer]
        else:
            yield c.layers[layer] + (f"/{c.ratios[layer]}" if c.ratios[layer] else "")
            yield "decoder" if self.is_decoder(layer) else ""
            yield "keeping candidates" if shared.keeps_candidates(layer) else ""
            yield "among candidates" if shared.among_candidates(layer) else ""
        yield "hash" if layer in self.hash_layers else ""
        yield "engram" if self.has_engram(layer) else ""

    @property
    def kinds(self) -> dict[str, int]:
        """The kinds of block that occur, and the first layer of each."""
        first: dict[str, int] = {}
        for layer in range(self.num_layers):
            first.setdefault(self.kind(layer), layer)
        return first

    def first_layers(self, count: int) -> ModelConfig:
        """The model cut off after its first ``count`` layers, its head kept."""
        moe, hashed = (tuple(i for i in layers if i < count) for layers in (self.moe_layers, self.hash_layers))
        compressed = self.compressed and self.compressed.first_layers(count)
        engram = self.engram and self.engram.first_layers(count)
        left_out = self.left_out_layers + self.num_layers - count
        return replace(
            self,
            num_layers=count,
            moe_layers=moe,
            hash_layers=hashed,
            compressed=compressed,
            engram=engram,
            left_out_layers=left_out,
        )
