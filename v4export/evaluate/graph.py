"""An exported graph by onnxruntime on the same windows: what was built is what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from v4export.evaluate.lane import Lane
from v4export.evaluate.store import Store
from v4export.evaluate.stream import compared, decoded, log_probabilities, scored
from v4export.package.bundle import Bundle
from v4export.runtime.onnx import OnnxExecutor


def graph_predictions(
    bundle: Bundle,
    reference: Lane,
    batches: Sequence[np.ndarray],
    store: Store,
    chunk: int,
    device: str = "cpu",
    advance: Callable[[float], None] = lambda _: None,
) -> np.ndarray:
    """What ``Stream.predictions`` keeps of every scored token, of a bundle's graph.

    Args:
        bundle: the graph, its state and precision.
        reference: in float32, whose last hidden states are in the store.
        batches: windows.
        store: as ``Stream.layers`` left it.
        chunk: logits at a time; a step has as many tokens as leave no more.
        device: that runs the graph.
        advance: told each finished batch.
    """
    executor = OnnxExecutor(
        bundle.folder, bundle.config, bundle.precision, max_seq_len=bundle.max_seq_len, device=device, prepack=False
    )
    head = reference.head(decoded(reference))
    kept = []
    for i, ids in enumerate(batches):
        (B, S), state = ids.shape, executor.new_state(len(ids))
        place_BS = scored(ids).reshape(B, S - 1)
        size = max(1, chunk // B)
        for start in range(0, S - 1, size):
            piece = np.ascontiguousarray(ids[:, start : min(start + size, S - 1)])
            every = np.broadcast_to(np.arange(piece.shape[1]), piece.shape)
            logits = torch.from_numpy(executor.step(piece, state, logits_at_BQ=every)).flatten(0, 1)
            at = place_BS[:, start : start + piece.shape[1]].flatten()
            wanted = log_probabilities(head, store[reference.name, i], at)
            found = logits.double().log_softmax(-1)
            kept.append(compared(wanted, found, torch.from_numpy(ids).flatten()[at + 1]))
        advance(1)
    return np.concatenate(kept)
