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


_AIM = "what docs/benchmarks.md aims at for our kernels on an H200, not measured yet"
_CPU = "decode by onnxruntime on a CPU, 25.4 ms of reads in 35.4 ms (docs/benchmarks.md); not measured on a GPU"
#: Part of a layer -> its efficiency. The section "GPU kernels" of docs/benchmarks.md has no figures so far.
EFFICIENCIES: Mapping[str, Efficiency] = {
    ATTENTION: Efficiency(0.80, _AIM),
    EXPERTS: Efficiency(0.75, _AIM),
    MATRICES: Efficiency(0.72, _CPU),
    HEAD: Efficiency(0.72, _CPU),
}


def given(share: float) -> dict[str, Efficiency]:
    """One figure for all parts."""
    return dict.fromkeys(EFFICIENCIES, Efficiency(share, "--efficiency"))
