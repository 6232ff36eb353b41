"""Cuts of weights: what of a matrix a rank has where a model is shared among several.

Rows of a matrix lie one behind the other, so some of them are a place in the checkpoint's file. Columns do not, and
are written once more, byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from v4export.checkpoint.audit import Weight
from v4export.config import ModelConfig
from v4export.config.sharding import Sharding, balanced
from v4export.errors import NotSupported

#: Who shares a matrix: ranks of attention, all ranks of a stage, or those that share an expert.
_TP, _WIDTH, _EXPERT = "tp", "width", "expert_parts"
_ROWS, _COLUMNS = 0, 1

#: Matrix within a layer -> what of it is cut, and among whom. Every other weight is whole in each rank.
_CUTS: dict[str, tuple[int, str]] = {
    "self_attn.q_proj": (_ROWS, _TP),
    "self_attn.q_b_proj": (_ROWS, _TP),
    "self_attn.kv_b_proj": (_ROWS, _TP),
    "self_attn.o_proj": (_COLUMNS, _TP),
    "self_attn.sinks": (_ROWS, _TP),
    "self_attn.o_a_proj": (_ROWS, _TP),
    "self_attn.o_b_proj": (_COLUMNS, _TP),
    "mlp.gate_proj": (_ROWS, _WIDTH),
    "mlp.up_proj": (_ROWS, _WIDTH),
    "mlp.down_proj": (_COLUMNS, _WIDTH),
    "mlp.shared_experts.gate_proj": (_ROWS, _WIDTH),
    "mlp.shared_experts.up_proj": (_ROWS, _WIDTH),
    "mlp.shared_experts.down_proj": (_COLUMNS, _WIDTH),
    "mlp.experts.gate_proj": (_ROWS, _EXPERT),
    "mlp.experts.up_proj": (_ROWS, _EXPERT),
    "mlp.experts.down_proj": (_COLUMNS, _EXPERT),
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT_NUMBER = re.compile(r"(?<=\.experts)\.(\d+)(?=\.)")

#: layer -> by group of ranks, the numbers of its experts
Deal = dict[int, tuple[tuple[int, ...], ...]]


def parts(name: str, sharding: Sharding) -> int:
    """Among how many ranks of a stage a weight is divided, by its Hub name; 1 of one that each of them has."""
    axis_and_sharers = _cut(name)
    if axis_and_sharers is None:
        return 1
    among = getattr(sharding, axis_and_sharers[1])
    return among * sharding.ep if axis_and_sharers[1] == _EXPERT else among


def layers_with(name: str, config: ModelConfig, sharding: Sharding) -> list[int]:
    """The layers beside which a weight lies, by its Hub name: its own, or the first or last of the ends.

    An embedding that is the head as well lies beside both, once where these are of one stage.
    """
    layer, last = _LAYER.match(name), config.num_layers - 1
    if layer:  # one that drafts lies beside the last
        return [min(int(layer[1]), last)]
    if not name.startswith("model.embed_tokens."):
        return [last]
    return [0, last] if config.tie_word_embeddings and sharding.pp > 1 else [0]


def stages(config: ModelConfig, each: Mapping[str, int], sharding: Sharding) -> list[tuple[int, int]]:
    """Layers of each stage, the first and the one behind the last, so that the fullest is as small as it can be.

    Args:
        config: the model.
        each: bytes of every weight, by Hub name.
        sharding: how the model is shared.
    """
    sizes = [0] * config.num_layers
    for name, nbytes in each.items():
        for layer in layers_with(name, config, sharding):
            sizes[layer] += -(-nbytes // parts(name, sharding))
    return balanced(sizes, sharding.pp)


def _cut(name: str) -> tuple[int, str] | None:
    """Along which axis a weight is cut, and who shares it; None of one that is whole in each rank."""
    layer = _LAYER.match(name)
    path = _EXPERT_NUMBER.sub("", name.removesuffix(".weight"))
    return _CUTS.get(path[layer.end() :]) if layer else None


@dataclass(frozen=True)
class Share:
    """What one rank of a stage holds.

    Attributes:
        sharding: of the model.
        number: of the rank within its stage.
        deal: which experts each group of ranks has.
    """

    sharding: Sharding
    number: int
    deal: Deal

    def experts(self, layer: int) -> tuple[int, ...]:
        """Numbers of the experts of a layer that are in this rank, wholly or in part."""
        return self.deal[layer][self.number // self.sharding.expert_parts]

    def of(self, weight: Weight) -> Weight | None:
        """A weight as this rank has it, or None where it has nothing of it.

        Raises:
            NotSupported: a cut would go through a block that shares a multiplier.
        """
        layer, expert = _LAYER.match(weight.name), _EXPERT_NUMBER.search(weight.name)
        if layer and expert and int(expert[1]) not in self.experts(int(layer[1])):
            return None
        found = _cut(weight.name)
        count = getattr(self.sharding, found[1]) if found else 1
        return cut(weight, found[0], self.number % count, count) if found and count > 1 else weight


def cut(weight: Weight, axis: int, index: int, count: int) -> Weight:
    """One of several equal parts of a weight's rows (axis 0) or columns (axis 1).

    Raises:
        NotSupported: a cut would go through a block that shares a multiplier.
    """
    size = weight.shape[axis] // count
    start, stop, block = index * size, (index + 1) * size, weight.block[axis]
    if weight.scale is not None and size % block:
        raise NotSupported(
            f"{weight.name} cannot be cut in {count}",
            f"{size} {('rows', 'columns')[axis]} each, and {block} share a multiplier",
            "take fewer ranks",
        )
    piece = f"@{index}of{count}"
    if axis == _COLUMNS:
        return replace(weight, shape=(weight.shape[0], size), piece=piece, columns=(start, stop))
    scale = weight.scale and weight.scale.part0(start // block, stop // block)
    shape = (size, *weight.shape[1:])
    return replace(weight, shape=shape, piece=piece, data=weight.data.part0(start, stop), scale=scale)


def deal_experts(
    layers: Sequence[int], experts: int, groups: int, load: dict[int, Sequence[float]] | None = None
) -> Deal:
    """As many experts of each layer for each group of ranks.

    Without a load they are dealt in order. With one, how often each expert of a layer is chosen, the busiest goes first
    to the group that has least to do and has room left, so that no group waits long for another.
    """

    def of(layer: int) -> tuple[tuple[int, ...], ...]:
        room = experts // groups
        if load is None or layer not in load:
            return tuple(tuple(range(g * room, (g + 1) * room)) for g in range(groups))
        hands: list[list[int]] = [[] for _ in range(groups)]
        busy = [0.0] * groups
        for expert in sorted(range(experts), key=lambda e: -load[layer][e]):
            group = min((g for g in range(groups) if len(hands[g]) < room), key=lambda g: (busy[g], g))
            hands[group].append(expert)
            busy[group] += load[layer][expert]
        return tuple(tuple(sorted(hand)) for hand in hands)

    return {layer: of(layer) for layer in layers}
