"""Row numbers: against a second implementation and onnxruntime's, and in every chunking alike."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from engram_subject import PAD, SMALL, TOKEN_MAP, plain_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from v4export.config.hashes import NO_ROW, layouts
from v4export.engram.hashing import Hasher
from v4export.errors import BadInput

HASHER = Hasher.of(SMALL, TOKEN_MAP)


@st.composite
def sequences(draw):
    """Tokens, masks and starts of a batch of sequences with lengths of their own."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    density = draw(st.sampled_from([0.0, 0.2, 0.6]))
    return [(rng.integers(0, 40, n), rng.random(n) < density, rng.random(n) < density) for n in lengths], rng


@settings(max_examples=200, deadline=None)
@given(sequences())
def test_every_chunking_gives_what_looking_back_gives(case):
    batch, rng = case
    done, history = np.zeros(len(batch), int), HASHER.empty_history(len(batch))
    found = {layer: [[] for _ in batch] for layer in SMALL.layers}
    while any(done[b] < len(tokens) for b, (tokens, _, _) in enumerate(batch)):
        lengths = np.array([rng.integers(0, min(5, len(t) - n) + 1) for n, (t, _, _) in zip(done, batch, strict=True)])
        steps = int(lengths.max()) + int(rng.integers(0, 2))
        # What is right of a sequence's tokens is never looked at, whatever it holds.
        tokens = np.full((len(batch), steps), 10**6)
        masked, starts = (rng.random((len(batch), steps)) < 0.5 for _ in range(2))
        for b, parts in enumerate(batch):
            for padded, part in zip((tokens, masked, starts), parts, strict=True):
                padded[b, : lengths[b]] = part[done[b] : done[b] + lengths[b]]
        rows, history = HASHER.rows(tokens, history, lengths, masked, starts)
        for layer, numbers in rows.items():
            for b, length in enumerate(lengths):
                found[layer][b] += numbers[b, :length].tolist()
                assert (numbers[b, length:] == NO_ROW).all()
        done += lengths
    for layer, hashes in layouts(SMALL).items():
        for b, (tokens, masked, starts) in enumerate(batch):
            expected = plain_rows(hashes, SMALL.heads, tokens.tolist(), masked.tolist(), starts.tolist())
            assert found[layer][b] == expected


def test_rows_stay_within_their_hash():
    rng = np.random.default_rng(0)
    rows, _ = HASHER.rows(rng.integers(0, 40, (3, 500)), HASHER.empty_history(3))
    for layer, hashes in layouts(SMALL).items():
        assert rows[layer].shape == (3, 500, SMALL.hashes)
        assert (rows[layer] >= hashes.offsets).all() and (rows[layer] < np.add(hashes.offsets, hashes.primes)).all()
        assert rows[layer].max() > hashes.offsets[-1]


def test_history_is_what_the_next_token_sees():
    tokens = np.array([[5, 6, 7, 8]])
    seen = TOKEN_MAP[tokens[0]].tolist()
    empty = HASHER.empty_history(1)
    assert empty.tolist() == [[PAD] * 3] and empty.dtype == np.int64
    assert HASHER.rows(tokens, empty)[1].tolist() == [seen[1:]]
    assert HASHER.rows(tokens, empty, np.array([2]))[1].tolist() == [[PAD, *seen[:2]]]
    assert HASHER.rows(tokens, empty, np.array([0]))[1].tolist() == [[PAD] * 3]
    flag = np.array([[False, False, True, False]])
    assert HASHER.rows(tokens, empty, masked=flag)[1].tolist() == [[PAD, PAD, seen[3]]]
    assert HASHER.rows(tokens, empty, starts=flag)[1].tolist() == [[PAD, seen[2], seen[3]]]
    none, history = HASHER.rows(tokens[:, :0], np.array([[3, 4, 5]]))
    assert none[1].shape == (1, 0, SMALL.hashes) and history.tolist() == [[3, 4, 5]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tokens_BS": np.array([[1, 40]])}, "not in the vocabulary\n  40; .* 0 to 39"),
        ({"tokens_BS": np.array([[-1, 0]])}, "not in the vocabulary\n  -1"),
        ({"tokens_BS": np.array([1, 2])}, r"tokens .*\n  int64 \[2\]"),
        ({"tokens_BS": np.array([[1.0, 2.0]])}, "tokens .*\n  float64"),
        ({"history_BN": np.zeros((1, 2), int)}, r"history .*\n .* expected integers \[1, 3\]"),
        ({"history_BN": np.full((1, 3), 23)}, "a history holds compressed ids that do not exist\n  23"),
        ({"lengths_B": np.array([3])}, "lengths do not fit the tokens\n  3; they have to be 0 to 2"),
        ({"masked": np.zeros((1, 2), int)}, r"masked .*\n .* expected bool \[1, 2\]"),
        ({"starts": np.zeros((2, 2), bool)}, r"starts .*\n .* expected bool \[1, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, says):
    whole = {"tokens_BS": np.array([[1, 2]]), "history_BN": HASHER.empty_history(1)}
    with pytest.raises(BadInput, match=says):
        HASHER.rows(**{**whole, **arguments})


def test_a_map_of_another_model_is_refused():
    with pytest.raises(BadInput, match="the token map does not match"):
        Hasher.of(SMALL, np.array([0, 1, 23], np.int32))
    with pytest.raises(BadInput, match="pad token"):
        Hasher.of(SMALL, np.array([0, 1], np.int32))


def session(op: str, inputs: list[str], outputs: list[str]):
    """onnxruntime's hashes; both of its outputs are asked for."""
    onnxruntime = pytest.importorskip("onnxruntime")
    node = onnx.helper.make_node(
        op, inputs, outputs, domain="com.microsoft", pad_id=PAD, n_head_per_ngram=SMALL.heads,
        max_ngram_size=SMALL.max_order,
    )  # fmt: skip
    kinds = {name: onnx.TensorProto.INT32 if name == "cumulative" else onnx.TensorProto.INT64 for name in inputs}
    infos = [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    results = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in outputs]
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", infos, results), opset_imports=opsets)
    model.ir_version = 10
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:
        if "is not a registered function/op" in str(error):
            pytest.skip(f"onnxruntime {onnxruntime.__version__} has no {op}")
        raise


@pytest.mark.parametrize("layer", SMALL.layers)
def test_onnxruntime_has_the_same_rows(layer):
    names = ["input_ids", "multipliers", "vocab_sizes", "past_ids", "head_offsets"]
    theirs = session("NGramHashMapping", names, ["hash_ids", "present_ids"])
    hashes, rng = layouts(SMALL)[layer], np.random.default_rng(layer)
    history = HASHER.empty_history(2)
    for steps in (1, 2, 7, 1):
        tokens = rng.integers(0, 40, (2, steps))
        arrays = [TOKEN_MAP[tokens], hashes.multipliers, hashes.primes, history, hashes.offsets]
        feed = {name: np.array(array, np.int64) for name, array in zip(names, arrays, strict=True)}
        rows, history = HASHER.rows(tokens, history)
        expected, present = theirs.run(None, feed)
        assert np.array_equal(rows[layer], expected) and np.array_equal(history, present)


@pytest.mark.parametrize("layer", SMALL.layers)
def test_onnxruntime_has_the_same_rows_for_unequal_sequences(layer):
    names = ["input_ids", "multipliers", "vocab_sizes", "cumulative", "past_ids", "head_offsets"]
    theirs = session("VarlenNGramHashMapping", names, ["hash_ids", "present_ids"])
    hashes, rng = layouts(SMALL)[layer], np.random.default_rng(layer)
    history = HASHER.empty_history(3)
    for lengths in ([4, 1, 2], [1, 1, 5]):
        tokens = rng.integers(0, 40, (3, max(lengths)))
        real = np.arange(max(lengths)) < np.array(lengths)[:, None]
        starts = np.cumsum([0, *lengths])
        arrays = [TOKEN_MAP[tokens[real]], hashes.multipliers, hashes.primes, starts, history, hashes.offsets]
        feed = {name: np.array(array, np.int64) for name, array in zip(names, arrays, strict=True)}
        feed["cumulative"] = feed["cumulative"].astype(np.int32)
        rows, history = HASHER.rows(tokens, history, np.array(lengths))
        expected, present = theirs.run(None, feed)
        assert np.array_equal(rows[layer][real], expected) and np.array_equal(history, present)
