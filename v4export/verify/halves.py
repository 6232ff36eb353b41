"""How far the hidden states that leave a block may be off: errors of its two halves, followed to its end.

A half takes an input z collapsed from the streams, computes y = F(z), and joins it to the streams:

    z = sum_j pre_j x_j        x'_k = post_k y + sum_j comb[j, k] x_j

A residual connection is the same with one stream and all coefficients 1. Where it goes by the shares pre that the half
before it computed (single-pass), their errors are of that half, and of the first none. What Engram adds ahead of both
is an error of all streams from the start. What a half adds is held to its own size,
post_k |y|, and not to the stream's, so that a wrong small branch cannot hide behind a large stream; an error of its
input is enlarged where it rounds to E4M3. An error of x'
relative to all streams moves the coefficients of the next half by as much as the rows of its projection are long, and
z by pre_j for each stream; and it passes through comb. Errors are norms of a token's vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from v4export.config import ModelConfig
from v4export.model.block import Block
from v4export.model.norm import unit_rms
from v4export.model.residual import Residual
from v4export.precision import Precision
from v4export.verify import tolerance
from v4export.verify.selection import Indexed

_SMALLEST = 1e-30


class Errors(NamedTuple):
    """What limits allow, relative to a part's own output: ``CONFIDENCE`` times the expected error of each."""

    attention: float
    feed_forward: float
    residual: float
    collapse: float
    coefficients: float
    sinkhorn: float
    engram: float = 0.0
    attention_roundings: int = 0
    feed_forward_roundings: int = 0

    @classmethod
    def of(cls, paths: Sequence[tolerance.Path], precision: Precision) -> Errors:
        """From the paths in the order of the fields; and how often the halves round to E4M3."""
        errors = cls(*(tolerance.CONFIDENCE * path.error(precision) for path in paths))  # type: ignore[arg-type]
        attention, feed_forward = (path.roundings(precision) for path in paths[:2])
        return errors._replace(attention_roundings=attention, feed_forward_roundings=feed_forward)


def enlarged(limit: torch.Tensor, times: int) -> torch.Tensor:
    """What is allowed of a result where so much is allowed ahead of some roundings to E4M3."""
    found: torch.Tensor = tolerance.CONFIDENCE * tolerance.enlarged(limit / tolerance.CONFIDENCE, times)
    return found


def block_paths(config: ModelConfig, layer: int, tokens: int) -> list[tolerance.Path]:
    """What limits of a block come from, in the order of ``Errors``; those it does not have are nameless."""
    return [
        tolerance.attention_path(config, layer, tokens),
        tolerance.feed_forward_path(config, layer),
        tolerance.RESIDUAL,
        *tolerance.hyper_paths(config),
        tolerance.engram_path(config, layer),
    ]


class Allowed(NamedTuple):
    """How far each token may be off.

    Attributes:
        hidden: norms, [n], or [n, X] with hyper-connections.
        attention_input: relative error of the attention's input, [n].
        router_input: relative error of the router's input, [n].
        pre: error of a share of the streams in the next layer's input, relative to it, [n].
    """

    hidden: torch.Tensor
    attention_input: torch.Tensor
    router_input: torch.Tensor
    pre: torch.Tensor


@dataclass(frozen=True)
class _Join:
    """A half's coefficients for the streams it met.

    Attributes:
        pre: [n, X].
        post: [n, X].
        comb: [n, X, X], summed over its first X.
        sensitivity: by how much a coefficient moves for a relative error of all streams.
        z: the half's input, [n, D].
        passing: what the connection itself wants to have passed to ``leave``.
    """

    pre: torch.Tensor
    post: torch.Tensor
    comb: torch.Tensor
    sensitivity: float
    z: torch.Tensor
    passing: tuple[torch.Tensor, ...]


def _join(connection: Any, x: torch.Tensor, pre: torch.Tensor | None) -> _Join:
    z, passing, _ = connection.enter(x, pre)
    if isinstance(connection, Residual):
        one = torch.ones(len(x), 1)
        return _Join(one, one, one[..., None], 0.0, z, passing)
    h, X, (post, comb) = connection, x.shape[1], passing
    if not h.hyper.single_pass:
        mixes = unit_rms(x.flatten(1), h.norm_eps) @ h.fn[:X].T
        pre = torch.sigmoid(mixes * h.scale[0] + h.base[:X]) + h.hyper.eps
    assert pre is not None
    scales = h.scale.abs().repeat_interleave(torch.tensor([X, X, X * X]))
    # Half of it passes a sigmoid, whose relative slope at 0 that is.
    return _Join(pre, post, comb, float((h.fn.norm(dim=-1) * scales).max()) / 2, z, passing)


def allowed(block: Block, x: torch.Tensor, watch: Watch, errors: Errors, pre: torch.Tensor | None = None) -> Allowed:
    """How far a block's output may be off, its input being exact.

    Args:
        block: the reference's.
        x: its input, [n, D] or [n, X, D].
        watch: what its halves returned for ``x``.
        errors: relative, of its parts.
        pre: shares of the streams in its input, where single-pass.
    """
    shape = (len(x), x.shape[1] if x.dim() > 2 else 1)
    error_nX, inputs, of_pre = torch.zeros(shape), [], torch.zeros(len(x))
    if block.engram is not None:
        added = (watch.remembered - x).norm(dim=-1).reshape(shape)
        x = watch.remembered
        stored = errors.residual * x.norm(dim=-1).reshape(shape)
        error_nX = torch.stack([errors.engram * added, _of_gates(watch, errors.engram), stored]).norm(dim=0)
    for connection, y, own, seen in (
        (block.attn_hc, watch.attended, (errors.attention, errors.attention_roundings), pre),
        (block.ffn_hc, watch.fed, (errors.feed_forward, errors.feed_forward_roundings), watch.pre),
    ):
        half = _half(connection, x, error_nX, y, own, errors, (seen, of_pre))
        x, error_nX, of_pre = half.left, half.error_nX, half.coefficients
        inputs.append(half.of_z)
    of_attention, of_router = inputs
    return Allowed(error_nX if x.dim() > 2 else error_nX[:, 0], of_attention, of_router, of_pre)


def _of_gates(watch: Watch, error: float) -> torch.Tensor:
    """How far Engram's gates may move what they let through, [n, X].

    An error of relative size e in a key, in a direction that has nothing to do with the stream, moves their product g
    by e times the root mean square of the weighted stream. The root of g moves by much more where g is small.
    """
    streams, keys, value, q_weight, k_weight, eps = watch.gated
    scaled = unit_rms(streams, eps) * q_weight * k_weight
    g = (scaled * unit_rms(keys, eps)).sum(-1) / streams.shape[-1] ** 0.5
    moved = error * scaled.square().mean(-1).sqrt()

    def gate(of: torch.Tensor) -> torch.Tensor:
        root = of.abs().clamp_min(1e-6).sqrt()
        return torch.sigmoid(torch.where(of < 0, -root, root))

    off = torch.maximum((gate(g + moved) - gate(g)).abs(), (gate(g - moved) - gate(g)).abs())
    return off * value.norm(dim=-1, keepdim=True)


class _Half(NamedTuple):
    """Relative errors of a half's input and coefficients, [n]; the streams it leaves, and norms of their errors."""

    of_z: torch.Tensor
    coefficients: torch.Tensor
    left: torch.Tensor
    error_nX: torch.Tensor


def _half(
    connection: Any,
    x: torch.Tensor,
    error_nX: torch.Tensor,
    y: torch.Tensor,
    own: tuple[float, int],
    errors: Errors,
    before: tuple[torch.Tensor | None, torch.Tensor],
) -> _Half:
    """Through one half.

    Args:
        connection: that joins the half to the streams.
        x: the streams it meets.
        error_nX: norms of their errors.
        y: what it returned.
        own: relative error that its own path allows, and how often that rounds to E4M3.
        errors: of the connection.
        before: shares of the streams that the half before computed, and their relative error, [n].
    """
    pre, of_pre = before
    join, size_nX = _join(connection, x, pre), x.norm(dim=-1).reshape(error_nX.shape)
    moved = error_nX.norm(dim=-1) / size_nX.norm(dim=-1).clamp_min(_SMALLEST)
    coefficients = _hypot(errors.sinkhorn, join.sensitivity * _hypot(errors.coefficients, moved))
    of_pre = coefficients if pre is None else of_pre
    # Coefficients' errors are independent. Streams share that of what the half before added to them all, and add up.
    collapsed = _hypot((join.pre * error_nX).sum(-1), of_pre * (join.pre * size_nX).norm(dim=-1))
    of_z = _hypot(errors.collapse, collapsed / join.z.norm(dim=-1).clamp_min(_SMALLEST))
    added = join.post * y.norm(dim=-1, keepdim=True)
    mixed = (join.comb * size_nX[..., None]).norm(dim=-2)
    left = connection.leave(x, y, *join.passing)
    parts = (
        added * _hypot(own[0], enlarged(of_z, own[1]))[:, None],
        (join.comb * error_nX[..., None]).sum(-2),
        coefficients[:, None] * _hypot(added, mixed),
        errors.residual * left.norm(dim=-1).reshape(error_nX.shape),
    )
    return _Half(of_z, coefficients, left, torch.stack(parts).norm(dim=0))


def _hypot(a: float | torch.Tensor, b: float | torch.Tensor) -> torch.Tensor:
    return torch.hypot(torch.as_tensor(a, dtype=torch.float32), torch.as_tensor(b, dtype=torch.float32))


class Watch(TorchFunctionMode):
    """Listens to a block while it runs: what its halves return, what its router sees, and what its indexer scores.

    Attributes:
        remembered: the streams with what Engram adds, where there is any.
        gated: the arguments of its gates.
        attended: output of the attention, [n, D].
        pre: shares of the streams in the feed-forward half's input, where single-pass.
        router_input: [n, D].
        fed: output of the feed-forward half, [n, D].
        index: what the indexer scored; None without one.
    """

    remembered: torch.Tensor
    gated: tuple[Any, ...]
    attended: torch.Tensor
    router_input: torch.Tensor
    fed: torch.Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self._block = block
        self.index: Indexed | None = None
        self.pre: torch.Tensor | None = None

    def __enter__(self) -> Watch:
        def engram(_m: object, _i: object, out: Any) -> None:
            self.remembered = out[0]

        def attention(_m: object, _i: object, out: Any) -> None:
            self.attended = out.output

        def feed_forward(_m: object, inputs: tuple[torch.Tensor, ...], out: Any) -> None:
            self.router_input = inputs[0]
            self.fed = out[0] if isinstance(out, tuple) else out

        listened = [(self._block.self_attn, attention), (self._block.mlp, feed_forward), (self._block.engram, engram)]
        self._hooks = [module.register_forward_hook(hook) for module, hook in listened if module is not None]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = _OPS.get(function)
        if name == "engram_gating":
            self.gated = args
        elif name == "hyper_coefficients":
            self.pre = result[0] if self.pre is None else self.pre  # the attention half runs first
        elif name:
            self.index = Indexed.of(name, args)
        return result


_WATCHED = ("index_select", "candidate_select", "index_reselect", "hyper_coefficients", "engram_gating")
_OPS = {getattr(torch.ops.v4, name).default: name for name in _WATCHED}
