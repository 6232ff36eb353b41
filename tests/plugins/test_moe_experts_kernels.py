"""The experts' kernels, emulated, beside the eager reference: every form of matrices, ragged and empty choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernel_checks import DTYPES, check, emulated

from v4export.plugins.kernels.call import Caller, Recorder, call
from v4export.plugins.kernels.kernel import Unfit
from v4export.plugins.moe_experts.kernel import SORT, kernels
from v4export.plugins.moe_experts.op import moe_experts

pytestmark = emulated
#: What tests call a form of matrices, and its name as a format.
FORMS = {"plain": "", "fp8": "fp8", "fp4": "mxfp4"}
# M tokens, E experts, K, D, F: one token, tiles of several, odd widths, more tokens than a tile, nothing at all
SIZES = [(3, 8, 2, 64, 32), (1, 4, 4, 160, 96), (70, 4, 2, 128, 64), (0, 4, 2, 64, 32)]


def matrices(form: str, count: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[list, list]:
    """Matrices [rows, columns] in a form, and their multipliers."""
    if form == "plain":
        return [(torch.randn(rows, columns) / columns**0.5).to(dtype) for _ in range(count)], []
    if form == "fp8":
        grid = -(-rows // 128), -(-columns // 128)
        scales = [(0.5 + torch.rand(grid)) / columns**0.5 for _ in range(count)]
        return [torch.randn(rows, columns).to(torch.float8_e4m3fn) for _ in range(count)], scales
    powers = [(2.0 ** torch.randint(-6, -2, (rows, columns // 32))).to(torch.bfloat16) for _ in range(count)]
    return [torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8) for _ in range(count)], powers


def arguments(
    form: str,
    sizes: Sequence[int],
    dtype: torch.dtype,
    limit: float | None = None,
    block: tuple[int, int] | None = None,
) -> list[Any]:
    M, E, K, D, F = sizes
    torch.manual_seed(sum(sizes))
    x, weights = torch.randn(M, D).to(dtype), torch.rand(M, K)
    indices = torch.stack([torch.randperm(E)[:K] for _ in range(M)]) if M else torch.zeros(0, K, dtype=torch.int64)
    parts = [matrices(form, E, *shape, dtype) for shape in ((F, D), (F, D), (D, F))]
    block = block or ((1, 32) if form == "fp4" else (128, 128))
    matrices_and_scales = [*(m for m, _ in parts), *(s for _, s in parts)]
    return [x, weights, indices, *matrices_and_scales, [], [], [], FORMS[form], *block, limit]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_they_are_the_reference(sizes: tuple, form: str, dtype: torch.dtype) -> None:
    """On the way are the hidden rows' rounding, and in the reference that of widened matrices."""
    check(moe_experts, kernels, arguments(form, sizes, dtype), dtype, 8 if dtype == torch.float32 else 3)


@pytest.mark.parametrize("form", FORMS)
def test_a_limit_cuts_off(form: str) -> None:
    """Gates above it, and ups on both sides; without it the result would be another."""
    args = arguments(form, (9, 4, 2, 64, 32), torch.float32, limit=0.1)
    check(moe_experts, kernels, args, torch.float32, 8)
    assert not torch.allclose(moe_experts(*args), moe_experts(*args[:-1], None))


@pytest.mark.parametrize("block", [(32, 64), (48, 192), (7, 128)])
def test_blocks_of_other_sizes(block: tuple[int, int]) -> None:
    sizes = (5, 3, 2, 200, 130)
    _, E, _, D, F = sizes
    args = arguments("fp8", sizes, torch.bfloat16, block=block)
    for part, (rows, columns) in zip((6, 7, 8), ((F, D), (F, D), (D, F)), strict=True):
        args[part] = [0.1 * torch.rand(-(-rows // block[0]), -(-columns // block[1])) for _ in range(E)]
    check(moe_experts, kernels, args, torch.bfloat16, 3)


def test_blocks_narrower_than_a_step_are_refused() -> None:
    args = arguments("fp8", SIZES[0], torch.bfloat16, block=(128, 32))
    with pytest.raises(Unfit, match="32 columns"):
        kernels(call, *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_fp8_and_fp4_number(dtype: torch.dtype) -> None:
    """Codes are widened by their bits: each of them once, in the columns that a token of ones picks out."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[127], codes[255] = 0, 0  # not numbers
    for form, stored in (("fp8", codes.view(torch.float8_e4m3fn)), ("fp4", codes)):
        width = 256 if form == "fp8" else 512
        args = arguments(form, (1, 1, 1, width, width), dtype)
        picked = torch.eye(width, dtype=torch.float32)[:8]
        args[0], args[1], args[2] = 4 * picked.to(dtype), torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.int64)
        args[4][0][0] = stored  # the up projection's first row: token i has its number i
        check(moe_experts, kernels, args, dtype, 8 if dtype == torch.float32 else 3)


class Stacking(Caller):
    """Gives kernels stacks in parts, as graphs do."""

    def __init__(self, each: int) -> None:
        super().__init__()
        self.each = each

    def tables(self, *lists: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, int]]:
        starts = range(0, len(lists[0]), self.each)
        rows = [[m.contiguous().view(torch.uint8).reshape(1, -1) for m in one] for one in lists if one]
        stacks = [torch.cat(one[first : first + self.each]) for one in rows for first in starts]
        return stacks, {"PARTS": len(starts), "PART": self.each}


@pytest.mark.parametrize("each", [7, 4, 3, 2])
@pytest.mark.parametrize("form", FORMS)
def test_stacks_in_parts(form: str, each: int) -> None:
    """Seven experts in one to four parts are the same as one by one, bit for bit."""
    args = arguments(form, (6, 7, 3, 64, 32), torch.bfloat16)
    assert torch.equal(kernels(Stacking(each), *args)[0], kernels(call, *args)[0])


def test_experts_that_nobody_chose_are_not_read() -> None:
    args = arguments("plain", (4, 6, 2, 64, 32), torch.float32)
    args[2] = torch.tensor([[1, 4]] * 4)
    for part in (3, 4, 5):
        for e in (0, 2, 3, 5):
            args[part][e] = torch.full_like(args[part][e], torch.nan)
    (y,) = kernels(call, *args)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize(("N", "E"), [(0, 4), (1, 300), (50, 3), (640, 256), (97, 1)])
def test_sorting(N: int, E: int) -> None:
    """Every pair stands once, experts in order, in tiles of at most 32."""
    torch.manual_seed(N)
    indices = torch.randint(0, E, (N,))
    order, tiles = call(SORT, indices, E=E, TOKENS=32)
    assert sorted(order.tolist()) == list(range(N))
    used = tiles[tiles[:, 2] > 0]
    assert (tiles[len(used) :] == 0).all() and int(used[:, 2].sum()) == N
    for expert, first, count in used.tolist():
        assert 0 < count <= 32
        assert set(indices[order[first : first + count].long()].tolist()) == {expert}
    assert used[:, 1].tolist() == [0, *used[:, 2].cumsum(0).tolist()][:-1] or not N


def test_the_tiles_hold_the_worst_choice() -> None:
    """Each expert has one token more than whole tiles: no choice makes more tiles of as many pairs."""
    indices = torch.arange(4).repeat_interleave(33)
    _, tiles = call(SORT, indices, E=4, TOKENS=32)
    assert len(tiles) == 8 and (tiles[:, 2] > 0).all()


def test_a_node_names_what_it_widens() -> None:
    """Proofs about engines go by it."""
    recorder = Recorder()
    on_meta = [[t.to("meta") for t in a] if isinstance(a, list) else a.to("meta") if isinstance(a, torch.Tensor) else a
               for a in arguments("fp4", SIZES[0], torch.bfloat16)]  # fmt: skip
    kernels(recorder, *on_meta)
    assert [c.kernel.name for c in recorder.compiled] == ["ExpertSort", "ExpertUpFp4", "ExpertDownFp4", "ExpertSum"]


def test_operands_anywhere_in_memory() -> None:
    """Views that are not packed, or do not start on 16 bytes, are read all the same."""
    args = arguments("plain", (3, 8, 2, 64, 32), torch.bfloat16)
    wanted = kernels(call, *args)
    odd = torch.empty(3 * 64 + 1, dtype=torch.bfloat16)[1:].view(3, 64).copy_(args[0])
    turned = [m.T.contiguous().T for m in args[3]]
    assert odd.data_ptr() % 16 and not turned[0].is_contiguous()
    assert torch.equal(kernels(call, odd, *args[1:3], turned, *args[4:])[0], wanted[0])
