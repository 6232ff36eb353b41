"""Every sum of products that a model computes in float32, beside the same numbers in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.model.load import load_transformer
from v4export.plugins import OPS
from v4export.plugins.kernels.on_cuda import eager
from v4export.verify.tolerance import ACCUMULATE

_PRODUCTS = {
    torch.ops.aten.mm.default: "matrix",
    torch.ops.aten.addmm.default: "matrix",
    torch.ops.aten.bmm.default: "attention",
    torch.ops.aten.baddbmm.default: "attention",
}
#: What custom ops compute, in PyTorch.
_BODIES = {op.torch_op._opoverload: eager(op.torch_op) for op in OPS}


@dataclass(frozen=True)
class Sums:
    """Sums of one operation.

    Attributes:
        kind: what is multiplied, by a ``matrix`` or within ``attention``.
        terms: of each sum.
        conditioning: of each row of results, how much larger it would be had all terms the same sign.
        error: of each row, relative to it, in units of what ``tolerance`` derives from the number of terms.
    """

    kind: str
    terms: int
    conditioning: torch.Tensor
    error: torch.Tensor


@dataclass
class BesideFloat64(TorchDispatchMode):
    """While it is on, collects the sums of all float32 products, those inside custom ops too."""

    found: list[Sums] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _BODIES:
            with self:
                return _BODIES[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and out.dtype == torch.float32 and out.numel():
            self._collect(_PRODUCTS[func], out, [a.double() for a in args if isinstance(a, torch.Tensor)])
        return out

    def _collect(self, kind: str, out: torch.Tensor, operands: list[torch.Tensor]) -> None:
        *added, a, b = operands
        exact, same_sign = a @ b + sum(added), a.abs() @ b.abs() + sum(one.abs() for one in added)
        size, terms = exact.norm(dim=-1), a.shape[-1]
        seen = size > 0
        error = (out.double() - exact).norm(dim=-1)[seen] / size[seen]
        self.found.append(
            Sums(kind, terms, same_sign.norm(dim=-1)[seen] / size[seen], error / (ACCUMULATE * (terms / 3) ** 0.5))
        )


def sums_of(checkpoint: Path, prompt: Sequence[int]) -> list[Sums]:
    """Those of a prompt, in a checkpoint's model without Engram."""
    opened = Checkpoint.open(checkpoint)
    weights = audit(opened, scan_values=False).weights
    model = load_transformer(opened.config, lambda name: torch.from_numpy(weights[name].decode()))
    ids, start = torch.tensor([prompt]), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad(), BesideFloat64() as beside:
        model(ids, start, model.empty_state(), torch.tensor([[len(prompt) - 1]]))
    return beside.found
