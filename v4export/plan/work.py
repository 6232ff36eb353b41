"""The work that is planned: a model, a recipe, sizes and devices; what all stages reckon from."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from v4export.checkpoint.audit import Weight, in_graph
from v4export.checkpoint.count import remembers
from v4export.checkpoint.names import drafter_prefix, expected
from v4export.config import ModelConfig
from v4export.config.sharding import WHOLE, Sharding
from v4export.engine.options import DEFAULT_ENGINE, EngineOptions
from v4export.engine.scratch import scratch
from v4export.graphs.export import DRAFTING, PORTABLE, REMEMBERING, THINKING, THINKING_MIX, THINKING_STEP
from v4export.graphs.variants import kinds
from v4export.plan.sharding import Rank, ranks
from v4export.plan.weights import WeightBytes, weight_bytes
from v4export.precision import PLAIN, Precision
from v4export.state_contract import layer_bytes, may_skip_decoder

_MAX_CHUNK = 512
_SCRATCH_BYTES = 1 << 30
_DRAFTING_PARTS = 3
_SHARED = ("model.embed_tokens.", "lm_head.")
_ENDS = (*_SHARED, "model.norm.")


@dataclass(frozen=True)
class Work:
    """What is to be made and run.

    Attributes:
        config: the model.
        precision: the recipe.
        weights: how the checkpoint stores them, or would.
        max_seq_len: tokens of the longest sequence.
        options: what is asked of an engine.
        engine: whether there is one.
        verify: whether the graph is to be verified.
        cpu_weights: whether integer matrices are written once more for a CPU.
        copied: whether shards have to be copied, since OUT is on another file system or copies were asked for.
        sharding: over how many devices it is spread when it runs.
        plugins: whether kernels take the place of bodies in an engine.
        free: bytes of memory that are free, by which a verification decides whether it runs bodies, too.
    """

    config: ModelConfig
    precision: Precision
    weights: Mapping[str, Weight]
    max_seq_len: int
    options: EngineOptions = DEFAULT_ENGINE
    engine: bool = True
    verify: bool = True
    cpu_weights: bool = True
    copied: bool = False
    sharding: Sharding = WHOLE
    plugins: bool = False
    free: int = 0

    @functools.cached_property
    def bytes(self) -> WeightBytes:
        """Of weights, exactly."""
        return weight_bytes(self.weights, self.config, self.precision, self.cpu_weights)

    @functools.cached_property
    def stored(self) -> int:
        """Bytes of the checkpoint's tensors that are scanned: all but tables that are looked up."""
        return sum(w.data.nbytes + (w.scale.nbytes if w.scale else 0) for w in self.inside.values())

    @functools.cached_property
    def inside(self) -> dict[str, Weight]:
        """Those that are part of a graph."""
        return in_graph(self.weights, self.config)

    @functools.cached_property
    def graphs(self) -> dict[str, int]:
        """The graphs there will be, and the bytes of the weights of each."""
        each, config = self.bytes.each, self.config
        thought = {n: b for n, b in each.items() if n.startswith("model.reasoning.")}
        drafter = drafter_prefix(config) if config.drafts else None
        drafting = sum(b for n, b in each.items() if drafter and n.startswith(drafter))
        found = {PORTABLE: self.bytes.total - sum(thought.values()) - drafting}
        if may_skip_decoder(config):
            before = {n for n, one in expected(config).items() if remembers(one, config)}
            found[REMEMBERING] = sum(b for n, b in each.items() if n in before)
        if config.thinks:
            ends = sum(b for n, b in each.items() if n.startswith(_ENDS))
            mix = sum(b for n, b in thought.items() if ".talk_head." in n)
            step = sum(thought.values()) - mix + ends
            found |= {THINKING: step + mix, THINKING_STEP: step, THINKING_MIX: mix + ends}
        if drafter:
            found[DRAFTING] = drafting + sum(b for n, b in each.items() if n.startswith(_SHARED))
        return found

    @functools.cached_property
    def engines(self) -> dict[str, int]:
        """The graphs that engines are built of, and the bytes of the weights of each."""
        if not self.engine:
            return {}
        # Unrolled thoughts have no engine where their matrices are narrow (``graphs.export.engine_precisions``).
        left = {THINKING} if self.precision.linear.scaled else set()
        return {name: nbytes for name, nbytes in self.graphs.items() if name not in left}

    @functools.cached_property
    def parts(self) -> int:
        """Parts that are traced."""
        r = self.config.reasoning
        thoughts = (r.steps + 1) * r.layers + 2 if r and self.config.thinks else 0
        own = 2 + len(kinds(self.config, self.precision)) + may_skip_decoder(self.config)
        return own + thoughts + _DRAFTING_PARTS * self.config.drafts

    @property
    def batch(self) -> int:
        """Most sequences at once."""
        return self.options.max_batch

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return PLAIN[self.precision.activations].bits // 8

    @functools.cached_property
    def state(self) -> list[int]:
        """Bytes of the state of each layer, all sequences at their longest."""
        layers = range(self.config.state_layers + self.config.drafts)
        return [self.batch * layer_bytes(self.config, i, self.max_seq_len, self.itemsize) for i in layers]

    @functools.cached_property
    def scratch(self) -> int:
        """Bytes that a prefill step takes for what its tokens gather and score."""
        token = max(place.bytes for place in scratch(self.config, self.max_seq_len, self.itemsize, self.plugins))
        chunk = self.options.max_chunk or max(
            1, min(_MAX_CHUNK, self.max_seq_len, _SCRATCH_BYTES // (self.batch * token))
        )
        return chunk * self.batch * token

    @functools.cached_property
    def ranks(self) -> list[Rank]:
        """What a device of each stage of a pipeline holds."""
        return ranks(self.config, self.bytes.each, self.state, self.sharding)

    @functools.cached_property
    def widest(self) -> int:
        """Numbers of the widest matrix's row."""
        return max(w.shape[-1] for w in self.inside.values())

    @functools.cached_property
    def largest_layer(self) -> int:
        """Numbers in the largest layer, or embedding, or head."""
        sizes: dict[str, int] = {}
        for name, weight in self.inside.items():
            words = name.split(".")
            part = ".".join(words[:3]) if words[1] == "layers" else words[0] + words[-2]
            sizes[part] = sizes.get(part, 0) + math.prod(weight.shape)
        return max(sizes.values())
