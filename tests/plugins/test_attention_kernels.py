"""The attentions' kernels, emulated, beside their eager references: sequences with a past, of unequal lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from histories import Past
from kernel_checks import DTYPES, check, emulated
from one_node import to_torch

from v4export.plugins import OPS
from v4export.plugins.kernels.attention import TILES
from v4export.plugins.kernels.call import Caller, Recorder, call
from v4export.plugins.kernels.kernel import Unfit

pytestmark = emulated
BY_NAME = {op.torch_op._name.removeprefix("v4::"): op for op in OPS}
SCALE = 0.3
# (S new tokens, held by each sequence): one token, a chunk, more rows than a tile, and none held at all
HISTORIES = [(1, [0]), (1, [37]), (3, [0, 70]), (5, [4, 150, 33])]


def narrow(arrays: Sequence[np.ndarray], dtype: torch.dtype, keep: Sequence[int] = ()) -> list[torch.Tensor]:
    """Tensors of them: floats in ``dtype`` but those at ``keep``."""
    tensors = [to_torch(a) for a in arrays]
    return [t.to(dtype) if t.is_floating_point() and i not in keep else t for i, t in enumerate(tensors)]


def steps_of(dtype: torch.dtype) -> float:
    """Probabilities are rounded to 16 bits before they are multiplied; float32 sums run in another order."""
    return 4 if dtype == torch.float32 else 2


def compare(name: str, args: Sequence[object], dtype: torch.dtype) -> None:
    op = BY_NAME[name]
    assert op.kernels is not None
    check(op.torch_op, op.kernels, args, dtype, steps_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("history", HISTORIES, ids=str)
@pytest.mark.parametrize(("H", "L", "R"), [(5, 32, 16), (20, 24, 7)])
def test_latent_attention(history: tuple, H: int, L: int, R: int, dtype: torch.dtype) -> None:
    S, position = history
    past = Past.of(position, S)
    rows = past.rows(L + R)
    arrays = [past.queries(H, L + R), past.new(rows), past.held(rows, max(position) + 2), past.position]
    compare("latent_attention", [*narrow(arrays, dtype), L, SCALE], dtype)


def test_a_cache_without_rows() -> None:
    past = Past.of([0, 0], 3)
    rows = past.rows(40)
    arrays = [past.queries(4, 40), past.new(rows), past.held(rows, 0), past.position]
    compare("latent_attention", [*narrow(arrays, torch.float32), 32, SCALE], torch.float32)


def chosen(past: Past, K: int, ratio: int) -> np.ndarray:
    """At most K of the numbers that each query sees, in any order, -1 among them; one at least."""
    selected = np.full((past.B * past.S, K), -1, np.int64)
    for m, _, t in past.each():
        count = min(K, (t + 1) // ratio)
        selected[m, past.rng.permutation(K)[:count]] = past.rng.permutation((t + 1) // ratio)[:count]
    return selected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_sparse_latent_attention(history: tuple, dtype: torch.dtype) -> None:
    S, position = history
    past = Past.of(position, S)
    rows = past.rows(48)
    cache = past.held(rows, max(position) + 1)
    arrays = [past.queries(5, 48), past.new(rows), cache, chosen(past, 21, 1), past.position]
    compare("sparse_latent_attention", [*narrow(arrays, dtype), 32, SCALE], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 5])
def test_thought_attention(steps: int, dtype: torch.dtype) -> None:
    at = np.array([[0, 30, 66], [2, 2, 7]], np.int64)
    past = Past.of([67, 8], 3)
    arrays = [past.queries(5, 48), past.normal(6, steps, 48), past.held(past.rows(48), 70), at]
    compare("thought_attention", [*narrow(arrays, dtype), 32, SCALE], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("history", HISTORIES, ids=str)
@pytest.mark.parametrize("since", [False, True])
def test_window_attention(history: tuple, since: bool, dtype: torch.dtype) -> None:
    S, position = history
    past, first = Past.of(position, S), [p // 2 for p in position]
    rows = past.rows(48)
    arrays = [
        past.queries(5, 48),
        past.new(rows),
        past.ring(rows, 33, first if since else ()),
        past.position,
        past.normal(5),
    ]
    extra = [torch.tensor(first)] if since else []
    compare("window_attention", [*narrow(arrays, dtype, keep=[4]), SCALE, *extra], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("history", HISTORIES, ids=str)
@pytest.mark.parametrize("ratio", [1, 4])
def test_compressed_attention(history: tuple, ratio: int, dtype: torch.dtype) -> None:
    S, position = history
    past = Past.of(position, S)
    rows, entries = past.rows(48), past.rows(48, ratio)
    arrays = [
        past.queries(5, 48), past.new(rows), past.ring(rows, 8), past.new(entries, ratio),
        past.held(entries, max(position) // ratio, ratio), past.position, past.normal(5),
    ]  # fmt: skip
    compare("compressed_attention", [*narrow(arrays, dtype, keep=[6]), ratio, SCALE], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("history", HISTORIES, ids=str)
@pytest.mark.parametrize("since", [False, True])
def test_sparse_attention(history: tuple, since: bool, dtype: torch.dtype) -> None:
    S, position, ratio = *history, 4
    past, first = Past.of(position, S), [p // 2 for p in position]
    rows, entries = past.rows(48), past.rows(48, ratio)
    arrays = [
        past.queries(5, 48), past.new(rows), past.ring(rows, 8, first if since else ()), past.new(entries, ratio),
        past.held(entries, max(position) // ratio, ratio), chosen(past, 9, ratio), past.position, past.normal(5),
    ]  # fmt: skip
    extra = [torch.tensor(first)] if since else []
    compare("sparse_attention", [*narrow(arrays, dtype, keep=[7]), ratio, SCALE, *extra], dtype)


def latent_args(H: int, L: int, dtype: torch.dtype = torch.bfloat16) -> list[object]:
    past = Past.of([300], 1)
    rows = past.rows(L + 16)
    arrays = [past.queries(H, L + 16), past.new(rows), past.held(rows, 300), past.position]
    return [*narrow(arrays, dtype), L, SCALE]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(tile: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch's shared memory chooses among, and rows in several splits."""
    monkeypatch.setattr("v4export.plugins.kernels.attention.TILES", (tile,))
    op, caller = BY_NAME["latent_attention"], Caller(budget=227 << 10)
    assert op.kernels is not None
    args = latent_args(H=64, L=32 + TILES.index(tile))  # a width of its own: compilations are kept by sizes
    (got,) = op.kernels(caller, *args)
    wanted = op.torch_op(*(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args))
    torch.testing.assert_close(got.float(), wanted, rtol=8e-3, atol=8e-3)


def test_the_largest_tile_that_fits_is_taken() -> None:
    heads = {}
    for kib in (48, 99, 227):
        recorder = Recorder(kib << 10)
        BY_NAME["latent_attention"].kernels(
            recorder, *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in latent_args(128, 512))
        )  # type: ignore[misc]
        heads[kib] = dict(recorder.compiled[0].defines)["HEADS"]
        assert recorder.compiled[0].launch.shared <= kib << 10
    assert heads == {48: "16", 99: "32", 227: "64"}


def test_a_row_too_wide_for_a_launch_is_refused() -> None:
    with pytest.raises(Unfit, match="bytes of shared memory"):
        args = latent_args(128, 512, torch.float32)
        BY_NAME["latent_attention"].kernels(
            Recorder(48 << 10), *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)
        )  # type: ignore[misc]


def test_scores_far_apart_do_not_overflow() -> None:
    past = Past.of([40], 1)
    rows = past.rows(32)
    arrays = [1000 * past.queries(2, 32), past.new(rows), past.held(rows, 40), past.position]
    (z,) = BY_NAME["latent_attention"].kernels(call, *narrow(arrays, torch.float32), 32, 1.0)  # type: ignore[misc]
    assert torch.isfinite(z).all()
