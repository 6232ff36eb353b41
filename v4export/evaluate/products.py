"""Products of 16-bit matrices on a CPU: widened, summed in float32 and rounded once.

That is what PyTorch's own do, several times slower on CPUs that have no instructions for them, and what onnxruntime's
copy of a graph does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from v4export.plugins.moe_experts.op import moe_experts

_PRODUCTS = {torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul}
_NARROW = {torch.bfloat16, torch.float16}
_EXPERTS = torch.ops.v4.moe_experts


class WidenedProducts(TorchFunctionMode):
    """Inside it, products of 16-bit operands are widened."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (_EXPERTS, _EXPERTS.default):
            # A mode ends at an operator's door: what is behind it is called as the function it is.
            with self:
                return moe_experts._init_fn(*args, **kwargs)
        if func in _PRODUCTS and args[0].dtype in _NARROW:
            wide = (one.float() if isinstance(one, torch.Tensor) else one for one in args)
            return func(*wide, **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)
