"""What an op has to move and to compute, from the shapes of its operands alone, whatever its kernels do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from kernel_cases import OP


class Work(NamedTuple):
    """What no implementation can do without.

    Attributes:
        moved: bytes between memory and the GPU.
        operations: multiplications and additions of products of matrices.
    """

    moved: float
    operations: float = 0.0

    def floor(self, bandwidth: float, rate: float) -> tuple[float, str]:
        """Seconds at bytes and operations a second, and which of the two binds."""
        memory, matrix = self.moved / bandwidth, self.operations / rate
        return (memory, "memory") if memory >= matrix else (matrix, "matrix")


def work(op: str, args: Iterable[Any]) -> Work:
    """Of one op in a step of one new token a sequence."""
    given = list(args)
    return _WORK[op](*given) if op in _WORK else Work(sized(given) + sized(_results(op, given)))


def sized(value: Any) -> int:
    """Of every tensor in it."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(sized, value)) if isinstance(value, list | tuple) else 0


def _results(op: str, args: list[Any]) -> Any:
    """Without numbers."""
    on_meta = [[t.to("meta") for t in a] if isinstance(a, list) else a for a in args]
    return OP[op].torch_op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in on_meta))


def _attention(q: torch.Tensor, rows: int, values: int) -> Work:
    """So many rows for each query token, read once for all heads; queries in, weighted values out."""
    M, H, W = q.shape
    return Work(q.element_size() * M * (rows * W + H * W + H * values), 2.0 * M * rows * H * (W + values))


def _latent(q, new, cache, position, latent_width, scale):
    """Every row held, and the new one."""
    return _attention(q, cache.shape[1] + 1, latent_width)


def _thought(q, own, cache, thought_at, latent_width, scale):
    """Every row held, and the thought's own."""
    return _attention(q, cache.shape[1] + own.shape[1], latent_width)


def _sparse_latent(q, new, cache, selected, position, latent_width, scale):
    """The selected rows, and their numbers."""
    return _with(_attention(q, selected.shape[1], latent_width), sized(selected))


def _window(q, new, ring, position, sinks, scale):
    """The rows of a window."""
    return _attention(q, ring.shape[1], q.shape[2])


def _compressed(q, new, ring, new_entry, entry, position, sinks, ratio, scale):
    """The rows of a window, and every entry."""
    return _attention(q, ring.shape[1] + entry.shape[1] + new_entry.shape[1], q.shape[2])


def _sparse(q, new, ring, new_entry, entry, selected, position, sinks, ratio, scale):
    """The rows of a window, the selected entries, and their numbers."""
    return _with(_attention(q, ring.shape[1] + selected.shape[1], q.shape[2]), sized(selected))


def _index(q, keys, results):
    """So many keys for each query token, a product for each head; numbers out. Scores need not be written."""
    M, H, width = q.shape
    return Work(q.element_size() * M * (keys + H) * width + 4 * M * H + 8 * M * results, 2.0 * M * H * width * keys)


def _select(q, weights, new, cache, position, top_k, ratio, scale):
    """Every key."""
    keys = cache.shape[1] + 1
    return _index(q, keys, min(top_k, keys))


def _candidates(q, weights, new, cache, position, top_k, ratio, scale, top_blocks, size):
    """Every key; numbers of keys and of blocks."""
    keys = cache.shape[1] + 1
    return _index(q, keys, min(top_k, keys) + min(top_blocks, -(-keys // size)))


def _reselect(q, weights, new, cache, blocks, position, top_k, ratio, scale, size):
    """The keys of the query's blocks."""
    return _with(_index(q, blocks.shape[1] * size, min(top_k, cache.shape[1] + 1)), sized(blocks))


def _experts(x, weights, indices, gate, up, down, *rest):
    """The matrices and multipliers of every expert that a token chose; three products a pair; tokens in and out."""
    (M, K), E, (F, D) = indices.shape, len(gate), (gate[0].shape[0], down[0].shape[0])
    hit = E * (1 - (1 - K / E) ** M) if indices.is_meta else indices.unique().numel()
    matrices = sized([gate, up, down, *rest[:3]]) / E
    return Work(hit * matrices + 2 * sized(x) + sized([weights, indices]), 6.0 * M * K * D * F)


def _compress(rows, ring, bias, position, ratio, halves):
    """A key and a gate of each token that an entry is pooled from; bias; the entry."""
    B, W = len(rows), rows.shape[2] // (2 * halves)
    return Work(4.0 * B * (halves * ratio * 2 * W + W) + sized(bias))


def _conv(rows, ring, weight, position, dilation):
    """Of the ring only the rows that there are taps for."""
    taps = weight.shape[1]
    return Work((taps + 1) * sized(rows) + sized(weight))


def _hash(logits, table, ids, *rest):
    """For a token its row of the table, as many logits, and both results."""
    return Work(len(ids) * (8 + table.shape[1] * (8 + 4 + 4 + 8)))


def _hyper(streams, fn, base, scale, *rest):
    """Streams and weights once, a collapsed row out; one product."""
    M, X, D = streams.shape
    out = M * D * streams.element_size() + 4 * M * (X + X * X)
    return Work(sized([streams, fn, base, scale]) + out, 2.0 * M * fn.numel())


def _coefficients(streams, fn, base, scale, *rest):
    """Streams and weights once; one product."""
    M, X, _ = streams.shape
    return Work(sized([streams, fn, base, scale]) + 4 * M * (2 * X + X * X), 2.0 * M * fn.numel())


def _with(one: Work, more: int) -> Work:
    return Work(one.moved + more, one.operations)


#: Of those that read every operand once, write every result once and have no product, none needs a function.
_WORK: dict[str, Callable[..., Work]] = {
    "latent_attention": _latent,
    "thought_attention": _thought,
    "sparse_latent_attention": _sparse_latent,
    "window_attention": _window,
    "compressed_attention": _compressed,
    "sparse_attention": _sparse,
    "index_select": _select,
    "candidate_select": _candidates,
    "index_reselect": _reselect,
    "moe_experts": _experts,
    "compress_tokens": _compress,
    "engram_conv": _conv,
    "hash_route": _hash,
    "hyper_connection": _hyper,
    "hyper_coefficients": _coefficients,
}
