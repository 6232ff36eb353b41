"""What each device holds, where a model is shared among several: ``checkpoint/pieces.py`` says who has what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from v4export.checkpoint.pieces import layers_with, parts, stages
from v4export.config import ModelConfig
from v4export.config.sharding import Sharding


def share(name: str, nbytes: int, sharding: Sharding) -> int:
    """Bytes of a weight that one device holds, rounded up."""
    return -(-nbytes // parts(name, sharding))


@dataclass(frozen=True)
class Rank:
    """What each device of a stage of a pipeline holds.

    Attributes:
        layers: the first, and the one behind the last.
        weights: bytes.
        state: bytes.
    """

    layers: tuple[int, int]
    weights: int
    state: int

    @property
    def nbytes(self) -> int:
        """Both."""
        return self.weights + self.state


def ranks(config: ModelConfig, each: Mapping[str, int], state: Sequence[int], sharding: Sharding) -> list[Rank]:
    """A device of each stage.

    Args:
        config: the model.
        each: bytes of every weight, by name.
        state: bytes of the state of each layer; reasoning layers, or the one that drafts, come last.
        sharding: how it is shared.

    Raises:
        BadInput: the model cannot be shared so.
    """
    sharding.check(config)
    last = config.num_layers - 1
    weights = [0] * config.num_layers
    for name, nbytes in each.items():
        for layer in layers_with(name, config, sharding):
            weights[layer] += share(name, nbytes, sharding)
    held = [*state[:last], sum(state[last:])]
    return [Rank((a, b), sum(weights[a:b]), sum(held[a:b])) for a, b in stages(config, each, sharding)]
