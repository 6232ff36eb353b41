"""How far the hidden states that leave a block may be off: errors of its two halves, followed to its end.

A half takes an input z collapsed from the streams, computes y = F(z), and joins it to the streams:

    z = sum_j pre_j x_j        x'_k = post_k y + sum_j comb[j, k] x_j

A residual connection is the same with one stream and all coefficients 1. What a half adds is held to its own size,
post_k |y|, and not to the stream's, so that a wrong small branch cannot hide behind a large stream. An error of x'
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

_SMALLEST = 1e-30


class Errors(NamedTuple):
    """What limits allow, relative to a part's own output: ``CONFIDENCE`` times the expected error of each."""

    attention: float
    feed_forward: float
    residual: float
    collapse: float
    coefficients: float
    sinkhorn: float

    @classmethod
    def of(cls, paths: Sequence[tolerance.Path], precision: Precision) -> Errors:
        """From the paths in the order of the fields."""
        return cls(*(tolerance.CONFIDENCE * path.error(precision) for path in paths))


def block_paths(config: ModelConfig, layer: int, tokens: int) -> list[tolerance.Path]:
    """What limits of a block come from, in the order of ``Errors``; the last three are of hyper-connections alone."""
    return [
        tolerance.attention_path(config, layer, tokens),
        tolerance.feed_forward_path(config, layer),
        tolerance.RESIDUAL,
        *tolerance.hyper_paths(config),
    ]


class Allowed(NamedTuple):
    """How far each token may be off.

    Attributes:
        hidden: norms, [n], or [n, X] with hyper-connections.
        attention_input: relative error of the attention's input, [n].
        router_input: relative error of the router's input, [n].
    """

    hidden: torch.Tensor
    attention_input: torch.Tensor
    router_input: torch.Tensor


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


def _join(connection: Any, x: torch.Tensor) -> _Join:
    z, passing = connection.enter(x)
    if isinstance(connection, Residual):
        one = torch.ones(len(x), 1)
        return _Join(one, one, one[..., None], 0.0, z, passing)
    h, X, (post, comb) = connection, x.shape[1], passing
    mixes = unit_rms(x.flatten(1), h.norm_eps) @ h.fn[:X].T
    pre = torch.sigmoid(mixes * h.scale[0] + h.base[:X]) + h.hyper.eps
    scales = h.scale.abs().repeat_interleave(torch.tensor([X, X, X * X]))
    # Half of it passes a sigmoid, whose relative slope at 0 that is.
    return _Join(pre, post, comb, float((h.fn.norm(dim=-1) * scales).max()) / 2, z, passing)


def allowed(block: Block, x: torch.Tensor, watch: Watch, errors: Errors) -> Allowed:
    """How far a block's output may be off, its input being exact.

    Args:
        block: the reference's.
        x: its input, [n, D] or [n, X, D].
        watch: what its halves returned for ``x``.
        errors: relative, of its parts.
    """
    error_nX, inputs = torch.zeros(len(x), x.shape[1] if x.dim() > 2 else 1), []
    for connection, y, own in (
        (block.attn_hc, watch.attended, errors.attention),
        (block.ffn_hc, watch.fed, errors.feed_forward),
    ):
        of_z, x, error_nX = _half(connection, x, error_nX, y, own, errors)
        inputs.append(of_z)
    return Allowed(error_nX if x.dim() > 2 else error_nX[:, 0], *inputs)


def _half(
    connection: Any, x: torch.Tensor, error_nX: torch.Tensor, y: torch.Tensor, own: float, errors: Errors
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Through one half: the relative error of its input z, [n]; the streams it leaves, and their errors' norms, [n, X].

    Args:
        connection: that joins the half to the streams.
        x: the streams it meets.
        error_nX: norms of their errors.
        y: what it returned.
        own: relative error that its own path allows.
        errors: of the connection.
    """
    join, size_nX = _join(connection, x), x.norm(dim=-1).reshape(error_nX.shape)
    moved = error_nX.norm(dim=-1) / size_nX.norm(dim=-1).clamp_min(_SMALLEST)
    coefficients = _hypot(errors.sinkhorn, join.sensitivity * _hypot(errors.coefficients, moved))
    # Coefficients' errors are independent. Streams share that of what the half before added to them all, and add up.
    collapsed = _hypot((join.pre * error_nX).sum(-1), coefficients * (join.pre * size_nX).norm(dim=-1))
    of_z = _hypot(errors.collapse, collapsed / join.z.norm(dim=-1).clamp_min(_SMALLEST))
    added = join.post * y.norm(dim=-1, keepdim=True)
    mixed = (join.comb * size_nX[..., None]).norm(dim=-2)
    left = connection.leave(x, y, *join.passing)
    parts = (
        added * _hypot(own, of_z)[:, None],
        (join.comb * error_nX[..., None]).sum(-2),
        coefficients[:, None] * _hypot(added, mixed),
        errors.residual * left.norm(dim=-1).reshape(error_nX.shape),
    )
    return of_z, left, torch.stack(parts).norm(dim=0)


def _hypot(a: float | torch.Tensor, b: float | torch.Tensor) -> torch.Tensor:
    return torch.hypot(torch.as_tensor(a, dtype=torch.float32), torch.as_tensor(b, dtype=torch.float32))


class Watch(TorchFunctionMode):
    """Listens to a block while it runs: what its halves return, what its router sees, and what its indexer scores.

    Attributes:
        attended: output of the attention, [n, D].
        router_input: [n, D].
        fed: output of the feed-forward half, [n, D].
        index: the arguments of the last ``index_select``; None without an indexer.
    """

    attended: torch.Tensor
    router_input: torch.Tensor
    fed: torch.Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self._block, self.index = block, None

    def __enter__(self) -> Watch:
        def attention(_m: object, _i: object, out: Any) -> None:
            self.attended = out.output

        def feed_forward(_m: object, inputs: tuple[torch.Tensor, ...], out: Any) -> None:
            self.router_input = inputs[0]
            self.fed = out[0] if isinstance(out, tuple) else out

        self._hooks = [
            self._block.self_attn.register_forward_hook(attention),
            self._block.mlp.register_forward_hook(feed_forward),
        ]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.v4.index_select.default:
            self.index = args
        return function(*args, **(kwargs or {}))
