"""Engines with their state on the device, over a TensorRT that onnxruntime plays: tokens are those of onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from played_tensorrt import VERSION, TensorRT, engine_executor, played_cuda_graphs, with_engines
from small_models import small
from traced import export_bundle

from v4export import api
from v4export.checkpoint.synth import synth
from v4export.config import Reasoning
from v4export.config.sharding import Sharding
from v4export.engine.backend import Backend
from v4export.errors import BadInput, NotSupported
from v4export.package.bundle import Bundle
from v4export.runtime.executors import Choice
from v4export.runtime.generate import generate
from v4export.runtime.on_device import loaded
from v4export.runtime.on_device.device import Device
from v4export.runtime.on_device.executor import EngineExecutor
from v4export.runtime.on_device.loaded import Runtime
from v4export.runtime.onnx import OnnxExecutor
from v4export.runtime.pausing import Pausing
from v4export.runtime.prompt_cache import PromptCache
from v4export.runtime.sampling import Sampler, Sampling

pytestmark = pytest.mark.slow

#: Growing rows; index keys; rings and entries; entries shared by layers, a decoder and Engram; thoughts; narrow rows.
MODELS = {
    "tiny-v3": small("tiny-v3"),
    "tiny-v3.2": small("tiny-v3.2"),
    "tiny-v4": small("tiny-v4"),
    "tiny-v4.1": small("tiny-v4.1"),
    "thinking": replace(small("tiny-v3"), num_layers=2, moe_layers=(1,), reasoning=Reasoning(1, 3)),
}
RANDOM = np.random.default_rng(0)
#: Shorter than a ring and longer than two; across the first capacity's 256 rows, in the prompt and while decoding.
PROMPTS = [RANDOM.integers(3, 300, length).tolist() for length in (5, 150, 290, 245)]
NEW = 24
#: More than an engine's profile has, so that a chunk is run in several steps.
CHUNK, MOST = 64, 48


@dataclass
class Both:
    """A bundle by onnxruntime, and its engines by TensorRT."""

    bundle: Bundle
    onnx: OnnxExecutor

    def engine(self, trt: TensorRT, **options: Any) -> EngineExecutor:
        return engine_executor(trt, self.bundle, **options)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Callable[[str], Both]:
    made: dict[str, Both] = {}

    def make(name: str) -> Both:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            bundle = export_bundle(synth(MODELS[name], folder / "hub"), folder / "out", "fp32")
            how = {"max_seq_len": bundle.max_seq_len, "threads": 1}
            onnx = OnnxExecutor(bundle.folder, bundle.config, bundle.precision, **how)
            made[name] = Both(with_engines(bundle, max_chunk=MOST), onnx)
        return made[name]

    return make


@pytest.fixture
def graphs() -> Any:
    """A TensorRT, whose steps can be captured, and what was asked of it."""
    trt = TensorRT()
    with played_cuda_graphs(trt) as counted:
        yield trt, counted


def tokens_of(executor: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    how = {"max_new_tokens": NEW, "sampler": Sampler(Sampling()), "chunk": CHUNK, **options}
    return [(event.tokens_B, event.pauses_B) for event in generate(executor, prompts, **how)]


@pytest.mark.parametrize("which", ["0", "2", "3", "012"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens(both, graphs, name, which):
    pair, (trt, counted) = both(name), graphs
    engine, prompts = pair.engine(trt), [PROMPTS[int(i)] for i in which]
    pausing = Pausing(threshold=2.0) if pair.bundle.config.thinks else None
    ours, wanted = (tokens_of(one, prompts, pausing=pausing) for one in (engine, pair.onnx))
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in wanted]
    assert [[p and p.tokens for p in pauses] for _, pauses in ours] == [
        [p and p.tokens for p in pauses] for _, pauses in wanted
    ]
    # Two steps are run as they are, and two more where rows grow while decoding; all others are replayed.
    grows = which == "3"
    assert engine.replays.reason is None and counted.captured == 1 + grows
    assert counted.replayed == engine.replays.replayed == NEW - 1 - 2 * (1 + grows)


@pytest.mark.parametrize("name", MODELS)
def test_rows(both, graphs, name):
    """All that is held after prompts, steps that some sequences sit out, and sequences that come, move and go."""
    pair, (trt, _) = both(name), graphs
    held = [_rows_after(one) for one in (pair.engine(trt), pair.onnx)]
    assert held[0].keys() == held[1].keys()
    for place, rows in held[0].items():
        np.testing.assert_allclose(np.asarray(rows), held[1][place], rtol=1e-3, atol=1e-4, err_msg=str(place))


def _rows_after(executor: Any) -> dict[Any, np.ndarray]:
    state, none = executor.new_state(3), np.zeros((1, 0), np.int64)
    for row, prompt in ((0, PROMPTS[1]), (2, PROMPTS[2])):
        one = executor.new_state(1)
        for at in range(0, len(prompt), CHUNK):
            executor.step(np.array([prompt[at : at + CHUNK]]), one, logits_at_BQ=none)
        state.put(row, one)
    random = np.random.default_rng(1)
    for step in range(30):
        if step == 15:
            state.put(1, executor.new_state(1))
        first = state.first(3 if step % 4 else 1)
        count = len(first.lengths_B)
        lengths = np.array([1, step % 3 == 0, step % 2])[:count]
        tokens = random.integers(3, 300, (3, 1))[:count]
        executor.step(tokens, first, logits_at_BQ=np.zeros((count, 1), np.int64), lengths_B=lengths)
        state.adopt(first)
    assert state.lengths_B.tolist() == [180, 4, 305]
    found = {
        (layer, name, b): state.rows(layer, name, b)
        for layer, some in enumerate(state.layers)
        for name in some
        for b in range(3)
    }
    return found | {"history": state.history_BN if state.history_BN is not None else np.zeros(0)}


def test_a_prompt_that_skips_the_decoder(both, graphs):
    pair, (trt, _) = both("tiny-v4.1"), graphs
    engine = pair.engine(trt)
    assert engine.tail == pair.onnx.tail is not None
    prompts = PROMPTS[1:3]
    assert tokens_of(engine, prompts, skip_decoder=True) == tokens_of(pair.onnx, prompts, skip_decoder=True)


@pytest.mark.parametrize("looped", [False, True])
def test_thoughts(both, graphs, looped):
    pair, found = both("thinking"), []
    for executor in (pair.engine(graphs[0]), pair.onnx):
        state = executor.new_state(2)
        executor.step(np.array([PROMPTS[0], PROMPTS[1][:5]]), state, logits_at_BQ=np.full((2, 1), 4))
        found.append(executor.think(executor.trunk, state, looped=looped))
    for ours, wanted in zip(vars(found[0]).values(), vars(found[1]).values(), strict=True):
        if not isinstance(ours, dict):
            np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


def test_wanted_positions_in_any_order_of_a_step_that_is_run_in_parts(both, graphs):
    pair, (trt, counted) = both("tiny-v4"), graphs
    tokens, at_BQ = np.array([PROMPTS[2][:110]]), np.array([[109, 0, 47, 48, 95, 96, 0]])
    ours, wanted = (one.step(tokens, one.new_state(1), logits_at_BQ=at_BQ) for one in (pair.engine(trt), pair.onnx))
    assert counted.profiles == [1, 1, 1]
    np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-4)


def test_narrow_rows(graphs, tmp_path):
    """Rows in FP8 beside activations of 16 bits, which NumPy and PyTorch call by other names."""
    hub = synth(MODELS["tiny-v4"], tmp_path / "hub")
    bundle = with_engines(api.export(hub, tmp_path / "out", precision="bf16", state="fp8", max_seq_len=512).bundle)
    how = {"max_seq_len": 512, "threads": 1}
    pair = Both(bundle, OnnxExecutor(bundle.folder, bundle.config, bundle.precision, **how))
    assert tokens_of(pair.engine(graphs[0]), PROMPTS[:2]) == tokens_of(pair.onnx, PROMPTS[:2])
    check_prompt_cache(pair, graphs[0], PROMPTS[1][:70], tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_cache(both, graphs, tmp_path, name):
    check_prompt_cache(both(name), graphs[0], PROMPTS[1], tmp_path)


def check_prompt_cache(pair: Both, trt: TensorRT, prompt: list[int], folder: Path) -> None:
    """A state that one executor has kept is what the other goes on from."""
    longer = [*prompt, *PROMPTS[0]]
    wanted = tokens_of(pair.onnx, [longer])
    for writer, reader in ((pair.onnx, pair.engine(trt)), (pair.engine(trt), pair.onnx)):
        cache = PromptCache(folder / "cache", "key")
        cache.file.unlink(missing_ok=True)
        tokens_of(cache.over(writer, prompt), [prompt])
        cached = cache.over(reader, longer)
        assert cached.reused == len(prompt) and tokens_of(cached, [longer]) == wanted


def test_states_that_take_turns_are_not_replayed(both, graphs):
    """A graph is of one state's addresses, so making one for each step would cost more than it brings."""
    pair, (trt, counted) = both("tiny-v3"), graphs
    engine = pair.engine(trt)
    runs = [generate(engine, [p], max_new_tokens=NEW, sampler=Sampler(Sampling())) for p in (PROMPTS[0], PROMPTS[1])]
    turns = [(one.tokens_B[0], other.tokens_B[0]) for one, other in zip(*runs, strict=True)]
    for mine, prompt in zip(zip(*turns, strict=True), PROMPTS, strict=False):
        assert [*mine] == [tokens[0] for tokens, _ in tokens_of(pair.onnx, [prompt])]
    assert counted.captured == counted.replayed == 0


def test_numbers_of_sequences_are_few(both, graphs):
    """Three sequences of four are run as four, the last one idle; it stays as it is."""
    pair, (trt, counted) = both("tiny-v4"), graphs
    engine = pair.engine(trt)
    state = engine.new_state(4)
    none = np.zeros((4, 0), np.int64)
    engine.step(np.array([prompt[:5] for prompt in PROMPTS]), state, logits_at_BQ=none)
    before = {key: state.rows(*key, 3).clone() for key in _keys(state)}
    for count in (3, 3, 3, 4, 3, 4):
        first = state.first(count)
        logits = engine.step(np.full((count, 1), 7), first, logits_at_BQ=np.zeros((count, 1), np.int64))
        state.adopt(first)
        assert logits.shape[0] == count
        if count == 3 and state.lengths_B[3] == 5:
            assert all((state.rows(*key, 3) == rows).all() for key, rows in before.items())
    assert state.lengths_B.tolist() == [11, 11, 11, 7] and (counted.captured, counted.replayed) == (1, 4)


def _keys(state: Any) -> list[tuple[int, str]]:
    return [(layer, name) for layer, some in enumerate(state.layers) for name in some]


@pytest.mark.parametrize("why", ["TensorRT refuses", "another stream", "switched off"])
def test_without_graphs(both, graphs, monkeypatch, caplog, why):
    """What cannot be captured is run step by step, once it has said why."""
    pair, (trt, counted) = both("tiny-v4"), graphs
    engine = pair.engine(trt, cuda_graphs=why != "switched off")
    if why == "TensorRT refuses":
        trt.captures = False
    elif why == "another stream":

        def fail(self: Any, work: Any) -> None:
            raise RuntimeError("operation not permitted on another stream\nmore")

        monkeypatch.setattr(Device, "capture", fail)
    with caplog.at_level(logging.WARNING):
        ours = tokens_of(engine, PROMPTS[1:2])
    assert ours == tokens_of(pair.onnx, PROMPTS[1:2])
    assert engine.replays.captured == counted.replayed == 0 and why in engine.replays.reason
    assert len([one for one in caplog.records if "CUDA graphs" in one.message]) == (why != "switched off")


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_rtx_makes_graphs_by_itself(both, cuda_graphs):
    pair, trt = both("tiny-v3"), TensorRT(rtx=True)
    with played_cuda_graphs(trt) as counted:
        engine = pair.engine(trt, cuda_graphs=cuda_graphs)
        assert tokens_of(engine, PROMPTS[:1]) == tokens_of(pair.onnx, PROMPTS[:1])
    assert counted.captured == 0 and counted.contexts == 2 and counted.by_itself == 2 * cuda_graphs
    assert engine.replays.reason == ("TensorRT-RTX makes CUDA graphs by itself" if cuda_graphs else "switched off")


def test_a_step_needs_a_profile(both, graphs, tmp_path):
    pair = both("tiny-v3")
    engine = pair.engine(graphs[0])
    with pytest.raises(BadInput, match="5 are asked for, 4 are possible"):
        engine.new_state(5)
    short = with_engines(pair.bundle, max_seq_len=100)
    try:
        engine = replace(pair, bundle=short).engine(graphs[0])
        with pytest.raises(BadInput, match=r"state\.0\.latent is \[1, 256, \d+\], a profile takes \[1, 1, \d+\] to"):
            engine.step(np.array([[5]]), engine.new_state(1), logits_at_BQ=np.zeros((1, 1), np.int64))
    finally:
        with_engines(pair.bundle, max_chunk=MOST)


def test_an_engine_of_another_bundle(both, graphs):
    one, other = both("tiny-v3"), both("tiny-v4")
    b = one.bundle
    runtime = Runtime(graphs[0], Device("cpu"), other.bundle.folder, other.bundle.manifest["engines"])
    engine = EngineExecutor(runtime, b.config, b.precision, max_seq_len=512)
    with pytest.raises(NotSupported, match="does not belong to this bundle"):
        engine.step(np.array([[5]]), engine.new_state(1), logits_at_BQ=np.zeros((1, 1), np.int64))


def opened(monkeypatch: Any, bundle: Bundle, devices: int = 1, torch_has: bool = True, version: str = VERSION) -> Any:
    """``Runtime.open`` on a machine that is played."""
    gpu = SimpleNamespace(name="NVIDIA H100", capability="sm90")
    monkeypatch.setattr(loaded, "cuda_devices", lambda: (gpu,) * devices)
    monkeypatch.setattr(loaded.torch.cuda, "is_available", lambda: torch_has)
    monkeypatch.setattr(loaded, "load_backend", lambda name, purpose: Backend(name, version, TensorRT(False), False))
    monkeypatch.setattr(loaded, "package_version", lambda name: None)
    monkeypatch.setattr(loaded, "Device", lambda name: Device("cpu"))
    return Choice("tensorrt").open(bundle)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"devices": 0}, r"no CUDA device to run the engine on\n.*--executor onnxruntime"),
        ({"torch_has": False}, "this PyTorch cannot use the CUDA device"),
        ({"version": "10.9"}, rf"another version[^$]*built by tensorrt {VERSION}, here is 10\.9"),
        ({}, r"cannot load model\.engine here\n  built for sm90; here is NVIDIA H100 \(sm90\); .*not compatible"),
    ],
)
def test_machines_that_cannot_run_it(both, monkeypatch, machine, message):
    with pytest.raises(NotSupported, match=message):
        opened(monkeypatch, both("tiny-v3").bundle, **machine)


def test_bundles_that_have_none(both, monkeypatch):
    bundle = both("tiny-v3").bundle
    with pytest.raises(NotSupported, match=r"no engine of model\.onnx\n  it has none\n  build it: v4export engine"):
        opened(monkeypatch, replace(bundle, manifest={}))
    with pytest.raises(NotSupported, match="shared among 2 ranks"):
        opened(monkeypatch, replace(bundle, sharding=Sharding(2, 1, 1)))
    gone = {"model.onnx": {**bundle.manifest["engines"]["model.onnx"], "path": "gone.engine"}}
    with pytest.raises(BadInput, match=r"lost an engine\n  gone\.engine is missing"):
        opened(monkeypatch, replace(bundle, manifest={**bundle.manifest, "engines": gone}))
    with pytest.raises(BadInput, match="unknown executor 'tvm'"):
        Choice("tvm")


def test_plugins_of_the_library_are_made_known_once(both, graphs, monkeypatch):
    """Those of all graphs that have kernels; others have no graph with launches beside them."""
    bundle, asked = both("thinking").bundle, []
    monkeypatch.setattr(loaded.plugin_v3, "register", lambda trt, names: asked.append(names))
    kernels = {"model": ["MoeRoute", "ExpertSort", "MoeRoute"], "think": ["MoeRoute", "ThoughtAttention"]}
    for name, ops in kernels.items():
        (bundle.folder / f"{name}.tensorrt.onnx").touch()
        kernels[name] = [SimpleNamespace(op_type=op) for op in ops]
    monkeypatch.setattr(loaded, "kernel_nodes", lambda path: kernels[path.name.split(".")[0]])
    engines = {name: {**one, "plugins": "library"} for name, one in bundle.manifest["engines"].items()}
    runtime = Runtime(graphs[0], Device("cpu"), bundle.folder, engines)
    for graph in ("model.onnx", "think.onnx", "think_mix.onnx"):
        runtime.load(graph)
    assert asked == [["ExpertSort", "MoeRoute"], ["ThoughtAttention"]]
