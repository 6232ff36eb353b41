"""moe_route as a kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4export.plugins.kernels.kernel import Kernel
from v4export.plugins.kernels.size import cdiv

#: How the source calls the ways of scoring.
SCORINGS = {"softmax": "SOFTMAX", "sigmoid": "SIGMOID", "sqrtsoftplus": "SQRT_SOFTPLUS"}
_WARPS = 4

ROUTE = Kernel(
    "MoeRoute",
    Path(__file__).with_name("kernel.cu"),
    inputs=("logits float32 M E", "bias float32 E"),
    outputs=("weights float32 M K", "indices int64 M K"),
    compiled="E K",
    scalars="M",
    grid=lambda d: (cdiv(d.M, _WARPS),),
    threads=lambda d: 32 * _WARPS,
)


def kernels(call: Any, logits, bias, top_k, scoring, num_groups, topk_groups, group_score, norm, scale):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    return call(
        ROUTE,
        logits,
        bias,
        K=top_k,
        SCORING=SCORINGS[scoring],
        GROUPS=num_groups,
        OPEN=topk_groups,
        BEST_TWO=int(group_score == "top2_sum"),
        NORM=int(norm),
        SCALE=float(scale),
    )
