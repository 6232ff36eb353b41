"""The pass that gives every expert its own Gemm, against the portable body of the node it replaces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common

from v4export.graphs.passes.group_experts import group_experts
from v4export.graphs.stamp import portable_bodies
from v4export.plugins.function_body import OPSET, VERSION, Body

E, K, D, F = 6, 2, 8, 5
SHAPES = {"gate": (F, D), "up": (F, D), "down": (D, F)}


def experts(folder: Path, order: tuple[str, ...]) -> ir.Model:
    """A MoeExperts node whose matrices lie in one file, each expert's in the given order."""
    rng = np.random.default_rng(0)
    weights, content = {}, b""
    for e in range(E):
        for part in order:
            data = rng.normal(size=SHAPES[part]).astype(np.float32).tobytes()
            name, shape = f"{e}.{part}", ir.Shape((1, *SHAPES[part]))
            tensor = ir.ExternalTensor(
                "w.bin", len(content), len(data), ir.DataType.FLOAT, shape=shape, name=name, base_dir=folder
            )
            weights[name] = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            content += data
    (folder / "w.bin").write_bytes(content)
    x, share, chosen = (
        ir.Value(name=name, shape=ir.Shape(["M", width]), type=ir.TensorType(dtype))
        for name, width, dtype in (
            ("x", D, ir.DataType.FLOAT), ("weights", K, ir.DataType.FLOAT), ("indices", K, ir.DataType.INT64),
        )
    )  # fmt: skip
    b = Body()
    matrices = [weights[f"{e}.{part}"] for part in SHAPES for e in range(E)]
    attributes = dict(num_experts=E, rows=128, columns=128, format="", limit=0.0)
    y = b.op("MoeExperts", x, share, chosen, *matrices, domain="v4", **attributes)
    y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape([None, D])
    out = b.op("Identity", y)
    out.name, out.dtype, out.shape = "y", ir.DataType.FLOAT, ir.Shape(["M", D])
    imports = {"": OPSET, "v4": VERSION}
    graph = ir.Graph(
        [x, share, chosen], [out], nodes=b.nodes, initializers=weights.values(), opset_imports=imports, name="g"
    )
    return ir.Model(graph, ir_version=10, functions=portable_bodies(b.nodes))


def run(model: ir.Model, folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    ir.save(model, folder / "model.onnx")
    return ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.mark.parametrize(
    ("order", "gemms"),
    [(("gate", "up", "down"), 2 * E), (("up", "gate", "down"), 3 * E), (("gate", "down", "up"), 3 * E)],
)
@pytest.mark.parametrize("tokens", [1, 7])
def test_same_numbers_and_neighbours_joined(tmp_path: Path, order: tuple[str, ...], gemms: int, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    feeds = {
        "x": rng.normal(size=(tokens, D)).astype(np.float32),
        "weights": rng.random((tokens, K), np.float32),
        "indices": np.stack([rng.permutation(E)[:K] for _ in range(tokens)]),
    }
    before = run(experts(tmp_path, order), tmp_path, feeds)
    model = experts(tmp_path, order)
    assert group_experts(model)
    common.RemoveUnusedNodesPass()(model)
    assert sum(node.op_type == "Gemm" for node in model.graph) == gemms
    np.testing.assert_allclose(run(model, tmp_path, feeds), before, rtol=1e-4, atol=1e-5)
