"""How far a correct execution may be from the reference: derived from unit round-off and the lengths of the sums.

Every operation on the way through a part adds a rounding error, and errors of different operations are independent to
first order. A product with n terms in precision u has a relative error of about sqrt(n)*u (Higham and Mary, A new
approach to probabilistic rounding error analysis, SIAM J. Sci. Comput. 41, 2019); storing a result in a narrower type
of unit round-off v adds one error of v. A rounding error is uniform, hence the factor 1/sqrt(3) for its mean square.

So along a path of R stored results and sums of n_1, n_2, .. terms, the error relative to the path's own output is

    e = sqrt(R*v^2 + (n_1 + n_2 + ..)*u^2) / sqrt(3)

and a limit of CONFIDENCE times that is passed by chance about never. Over n tokens errors average out, which a defect
does not: the root mean square of error over expected error may not exceed 1 + (CONFIDENCE - 1)/sqrt(n). That is what
shows a constant that is a few percent off, whose effect on any one token is within 16-bit rounding. How the errors of a
block's two halves reach the hidden states that leave it is said in ``halves.py``.

Where a recipe rounds what matrices multiply to E4M3 by calibrated scales, both sides round, by the same scale, and an
error of d that a number has before it is enlarged. Numbers on both sides of a rounding boundary end up a spacing s
apart. A boundary lies between two numbers that are d apart with probability |d|/s, so the mean square error after
rounding is |d|/s * s^2 = |d|*s, far more than d^2. The spacing of E4M3 is 1/8 of the power of two below a number x, on
average over an octave 1/(16 ln 2) of |x|. For errors that have nothing to do with the numbers, and both of a bell
curve, whose mean magnitude is sqrt(2/pi) of their root mean square, an error of size e relative to a vector becomes

    sqrt(e * u)        u = (2/pi) / (16 ln 2) = 0.057

which is more than e as long as e < u. An error that is as large as the spacing itself stays what it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from v4export.config import FULL, HCA, ModelConfig
from v4export.precision import Precision
from v4export.state_contract import FLOAT32, state_tensors

#: Multiple of the expected error that a limit allows; covers what the derivation leaves out: the conditioning of
#: softmax, norms and cancelling sums, and the spread between tokens.
CONFIDENCE = 6.0

#: Unit round-off of float32, in which every sum is accumulated whatever the storage type.
ACCUMULATE = 2.0**-24

#: By how much rounding to E4M3 enlarges errors, as derived above.
E4M3_SPACING = 2 / math.pi / (16 * math.log(2))


def enlarged(error: Any, times: int) -> Any:
    """What an expected relative error, a number or a tensor, becomes by so many roundings to E4M3 one after another.

    Each takes e to sqrt(e * u) or leaves it as it is, whichever is more: n of them to u * (e/u) ** (1 / 2**n).
    """
    u = E4M3_SPACING
    if isinstance(error, torch.Tensor):
        return torch.maximum(error, u * (error / u) ** 0.5**times)
    return max(error, u * (error / u) ** 0.5**times)


def mean_limit(tokens: int) -> float:
    """Largest root mean square, over that many tokens, of error divided by expected error; CONFIDENCE for a single one.

    Sound graphs of the trained example have 0.5 to 0.75 in 16 bits and 0.2 to 0.35 in float32.
    """
    return 1 + (CONFIDENCE - 1) / math.sqrt(max(tokens, 1))


@dataclass(frozen=True)
class Path:
    """The longest way through a part of the network.

    Attributes:
        name: of the part.
        stored: results on the way that are stored in the activations' type.
        terms: lengths of the sums on the way, added up.
        products: how many of the sums multiply by a matrix that may be narrow.
        rounded: how many of them multiply something that may be rounded to E4M3.
    """

    name: str
    stored: int
    terms: int
    products: int
    rounded: int = 0

    def roundings(self, precision: Precision) -> int:
        """How often errors on the way are enlarged by rounding to E4M3."""
        return self.rounded if precision.inputs else 0

    def error(self, precision: Precision) -> float:
        """Expected error relative to the part's output; as if all of it arose ahead of the first rounding to E4M3."""
        return enlarged(self.unrounded(precision), self.roundings(precision))

    def unrounded(self, precision: Precision) -> float:
        """The same without such roundings."""
        # A narrow matrix is widened to the activations' type before it multiplies: one rounding more for each.
        stored = self.stored + (self.products if precision.quantised else 0)
        storage = 0.0 if precision.activations == "float32" else precision.roundoff
        return math.sqrt((stored * storage**2 + (self.terms + self.stored) * ACCUMULATE**2) / 3)

    def derivation(self, precision: Precision) -> str:
        """The limit's terms in one line."""
        times = self.roundings(precision)
        enlarged = f", enlarged by {times} roundings to E4M3" if times else ""
        return (
            f"{self.name}: {CONFIDENCE:g}*sqrt(({self.stored} stored * {precision.roundoff:.2g}^2 + "
            f"{self.terms} terms * {ACCUMULATE:.2g}^2)/3){enlarged} = {CONFIDENCE * self.error(precision):.2g}"
        )


def attention_path(config: ModelConfig, layer: int, tokens: int) -> Path:
    """Norm, query, score, softmax, mix, output, over sequences of so many tokens.

    Latent attention is absorbed: a product more on the way to the score, and one on the way to the value. That of
    DeepSeek-V4 norms and rotates its queries, rotates its result back, and has two output projections; as many keys are
    in a softmax as the window, the selected or all of the entries, and the sink are.
    """
    c = config
    if c.compressed is None:
        seen = min(tokens, c.indexer.top_k) if c.indexer else tokens
        low_rank = [c.q_lora_rank, c.q_lora_rank] if c.q_lora_rank else []  # its norm, and the second projection
        sums = [c.hidden_size, c.hidden_size, *low_rank, c.qk_nope_head_dim, c.latent_dim, seen, seen, c.kv_lora_rank]
        matrices = 3 + 2 * bool(c.q_lora_rank)
        # Queries pass one or two linear layers, and what comes out another; up-projections round no input.
        rounded = 2 + bool(c.q_lora_rank)
        return Path("attention", len(sums) + 3, sum(sums) + c.num_heads * c.v_head_dim, matrices, rounded)
    v, rank, ratio = c.compressed, c.q_lora_rank or 0, c.compressed.ratios[layer]
    entries = tokens // ratio if ratio else 0
    entries = min(entries, c.indexer.top_k) if c.indexer and v.layers[layer] != HCA else entries
    keys = min(tokens, v.window) + entries + 1
    query = [c.hidden_size, c.hidden_size, rank, rank]
    query += [v.head_dim] if v.norm_queries else []
    output = [c.num_heads * v.head_dim // v.o_groups, v.o_groups * v.o_lora_rank]
    sums = [*query, v.head_dim, keys, keys, *output]
    # Stored on the way: the query at each of its steps and once rotated, the mix, the mix rotated, two projections.
    return Path("attention", len(query) + 1 + 2 + len(output), sum(sums), 4, 3)  # the first of two outputs rounds none


def row_path(config: ModelConfig, layer: int, name: str) -> Path:
    """What is kept in a state tensor: a projection, normed and rotated; or pooled from projections, and then so."""
    width = config.hidden_size
    tensors = {t.name: t for t in state_tensors(config, layer)}
    tensor = tensors[name]
    if name == "latent":  # either normed or rotated
        return Path(name, 3, 2 * width + config.kv_lora_rank, 1, 1)
    if name == "engram":  # the gated value, normed
        memory = engram_path(config, layer)
        return Path(name, memory.stored + 1, memory.terms + width, memory.products, memory.rounded)
    if tensor.dtype == FLOAT32:  # projections of normed hidden states, which are stored, in float32
        return Path(name, 1, 2 * width, 0)
    if config.compressed and config.compressed.layers[layer] == FULL and name != "window":
        entry = tensors["entry"]
        pooled = [entry.every, entry.every] if entry.every > 1 else []
        # The latent is stored as it is pooled and once normed; an index key is projected from it, normed and rotated.
        keyed = [entry.width, tensor.width] if name == "index_key" else []
        return Path(name, 4 + len(keyed), sum([2 * width, *pooled, entry.width, *keyed]), 0)
    if tensor.every == 1:
        return Path(name, 4, 2 * width + tensor.width, 1, 1)
    slots = tensors[{"entry": "open", "index_key": "index_open"}[name]].ring or 0
    return Path(name, 4, 2 * width + 2 * slots + tensor.width, 0)


def engram_path(config: ModelConfig, layer: int) -> Path:
    """Projection of what was looked up, norms of a stream and a key, the gated value."""
    e = config.engram
    if e is None or not config.has_engram(layer):
        return Path("", 0, 0, 0)
    convolved = [config.hidden_size, e.kernel] if e.kernel else []
    return Path("engram", 3 + len(convolved), sum([e.row_dim, 3 * config.hidden_size, *convolved]), 1, 1)


def index_query_path(config: ModelConfig) -> Path:
    """Norm, two projections with a norm between them, rotation: an indexer's queries."""
    rank = config.q_lora_rank or 0
    return Path("index query", 5, 2 * config.hidden_size + 2 * rank, 2, 2)


def index_weight_path(config: ModelConfig) -> Path:
    """Norm and projection: the weights of an indexer's heads."""
    return Path("index weight", 2, 2 * config.hidden_size, 0)


def feed_forward_path(config: ModelConfig, layer: int) -> Path:
    """Norm, gate and up, product, down; for routed layers the weighted sum and the shared expert."""
    c = config
    inner = c.moe_intermediate_size if c.is_moe(layer) else c.intermediate_size
    sums = [c.hidden_size, c.hidden_size, max(inner, c.moe_intermediate_size * c.num_shared_experts)]
    routed = [c.hidden_size, c.experts_per_token] if c.is_moe(layer) else []  # the router's weights, the sum over K
    return Path("feed-forward", len(sums) + len(routed) + 2, sum(sums) + sum(routed), 2, 2)


def hyper_paths(config: ModelConfig) -> tuple[Path, Path, Path]:
    """Of hyper-connections: the stored input of a half, what its coefficients come from, and Sinkhorn's sums.

    The latter two are float32 whatever the precision: nothing is stored. Without hyper-connections nothing happens.
    """
    if config.hyper is None:
        return (Path("", 0, 0, 0),) * 3
    X = config.hyper.streams
    sinkhorn = 2 * config.hyper.sinkhorn_iterations * X
    return (
        Path("collapse", 1, X, 0),
        # A root halves the error of the norm's squares.
        Path("coefficients", 0, X * config.hidden_size * 5 // 4, 0),
        Path("Sinkhorn", 0, sinkhorn, 0),
    )


def head_path(config: ModelConfig) -> Path:
    """Final norm and logits; the head's matrix is never FP8. With hyper-connections a collapse before."""
    collapse = hyper_paths(config)[:2]
    return Path("head", 2 + sum(p.stored for p in collapse), 2 * config.hidden_size + sum(p.terms for p in collapse), 0)


def features_path(config: ModelConfig) -> Path:
    """The norm of what a layer that drafts goes on from; streams are handed over as they are."""
    return Path("norm", 1, config.hidden_size, 0) if config.hyper is None else Path("", 0, 0, 0)


def draft_entry_path(config: ModelConfig) -> Path:
    """A norm and a projection of either summand, and their sum."""
    return Path("entry", 2 if config.hyper is None else 3, 3 * config.hidden_size, 1)


#: Hidden states are stored after each half of a block.
RESIDUAL = Path("residual", 1, 1, 0)
