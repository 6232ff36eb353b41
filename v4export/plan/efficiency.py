"""How near to a device's data sheet the parts of a step come, with where each figure is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from v4export.plan.loads import ATTENTION, EXPERTS, HEAD, MATRICES


@dataclass(frozen=True)
class Efficiency:
    """Share of bandwidth, or of the rate of products, whichever binds; and the source of the figure."""

    share: float
    source: str


_H100 = "our kernels on an H100, {} (docs/benchmarks.md, GPU kernels), of the data sheet's 3.35 TB/s"
_CPU = "decode by onnxruntime on a CPU, 25.4 ms of reads in 35.4 ms (docs/benchmarks.md); not measured on a GPU"
#: Part of a layer -> its efficiency.
EFFICIENCIES: Mapping[str, Efficiency] = {
    ATTENTION: Efficiency(0.08, _H100.format("DeepSeek-V3, 64 sequences of 8,192 tokens")),
    EXPERTS: Efficiency(0.60, _H100.format("DeepSeek-V3 in FP8, 64 tokens")),
    MATRICES: Efficiency(0.72, _CPU),
    HEAD: Efficiency(0.72, _CPU),
}


def given(share: float) -> dict[str, Efficiency]:
    """One figure for all parts."""
    return dict.fromkeys(EFFICIENCIES, Efficiency(share, "--efficiency"))
