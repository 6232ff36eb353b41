"""Who holds what: the rule, counted by hand; stages as even as can be; more devices never hold more each."""

from __future__ import annotations

import contextlib
import itertools
import random

import pytest

from v4export import presets
from v4export.checkpoint.imagined import imagined
from v4export.config.sharding import Sharding, balanced
from v4export.errors import BadInput
from v4export.plan.sharding import ranks, share
from v4export.plan.weights import weight_bytes
from v4export.precision import precision
from v4export.state_contract import layer_bytes

LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.embed_tokens.weight", 1), (LAYER + "input_layernorm.weight", 1),
        (LAYER + "self_attn.q_a_proj.weight", 1), (LAYER + "self_attn.kv_a_proj_with_mqa.weight", 1),
        (LAYER + "self_attn.q_b_proj.weight", 8), (LAYER + "self_attn.kv_b_proj.weight", 8),
        (LAYER + "self_attn.o_proj.weight", 8), (LAYER + "self_attn.o_proj.bias", 1),
        (LAYER + "self_attn.o_a_proj.weight", 8), (LAYER + "self_attn.sinks", 8),
        (LAYER + "self_attn.indexer.wq_b.weight", 1), (LAYER + "self_attn.compressor.indexer.q_b_proj.weight", 1),
        (LAYER + "mlp.gate.weight", 1), (LAYER + "mlp.experts.3.up_proj.weight", 8),
        (LAYER + "mlp.shared_experts.down_proj.weight", 8), (LAYER + "mlp.gate_proj.weight", 8),
    ],
)  # fmt: skip
def test_what_divides_a_weight(name, parts):
    assert share(name, 800, Sharding(8, 2)) == 800 // parts
    assert share(name, 801, Sharding(8, 2)) == -(-801 // parts)


def test_experts_are_cut_where_there_are_more_devices_than_they_are_dealt_to():
    assert share(LAYER + "mlp.experts.0.up_proj.weight", 800, Sharding(8, 2)) == 100
    assert Sharding(8, 2, 3).ranks == 24 and Sharding(8, 2).width == 8


def test_a_case_by_hand():
    config = presets.load("tiny-v3")
    each = {name: 100 for name in imagined(config)}
    state = [layer_bytes(config, i, 64) for i in range(config.num_layers)]
    held = ranks(config, each, state, Sharding(4, 2, 1))
    heads = sum(name.endswith(("q_b_proj.weight", "kv_b_proj.weight", "o_proj.weight")) for name in each)
    cut = sum("_proj" in name and ".mlp." in name for name in each)
    assert held[0].weights == 100 * (len(each) - heads - cut) + 25 * (heads + cut)
    assert held[0].state == 64 * config.num_layers * config.latent_dim * 2 and held[0].layers == (0, config.num_layers)


def test_stages_are_as_even_as_can_be():
    draw = random.Random(0)
    for _ in range(300):
        sizes = [draw.randint(1, 20) for _ in range(draw.randint(1, 8))]
        parts = draw.randint(1, len(sizes))
        found = balanced(sizes, parts)
        cuts = itertools.combinations(range(1, len(sizes)), parts - 1)
        best = min(max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *c, len(sizes)))) for c in cuts)
        assert len(found) == parts and max(sum(sizes[a:b]) for a, b in found) == best
        assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])] and found[-1][1] == len(sizes)


@pytest.mark.parametrize("name", ["tiny-v3", "tiny-v4", "tiny-v4.1", "tiny-v4x", "v4-lite"])
def test_more_devices_never_hold_more(name):
    config = presets.load(name)
    each = weight_bytes(imagined(config), config, precision("bf16", config)).each
    state = [layer_bytes(config, i, 256) for i in range(config.state_layers)]

    def fullest(*sizes):
        return max(rank.nbytes for rank in ranks(config, each, state, Sharding(*sizes)))

    def fits(*sizes):
        with contextlib.suppress(BadInput):
            Sharding(*sizes).check(config)
            return True

    layers = config.num_layers
    for grown in (
        [(1, 1, p) for p in range(1, layers + 1)],
        [(n, n, 1) for n in (1, 2, 4)],
        [(1, n, 1) for n in (1, 2, 4)],
    ):
        held = [fullest(*sizes) for sizes in grown if fits(*sizes)]
        assert len(held) > 1 and held == sorted(held, reverse=True)
    whole = ranks(config, each, state, Sharding())
    assert whole[0].nbytes == sum(each.values()) + sum(state)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (1, 3, 1), (2, 3, 1), (1, 1, 99)])
def test_what_cannot_be_cut_is_refused(sizes):
    with pytest.raises(BadInput, match=r"cannot be dealt|must divide|more stages"):
        ranks(presets.load("tiny-v3"), {}, [0] * 8, Sharding(*sizes))
