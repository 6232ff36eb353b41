from __future__ import annotations

import pytest

from v4export import presets
from v4export.checkpoint.names import expected
from v4export.config import Fp8Blocks
from v4export.errors import BadInput
from v4export.precision import FORMATS, NATIVE, PRECISIONS, Keep, module_path, native, precision, recipe_rows

V3 = presets.load("tiny-v3")
ROLES = {name: one.role for name, one in expected(V3).items()}


def formats(recipe) -> dict[str, str]:
    return {module_path(name): recipe.format_of(name, role).name for name, role in ROLES.items()}


def test_every_recipe_says_something_of_every_role():
    for recipe in PRECISIONS.values():
        assert recipe.format_of("w", "linear") == recipe.linear and recipe.format_of("w", "expert") == recipe.expert
        assert recipe.format_of("w", "router_bias").dtype == "float32"
        assert recipe.format_of("w", "hash_table").dtype == "int64"
        for role in ("router", "norm", "embedding", "head", "projection"):
            assert recipe.format_of("w", role).dtype == recipe.activations


def test_names_and_bits():
    assert [f.bits for f in FORMATS.values()] == [32, 16, 16, 8, 8, 8, 4, 4, 8, 4]
    bits = {name: round(8 * f.nbytes(1024, 1024) / 2**20, 3) for name, f in FORMATS.items()}
    assert bits == {
        "fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8.002, "fp8-row": 8.031, "mxfp8": 8.5, "mxfp4": 4.5, "nvfp4": 4.5,
        "int8": 8.5, "int4": 4.5,
    }  # fmt: skip


def test_only_whole_blocks_fit():
    assert FORMATS["fp8"].fits(40) and FORMATS["fp8-row"].fits(40) and FORMATS["bf16"].fits(40)
    assert not FORMATS["int4"].fits(40) and FORMATS["nvfp4"].fits(48) and not FORMATS["mxfp8"].fits(48)


def test_what_a_gpu_must_have():
    assert PRECISIONS["bf16"].types() == ("fp32", "bf16"), "routing and attention are float32"
    assert (
        set(PRECISIONS["nvfp4"].types())
        == {"fp32", "bf16", "fp8", "fp4"}
        == set(PRECISIONS["nvfp4"].types(plugins=True))
    )
    assert set(PRECISIONS["mxfp4"].types(plugins=True)) == {"fp32", "bf16", "fp8"}
    assert set(PRECISIONS["int4"].types()) == {"fp32", "bf16", "int8", "int4"}
    kept = PRECISIONS["mxfp4"].kept(["mxfp4:layers.0.*"])
    assert "fp4" in kept.types(plugins=True), "a linear layer in FP4 is read by no kernel"
    assert PRECISIONS["mxfp4"].stored == ("fp4", "fp8") and PRECISIONS["fp16"].stored == ("fp16",)


def test_native_is_what_the_checkpoint_has():
    assert native(V3) == "bf16" and native(presets.load("tiny-v3.1")) == "fp8"
    assert native(presets.load("tiny-v4-fp4")) == "mxfp4" and native(presets.load("tiny-kimi-k2")) in PRECISIONS
    assert precision(NATIVE, presets.load("tiny-v4-fp4")).expert.name == "mxfp4"
    with pytest.raises(BadInput, match="known: fp32"):
        precision(NATIVE)
    with pytest.raises(BadInput, match="unknown precision 'fp12'"):
        precision("fp12")


def test_blocks_are_the_checkpoints():
    from dataclasses import replace

    found = precision("mxfp4", replace(V3, fp8=Fp8Blocks(64, 32)), ["fp8:lm_head"])
    assert found.linear.block == (64, 32) == found.keep[0].format.block and found.expert.block == (1, 32)


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("lm_head", {"lm_head"}),
        ("layers.0.*", {p for p in formats(PRECISIONS["bf16"]) if p.startswith("layers.0.") and "proj" in p}),
        ("*.o_proj|*.q_a_proj", {f"layers.{i}.self_attn.{p}_proj" for i in range(V3.num_layers) for p in ("o", "q_a")}),
        ("*.expert", {f"layers.{i}.mlp.experts" for i in V3.moe_layers}),
        ("layers.1.expert | lm_head", {"layers.1.mlp.experts", "lm_head"}),
    ],
)
def test_exceptions(pattern, paths):
    recipe = PRECISIONS["bf16"].kept([f"int8:{pattern}"])
    recipe.check(ROLES)
    assert {path for path, name in formats(recipe).items() if name == "int8"} == paths


def test_the_first_exception_counts():
    recipe = PRECISIONS["fp8"].kept(["bf16:layers.0.*", "mxfp8:*.linear"])
    assert recipe.format_of("model.layers.0.self_attn.o_proj.weight", "linear").name == "bf16"
    assert recipe.format_of("model.layers.1.self_attn.o_proj.weight", "linear").name == "mxfp8"
    assert recipe.format_of("model.layers.1.mlp.experts.0.up_proj.weight", "expert").name == "fp8"
    assert list(map(str, recipe.keep)) == ["bf16:layers.0.*", "mxfp8:*.linear"]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("lm_head", "says nothing"),
        ("bf16:", "says nothing"),
        ("fp12:lm_head", "formats: fp32"),
        ("fp16:lm_head", "computes in bf16"),
    ],
)
def test_what_makes_no_exception(keep, message):
    with pytest.raises(BadInput, match=message):
        PRECISIONS["fp8"].kept([keep])


def test_narrow_exceptions_go_with_bfloat16():
    with pytest.raises(BadInput, match="int4 goes with bf16 activations"):
        PRECISIONS["fp32"].kept(["int4:*.expert"])
    assert PRECISIONS["fp16"].kept(["fp8:*.expert"]).keep


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("bf16:layers.9.*", "no matrix is called so; there are"),
        ("bf16:*.router", "router"),
        ("bf16:*.norm|norm", "norm"),
        ("fp32:*.expert", "experts are bf16 or narrower"),
    ],
)
def test_an_exception_that_changes_nothing_is_an_error(keep, message):
    with pytest.raises(BadInput, match=message):
        PRECISIONS["fp8"].kept([keep]).check(ROLES)


def test_what_a_graph_has_of_a_recipe():
    norms = {name: role for name, role in ROLES.items() if role == "norm"}
    experts = {name: role for name, role in ROLES.items() if role == "expert"}
    assert PRECISIONS["fp8"].used(ROLES) == PRECISIONS["fp8"]
    assert PRECISIONS["fp8"].used(norms).name == "bf16" and PRECISIONS["fp8"].used(norms).stored == ("bf16",)
    assert PRECISIONS["mxfp4"].used(experts).name == "mxfp4" and PRECISIONS["mxfp4"].used(experts).stored == ("fp4",)


def test_paths():
    assert module_path("model.layers.3.mlp.experts.17.up_proj.weight") == "layers.3.mlp.experts"
    assert module_path("lm_head.weight") == "lm_head" and Keep.parse("fp32:'lm_head'").pattern == "lm_head"


def test_the_table_of_recipes():
    header, *rows = recipe_rows()
    assert [row[0] for row in rows] == [*PRECISIONS, NATIVE] and all(len(row) == len(header) for row in rows)
