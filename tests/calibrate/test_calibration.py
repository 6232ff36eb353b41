"""Scales of every family's inputs, against whole models that are listened to; and runs that are stopped."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import small

from v4export.calibrate import calibration as module
from v4export.calibrate.calibration import Calibration, calibrate, parts
from v4export.calibrate.magnitudes import Method
from v4export.checkpoint.activation_scales import all_scales
from v4export.checkpoint.audit import Weight, audit
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.synth import synth
from v4export.config import ModelConfig
from v4export.engram.vocabulary import read_token_map
from v4export.evaluate.lane import Lane
from v4export.model.linear import Linear
from v4export.model.load import load_transformer
from v4export.model.moe import MixtureOfExperts
from v4export.precision import PRECISIONS
from v4export.verify.looked_up import EngramReference

FAMILIES = ("tiny-v3", "tiny-v3.2", "tiny-v4", "tiny-v4.1", "tiny-v4x")


@dataclasses.dataclass
class Subject:
    """A random checkpoint, and windows of random tokens."""

    config: ModelConfig
    weights: dict[str, Weight]
    words: np.ndarray | None
    ids: np.ndarray
    decoded: list[str] = dataclasses.field(default_factory=list)

    def run(self, method: Method | None = None, **options) -> Calibration:
        how = {"checkpoint": "a hash", "token_map": self.words} | options
        return calibrate(self.config, self.weights, self.ids, method or Method("max"), **how)


def subject(folder: Path, preset: str, windows: int = 3, context: int = 24) -> Subject:
    synth(small(preset), folder)
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    words = read_token_map(folder, config.engram, config.vocab_size) if config.engram else None
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (windows, context))
    return Subject(config, audit(checkpoint, scan_values=False).weights, words, ids)


def by_listening(s: Subject) -> dict[str, np.ndarray]:
    """Largest magnitudes that a whole model's matrices multiply, a window at a time and each expert by hand."""
    c = s.config
    model = load_transformer(c, lambda name: torch.from_numpy(s.weights[name].decode()), absorbed=False)
    largest: dict[str, float] = defaultdict(float)

    def saw(name: str, x: torch.Tensor) -> None:
        largest[name] = max(largest[name], float(x.abs().max()))

    def experts(path: str, moe: MixtureOfExperts):
        def hook(_m, inputs, out):
            x, chosen = inputs[0], out[1]
            for e in chosen.unique().tolist():
                own = x[(chosen == e).any(-1)]
                gate, up, _ = (getattr(moe.experts[e], f"{part}_proj").weight for part in ("gate", "up", "down"))
                g, u = own @ gate.T, own @ up.T
                if c.swiglu_limit is not None:
                    g, u = g.clamp(max=c.swiglu_limit), u.clamp(-c.swiglu_limit, c.swiglu_limit)
                saw(f"{path}.experts.input_scale.{e}", own)
                saw(f"{path}.experts.middle_scale.{e}", g * torch.sigmoid(g) * u)

        return hook

    for prefix, part in (("model.", model.layers), ("model.", model.head)):
        for name, one in part.named_modules():
            path = f"{prefix}layers.{name}" if part is model.layers else f"{prefix}{name}"
            if isinstance(one, Linear):
                one.register_forward_pre_hook(lambda _m, i, path=path: saw(f"{path}.input_scale", i[0]))
            elif isinstance(one, MixtureOfExperts):
                one.register_forward_hook(experts(path, one))
    rows = EngramReference(c, s.weights, PRECISIONS["fp32"], s.words) if c.engram else None
    with torch.inference_mode():
        for window in s.ids:
            none = np.empty(0, np.int64)
            looked_up = (
                {i: torch.from_numpy(rows.rows(i, none, window))[None] for i in c.engram.layers} if rows else None
            )
            at, ids = torch.arange(len(window))[None], torch.from_numpy(window)[None]
            step = model(ids, torch.zeros(1, dtype=torch.int64), model.empty_state(), at, looked_up)
            if c.thinks:
                model.think(step.trunk, at, step.rows)
    found = {}
    for name, shape in all_scales(c).items():
        each = [largest.get(f"{name}.{e}", 0.0) for e in range(c.num_experts)]
        found[name] = np.array(each if shape else largest[name])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("preset", FAMILIES)
def test_ranges_are_those_of_the_model(tmp_path, preset):
    s = subject(tmp_path / "model", preset)
    found, wanted = s.run(enough=1), by_listening(s)
    assert [*found.found] == [*found.scales.values] == [*all_scales(s.config)] and found.tokens == s.ids.size
    for name, shape in all_scales(s.config).items():
        one, scale = found.found[name], found.scales.values[name]
        assert scale.shape == shape and scale.dtype == np.float32 and (scale > 0).all()
        there = wanted[name] > 0
        assert there.any(), name
        np.testing.assert_allclose(
            np.array(one.ranges).reshape(shape)[there], wanted[name][there], rtol=1e-4, err_msg=name
        )
        np.testing.assert_allclose(scale[there], wanted[name][there] / 448, rtol=1e-4)
        assert [e for e in range(len(one.ranges)) if not there.reshape(-1)[e]] == [*one.borrowed]


class Stopped(Exception):
    """What stops a run in the tests."""


def stop_after(count: int):
    done = []

    def advance(units: float) -> None:
        done.append(units)
        if sum(done) >= count:
            raise Stopped

    return advance


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which layers' weights were read."""
    read, block = [], Lane.block

    def counted(self, layer, values):
        read.append(layer)
        return block(self, layer, values)

    monkeypatch.setattr(Lane, "block", counted)
    return read


@pytest.mark.parametrize("preset", ["tiny-v3", *(pytest.param(p, marks=pytest.mark.slow) for p in FAMILIES[2:])])
@pytest.mark.parametrize("method", ["max", "percentile"])
def test_a_stopped_run_goes_on(tmp_path, preset, method, decoded):
    s, file = subject(tmp_path / "model", preset), tmp_path / ".scales.calibration"
    whole, layers = s.run(Method(method)), s.config.num_layers
    assert decoded == [*range(layers)]
    for stop in range(1, parts(s.config)):
        with pytest.raises(Stopped):
            s.run(Method(method), saved=file, advance=stop_after(stop))
        assert [f.name for f in tmp_path.iterdir() if f.is_file()] == [file.name], "nothing half-written is left"
        decoded.clear()
        advanced: list[float] = []
        gone_on = s.run(Method(method), saved=file, advance=advanced.append)
        assert gone_on.resumed == stop and advanced[0] == stop and sum(advanced) == parts(s.config)
        assert decoded == [*range(stop, layers)], "what was done is not done again"
        assert gone_on.found == whole.found and gone_on.scales.made == whole.scales.made
        for name, scale in whole.scales.values.items():
            assert scale.tobytes() == gone_on.scales.values[name].tobytes(), name
        file.unlink()


def test_a_state_of_another_calibration_is_not_gone_on_from(tmp_path):
    s, file = subject(tmp_path / "model", "tiny-v3"), tmp_path / "state"
    with pytest.raises(Stopped):
        s.run(saved=file, advance=stop_after(2))
    stored = file.read_bytes()
    others = [
        {"checkpoint": "another"},
        {"enough": 3},
        {"method": Method("mse")},
        {"method": Method("percentile", 99)},
    ]
    for options in others:
        file.write_bytes(stored)
        assert s.run(saved=file, **options).resumed == 0
    file.write_bytes(stored)
    assert dataclasses.replace(s, ids=s.ids[::-1].copy()).run(saved=file).resumed == 0
    file.write_bytes(stored)
    assert s.run(saved=file).resumed == 2
    for damaged in (stored[:5000], b"", b"not a state"):
        file.write_bytes(damaged)
        assert s.run(saved=file).resumed == 0


def test_without_memory_for_two_layers_none_is_read_ahead(tmp_path, monkeypatch):
    s = subject(tmp_path / "model", "tiny-v3")
    whole = s.run()
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 0}))
    assert s.run().found == whole.found


def test_rare_experts_are_told(tmp_path):
    s = subject(tmp_path / "model", "tiny-v3", windows=1, context=8)
    some = [one for one in s.run().found.values() if one.borrowed]
    assert some and all(one.name.endswith(("experts.input_scale", "experts.middle_scale")) for one in some)
    for one in some:
        often = [r for r, tokens in zip(one.ranges, one.tokens, strict=True) if tokens >= 16]
        assert all(one.ranges[e] >= max(often, default=0) for e in one.borrowed)
        assert [*one.borrowed] == [e for e, tokens in enumerate(one.tokens) if tokens < 16]
