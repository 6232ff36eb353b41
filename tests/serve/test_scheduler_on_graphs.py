"""Schedulers over real graphs, of every kind of state: each answer is what its prompt gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from played_tensorrt import TensorRT, engine_executor, played_cuda_graphs, with_engines
from serving import Letters, Listener
from small_models import small
from traced import export_bundle

from v4export.checkpoint.synth import synth
from v4export.config import Reasoning
from v4export.runtime.executors import EXECUTORS, ONNXRUNTIME
from v4export.runtime.generate import Executor, generate
from v4export.runtime.onnx import OnnxExecutor
from v4export.runtime.pausing import Pausing
from v4export.runtime.sampling import Sampler, Sampling
from v4export.serve.answer import Request
from v4export.serve.limits import Limits
from v4export.serve.scheduler import Scheduler

pytestmark = pytest.mark.slow

#: Growing rows and index keys; rings and entries; entries shared by layers, a decoder and Engram; thoughts.
MODELS = {
    "tiny-v3.2": small("tiny-v3.2"),
    "tiny-v4": small("tiny-v4"),
    "tiny-v4.1": small("tiny-v4.1"),
    "thinking": replace(small("tiny-v3"), num_layers=2, moe_layers=(1,), reasoning=Reasoning(1, 3)),
}


@pytest.fixture(params=[(model, by) for model in MODELS for by in EXECUTORS], ids="-".join)
def executors(request, tmp_path) -> Iterator[tuple[Executor, OnnxExecutor]]:
    """What serves, and onnxruntime, which says what each gets alone."""
    model, by = request.param
    bundle = export_bundle(synth(MODELS[model], tmp_path / "hub"), tmp_path / "out", "fp32")
    made = (bundle.folder, bundle.config, bundle.precision)
    alone = OnnxExecutor(*made, max_seq_len=bundle.max_seq_len, threads=1)
    if by == ONNXRUNTIME:
        yield alone, alone
        return
    package = TensorRT()
    with played_cuda_graphs(package):
        engine = engine_executor(package, with_engines(bundle))
        yield engine, alone
    assert engine.replays.replayed and engine.replays.reason is None


def test_each_gets_what_it_gets_alone(executors):
    executor, by_itself = executors
    random, thinks = np.random.default_rng(0), executor.config.thinks
    sizes = [(3, 20), (150, 30), (17, 9), (40, 40), (5, 1), (290, 12), (64, 25), (31, 33)]
    asked = []
    for number, (length, new) in enumerate(sizes):
        pausing = [None, Pausing(steps=2, always=True), Pausing(threshold=2.0)][number % 3] if thinks else None
        tokens = random.integers(3, executor.config.vocab_size, length).tolist()
        asked.append(Request(tuple(tokens), new, pausing=pausing))
    with Scheduler(executor, Letters(), Limits(slots=3, chunk=32)) as scheduler:
        heard = [Listener() for _ in asked]
        for one, listener in zip(asked, heard, strict=True):
            scheduler.submit(one, listener)
        found = [listener.wait() for listener in heard]
    assert [one.error for one in found] == [None] * len(sizes)
    for one, listener in zip(asked, found, strict=True):
        how = {"max_new_tokens": one.max_tokens, "pausing": one.pausing, "chunk": 32}
        alone = list(generate(by_itself, [one.tokens], sampler=Sampler(Sampling()), **how))
        assert listener.tokens == [event.tokens_B[0] for event in alone]
        assert listener.usage.thoughts == sum(any(event.pauses_B) for event in alone)
    assert any(listener.usage.thoughts for listener in found) == thinks
    replayed = executor.replays.replayed if executor is not by_itself else 0
    assert scheduler.metrics.values()["replayed_steps"] == replayed
