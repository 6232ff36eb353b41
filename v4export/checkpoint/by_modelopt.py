"""Multipliers of NVFP4 blocks as NVIDIA's Model Optimizer searches them: of all in E4M3, that with the least error.

It is the extra ``modelopt``, imported where a recipe asks for it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from v4export.checkpoint.e2m1 import E2M1_MAX
from v4export.checkpoint.formats import E4M3_MAX

_MODULE = "modelopt.torch.quantization.calib.mse"


def _calibrators() -> Any:
    with warnings.catch_warnings():
        # It warns of kernels it has no use for here: of Triton, CUDA and of transformers' versions.
        warnings.simplefilter("ignore")
        return importlib.import_module(_MODULE)


def searched(x_CN: Tensor, scale_2: float, rounded: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Multipliers float32 [N] of N blocks of C numbers, ``scale_2`` included.

    Args:
        x_CN: the numbers, float32.
        scale_2: multiplier of multipliers.
        rounded: what the format makes of numbers by multipliers.
    """
    x_NC = x_CN.t().contiguous()

    def rounded_by(x_NC: Tensor, largest_N: Tensor) -> Tensor:
        return rounded(x_NC, largest_N.reshape(-1, 1) / E2M1_MAX)

    most = torch.tensor(scale_2 * E4M3_MAX * E2M1_MAX)
    search = _calibrators().NVFP4MSECalibrator(x_NC.abs().amax(1), most, axis=0, quant_func=rounded_by)
    search.collect(x_NC)
    return search.compute_amax() / E2M1_MAX
