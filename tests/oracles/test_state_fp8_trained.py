"""What E4M3 rows cost a trained model: predictions of text that it has not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.model.load import load_transformer
from v4export.precision import precision as find_precision
from v4export.runtime.tokenizer import load_tokenizer
from v4export.verify.rounded import as_the_graph_holds

pytestmark = pytest.mark.slow


def measured(folder: Path, recipe: str, length: int, windows: int) -> dict[str, float]:
    """Perplexity with and without, mean KL divergence in nats, and how often the likeliest token is the same."""
    checkpoint = Checkpoint.open(folder)
    weights, how = audit(checkpoint).weights, find_precision(recipe)

    def lookup(name: str) -> torch.Tensor:
        return torch.from_numpy(as_the_graph_holds(weights[name], how))

    ids = torch.tensor(load_tokenizer(folder).encode((folder / "heldout.txt").read_text()))
    ids_WS = ids[: len(ids) // length * length].reshape(-1, length)[:windows]
    at, start, said = torch.arange(length).expand(len(ids_WS), length), torch.zeros(len(ids_WS), dtype=torch.int64), []
    for fp8 in (False, True):
        config = replace(checkpoint.config, state_fp8=fp8)
        model = load_transformer(config, lookup, dtype=getattr(torch, how.activations))
        with torch.inference_mode():
            out = [
                model(one, start[:1], model.empty_state(), at[:1]).logits[0, :-1].log_softmax(-1)
                for one in ids_WS.split(1)
            ]
        said.append(torch.stack(out).double())
    plain, narrow = said
    nll = [-one.gather(-1, ids_WS[:, 1:, None]).mean() for one in said]
    kl = (plain.exp() * (plain - narrow)).sum(-1).mean()
    same = (plain.argmax(-1) == narrow.argmax(-1)).double().mean()
    return {
        "tokens": ids_WS[:, 1:].numel(),
        "plain": float(np.exp(nll[0])),
        "fp8": float(np.exp(nll[1])),
        "kl": float(kl),
        "same": float(same),
    }


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize(("length", "windows"), [(128, 24), (1024, 3)])
def test_what_rounding_costs(trained_checkpoint: Path, recipe: str, length: int, windows: int) -> None:
    """Several times what was measured with more windows; rounding rotated columns, too, would be beyond."""
    if not (trained_checkpoint / "heldout.txt").is_file():
        pytest.skip("a random checkpoint predicts no text")
    found = measured(trained_checkpoint, recipe, length, windows)
    assert found["kl"] > 1e-6, found
    assert found["fp8"] / found["plain"] < 1.01 and found["kl"] < 0.003 and found["same"] > 0.97, found
