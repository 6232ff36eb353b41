"""E2M1 in PyTorch's arithmetic, against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

from v4export.checkpoint.e2m1 import e2m1_codes, packed, round_to_e2m1

TIES = np.float32([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
#: Every 4099th float32, all ties and what lies next to them, of both signs.
NUMBERS = np.concatenate(
    [np.arange(0, 2**31, 4099, dtype=np.uint32).view(np.float32), *(np.nextafter(TIES, to) for to in (0, TIES, 9))]
).astype(np.float32)
NUMBERS = np.concatenate([NUMBERS[np.isfinite(NUMBERS)], -NUMBERS[np.isfinite(NUMBERS)]])


def test_numbers_are_rounded_as_ml_dtypes_does():
    expected = np.clip(NUMBERS, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    found = round_to_e2m1(torch.from_numpy(NUMBERS))
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))
    np.testing.assert_array_equal(e2m1_codes(found).numpy(), expected.view(np.uint8) & 15)


def test_two_share_a_byte_the_first_in_the_low_bits():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert packed(codes).tolist() == [[0x21, 0x0F]]
