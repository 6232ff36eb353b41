"""The graphs of a model that is shared among devices: one for each rank, of its stage's layers and its own pieces."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.names import Expected, expected
from v4export.checkpoint.pieces import Deal, Share, deal_experts, stages
from v4export.config import ModelConfig
from v4export.config.sharding import Sharding
from v4export.errors import BadInput, NotSupported
from v4export.graphs.lint import Lint, lint
from v4export.graphs.shards import Placed
from v4export.graphs.split import split
from v4export.graphs.stamp import stamp
from v4export.graphs.trace import CALLER, DECODER_START, Part
from v4export.graphs.weights import as_a_rank_names
from v4export.precision import Precision

_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")


def rank_graph(graph: str, rank: int) -> str:
    """Name of a rank's portable graph."""
    return f"{graph.removesuffix('.onnx')}.rank{rank}.onnx"


@dataclass(frozen=True)
class Plan:
    """Who has what.

    Attributes:
        sharding: of the model.
        stages: of each, the first of its layers and the first behind them.
        deal: experts of each group of a stage's ranks, by layer.
    """

    sharding: Sharding
    stages: tuple[tuple[int, int], ...]
    deal: Deal

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Plan:
        """What a manifest says."""
        deal = {int(layer): tuple(map(tuple, hands)) for layer, hands in found["deal"].items()}
        return cls(Sharding(**found["sharding"]), tuple(map(tuple, found["stages"])), deal)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        precision: Precision,
        sharding: Sharding,
        load: Mapping[int, Sequence[float]] | None = None,
    ) -> Plan:
        """Stages as equal in bytes as they can be; experts in order, or by their ``load``.

        Raises:
            BadInput, NotSupported: the model cannot be shared so, or the load is not that of its experts.
        """
        sharding.check(config)
        missing = {
            "reasoning layers": config.thinks,
            "attention with biases": config.attention_bias and sharding.tp > 1,
        }
        missing["inputs that are rounded"] = precision.inputs
        if any(missing.values()):
            what = next(what for what, is_there in missing.items() if is_there)
            fix = "leave them out: --think-steps 0" if config.thinks else "take one rank"
            raise NotSupported(f"{what} are not shared among ranks", f"{sharding}, {precision.name}", fix)
        for layer, counts in (load or {}).items():
            if layer not in config.moe_layers or len(counts) != config.num_experts or not min(counts) >= 0:
                raise BadInput(
                    f"the load of layer {layer}'s experts is not one",
                    f"{len(counts)} counts from {min(counts, default=0)} on; {config.num_experts} experts a layer",
                    "count how often each expert of a routed layer is chosen",
                )
        dealt = deal_experts(config.moe_layers, config.num_experts, sharding.ep, load)
        return cls(sharding, tuple(stages(config, _bytes_of(config, precision), sharding)), dealt)

    def shares(self) -> list[Share]:
        """What each rank of a stage holds of its layers."""
        return [Share(self.sharding, number, self.deal) for number in range(self.sharding.width)]

    def stage_of(self, rank: int) -> int:
        """Stage of a rank, by its number among all."""
        return rank // self.sharding.width


def pieces(weights: Sequence[Weight], plan: Plan) -> tuple[list[Weight], list[list[Weight]]]:
    """Every piece that some rank has, each once; and those of each rank of a stage, whatever its layers."""
    each = [[own for weight in weights if (own := share.of(weight))] for share in plan.shares()]
    return list({(w.name, w.piece): w for own in each for w in own}.values()), each


def stamp_ranks(
    config: ModelConfig,
    precision: Precision,
    parts: Mapping[str, Part],
    placed: Mapping[str, Placed],
    base: Path,
    plan: Plan,
    each: Sequence[Sequence[Weight]],
) -> tuple[list[ir.Model], Lint]:
    """The portable graph of every rank, and what was proved of them together.

    Args:
        config: the model.
        precision: of the graph.
        parts: of one rank's sizes.
        placed: where pieces lie.
        base: folder that locations are relative to.
        plan: who has what.
        each: pieces of each rank of a stage.
    """
    own, width = config.of_a_rank(plan.sharding), plan.sharding.width
    found: list[ir.Model] = [ir.Model(ir.Graph([], [], nodes=[]), ir_version=1)] * plan.sharding.ranks
    proved = []
    for share, some in zip(plan.shares(), each, strict=True):
        known = dict(placed) | as_a_rank_names(placed, some)
        whole = ir.to_proto(stamp(own, precision, parts, known, base, share))
        for number, (stage, ends) in enumerate(zip(split_stages(whole, plan.stages), plan.stages, strict=True)):
            graph = found[number * width + share.number] = ir.from_proto(stage)
            proved.append(lint(graph, own, precision, parts, range(*ends), share.experts))
    return found, Lint.of_all(proved)


def describe(graphs: Mapping[str, ir.Model], plan: Plan) -> tuple[dict[str, Any], ...]:
    """What a manifest says of each rank: whose rows it holds, and what it reads of the stage before it.

    Ranks of a stage hold the same rows, so these are replicated among them; a stage holds those of its own layers, and
    of layers before it those that its own read as well.
    """
    caller = {*CALLER, DECODER_START}
    found = []
    for number, (name, model) in enumerate(graphs.items()):
        reads = [value.name or "" for value in model.graph.inputs]
        state = [one for one in reads if one.startswith("state.")]
        given = [one for one in reads if one in caller or one.startswith("engram.")]
        stage = plan.stage_of(number)
        found.append(
            {
                "graph": name,
                "stage": stage,
                "layers": list(plan.stages[stage]),
                "state": state,
                "receives": [one for one in reads if one not in {*state, *given}],
            }
        )
    return tuple(found)


def split_stages(model: onnx.ModelProto, stages: Sequence[tuple[int, int]]) -> list[onnx.ModelProto]:
    """A graph cut between layers. What the embedding makes of positions alone, every stage computes for itself."""
    stage_of = {layer: number for number, ends in enumerate(stages) for layer in range(*ends)}

    def piece_of(node: onnx.NodeProto) -> int | None:
        layer = _LAYER.match(node.name)
        if layer:
            return stage_of[int(layer[1])]
        return None if node.name.startswith("embed.") else len(stages) - 1

    return [model] if len(stages) == 1 else split(model, piece_of, len(stages))


def _bytes_of(config: ModelConfig, precision: Precision) -> dict[str, int]:
    """Bytes of every weight."""

    def nbytes(name: str, one: Expected) -> int:
        return precision.format_of(name, one.role).nbytes(math.prod(one.shape[:-1]), one.shape[-1])

    return {name: nbytes(name, one) for name, one in expected(config).items()}
