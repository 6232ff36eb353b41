"""What is compared: models of the same active size, and how they are trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from training.model import CausalLM
from training.thoughts import ThinkingLM
from v4export.config import Engram, ModelConfig, Reasoning
from v4export.config.hashes import layouts

VOCAB = 2048
PAD_ID = 2

PLAIN = ModelConfig(
    family="deepseek_v3",
    vocab_size=VOCAB,
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    q_lora_rank=64,
    kv_lora_rank=48,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    intermediate_size=320,
    moe_layers=(1, 2, 3),
    moe_intermediate_size=64,
    num_experts=16,
    num_shared_experts=1,
    experts_per_token=4,
    num_groups=1,
    topk_groups=1,
    scoring="sigmoid",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    routed_scaling_factor=2.0,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    yarn=None,
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_ids=(1,),
    pad_token_id=PAD_ID,
    dtype="float32",
)

#: Tables of two layers.
ENGRAM = Engram(
    layers=(1, 2), max_order=3, heads=4, width=16, buckets=10000, compressed_vocab=VOCAB, pad_token_id=PAD_ID
)


def configs(compressed_vocab: int) -> dict[str, ModelConfig]:
    """The models that can be compared, by name.

    ``plain``; ``engram``, whose feed-forwards are narrower by what the projections of its rows cost; ``experts``, with
    as many parameters as ``engram`` in more experts, and a dense layer narrower by what their routers cost.
    """
    engram = replace(ENGRAM, compressed_vocab=compressed_vocab)
    return {
        "plain": PLAIN,
        "engram": replace(PLAIN, family="v4x", engram=engram, moe_intermediate_size=56, intermediate_size=272),
        "experts": replace(PLAIN, num_experts=48, intermediate_size=288),
    }


def full(vocab: int, compressed_vocab: int) -> ModelConfig:
    """A small model of every part: latent attention, routed experts, Engram in two layers, and reasoning layers.

    Its own layers are few and narrow, so that they learn within minutes what they can. All of its rotations turn more
    than once in a window of 512 tokens, so that longer texts than it was trained on hold no angle that it has not seen.
    """
    return replace(
        PLAIN,
        family="v4x",
        vocab_size=vocab,
        hidden_size=96,
        num_layers=3,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=24,
        intermediate_size=192,
        moe_layers=(1, 2),
        moe_intermediate_size=48,
        num_experts=8,
        experts_per_token=2,
        rope_theta=100.0,
        dtype="bfloat16",
        engram=replace(ENGRAM, buckets=1500, compressed_vocab=compressed_vocab),
        reasoning=Reasoning(layers=2, steps=4, intermediate_size=384),
    )


def build(config: ModelConfig) -> CausalLM:
    """A model with random weights."""
    found = layouts(config.engram) if config.engram else {}
    rows = {layer: layout.rows for layer, layout in found.items()}
    return (ThinkingLM if config.thinks else CausalLM)(config, rows)


@dataclass(frozen=True)
class Size:
    """Numbers in a model: all of them, and those that are read for one token."""

    total: int
    active: int


def size(model: CausalLM) -> Size:
    """Active are all but the rows of embedding and tables that a token does not look up, and experts not its own."""
    c = model.config
    total = sum(one.numel() for one in model.parameters())
    idle = (c.vocab_size - 1) * c.hidden_size
    idle += (c.num_experts - c.experts_per_token) * c.expert_parameters * len(c.moe_layers)
    if c.engram:
        idle += sum(table.numel() - c.engram.row_dim for table in model.tables())
    return Size(total, total - idle)


@dataclass(frozen=True)
class Training:
    """Options of a training.

    Attributes:
        tokens: seen in all.
        window: tokens of a sequence.
        batch: sequences of a step.
        rate: largest learning rate of Adam.
        end: what part of it a cosine takes it to.
        warmup: part of the steps over which the rate rises.
        table_rate: what the rate of Engram tables is multiplied by.
        decay: of matrices other than tables.
        betas: of Adam.
        clip: largest norm of a gradient.
        balance: how far a router's bias moves a step.
        measurements: of the held-out loss, equally far apart.
    """

    tokens: int
    window: int = 256
    batch: int = 4
    rate: float = 6e-3
    end: float = 0.1
    warmup: float = 0.05
    table_rate: float = 5.0
    decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    balance: float = 2e-3
    measurements: int = 6

    @property
    def steps(self) -> int:
        """How many there are."""
        return max(1, self.tokens // (self.window * self.batch))
