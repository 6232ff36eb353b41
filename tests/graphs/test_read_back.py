"""Formats read back from graphs: what was asked for passes, and anything else is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx_ir as ir
import pytest

from v4export.errors import NotSupported
from v4export.graphs.read_back import check_formats
from v4export.precision import PRECISIONS

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"
RECIPES = [name for name, recipe in PRECISIONS.items() if not recipe.inputs]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_what_was_asked_for(stamped, name):
    config, model, _ = stamped("tiny-v3", name)
    recipe = PRECISIONS[name]
    kinds = check_formats(model, config, recipe)
    assert kinds["model.layers.*.mlp.experts.*.up_proj.weight"] == {
        recipe.expert.name: config.num_experts * len(config.moe_layers)
    }
    counts = sum(map(Counter, kinds.values()), Counter())
    experts = 3 * config.num_experts * len(config.moe_layers)
    assert counts[recipe.expert.name] >= experts and counts[recipe.linear.name] > 0 and counts["fp32"] > 0
    assert sum(counts.values()) == len([n for n in model.graph.initializers if n.endswith(("weight", "bias"))])


@pytest.mark.parametrize("asked", RECIPES)
@pytest.mark.parametrize("made", ["bf16", "fp8", "mxfp4"])
def test_another_recipe_is_a_mismatch(stamped, asked, made):
    config, model, _ = stamped("tiny-v3", made)
    if asked == made:
        return
    with pytest.raises(NotSupported, match="the graph does not hold"):
        check_formats(model, config, PRECISIONS[asked])


def wider_numbers(model: ir.Model) -> str:
    model.graph.initializers[O_PROJ].dtype = ir.DataType.BFLOAT16
    return O_PROJ


def no_multipliers(model: ir.Model) -> str:
    del model.graph.initializers[f"{EXPERT}_scale_inv"]
    return EXPERT


def multipliers_of_another_type(model: ir.Model) -> str:
    model.graph.initializers[f"{O_PROJ}_scale_inv"].dtype = ir.DataType.FLOAT16
    return O_PROJ


def multipliers_of_other_blocks(model: ir.Model) -> str:
    model.graph.initializers[f"{O_PROJ}_scale_inv"].shape = ir.Shape([7, 7])
    return O_PROJ


def widened_in_other_blocks(model: ir.Model) -> str:
    (use,) = model.graph.initializers[O_PROJ].uses()
    use.node.attributes["block_shape"] = ir.AttrInt64s("block_shape", [1, 16])
    return O_PROJ


def experts_of_another_format(model: ir.Model) -> str:
    for node in model.graph:
        if node.op_type == "MoeExperts":
            node.attributes["format"] = ir.AttrString("format", "mxfp8")
    return EXPERT


def read_by_something_else(model: ir.Model) -> str:
    value = model.graph.initializers[O_PROJ]
    model.graph.append(ir.Node("", "Identity", [value], name="beside"))
    return O_PROJ


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
@pytest.mark.parametrize(
    "damage",
    [
        wider_numbers,
        no_multipliers,
        multipliers_of_another_type,
        multipliers_of_other_blocks,
        widened_in_other_blocks,
        experts_of_another_format,
        read_by_something_else,
    ],
    ids=lambda f: f.__name__,
)
def test_damage_is_named(stamped, damage: Callable[[ir.Model], str], name: str):
    config, model, _ = stamped("tiny-v3", name)
    weight = damage(model)
    prefix = weight.rpartition(".0.")[0] if "experts" in weight else weight
    with pytest.raises(NotSupported, match=prefix.replace(".", r"\.")):
        check_formats(model, config, PRECISIONS[name])
