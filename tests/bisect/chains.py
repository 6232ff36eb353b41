"""Small foreign graphs: a chain of six steps, each a product, an activation and a residual connection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, STEPS = 16, 6


def chain(
    file: Path, *, wrong: dict[int, str] | None = None, prefix: str = "", change: float = 1.0, inputs: str = "x"
) -> Path:
    """Write one.

    Args:
        file: to write.
        wrong: by step, another activation than Tanh.
        prefix: of all names but inputs and outputs.
        change: factor of the third step's weight.
        inputs: name of the input.
    """
    rng, nodes, x = np.random.default_rng(0), [], inputs
    weights = [rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 4 for _ in range(STEPS)]
    weights[2] *= np.float32(change)
    for i in range(STEPS):
        out = "y" if i == STEPS - 1 else f"{prefix}a{i}"
        w, m, t = (f"{prefix}{letter}{i}" for letter in "wmt")
        nodes.append(helper.make_node("MatMul", [x, w], [m], name=f"{prefix}product{i}"))
        nodes.append(helper.make_node((wrong or {}).get(i, "Tanh"), [m], [t], name=f"{prefix}activation{i}"))
        nodes.append(helper.make_node("Add", [x, t], [out], name=f"{prefix}sum{i}"))
        x = out
    kept = [numpy_helper.from_array(w, f"{prefix}w{i}") for i, w in enumerate(weights)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in (inputs, "y")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], kept)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    return file
