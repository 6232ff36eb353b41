"""How far a block may be off follows from its two halves, and covers what errors of that size do to it."""

from __future__ import annotations

import pytest
import torch

from v4export import presets
from v4export.model.block import Block, Embed
from v4export.model.transformer import empty_state
from v4export.verify.halves import Errors, Watch, allowed

NONE = Errors(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
SEEN = 12


def made(preset: str, layer: int):
    """A block with random weights, its input and what it reads."""
    torch.manual_seed(0)
    config = presets.load(preset)
    block, embed = Block(config, layer, absorbed=False), Embed(config)
    for name, p in [*block.named_parameters(), *embed.named_parameters()]:
        if not p.is_floating_point():
            p.data.copy_(torch.randint(0, config.num_experts, p.shape))
        elif "norm" in name:
            p.data.copy_(1 + 0.1 * torch.randn_like(p))
        else:
            p.data.copy_(torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.dim() > 1 and "embed" not in name else 1))
    ids = torch.randint(0, config.vocab_size, (1, SEEN))
    x, shared = embed.shared(ids, torch.zeros(1, dtype=torch.int64))
    x = torch.randn_like(x)  # streams that differ

    def run(chosen=None, selected=None):
        return block(x, shared, empty_state(config, layer, torch.float32), chosen, selected)

    return block, x, run


@pytest.mark.parametrize(("preset", "layer"), [("tiny-v3", 0), ("tiny-v3", 1), ("tiny-v4", 0), ("tiny-v4", 2)])
def test_allowed_errors_cover_perturbed_halves(preset, layer):
    with torch.inference_mode():
        block, x, run = made(preset, layer)
        with Watch(block) as watch:
            out = run()
        assert watch.attended.shape == watch.fed.shape == (SEEN, x.shape[-1]) and watch.index is None
        for errors in (NONE._replace(attention=1e-3), NONE._replace(feed_forward=1e-3)):
            limits = allowed(block, x, watch, errors)
            assert limits.hidden.shape == x.shape[:-1]
            hooks = [
                part.register_forward_hook(lambda _m, _i, out, size=size: _perturbed(out, size))
                for part, size in ((block.self_attn, errors.attention), (block.mlp, errors.feed_forward))
            ]
            ratios = []
            for _ in range(20):
                moved = run(out.experts).hidden
                ratios.append((moved - out.hidden).norm(dim=-1) / limits.hidden)
            for hook in hooks:
                hook.remove()
            ratio = torch.stack(ratios)
            # As large as its bound: the limit is reached, and passed by what SwiGLU amplifies, which CONFIDENCE covers.
            assert 0.3 < ratio.square().mean().sqrt() < 1.5 and ratio.max() < 3


def _perturbed(out, size):
    """The output with an error of this relative size in a random direction."""
    y = out if isinstance(out, torch.Tensor) else out[0]
    noise = torch.randn_like(y)
    y = y + noise * size * y.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return y if isinstance(out, torch.Tensor) else out._replace(output=y) if hasattr(out, "_replace") else (y, *out[1:])


def test_a_small_half_is_held_to_its_own_size():
    with torch.inference_mode():
        block, x, run = made("tiny-v3", 0)
        with Watch(block) as watch:
            run()
        errors = NONE._replace(attention=1e-3)
        small, large = (allowed(block, x * s, watch, errors).hidden for s in (1.0, 1e6))
    torch.testing.assert_close(large, 1e-3 * watch.attended.norm(dim=-1), rtol=1e-3, atol=0)
    assert (small >= large * 0.99).all()


def test_an_indexer_is_listened_to():
    with torch.inference_mode():
        block, _, run = made("tiny-v4", 1)
        with Watch(block) as watch:
            run()
        assert watch.index is not None and watch.index.scored[5:7] == (8, 4) and not block.self_attn._forward_hooks
