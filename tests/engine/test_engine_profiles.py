from __future__ import annotations

import numpy as np
import pytest
from engine_graphs import linear, save

from v4export import presets
from v4export.engine.profiles import ShapeOverride, derive_profiles, input_dims, parse_shapes
from v4export.errors import BadInput
from v4export.runtime.state import State
from v4export.state_contract import state_tensors

INPUTS = {
    "input_ids": ("B", "S"),
    "position": ("B",),
    "logits_at": ("B", "Q"),
    "state.0.latent": ("B", "T", 576),
    "state.1.entry": ("B", "T/4", 512),
    "state.2.entry": ("B", "T/128", 512),
    "state.2.window": ("B", 128, 512),
    "fixed": (3, 4),
}
SIZES = {"max_batch": 4, "max_seq_len": 1024, "max_chunk": 128}


def test_two_profiles():
    decode, prefill = derive_profiles(INPUTS, **SIZES)
    assert (decode.name, prefill.name) == ("decode", "prefill")
    batch = {
        "state.1.entry": ((1, 1, 512), (4, 128, 512), (4, 257, 512)),
        "state.2.entry": ((1, 1, 512), (4, 4, 512), (4, 9, 512)),
        "state.2.window": ((1, 128, 512), (4, 128, 512), (4, 128, 512)),
    }
    assert decode.shapes == batch | {
        "input_ids": ((1, 1), (4, 1), (4, 1)),
        "position": ((1,), (4,), (4,)),
        "logits_at": ((1, 1), (4, 1), (4, 1)),
        "state.0.latent": ((1, 1, 576), (4, 512, 576), (4, 1024, 576)),
    }
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 128), (4, 128))
    assert prefill.shapes["logits_at"] == ((1, 1), (1, 1), (4, 128))


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_earlier_steps_of_a_thought(steps):
    """The first step has none, and the last has all but itself."""
    inputs = {"thought_at": ("B", "Q"), "own.0": ("P", "B", "Q", 576)}
    decode, prefill = derive_profiles(inputs, **SIZES, max_steps=steps)
    (least, likely, most), (_, _, widest) = decode.shapes["own.0"], prefill.shapes["own.0"]
    assert least == (0, 1, 1, 576) and most == (steps - 1, 4, 1, 576) and widest == (steps - 1, 4, 128, 576)
    assert least[0] <= likely[0] <= most[0] and (likely[0] > 0) == (steps > 1)


def test_earlier_steps_that_a_user_gives():
    inputs = {"entering": ("B", "Q"), "own.0": ("P", "B", "Q", 576), "own.1": ("P", "B", "Q", 576)}
    given = ShapeOverride.parse("own.0:0x1x1x576", "own.0:2x1x1x576", "own.0:5x2x3x576")
    (profile,) = derive_profiles(inputs, **SIZES, max_steps=8, override=given)
    assert profile.shapes["own.1"] == ((0, 1, 1, 576), (2, 1, 1, 576), (5, 2, 3, 576))
    assert profile.shapes["entering"] == ((1, 1), (1, 1), (2, 3))


def test_a_thought_has_a_step():
    with pytest.raises(BadInput, match="max_steps"):
        derive_profiles(INPUTS, **SIZES, max_steps=0)


@pytest.mark.parametrize("every", [2, 3, 7, 128, 1000])
@pytest.mark.parametrize("length", [1, 5, 128, 1024])
def test_every_number_of_rows_the_runtime_binds(every, length):
    """One sequence: rows its tokens complete, never none. Several: a buffer with a row more than that."""
    inputs = {"a": ("B", "T", 8), "b": ("B", f"T/{every}", 8)}
    for profile in derive_profiles(inputs, max_batch=2, max_seq_len=length, max_chunk=4):
        least, likely, most = (shape[1] for shape in profile.shapes["b"])
        bound = [max(1, tokens // every) for tokens in range(length + 1)] + [length // every + 1]
        assert least == min(bound) == 1 and most == max(bound) and least <= likely <= most
        assert profile.shapes["a"][0][1] == 1 and profile.shapes["a"][2][1] == length


def test_the_runtime_binds_no_other_number_of_rows():
    """State and profile agree about the buffers, whatever the batch."""
    config = presets.load("tiny-v4")
    for batch in (1, 3):
        state = State.empty(config, batch, np.dtype(np.float32), limit=300)
        inputs = {
            f"{i}.{t.name}": ("B", t.held_dim, t.width)
            for i in range(config.num_layers)
            for t in state_tensors(config, i)
        }
        (profile,) = derive_profiles(inputs, max_batch=batch, max_seq_len=300, max_chunk=1)
        for _ in range(300):
            state.reserve(1)
            for name, (least, _, most) in profile.shapes.items():
                layer, _, tensor = name.partition(".")
                bound = state.held(int(layer), tensor).shape
                assert bound[0] == batch and least[1] <= bound[1] <= most[1]
                state.room(int(layer), tensor)
            state.commit(np.ones(batch, np.int64))


def test_one_profile_when_chunks_are_single_tokens():
    assert [p.name for p in derive_profiles(INPUTS, max_batch=1, max_seq_len=8, max_chunk=1)] == ["decode"]


def test_none_for_a_static_graph():
    assert derive_profiles({"x": (1, 2)}, **SIZES) == ()


@pytest.mark.parametrize("dim", ["", "Z", "S/0", "T/", "T/0", "T/x", "T/-4"])
def test_dimension_without_a_size(dim):
    with pytest.raises(BadInput, match="axis 1 of input x"):
        derive_profiles({"x": ("B", dim)}, **SIZES)


def test_sizes_must_be_positive():
    with pytest.raises(BadInput, match="max_chunk"):
        derive_profiles(INPUTS, max_batch=1, max_seq_len=8, max_chunk=0)


def test_override_carries_letters_over():
    given = ShapeOverride.parse("input_ids:1x1", "input_ids:2x4", "input_ids:2x16")
    (profile,) = derive_profiles(INPUTS, **SIZES, override=given)
    assert profile.shapes["input_ids"] == ((1, 1), (2, 4), (2, 16))
    assert profile.shapes["position"] == ((1,), (2,), (2,))
    assert profile.shapes["state.0.latent"] == ((1, 1, 576), (2, 512, 576), (2, 1024, 576))


def test_override_of_tokens_reaches_the_rows_that_stand_for_several():
    given = ShapeOverride.parse("state.0.latent:1x8x576", "state.0.latent:2x100x576", "state.0.latent:2x600x576")
    (profile,) = derive_profiles(INPUTS, **SIZES, override=given)
    assert profile.shapes["state.1.entry"] == ((1, 2, 512), (2, 25, 512), (2, 151, 512))
    given = ShapeOverride.parse(None, "state.1.entry:2x7x512", None)
    (profile,) = derive_profiles(INPUTS, **SIZES, override=given)
    assert profile.shapes["state.1.entry"] == ((2, 7, 512),) * 3
    assert profile.shapes["state.2.entry"] == ((2, 1, 512), (2, 4, 512), (2, 9, 512))


def test_override_of_one_bound_fixes_the_shape():
    (profile,) = derive_profiles(INPUTS, **SIZES, override=ShapeOverride(opt={"input_ids": (2, 4)}))
    assert profile.shapes["input_ids"] == ((2, 4), (2, 4), (2, 4))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"nothing": (1,)}, "no input"),
        ({"input_ids": (1, 2, 3)}, "does not fit"),
        ({"state.0.latent": (1, 2, 3)}, "does not fit"),
        ({"input_ids": (1, 2), "position": (3,)}, "disagree about dimension B"),
    ],
)
def test_override_that_does_not_fit(shapes, message):
    with pytest.raises(BadInput, match=message):
        derive_profiles(INPUTS, **SIZES, override=ShapeOverride(opt=shapes))


def test_override_out_of_order():
    with pytest.raises(BadInput, match="not in order"):
        derive_profiles(INPUTS, **SIZES, override=ShapeOverride(min={"input_ids": (4, 4)}, max={"input_ids": (2, 2)}))


def test_parse_shapes():
    assert parse_shapes("input_ids:1x4,position:1") == {"input_ids": (1, 4), "position": (1,)}
    assert parse_shapes(" 'a:0':2X3 , s:scalar") == {"a:0": (2, 3), "s": ()}


@pytest.mark.parametrize("text", ["", "input_ids", "a:1x", "a:-1", "a:1x4,a:2x4", ":1x4"])
def test_parse_shapes_refuses(text):
    with pytest.raises(BadInput, match="input_ids:1x4"):
        parse_shapes(text)


def test_dims_of_a_file(tmp_path):
    assert input_dims(save(linear("fp32"), tmp_path)) == {"x": ("B", "S", 256)}
