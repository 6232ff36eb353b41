"""Cached rows as E4M3: rounding against a literal form of it, and the definition of every family with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import literal_rows
import numpy as np
import pytest
import torch
import torch_state
from checks import random_ids
from test_thoughts import CASES, Model, ThinkingRunner, model_of

from v4export import state_contract
from v4export.model import indexer, mla, reasoning, rows, shared_entries, window
from v4export.state_contract import E4M3, FLOAT32, state_tensors

LENGTH = 36
#: How a sequence is cut into steps.
CUTS = {"at once": [LENGTH], "in chunks": [1, 5, 17, 2, 11], "one by one": [1] * LENGTH}


ROTATED_ROWS = {"latent", "window", "entry"}


def narrow(case: Model) -> Model:
    """The same model with its cached rows in E4M3."""
    return replace(case, config=replace(case.config, state_fp8=True))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Model:
    return model_of(request.param)


def run(runner: ThinkingRunner, sizes: list[int]) -> np.ndarray:
    """What is said of one sequence, [n, V + 1 + K - 2]."""
    ids, ends = random_ids(LENGTH), np.cumsum(sizes)
    pieces = [ids[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return np.concatenate([runner.step(piece[None], np.array([len(piece)]))[0] for piece in pieces])


def kept(runner: ThinkingRunner) -> Iterator[tuple[tuple[int, str], np.ndarray]]:
    """Every state tensor's rows at the end, as float32."""
    for i in range(runner.model.config.state_layers):
        for tensor in state_tensors(runner.model.config, i):
            yield (i, tensor.name), runner.state.rows(i, tensor.name, 0).astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 64, 80, 128, 200, 576])
def test_rounding_is_the_literal_one(width: int, dtype: torch.dtype) -> None:
    x = torch.from_numpy(np.random.default_rng(width).standard_normal((6, width)).astype(np.float32))
    x *= torch.tensor([1.0, 1e-6, 3e4, 1e-37, 1.0, 1.0])[:, None]
    x[4] = 0
    x[5, ::2] *= 2.0**-12  # next to nothing, beside others
    x = x.to(dtype)
    numbers, scale = rows.narrowed(x[None])
    assert numbers.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape[-1] == -(-width // 64)
    wanted = literal_rows.narrow(x.float().numpy())
    np.testing.assert_array_equal(numbers[0].float().numpy(), wanted[0])
    np.testing.assert_array_equal(scale[0].numpy(), wanted[1])
    wide = rows.widened(numbers, scale, dtype)
    literal = torch.from_numpy(literal_rows.widen(*wanted)).to(dtype)
    assert wide.dtype == dtype and torch.equal(wide[0], literal)
    largest = x.float().abs().max()
    assert ((wide[0] - x).abs() <= x.abs().float() / 16 + largest / 448 / 1024 + x.abs().float() / 256).all()
    assert torch.equal(wide[0, 4], x[4])


def test_ties_go_to_the_even_number() -> None:
    # 448 makes the multiplier 1; the others lie in the middle of two numbers.
    x = torch.tensor([[[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10]]])
    numbers, scale = rows.narrowed(x)
    assert scale.item() == 1 and numbers[0, 0].float().tolist() == [448.0, 16.0, 20.0, -16.0, 0.0, 2.0**-8]


def test_a_nan_stays_one() -> None:
    x = torch.ones(1, 1, 128)
    x[0, 0, 70] = torch.nan
    wide = rows.widened(*rows.narrowed(x), torch.float32)[0, 0]
    assert wide[:64].isfinite().all() and wide[64:].isnan().all()


@pytest.mark.slow
def test_without_rounding_it_is_the_same_model(case: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(case.runner(), CUTS["in chunks"])
    assert np.abs(run(narrow(case).runner(), CUTS["in chunks"]) - plain).max() > 1e-3
    monkeypatch.setattr(state_contract, "E4M3", state_contract.FLOAT32)
    monkeypatch.setattr(rows, "narrowed", lambda x: (x, x.new_ones(*x.shape[:-1], -(-x.shape[-1] // 64))))
    monkeypatch.setattr(rows, "widened", lambda x, scale, dtype: x)
    np.testing.assert_array_equal(run(narrow(case).runner(), CUTS["in chunks"]), plain)


@pytest.mark.slow
def test_what_is_kept_does_not_depend_on_the_steps(case: Model) -> None:
    model = narrow(case)
    runners = {name: model.runner() for name in CUTS}
    at_once, *others = (run(runners[name], sizes) for name, sizes in CUTS.items())
    first, *rest = (dict(kept(runner)) for runner in runners.values())
    for said in others:
        # One number of ten thousand may fall to the other side, where sums in another order differ in the last bit.
        off = np.abs(said - at_once).max(-1) > 1e-4 * np.abs(at_once).max()
        assert off.mean() < 0.2, off
    for found in rest:
        for place, value in found.items():
            assert value.shape == first[place].shape
            differ = ~np.isclose(value, first[place], rtol=1e-4, atol=1e-5 * np.abs(first[place]).max())
            assert differ.mean() < 2e-3, (place, differ.mean())


@pytest.mark.slow
def test_a_step_reads_of_its_own_tokens_what_later_steps_read(case: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[rows.Kept] = []

    def watched(*args: Any) -> rows.Kept:
        seen.append(rows.keep(*args))
        return seen[-1]

    for module in (mla, indexer, window, shared_entries, reasoning):
        monkeypatch.setattr(module, "keep", watched)
    runner = narrow(case).runner()
    run(runner, [LENGTH])
    for buffers in runner.state.layers:
        held = {name: torch_state.held(buffer.array) for name, buffer in buffers.items()}
        later = rows.read(held, torch.float32)
        for tensor in (buffer.tensor for buffer in buffers.values() if buffer.tensor.dtype == E4M3):
            count = tensor.complete(LENGTH)
            numbers = np.arange(max(0, count - (tensor.ring or count)), count)
            at = numbers % tensor.ring if tensor.ring else numbers
            stored = {name: held[name][0, at] for name, b in buffers.items() if b.tensor.rows == tensor.name}
            own = [one.read for one in seen if _holds(one.tensors, numbers, stored)]
            assert own and all(torch.equal(read[0, numbers], later[tensor.name][0, at]) for read in own)


def _holds(new: dict[str, torch.Tensor], numbers: np.ndarray, stored: dict[str, torch.Tensor]) -> bool:
    """Whether these are the new rows that were stored."""
    if new.keys() != stored.keys() or any(value.shape[1] <= numbers.max() for value in new.values()):
        return False
    return all(torch.equal(value[0, numbers].float(), stored[name].float()) for name, value in new.items())


@pytest.mark.slow
def test_the_first_layer_keeps_its_rows_rounded(case: Model) -> None:
    """What it is given does not depend on rounding."""
    plain, model = case.runner(), narrow(case)
    runner = model.runner()
    run(plain, [LENGTH])
    run(runner, [LENGTH])
    found, exact = dict(kept(runner)), dict(kept(plain))
    for tensor in state_tensors(model.config, 0):
        if tensor.name != tensor.rows:
            continue
        whole = exact[0, tensor.name]
        if tensor.dtype != E4M3:
            np.testing.assert_array_equal(found[0, tensor.name], whole)
            continue
        turned = model.config.qk_rope_head_dim if tensor.name in ROTATED_ROWS else 0
        cut = whole.shape[1] - turned
        numbers, scales = literal_rows.narrow(whole[:, :cut])
        np.testing.assert_array_equal(found[0, tensor.name], numbers)
        np.testing.assert_array_equal(found[0, tensor.name + "_scale"], scales)
        if turned:
            np.testing.assert_array_equal(found[0, tensor.name + "_rotated"], whole[:, cut:])


def test_every_family_keeps_rows_of_attention_alone() -> None:
    kinds: dict[str | None, set[str]] = {}
    for config in (narrow(model_of(case)).config for case in CASES):
        for tensor in (tensor for i in range(config.state_layers) for tensor in state_tensors(config, i)):
            kinds.setdefault(tensor.dtype, set()).add(tensor.name)
    rounded = ROTATED_ROWS | {"index_key"}
    scales, rotated = (
        {f"{name}_{end}" for name in some} for end, some in (("scale", rounded), ("rotated", ROTATED_ROWS))
    )
    assert kinds == {E4M3: rounded, FLOAT32: scales | {"open", "index_open"}, None: rotated | {"engram"}}
