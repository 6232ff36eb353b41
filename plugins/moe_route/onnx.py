"""moe_route as ONNX: the body in standard operators."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, make_function, opset

OP_TYPE = "MoeRoute"
ATTRIBUTES = {
    "top_k": "INT",
    "scoring": "STRING",
    "num_groups": "INT",
    "topk_groups": "INT",
    "group_score": "STRING",
    "norm": "INT",
    "scale": "FLOAT",
}
OUTPUTS = (lambda _: ir.DataType.FLOAT, lambda _: ir.DataType.INT64)


def translate(logits, bias, top_k, scoring, num_groups, topk_groups, group_score, norm, scale):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    return opset(DOMAIN).MoeRoute(
        logits,
        bias,
        top_k=top_k,
        scoring=scoring,
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_score=group_score,
        norm=int(norm),
        scale=scale,
        **PLUGIN_HINTS,
    )


def function(node: ir.Node) -> ir.Function:
    """The body for a node's attributes: (logits [M,E], bias [E]) -> (weights [M,K], indices [M,K])."""
    a = {name: node.attributes[name].value for name in ATTRIBUTES}
    logits, bias = ir.val("logits"), ir.val("bias")

    def write(b: Body) -> list[ir.Value]:
        scores = expert_scores(b, logits, a["scoring"])
        choice = b.op("Add", scores, bias)
        if a["topk_groups"] < a["num_groups"]:
            choice = _open_groups(b, choice, a)
        _, idx = b.ops("TopK", choice, b.const([a["top_k"]]), outputs=2, axis=-1, largest=1, sorted=1)
        weights = expert_weights(b, scores, idx, bool(a["norm"]), a["scale"])
        weights.name, idx.name = "weights", "indices"
        return [weights, idx]

    return make_function(OP_TYPE, [logits, bias], write, [*ATTRIBUTES, *PLUGIN_HINTS])


def expert_scores(b: Body, logits: ir.Value, scoring: str) -> ir.Value:
    """Scores float32 [M, E] of logits [M, E]."""
    return _SCORINGS[scoring](b, logits)


def expert_weights(b: Body, scores: ir.Value, indices: ir.Value, norm: bool, scale: float) -> ir.Value:
    """Weights float32 [M, K] of the experts [M, K] that somebody chose."""
    weights = b.op("GatherElements", scores, indices, axis=1)
    if norm:
        total = b.op("ReduceSum", weights, b.const([-1]), keepdims=1)
        weights = b.op("Div", weights, b.op("Add", total, b.const(1e-20, np.float32)))
    return b.op("Mul", weights, b.const(scale, np.float32))


def _sqrt_softplus(b: Body, logits: ir.Value) -> ir.Value:
    """The root of max(x, 0) + log(1 + u), u = exp(-|x|).

    There is no Log1p, and onnxruntime's Softplus takes the logarithm of 1 + u, which is 1 for x < -17: the root of that
    loss is 2e-4. But log(1 + u) is 2 atanh(u / (u + 2)), which loses nothing.
    """
    two = b.const(2, np.float32)
    u = b.op("Exp", b.op("Neg", b.op("Abs", logits)))
    log1p = b.op("Mul", b.op("Atanh", b.op("Div", u, b.op("Add", u, two))), two)
    return b.op("Sqrt", b.op("Add", b.op("Relu", logits), log1p))


_SCORINGS: dict[str, Callable[[Body, ir.Value], ir.Value]] = {
    "softmax": lambda b, logits: b.op("Softmax", logits, axis=-1),
    "sigmoid": lambda b, logits: b.op("Sigmoid", logits),
    "sqrtsoftplus": _sqrt_softplus,
}


def _open_groups(b: Body, choice: ir.Value, a: dict[str, object]) -> ir.Value:
    """Scores with every expert outside the best groups set to the lowest float."""
    groups, keep = int(a["num_groups"]), int(a["topk_groups"])  # type: ignore[call-overload]
    grouped = b.reshape(choice, 0, groups, -1)
    best, _ = b.ops("TopK", grouped, b.const([1 if a["group_score"] == "max" else 2]), outputs=2, axis=-1)
    score = b.op("ReduceSum", best, b.const([-1]), keepdims=0)
    # The keep-th best group score is the threshold a group must reach. Equal scores would open one group too many,
    # so each index is compared with the chosen ones instead.
    _, chosen = b.ops("TopK", score, b.const([keep]), outputs=2, axis=-1)
    each = b.const(np.arange(groups).reshape(1, groups, 1))
    same = b.op("Equal", each, b.op("Unsqueeze", chosen, b.const([1])))
    opened = b.op("ReduceMax", b.op("Cast", same, to=int(ir.DataType.FLOAT)), b.const([-1]), keepdims=1)
    masked = b.op("Where", b.op("Cast", opened, to=int(ir.DataType.BOOL)), grouped, b.const(_LOWEST, np.float32))
    return b.op("Reshape", masked, b.op("Shape", choice))


_LOWEST = np.finfo(np.float32).min
