"""Whether tokens that do not pass a decoder leave the rows that they leave where they pass every layer.

The rest of a prompt, and the reference, start from these rows, and nothing else that is compared depends on how they
were made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from v4export.config import ModelConfig
from v4export.precision import Precision
from v4export.runtime.onnx import OnnxExecutor
from v4export.state_contract import remembered
from v4export.verify import tolerance
from v4export.verify.boundary import Boundary, judge

NAME = "remembered rows"


def remembered_rows(
    executor: OnnxExecutor, config: ModelConfig, precision: Precision, tokens: Sequence[int], chunk: int
) -> Boundary:
    """The tensor whose rows are the furthest towards their limit, which is that of a row by itself.

    Both graphs compute them by the same nodes of the same numbers: no bit differs where a runtime runs both alike.
    """
    short, whole = executor.new_state(), executor.new_state()
    for start in range(0, len(tokens), chunk):
        piece = np.array([tokens[start : start + chunk]], np.int64)
        executor.remember(piece, short)
        executor.step(piece, whole, logits_at_BQ=np.zeros((1, 0), np.int64))
    judged = []
    for layer in range(config.num_layers):
        for tensor in remembered(config, layer):
            rows = [torch.from_numpy(s.rows(layer, tensor.name, 0).astype(np.float32)) for s in (short, whole)]
            path = tolerance.row_path(config, layer, tensor.rows)
            allowed = tolerance.CONFIDENCE * path.error(precision) * rows[1].norm(dim=-1)
            one = judge(NAME, rows[:1], rows[1:], [allowed], path.derivation(precision))
            judged.append(one.also() if one.ok else one.also((f"layer {layer}, {tensor.name}",)))
    return max(judged, key=lambda one: (not one.ok, one.rel / one.limit if one.limit else one.rel))
