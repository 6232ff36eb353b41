"""Latent attention with keys and values expanded per head where many tokens come at once, for onnxruntime on a CPU.

Absorbed attention works on rows of L + R numbers for every head; expanded attention first pays for the expansion of all
cached rows, then works on N + R and V numbers. One new token wants the first form, a chunk of a prompt the second. The
graph holds both, in the branches of an ``If`` whose condition compares their multiplications, computed from S and T
once for all layers. The scores' mask, too, is made once and shared. Both branches read the same weight bytes.

Measured on a model of 1e9 parameters, a prompt of 512 tokens takes two thirds of the time it takes absorbed, and a
token of decode as long as without the branch (``docs/benchmarks.md``).

Only float32 graphs are rewritten: at 16 bits the lowered graph has to round where the portable one rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from v4export.graphs.passes.neighbours import made_by, read_by
from v4export.graphs.passes.replaced import replace
from v4export.plugins.function_body import Body

#: Fewest new tokens worth the expanded form, whatever the multiplications say: below it, overheads decide.
FEWEST = 32


@dataclass(frozen=True)
class _Core:
    """What is between a block's queries and its output projection.

    Attributes:
        attention: the LatentAttention node.
        q_nope: [M, H, N].
        q_rope: [M, H, R].
        to_key: [H, N, L].
        from_latent: to_value transposed, [H, L, V].
        kv_b: the weight both are views of, [H * (N + V), L].
        nodes: what the branches replace, in order.
    """

    attention: ir.Node
    q_nope: ir.Value
    q_rope: ir.Value
    to_key: ir.Value
    from_latent: ir.Value
    kv_b: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """H, N, R, V, L."""
        heads, nope, latent = _ints(self.to_key)
        return heads, nope, _ints(self.q_rope)[-1], _ints(self.from_latent)[-1], latent


def expand_prefill(model: ir.Model) -> bool:
    """Rewrite every absorbed attention in place; whether there was any."""
    nodes = [node for node in model.graph if node.op_type == "LatentAttention"]
    cores = [core for core in map(_match, nodes) if core]
    if not cores:
        return False
    first = cores[0]
    shared = Body("expand_prefill.")
    pays, mask = _pays(shared, first), _mask(shared, first.attention)
    model.graph.insert_before(first.nodes[0], shared.nodes)
    for core in cores:
        body = Body(f"{core.attention.name}.")
        then = body.subgraph("expanded", [], lambda b, core=core: [_expanded(b, core, mask)])  # type: ignore[misc]
        otherwise = body.subgraph("absorbed", [], lambda b, core=core: [_absorbed(b, core)])  # type: ignore[misc]
        z, output = body.op("If", pays, then_branch=then, else_branch=otherwise), core.nodes[-1].outputs[0]
        replace(model.graph, core.nodes[-1], core.nodes, body.nodes, [output], [z])
    return True


def _match(attention: ir.Node) -> _Core | None:
    """The pattern of ``v4export.model.mla``'s absorbed form around a float32 LatentAttention node."""
    if attention.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    join = made_by(attention.inputs[0], "Concat")
    turn = made_by(join and join.inputs[0], "Transpose")
    absorb = made_by(turn and turn.inputs[0], "MatMul")
    heads_first = made_by(absorb and absorb.inputs[0], "Transpose")
    parts = made_by(absorb and absorb.inputs[1], "Split")
    view = made_by(parts and parts.inputs[0], "Reshape")
    out_heads_first = read_by(attention, "Transpose")
    emit = read_by(out_heads_first, "MatMul")
    last = read_by(emit, "Transpose")
    if not (join and turn and absorb and heads_first and view and out_heads_first and emit and last):
        return None
    q_nope, q_rope, to_key, from_latent, kv_b = (
        heads_first.inputs[0], join.inputs[1], absorb.inputs[1], emit.inputs[1], view.inputs[0],
    )  # fmt: skip
    if q_nope is None or q_rope is None or to_key is None or from_latent is None or kv_b is None:
        return None
    nodes = (heads_first, absorb, turn, join, attention, out_heads_first, emit, last)
    return _Core(attention, q_nope, q_rope, to_key, from_latent, kv_b, nodes)


def _ints(value: ir.Value) -> list[int]:
    assert value.shape is not None
    return [d if isinstance(d, int) else -1 for d in value.shape]


def _pays(b: Body, core: _Core) -> ir.Value:
    """Whether the expanded form multiplies less, and there are tokens enough.

    Per head, with U = T + S: expanded ``U L (N+V) + S U (N+R+V)``, absorbed ``S L (N+V) + S U (2L + 2R)``. (The value
    product runs over whole rows, R included.)
    """
    _, nope, rope, value, latent = core.sizes
    steps, held = b.dim(core.attention.inputs[1], 1), b.dim(core.attention.inputs[2], 1)  # type: ignore[arg-type]
    saved = b.op("Mul", b.op("Mul", steps, b.op("Add", steps, held)), b.const([2 * latent + rope - nope - value]))
    less = b.op("Greater", saved, b.op("Mul", held, b.const([latent * (nope + value)])))
    return b.op("Squeeze", b.op("And", less, b.op("GreaterOrEqual", steps, b.const([FEWEST]))))


def _mask(b: Body, attention: ir.Node) -> ir.Value:
    """What is added to the scores, [B, 1, S, T+S]: 0 where a query may look, the lowest float elsewhere."""
    new, cache, position = attention.inputs[1:4]
    assert new is not None and cache is not None and position is not None
    step = b.arange(b.dim(new, 1))
    held = b.op("Less", b.arange(b.dim(cache, 1)), b.reshape(position, -1, 1, 1, 1))
    causal = b.op("LessOrEqual", step, b.reshape(step, 1, 1, -1, 1))
    to_held = b.op("Expand", held, b.op("Concat", b.const([1, 1]), b.dim(new, 1), b.const([1]), axis=0))
    to_new = b.op("Expand", causal, b.op("Concat", b.dim(new, 0), b.const([1, 1, 1]), axis=0))
    visible = b.op("Concat", to_held, to_new, axis=-1)
    return b.op("Where", visible, b.const(0, np.float32), b.const(np.finfo(np.float32).min, np.float32))


def _expanded(b: Body, core: _Core, mask: ir.Value) -> ir.Value:
    """[M, H, V] from keys and values of every head, by the standard Attention operator."""
    heads, nope, rope, value, latent = core.sizes
    _, new, cache, _ = core.attention.inputs
    assert new is not None and cache is not None
    batch = b.dim(new, 0)
    rows = b.reshape(b.op("Concat", cache, new, axis=1), -1, latent + rope)
    c, k_rope = b.ops("Split", rows, b.const([latent, rope]), outputs=2, axis=-1)
    expanded = b.reshape(b.op("Gemm", c, core.kv_b, transB=1), -1, heads, nope + value)
    k_nope, v = b.ops("Split", expanded, b.const([nope, value]), outputs=2, axis=-1)
    each_head = b.op("Expand", b.op("Unsqueeze", k_rope, b.const([1])), b.const([1, heads, 1]))
    k, q = (b.op("Concat", *pair, axis=-1) for pair in ((k_nope, each_head), (core.q_nope, core.q_rope)))
    q, k = (b.reshape(x, batch, -1, heads * (nope + rope)) for x in (q, k))
    z = b.op(
        "Attention", q, k, b.reshape(v, batch, -1, heads * value), mask,
        q_num_heads=heads, kv_num_heads=heads, scale=core.attention.attributes["scale"].as_float(),
    )  # fmt: skip
    return b.reshape(z, -1, heads, value)


def _absorbed(b: Body, core: _Core) -> ir.Value:
    """[M, H, V] as the portable graph has it."""
    node = core.attention
    q_latent = b.op("MatMul", b.op("Transpose", core.q_nope, perm=[1, 0, 2]), core.to_key)
    q = b.op("Concat", b.op("Transpose", q_latent, perm=[1, 0, 2]), core.q_rope, axis=-1)
    z = b.op(node.op_type, q, *node.inputs[1:], domain=node.domain, **node.attributes)
    z.dtype, z.shape = node.outputs[0].dtype, node.outputs[0].shape
    emitted = b.op("MatMul", b.op("Transpose", z, perm=[1, 0, 2]), core.from_latent)
    return b.op("Transpose", emitted, perm=[1, 0, 2])
