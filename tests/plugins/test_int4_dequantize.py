from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from one_node import one_node, run
from onnx_ir.passes import common

from v4export.plugins.int4_dequantize.op import int4_dequantize

COLUMNS = 32


def operands(rows: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Numbers [N, K], multipliers, and the numbers as PyTorch holds them."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(-8, 8, (rows, width))
    scale = np.exp2(rng.normal(size=(rows, width // COLUMNS))).astype(ml_dtypes.bfloat16)
    halves = numbers.astype(np.uint8) & 15
    return numbers, scale, torch.from_numpy(halves[:, ::2] | halves[:, 1::2] << 4)


def by_hand(numbers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    out = np.zeros(numbers.shape, ml_dtypes.bfloat16)
    for n in range(out.shape[0]):
        for k in range(out.shape[1]):
            out[n, k] = np.float32(numbers[n, k]) * np.float32(scale[n, k // COLUMNS])
    return out.astype(np.float32)


def model_of(numbers: np.ndarray, scale: np.ndarray) -> ir.Model:
    attributes = {"domain": "trt", "axis": numbers.ndim - 1, "block_size": COLUMNS}
    model = one_node("TRT_INT4DequantizeLinear", [], [numbers.astype(ml_dtypes.int4), scale], **attributes)
    # onnxruntime lets no function read numbers of this type, but for the body's own cast.
    common.InlinePass()(model)
    return model


@pytest.mark.parametrize("leading", [False, True], ids=["matrix", "as experts have it"])
@pytest.mark.parametrize("shape", [(1, 32), (5, 96)])
def test_equation(shape, leading):
    numbers, scale, packed = operands(*shape)
    wanted = by_hand(numbers, scale)
    eager = int4_dequantize(packed, torch.from_numpy(scale.view(np.int16)).view(torch.bfloat16), COLUMNS)
    assert eager.dtype == torch.bfloat16
    np.testing.assert_array_equal(eager.float().numpy(), wanted)
    if leading:
        numbers, scale, wanted = numbers[None], scale[None], wanted[None]
    np.testing.assert_array_equal(run(model_of(numbers, scale), [])[0], wanted)


def test_every_number():
    numbers = np.arange(32)[None] % 16 - 8
    scale = np.full((1, 1), 0.5, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(run(model_of(numbers, scale), [])[0], numbers * 0.5)


def test_registration():
    _, scale, packed = operands(4, 64)
    args = (packed, torch.from_numpy(scale.view(np.int16)).view(torch.bfloat16), COLUMNS)
    torch.library.opcheck(int4_dequantize, args, test_utils=("test_autograd_registration", "test_faketensor"))
