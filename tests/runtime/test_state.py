from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4export import presets
from v4export.config import Reasoning
from v4export.errors import BadInput
from v4export.runtime.state import State
from v4export.state_contract import (
    E4M3,
    SCALE,
    StateTensor,
    bytes_per_token,
    fixed_bytes,
    may_skip_decoder,
    state_tensors,
)

#: Has a row per token, rows per 4 and per 128 tokens, and rings of 8, 16 and 128 rows.
V4 = replace(presets.load("tiny-v4"), num_layers=3)
V3 = presets.load("tiny-v3")


def empty(batch: int = 1, limit: int = 2000, config=V4) -> State:
    return State.empty(config, batch, np.dtype(np.float32), limit)


def rows(sequence: int, layer: int, tensor: StateTensor, numbers: np.ndarray) -> np.ndarray:
    """What the graph returns for a row: a function of whose it is."""
    return (sequence * 1e5 + layer * 1e4 + len(tensor.name) * 3e3 + numbers)[:, None].repeat(tensor.width, 1)


def step(state: State, S: int, lengths: list[int]) -> None:
    """What an executor does: the graph returns rows of all S tokens, of which the last may be padding."""
    state.reserve(S, np.array(lengths))
    for layer, buffers in enumerate(state.layers):
        for name, buffer in buffers.items():
            tensor, room = buffer.tensor, state.room(layer, name)
            assert room.shape[1] == tensor.returned(S)
            for b, start in enumerate(state.lengths_B.tolist()):
                first, end = tensor.complete(start), tensor.complete(start + lengths[b])
                room[b] = rows(b, layer, tensor, first + np.arange(room.shape[1]))
                if state.single and S == 1 and tensor.ring:
                    continue
                room[b, end - first :] = np.nan
    state.commit(np.array(lengths))


def check(state: State) -> None:
    """Every row that can be seen is where it belongs."""
    for layer, buffers in enumerate(state.layers):
        for name, buffer in buffers.items():
            tensor, held = buffer.tensor, state.held(layer, name)
            assert held.shape[1] >= 1
            for b, length in enumerate(state.lengths_B.tolist()):
                count = tensor.complete(length)
                numbers = np.arange(max(0, count - (tensor.ring or count)), count)
                wanted = rows(b, layer, tensor, numbers)
                np.testing.assert_array_equal(held[b, numbers % tensor.ring if tensor.ring else numbers], wanted)
                np.testing.assert_array_equal(state.rows(layer, name, b), wanted)


def test_one_sequence_is_read_and_written_in_place():
    state = empty()
    step(state, 5, [5])
    before = [b.array.ctypes.data for b in state.buffers]
    for _ in range(200):
        state.reserve(1)
        for layer, buffers in enumerate(state.layers):
            for name, buffer in buffers.items():
                assert np.shares_memory(state.held(layer, name), buffer.array)
                assert np.shares_memory(state.room(layer, name), buffer.array)
        step(state, 1, [1])
    assert before == [b.array.ctypes.data for b in state.buffers]
    assert state.held(1, "entry").shape[1] == 205 // 4 and state.held(2, "entry").shape[1] == 1
    check(state)


def test_capacity_doubles():
    state, capacities = empty(limit=5000, config=V3), []
    for _ in range(1100):
        step(state, 1, [1])
        if state.buffers[0].array.shape[1] not in capacities:
            capacities.append(state.buffers[0].array.shape[1])
    assert capacities == [256, 512, 1024, 2048]
    assert state.nbytes == 2048 * bytes_per_token(V3, 4)
    check(state)


def test_rings_and_entries_have_the_size_of_the_contract():
    state = empty(limit=5000)
    step(state, 1024, [1024])
    spare = sum(4 * t.width for i in range(3) for t in state_tensors(V4, i) if t.every > 1)
    assert state.nbytes == 1024 * bytes_per_token(V4, 4) + fixed_bytes(V4, 4) + spare


def test_a_long_chunk_takes_what_it_needs():
    state = empty(limit=5000)
    step(state, 1500, [1500])
    assert state.layers[1]["entry"].array.shape[1] == 376
    check(state)


@pytest.mark.parametrize("config", [V3, V4], ids=["v3", "v4"])
@pytest.mark.parametrize("limit", [10, 300])
def test_limit(limit, config):
    state = empty(limit=limit, config=config)
    step(state, limit - 1, [limit - 1])
    with pytest.raises(BadInput, match=rf"{limit + 1} tokens, at most {limit}"):
        state.reserve(2)
    check(state)
    step(state, 1, [1])
    assert state.lengths_B.tolist() == [limit]
    check(state)


def test_limit_counts_the_longest_sequence():
    state = empty(2, limit=10)
    step(state, 8, [2, 8])
    with pytest.raises(BadInput):
        state.reserve(3)
    step(state, 2, [2, 2])
    check(state)


@given(
    st.integers(1, 3).flatmap(
        lambda batch: st.lists(
            st.integers(1, 150).flatmap(
                lambda S: st.tuples(st.just(S), st.lists(st.integers(0, S), min_size=batch, max_size=batch))
            ),
            min_size=1,
            max_size=6,
        )
    ),
    st.sampled_from([V3, V4]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_steps(steps, config):
    """Padding is never kept, and nothing held moves, whatever the lengths."""
    batch = len(steps[0][1])
    state = empty(batch, config=config)
    for S, lengths in steps:
        before = state.lengths_B.copy()
        step(state, S, lengths)
        assert (state.lengths_B == before + lengths).all()
        check(state)


def test_padding_of_one_sequence_is_overwritten():
    state = empty()
    step(state, 6, [4])
    assert state.lengths_B.tolist() == [4]
    step(state, 3, [3])
    check(state)


def test_a_full_sequence_may_stay_while_others_go_on():
    state = empty(2, limit=8)
    step(state, 8, [8, 2])
    state.reserve(4, np.array([0, 4]))  # the first is at its limit and only padded
    with pytest.raises(BadInput, match="longer than"):
        state.reserve(4, np.array([1, 4]))
    step(state, 4, [0, 4])
    check(state)


@pytest.mark.parametrize(
    ("preset", "growing"),
    [
        ("deepseek-v2-lite", 31_104),
        ("deepseek-v3", 70_272),
        ("deepseek-v3.2", 61 * (1152 + 256)),
        ("deepseek-v4-flash", 6_880),
        ("deepseek-v4-pro", 9_848),
        ("v4-1t", 70_272 + 2_304),
        ("v4-lite", 36_864 + 2_304),
    ],
)
def test_bytes_per_token(preset, growing):
    assert bytes_per_token(presets.load(preset)) == growing


@pytest.mark.parametrize(("preset", "growing"), [("deepseek-v3", 61 * 672), ("deepseek-v3.2", 61 * 808)])
def test_bytes_per_token_in_fp8(preset, growing):
    """A byte a number and four for every 64; two for each of 64 rotated ones."""
    narrow = replace(presets.load(preset), state_fp8=True)
    assert bytes_per_token(narrow) == growing and bytes_per_token(narrow, 4) == growing + 61 * 64 * 2


def test_fixed_bytes_in_fp8():
    """Windows shrink; what entries are made of stays float32."""
    flash = replace(presets.load("deepseek-v4-flash"), state_fp8=True)
    assert fixed_bytes(flash) == 43 * 128 * (448 + 4 * 7 + 2 * 64) + 21 * 80 * 1024 + 20 * 512 * 1024


@pytest.mark.parametrize("preset", ["tiny-v3.2", "tiny-v4", "tiny-v4.1"])
def test_rows_of_e4m3_are_put_in_their_places(preset):
    """The smallest numbers of the type stand for rows, which its few numbers cannot count."""
    config = replace(presets.load(preset), state_fp8=True)
    state = empty(3, config=config)
    narrow = [b for b in state.buffers if b.tensor.dtype == E4M3]
    assert {b.tensor.rows for b in narrow} == {b.tensor.rows for b in state.buffers if b.tensor.name.endswith(SCALE)}
    assert all(b.array.dtype == ml_dtypes.float8_e4m3fn for b in narrow)
    for S, lengths in ((21, [21, 4, 9]), (1, [1, 1, 1]), (3, [0, 3, 1])):
        state.reserve(S, np.array(lengths))
        for layer, buffers in enumerate(state.layers):
            for name, buffer in buffers.items():
                first = [buffer.tensor.complete(n) for n in state.lengths_B.tolist()]
                room = state.room(layer, name)
                for b, number in enumerate(first):
                    codes = (number + np.arange(room.shape[1])).astype(np.uint8) % 127
                    room[b] = codes.view(ml_dtypes.float8_e4m3fn)[:, None]
        state.commit(np.array(lengths))
    for layer, buffers in enumerate(state.layers):
        for name, buffer in buffers.items():
            for b, length in enumerate(state.lengths_B.tolist()):
                count = buffer.tensor.complete(length)
                numbers = np.arange(max(0, count - (buffer.tensor.ring or count)), count)
                wanted = numbers.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
                np.testing.assert_array_equal(state.rows(layer, name, b).astype(np.float32)[:, 0], wanted)


def test_fixed_bytes():
    """Windows of 131,072 bytes a layer; projections of open entries: 80 KiB in a CSA layer, 512 KiB in an HCA layer."""
    flash, pro = presets.load("deepseek-v4-flash"), presets.load("deepseek-v4-pro")
    assert fixed_bytes(flash) == 43 * 131_072 + 21 * 80 * 1024 + 20 * 512 * 1024
    assert fixed_bytes(pro) == 61 * 131_072 + 30 * 80 * 1024 + 31 * 512 * 1024


def thinking(name: str, steps: int = 3):
    sizes = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "v_head_dim": 16, "intermediate_size": 80}
    return replace(presets.load(name), reasoning=Reasoning(2, steps, **sizes))


@pytest.mark.parametrize("name", ["tiny-v3", "tiny-v3.2", "tiny-v4", "tiny-v4.1"])
def test_rows_of_reasoning_layers_come_last(name):
    plain, config = presets.load(name), thinking(name)
    state = empty(2, config=config)
    own, thought = state.layers[: plain.num_layers], state.layers[plain.num_layers :]
    assert [[*layer] for layer in own] == [[*layer] for layer in empty(config=plain).layers]
    latent = StateTensor("latent", 24 + config.qk_rope_head_dim)
    assert [[buffer.tensor for buffer in layer.values()] for layer in thought] == [[latent]] * 2
    assert bytes_per_token(config) - bytes_per_token(plain) == 2 * 2 * latent.width
    assert fixed_bytes(config) == fixed_bytes(plain)
    step(state, 5, [5, 2])
    step(state, 1, [1, 1])
    check(state)
    assert len(empty(config=thinking(name, steps=0)).layers) == plain.num_layers


def test_who_thinks_passes_the_decoder():
    """Reasoning layers have a row for every token, which is made of what the last layer returns."""
    assert may_skip_decoder(presets.load("tiny-v4.1")) and may_skip_decoder(thinking("tiny-v4.1", steps=0))
    assert not may_skip_decoder(thinking("tiny-v4.1"))


def numbered(rows: np.ndarray, sequence: int) -> np.ndarray:
    """Rows of sequence 0, as if they were of another (see ``rows`` above)."""
    return rows + np.float32(sequence * 1e5)


@pytest.mark.parametrize("tokens", [0, 1, 3, 7, 150, 700])
@pytest.mark.parametrize("name", ["tiny-v3", "tiny-v3.2", "tiny-v4", "tiny-v4.1"])
def test_a_sequence_is_put_beside_others(name, tokens):
    """Growing rows, rings and rows of several tokens are what the sequence would have had there from the start."""
    config = thinking(name)
    batch, alone = empty(3, config=config), empty(config=config)
    step(batch, 200, [5, 200, 17])
    for n in [tokens // 2, 1, tokens - tokens // 2 - 1] if tokens else []:
        if n > 0:
            step(alone, n, [n])
    for buffer in alone.buffers:
        buffer.array[...] = numbered(buffer.array, 1)
    batch.put(1, alone)
    assert batch.lengths_B.tolist() == [5, tokens, 17]
    check(batch)
    step(batch, 9, [9, 9, 0])
    step(batch, 1, [1, 1, 1])
    check(batch)
    assert batch.lengths_B.tolist() == [15, tokens + 10, 18]
    alone.layers[0]["window" if "window" in alone.layers[0] else "latent"].array[...] = np.nan
    check(batch)  # it shares nothing


def test_a_sequence_that_is_put_brings_its_decoder_start_and_its_history():
    batch, alone = empty(3, config=V3), empty(config=V3)
    batch.history_BN, alone.history_BN = np.zeros((3, 2), np.int64), np.array([[7, 8]])
    alone.decoder_start_B = np.array([4])
    position, history = batch.lengths_B, batch.history_BN
    step(alone, 6, [6])
    batch.put(2, alone)
    assert batch.decoder_start_B.tolist() == [0, 0, 4] and batch.history_BN.tolist() == [[0, 0], [0, 0], [7, 8]]
    assert batch.lengths_B.tolist() == [0, 0, 6]
    assert position.tolist() == [0, 0, 0] and not history.any()  # what a step was given stays as it is


def test_putting_a_sequence_that_is_too_long_for_its_place_grows_the_batch():
    batch, alone = empty(2, limit=600, config=V3), empty(limit=600, config=V3)
    step(alone, 590, [590])
    for buffer in alone.buffers:
        buffer.array[...] = numbered(buffer.array, 1)
    batch.put(1, alone)
    assert {b.array.shape[1] for b in batch.buffers} == {590}
    check(batch)
    batch.put(1, empty(limit=600, config=V3))
    assert batch.lengths_B.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["tiny-v3", "tiny-v4", "tiny-v4.1"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_step_of_the_first_sequences_alone(name, count):
    """Rows, lengths and room are the whole state's, of which the others stay as they are."""
    state = empty(3, config=thinking(name))
    state.history_BN = np.zeros((3, 2), np.int64)
    step(state, 254, [254, 90, 17])
    for n in range(1, 5):
        first = state.first(count)
        assert all(np.shares_memory(a.array, b.array) for a, b in zip(first.buffers, state.buffers, strict=True))
        step(first, 1, [1, 0, 1][:count])
        first.history_BN = np.full((count, 2), n)
        first.decoder_start_B = np.full(count, n)
        state.adopt(first)
        assert state.lengths_B.tolist() == [254 + n, 90, 17 + n * (count == 3)]
        assert state.history_BN[:, 0].tolist() == state.decoder_start_B.tolist() == [n] * count + [0] * (3 - count)
        check(state)
    step(state, 2, [2, 2, 2])
    check(state)
