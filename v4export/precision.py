"""What ``--precision`` means: the type of activations and state, and the format of the large matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from v4export.config import Fp8Blocks, ModelConfig
from v4export.errors import BadInput

#: Roles (``v4export/checkpoint/names.py``) whose matrices a narrow format applies to. Router, norms, embedding and head
#: stay in the activations' type, as DeepSeek's own FP8 checkpoints keep them.
MATRIX_ROLES = frozenset({"linear", "expert"})

#: Always float32, whatever the precision: the router's correction bias decides near ties, and what steers
#: hyper-connections, sinks and pooling is small and stored so.
FLOAT32_ROLES = frozenset({"router_bias", "hyper", "sink", "position_bias"})

#: Roles whose dtype no precision changes.
_FIXED = dict.fromkeys(FLOAT32_ROLES, "float32") | {"hash_table": "int64"}


@dataclass(frozen=True)
class Precision:
    """One row of the table below.

    Attributes:
        name: what the user types.
        activations: dtype of activations, state, and of every weight that is not in ``matrices``'s format.
        fp8: block format of the matrices, or None where they have the activations' dtype.
        roundoff: unit round-off of the activations' dtype.
        weight_roundoff: unit round-off of the coarsest dtype of a matrix.
        fp4_experts: experts' matrices are packed E2M1 with a power of two per 32 numbers (OCP MX v1.0, MXFP4).
    """

    name: str
    activations: str
    fp8: Fp8Blocks | None
    roundoff: float
    weight_roundoff: float
    fp4_experts: bool = False

    @property
    def unquantised(self) -> str:
        """Name of the precision with the same activations whose matrices have their type."""
        return next(p.name for p in PRECISIONS.values() if p.activations == self.activations and not p.fp8)

    def weight_dtype(self, role: str) -> str:
        """dtype a weight of this role is stored in."""
        if role in _FIXED:
            return _FIXED[role]
        if self.fp4_experts and role == "expert":
            return "float4_e2m1fn"
        return "float8_e4m3fn" if self.fp8 and role in MATRIX_ROLES else self.activations


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp32", "float32", None, 2.0**-24, 2.0**-24),
        Precision("fp16", "float16", None, 2.0**-11, 2.0**-11),
        Precision("bf16", "bfloat16", None, 2.0**-8, 2.0**-8),
        Precision("fp8", "bfloat16", Fp8Blocks(), 2.0**-8, 2.0**-4),
        Precision("mxfp4", "bfloat16", Fp8Blocks(), 2.0**-8, 2.0**-2, fp4_experts=True),
    )
}


def precision(name: str, config: ModelConfig | None = None) -> Precision:
    """The precision of that name; its FP8 blocks are those that a model's checkpoint has, where it has any.

    Raises:
        BadInput: there is none.
    """
    if name not in PRECISIONS:
        raise BadInput(f"unknown precision {name!r}", f"known: {', '.join(PRECISIONS)}", "choose one of them")
    found, stored = PRECISIONS[name], config.fp8 if config else None
    if found.fp8 is None or stored is None:
        return found
    return replace(found, fp8=replace(found.fp8, rows=stored.rows, columns=stored.columns))
