"""Halves of layers with FP8 matrices and FP8 inputs, in NumPy and ml_dtypes, against the definition with scales."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch

from v4export import presets
from v4export.model.block import Block
from v4export.model.inputs import round_inputs, set_input_scales
from v4export.model.linear import Linear

CONFIG = presets.load("tiny-v3")
DENSE, ROUTED = 0, 1
RNG = np.random.default_rng(7)


def fp8(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """As a GPU's FP8 product reads it: an E4M3 number, which the scale multiplies afterwards."""
    return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def product(x: np.ndarray, w: np.ndarray, scale: float) -> np.ndarray:
    """FP8 numbers times FP8 numbers with a multiplier a row, added up in double precision, scaled once at the end."""
    rows = np.abs(w).max(1) / np.float32(448)
    codes = (w / rows[:, None]).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return ((fp8(x, np.float32(scale)).astype(np.float64) @ codes.T) * rows * scale).astype(np.float32)


def stored(w: np.ndarray) -> np.ndarray:
    """A matrix as FP8 with a multiplier a row, widened: what the definition is given."""
    rows = np.abs(w).max(1, keepdims=True) / np.float32(448)
    return (w / rows).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * rows


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def block(layer: int) -> tuple[Block, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A layer with random weights, those weights, and scales of what it reads, some of which cut numbers off."""
    one, weights = Block(CONFIG, layer, absorbed=False), {}
    for name, parameter in one.named_parameters():
        shape = tuple(parameter.shape)
        w = RNG.normal(size=shape).astype(np.float32) / np.float32(shape[-1] ** 0.5 if len(shape) > 1 else 1)
        weights[name] = w
        held = stored(w) if name.endswith("proj.weight") or "kv_a_proj" in name else w
        parameter.data.copy_(torch.from_numpy(held))
    prefix, scales = f"model.layers.{layer}.", {}
    for name in weights:
        path = name.removesuffix(".weight")
        if ".experts." in name:
            path = path.partition(".experts.")[0] + ".experts"
            for kind in ("input_scale", "middle_scale"):
                scales.setdefault(f"{prefix}{path}.{kind}", scale(CONFIG.num_experts))
        elif name.endswith("_proj.weight") and not name.endswith("kv_b_proj.weight"):
            scales[f"{prefix}{path}.input_scale"] = scale()
    set_input_scales(one, scales, layer, CONFIG)
    return one, weights, {name.removeprefix(prefix): s for name, s in scales.items()}


def scale(*shape: int) -> np.ndarray:
    return np.exp(RNG.uniform(-6.5, -4.5, shape)).astype(np.float32)


def near(found: torch.Tensor, wanted: np.ndarray) -> None:
    """All but those whose input a sum in another order has pushed over a boundary of E4M3."""
    error = np.linalg.norm(found.numpy() - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert np.median(error) < 2e-3 and error.max() < 0.05, error


@torch.inference_mode()
def test_dense_half():
    one, w, s = block(DENSE)
    x = RNG.normal(size=(40, CONFIG.hidden_size)).astype(np.float32)
    gate, up = (product(x, w[f"mlp.{part}_proj.weight"], s[f"mlp.{part}_proj.input_scale"]) for part in ("gate", "up"))
    wanted = product(silu(gate) * up, w["mlp.down_proj.weight"], s["mlp.down_proj.input_scale"])
    near(one.mlp(torch.from_numpy(x)), wanted)


@torch.inference_mode()
def test_routed_half():
    one, w, s = block(ROUTED)
    x = RNG.normal(size=(40, CONFIG.hidden_size)).astype(np.float32)
    # What experts are chosen depends on nothing that is rounded.
    weights, chosen = (each.numpy() for each in one.mlp.gate(torch.from_numpy(x)))

    def swiglu(rows: np.ndarray, path: str, scales: tuple[float, float, float]) -> np.ndarray:
        gate, up = (
            product(rows, w[f"{path}.{part}_proj.weight"], by) for part, by in zip(("gate", "up"), scales, strict=False)
        )
        return product(silu(gate) * up, w[f"{path}.down_proj.weight"], scales[2])

    shared = tuple(float(s[f"mlp.shared_experts.{part}_proj.input_scale"]) for part in ("gate", "up", "down"))
    wanted = swiglu(x, "mlp.shared_experts", shared)
    for m in range(len(x)):
        for k, e in enumerate(chosen[m]):
            own, middle = (float(s[f"mlp.experts.{kind}_scale"][e]) for kind in ("input", "middle"))
            wanted[m] += weights[m, k] * swiglu(x[m : m + 1], f"mlp.experts.{e}", (own, own, middle))[0]
    near(one.mlp(torch.from_numpy(x))[0], wanted)


@torch.inference_mode()
def test_projections_of_attention():
    one, w, s = block(DENSE)
    x = RNG.normal(size=(30, CONFIG.hidden_size)).astype(np.float32)
    for name in ("q_a_proj", "kv_a_proj_with_mqa"):
        if f"self_attn.{name}.weight" in w and f"self_attn.{name}.input_scale" in s:
            wanted = product(x, w[f"self_attn.{name}.weight"], s[f"self_attn.{name}.input_scale"])
            near(getattr(one.self_attn, name)(torch.from_numpy(x)), wanted)
    z = RNG.normal(size=(30, CONFIG.num_heads, CONFIG.v_head_dim)).astype(np.float32)
    wanted = product(z.reshape(30, -1), w["self_attn.o_proj.weight"], s["self_attn.o_proj.input_scale"])
    near(one.self_attn.output(torch.from_numpy(z)), wanted)
    assert one.self_attn.kv_b_proj.input_scale is None, "multiplied in parts, and by what is not rounded"


@pytest.mark.parametrize("layer", [DENSE, ROUTED])
def test_only_what_is_wanted_is_rounded(layer):
    one = round_inputs(Block(CONFIG, layer), lambda name: name == "self_attn.o_proj.weight")
    linears = {name: m for name, m in one.named_modules() if isinstance(m, Linear)}
    assert [n for n, m in linears.items() if m.input_scale is not None] == ["self_attn.o_proj"]
    if layer == ROUTED:
        assert one.mlp.experts.input_scale is one.mlp.experts.middle_scale is None
        round_inputs(one, lambda name: ".experts." in name)
        assert one.mlp.experts.input_scale.shape == one.mlp.experts.middle_scale.shape == (CONFIG.num_experts,)
        assert all(m.input_scale is None for n, m in linears.items() if ".experts." in n), "it is the op that rounds"


def test_scales_of_other_layers_are_not_taken():
    one, _, scales = block(DENSE)
    other = Block(dataclasses.replace(CONFIG), DENSE)
    set_input_scales(other, {f"model.layers.3.{name}": s for name, s in scales.items()}, DENSE, CONFIG)
    assert not [name for name, _ in other.named_parameters() if name.endswith("_scale")]
    assert len([name for name, _ in one.named_parameters() if name.endswith("input_scale")]) == len(scales)
