"""What a rank has of a weight: rows where they lie, columns byte for byte; and which experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from v4export import presets
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.pieces import Share, cut, deal_experts
from v4export.checkpoint.synth import synth
from v4export.config.sharding import Sharding
from v4export.errors import BadInput, NotSupported
from v4export.graphs.weights import decide, place
from v4export.precision import precision

EXPERT = "model.layers.2.mlp.experts.0"


#: Of which matrices can be cut in two between blocks that share a multiplier.
WIDE = replace(presets.load("tiny-v4-fp4"), moe_intermediate_size=256)


def weights_of(config, folder):
    checkpoint = Checkpoint.open(synth(config, folder))
    return checkpoint.config, audit(checkpoint).weights


@pytest.fixture(scope="module", params=[presets.load("tiny-v3"), WIDE], ids=["bf16", "fp4"])
def model(request, tmp_path_factory):
    return weights_of(request.param, tmp_path_factory.mktemp("hub") / "model")


def matrices(model):
    """Of every cut matrix one, with its parts."""
    config, weights = model
    share = Share(Sharding(tp=2, ep=1), 0, deal_experts(config.moe_layers, config.num_experts, 1))
    for name, weight in weights.items():
        try:
            piece = share.of(weight)
        except NotSupported:
            continue  # a cut through a block of a tiny model
        if piece is not None and piece.piece and (".mlp.experts." not in name or name.startswith(EXPERT)):
            yield weight, piece


def test_pieces_together_are_the_weight(model):
    seen = set()
    for weight, piece in matrices(model):
        axis = int(piece.columns is not None)
        parts = [cut(weight, axis, i, 2) for i in range(2)]
        assert np.array_equal(np.concatenate([p.decode() for p in parts], axis), weight.decode()), weight.name
        assert all(p.shape == p.decode().shape for p in parts)
        seen.add((axis, weight.packed))
    assert {(0, False), (1, False)} <= seen


def test_rows_are_pointed_at_and_columns_copied(model, tmp_path):
    config, _ = model
    recipe = precision("native", config)
    for weight, piece in matrices(model):
        kept, written = decide(piece, recipe)
        whole = {name: tensor for name, tensor in decide(weight, recipe)[0]}
        if piece.columns is None:
            assert kept and kept[0][1].offset >= whole[weight.name].offset, weight.name
            assert kept[0][1].file == whole[weight.name].file
        else:
            assert not kept and written[0].name == weight.name + "@0of2"
    some = [piece for _, piece in matrices(model) if piece.columns]
    placed = place(some, recipe, tmp_path)
    for piece in some:
        lies = placed.tensors[piece.name + piece.piece]
        stored = np.fromfile(tmp_path / lies.location, np.uint8, lies.nbytes, offset=lies.offset)
        each, (start, stop) = (2 if piece.packed else 1), piece.columns
        same = np.ascontiguousarray(piece.data.read()[:, start // each : stop // each])
        assert np.array_equal(stored, same.view(np.uint8).ravel()), piece.name


def test_a_rank_has_its_own_experts(model):
    config, weights = model
    deal = deal_experts(config.moe_layers, config.num_experts, 2)
    shares = [Share(Sharding(ep=2), number, deal) for number in range(2)]
    for weight in weights.values():
        has = [share.of(weight) is not None for share in shares]
        if ".mlp.experts." not in weight.name:
            assert all(has)
            continue
        layer, expert = (int(part) for part in weight.name.split(".") if part.isdigit())
        assert has == [expert in share.experts(layer) for share in shares] and sum(has) == 1


def test_experts_are_dealt_out_by_their_load():
    load = {5: [8, 7, 6, 1, 1, 1, 1, 1]}
    (hands,) = deal_experts([5], 8, 2, load).values()
    assert sorted(e for hand in hands for e in hand) == list(range(8)) and {len(hand) for hand in hands} == {4}
    busy = [sum(load[5][e] for e in hand) for hand in hands]
    assert sorted(busy) == [11, 15], "and in order it would be 4 and 22"
    assert deal_experts([5, 6], 4, 2, {5: [9, 9, 0, 0]})[6] == ((0, 1), (2, 3)), "a layer without a load, in order"


def test_no_cut_through_a_block(tmp_path):
    _, weights = weights_of(presets.load("tiny-v3.1"), tmp_path / "hub")
    weight = next(w for w in weights.values() if w.scale is not None and w.shape[0] % (2 * w.block[0]))
    with pytest.raises(NotSupported, match=r"cannot be cut in 2(.|\n)*share a multiplier"):
        cut(weight, 0, 0, 2)


@pytest.mark.parametrize(
    ("sharding", "error", "says"),
    [
        (Sharding(tp=3), BadInput, "heads cannot be dealt out evenly"),
        (Sharding(tp=2, ep=4), BadInput, "--ep must divide --tp"),
        (Sharding(ep=3), BadInput, "cannot be dealt out evenly"),
        (Sharding(pp=9), BadInput, "more stages than layers"),
    ],
)
def test_what_is_not_divided_evenly(sharding, error, says):
    with pytest.raises(error, match=says):
        sharding.check(presets.load("tiny-v3"))
