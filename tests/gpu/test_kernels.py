"""Kernels on the GPU at hand: every op at published widths, and whole tiny models, beside the same without kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_operands import OP, check_op, models_and_ops, operands

from v4export import api
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.config import ModelConfig
from v4export.engine.backend import cuda_devices
from v4export.model import Transformer
from v4export.model.load import load_transformer
from v4export.plugins.kernels import cuda
from v4export.plugins.kernels.kernel import Compilable, Unfit
from v4export.runtime.state import State

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda_devices(), reason="no CUDA device")]
SEQUENCES, HELD = (1, 3, 64), (1, 700)
#: Tokens of a prompt, longer than windows and than what an indexer takes; then tokens one by one.
PROMPT, SINGLES = 150, 12
TOKENS = PROMPT + SINGLES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("model", "op", "form"), models_and_ops())
def test_an_op_is_its_reference(model: str, op: str, form: str, dtype: torch.dtype) -> None:
    for sequences in SEQUENCES:
        for held in HELD:
            torch.manual_seed(sequences + held)
            for args in operands(model, op, form, sequences, held, dtype, "cuda"):
                try:
                    check_op(op, args, dtype, OP[op].torch_op)
                except Unfit as unfit:
                    if dtype != torch.float32:
                        raise
                    pytest.skip(str(unfit))


class Running:
    """A model on a device over the runtime's state, which stays where it is."""

    def __init__(self, model: Transformer, device: str) -> None:
        with torch.device(device):
            self.model, self.device = model.to(device), device
        self.state = State.empty(model.config, 1, np.dtype(np.float32), 1024)

    def step(self, ids: np.ndarray, looked_up: dict[int, np.ndarray]) -> np.ndarray:
        """Logits [S, V] of the next tokens."""
        self.state.reserve(len(ids))
        layers = enumerate(self.state.layers)
        with torch.no_grad(), torch.device(self.device):
            held = [{name: self._there(self.state.held(i, name)) for name in buffers} for i, buffers in layers]
            found = {layer: self._there(rows[None]) for layer, rows in looked_up.items()}
            every, position = torch.arange(len(ids))[None], self._there(self.state.lengths_B)
            start = self._there(self.state.decoder_start_B)
            out = self.model(self._there(ids[None]), position, held, every, found or None, start)
        for i, rows in enumerate(out.rows):
            for name, new in rows.items():
                self.state.room(i, name)[:] = new.cpu().numpy()
        self.state.commit(np.array([len(ids)]))
        return out.logits[0].cpu().numpy()

    def _there(self, array: np.ndarray) -> torch.Tensor:
        # A copy on a CPU too: what is read must not change while the step writes.
        return torch.from_numpy(array.copy()).to(self.device)


def logits(model: Transformer, device: str, ids: np.ndarray) -> np.ndarray:
    """Of a prompt and then token by token, [TOKENS, V]."""
    running, every = Running(model, device), looked_up(model.config)
    parts = [slice(0, PROMPT), *(slice(at, at + 1) for at in range(PROMPT, TOKENS))]
    return np.concatenate([running.step(ids[p], {layer: rows[p] for layer, rows in every.items()}) for p in parts])


def looked_up(config: ModelConfig) -> dict[int, np.ndarray]:
    """Any rows: whose they are does not matter here."""
    if config.engram is None:
        return {}
    rng, shape = np.random.default_rng(1), (TOKENS, config.engram.row_dim)
    return {layer: rng.normal(size=shape).astype(np.float32) for layer in config.engram.layers}


def loaded(checkpoint: Checkpoint) -> Transformer:
    """The model in float32."""
    weights: dict[str, Any] = audit(checkpoint).weights
    return load_transformer(checkpoint.config, lambda name: torch.from_numpy(weights[name].decode()))


@pytest.mark.parametrize("preset", ["tiny-v3", "tiny-v3.2", "tiny-v4", "tiny-v4.1", "tiny-v4x"])
def test_a_model_gives_the_logits_of_a_cpu(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, launch = set(), cuda.launch

    def noted(compilable: Compilable, *rest: Any) -> None:
        launched.add(compilable.launch.entry)
        launch(compilable, *rest)

    monkeypatch.setattr(cuda, "launch", noted)
    checkpoint = Checkpoint.open(api.synth(preset, tmp_path / "hub"))
    ids = np.random.default_rng(0).integers(3, 256, TOKENS)
    here, there = (logits(loaded(checkpoint), device, ids) for device in ("cpu", "cuda"))
    assert {"expert_up", "expert_down"} <= launched
    assert here.std() > 1e-3
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-4)
