"""Experts of integers through onnxruntime's QMoE, against the portable bodies and against plain NumPy."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from nbits_graphs import Stored, counts, given, repacked_copy, run

from v4export.checkpoint.narrow import widen
from v4export.graphs.lower import bodies_for_cpu, lower_for_cpu
from v4export.plugins.function_body import Body

E, K, D, F = 6, 2, 96, 64
LAYER = "model.layers.3.mlp.experts."
SHAPES = {"gate": (F, D), "up": (F, D), "down": (D, F)}
BF16, FP32, FP16 = ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.FLOAT16


@pytest.fixture(autouse=True)
def exact_experts(monkeypatch):
    """As the runtime sets it where it makes a session."""
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "fp32")


def experts(
    folder: Path, stored: str, activations: ir.DataType, limit: float = 0.0, shapes=SHAPES
) -> tuple[Path, Stored]:
    found = Stored(folder, stored)
    width = shapes["down"][0]
    operands = [
        found.matrix(f"{LAYER}{e}.{part}_proj.weight", shape, (1,)) for part, shape in shapes.items() for e in range(E)
    ]
    x, share = given("x", ["M", width], activations), given("weights", ["M", K], FP32)
    chosen = given("indices", ["M", K], ir.DataType.INT64)
    b = Body()
    y = b.op(
        "MoeExperts", x, share, chosen, *(one[0] for one in operands), *(one[1] for one in operands), domain="v4",
        num_experts=E, rows=1, columns=32, format=stored, limit=limit,
    )  # fmt: skip
    y.dtype, y.shape = activations, ir.Shape([None, width])
    return found.save(b, [x, share, chosen], [y]), found


def feeds(tokens: int, width: int = D, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(tokens, width)).astype(ml_dtypes.bfloat16).astype(np.float32),
        "weights": rng.random((tokens, K), np.float32) + np.float32(0.1),
        "indices": np.stack([rng.permutation(E)[:K] for _ in range(tokens)]),
    }


def mixed(found: Stored, given: dict[str, np.ndarray], limit: float) -> np.ndarray:
    """The equation, a token and an expert at a time, in float64."""
    y = np.zeros_like(given["x"], np.float64)
    for token, x in enumerate(given["x"].astype(np.float64)):
        for share, e in zip(given["weights"][token], given["indices"][token], strict=True):
            gate, up, down = (
                widen(found.matrices[f"{LAYER}{e}.{part}_proj.weight"], found.format).astype(np.float64)
                for part in SHAPES
            )
            g, u = gate @ x, up @ x
            if limit:
                g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
            y[token] += share * (down @ (g / (1 + np.exp(-g)) * u))
    return y


def rel(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("limit", [0.0, 2.5])
@pytest.mark.parametrize("stored", ["int4", "int8"])
def test_the_equations_numbers(tmp_path, stored, limit, tokens, prepack):
    path, found = experts(tmp_path, stored, BF16, limit)
    model = repacked_copy(path)
    assert counts(model)["QMoE"] == 1 and "Loop" not in counts(model)
    given = feeds(tokens)
    (got,) = run(model, tmp_path, given, prepack)
    # Only the result is rounded: half a step of bfloat16, and nothing that would show in eight bits of another sum.
    wanted = mixed(found, given, limit)
    assert (np.abs(got - wanted) <= 2.0**-8 * np.abs(wanted) + 3e-6 * np.abs(wanted).max()).all()
    (portable,) = run(bodies_for_cpu(path), tmp_path, given)
    assert rel(got, portable) < 2.0**-6


@pytest.mark.parametrize(("stored", "activations"), [("int8", FP32), ("int4", FP32), ("int4", FP16), ("mxfp4", BF16)])
def test_other_formats_are_left_alone(tmp_path, stored, activations):
    path, _ = experts(tmp_path, stored, activations)
    model = repacked_copy(path)
    assert "QMoE" not in counts(model) and counts(model)["Loop"] == 1
    assert not list(tmp_path.glob("weights/*"))
    np.testing.assert_array_equal(*(run(m, tmp_path, feeds(5))[0] for m in (model, lower_for_cpu(path))))


def test_an_expert_named_twice_counts_twice(tmp_path):
    path, found = experts(tmp_path, "int4", BF16)
    given = feeds(4)
    given["indices"][:, 1] = given["indices"][:, 0]
    (got,) = run(repacked_copy(path), tmp_path, given)
    assert rel(got, mixed(found, given, 0.0)) < 2.0**-8


@pytest.mark.parametrize("stored", ["int4", "int8"])
def test_rows_of_a_single_block(tmp_path, stored):
    shapes = {"gate": (32, 32), "up": (32, 32), "down": (32, 32)}
    path, found = experts(tmp_path, stored, BF16, shapes=shapes)
    given = feeds(9, 32)
    (got,) = run(repacked_copy(path), tmp_path, given)
    assert rel(got, mixed(found, given, 0.0)) < 2.0**-8


def test_activations_in_eight_bits_are_another_sum(tmp_path, monkeypatch):
    monkeypatch.delenv("ORT_QMOE_CPU_QNBIT_GEMM")
    path, found = experts(tmp_path, "int4", BF16)
    given = feeds(7)
    (got,) = run(repacked_copy(path, level=4), tmp_path, given)
    assert 2.0**-8 < rel(got, mixed(found, given, 0.0)) < 5e-2
