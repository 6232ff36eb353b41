"""Serving with drafts: each gets what it gets alone and without, whatever the others draft; up to Triton's model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from played_tensorrt import TensorRT, engine_executor, played_cuda_graphs, with_engines
from serving import Letters, Listener, triton_request, triton_utilities
from small_models import small
from traced import export_bundle

from v4export import api
from v4export.checkpoint.synth import synth
from v4export.errors import BadInput
from v4export.package.bundle import Bundle
from v4export.runtime.executors import EXECUTORS, ONNXRUNTIME
from v4export.runtime.generate import Executor, generate
from v4export.runtime.onnx import OnnxExecutor
from v4export.runtime.sampling import Sampler, Sampling
from v4export.runtime.tokenizer import load_tokenizer
from v4export.serve.answer import Request
from v4export.serve.asked import Reader
from v4export.serve.limits import Limits
from v4export.serve.model import Model
from v4export.serve.scheduler import Scheduler

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["tiny-v3", "tiny-v4"])
def bundle(request, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    config = replace(small(request.param), num_mtp_layers=1, drafts=True)
    return export_bundle(synth(config, folder / "hub"), folder / "out", "fp32", draft=True)


@pytest.fixture(params=EXECUTORS)
def executors(request, bundle) -> Iterator[tuple[Executor, OnnxExecutor]]:
    """What serves, and onnxruntime, which says what each gets alone."""
    made = (bundle.folder, bundle.config, bundle.precision)
    alone = OnnxExecutor(*made, max_seq_len=bundle.max_seq_len, threads=1)
    if request.param == ONNXRUNTIME:
        yield alone, alone
        return
    package = TensorRT()
    with played_cuda_graphs(package):
        yield engine_executor(package, with_engines(bundle)), alone


def test_each_gets_what_it_gets_alone(executors):
    executor, by_itself = executors
    random = np.random.default_rng(0)
    sizes = [(3, 20), (150, 30), (17, 9), (40, 40), (5, 1), (290, 12), (64, 25), (31, 33)]
    asked = []
    for number, (length, new) in enumerate(sizes):
        tokens = random.integers(3, executor.config.vocab_size, length).tolist()
        sampling = Sampling(1.0, seed=number) if number % 3 == 2 else Sampling()
        asked.append(Request(tuple(tokens), new, sampling=sampling, draft_max=(0, 1, 4)[number % 3]))
    with Scheduler(executor, Letters(), Limits(slots=3, chunk=32, draft_max=4)) as scheduler:
        heard = [Listener() for _ in asked]
        for one, listener in zip(asked, heard, strict=True):
            scheduler.submit(one, listener)
        found = [listener.wait() for listener in heard]
    assert [one.error for one in found] == [None] * len(sizes)
    for one, listener in zip(asked, found, strict=True):
        how = {"max_new_tokens": one.max_tokens, "chunk": 32, "sampler": Sampler(one.sampling)}
        alone = list(generate(by_itself, [one.tokens], **how))
        assert listener.tokens == [event.tokens_B[0] for event in alone]
        assert bool(listener.usage.drafted) == (one.draft_max > 0 and one.max_tokens > 2)
        assert listener.usage.accepted <= listener.usage.drafted
    counted = scheduler.metrics.values()
    assert counted["drafted_tokens"] == sum(listener.usage.drafted for listener in found)
    assert counted["accepted_tokens"] == sum(listener.usage.accepted for listener in found)


def test_triton(bundle, tmp_path):
    """The model that a server would load: whole answers and streams, each asking for drafts or for none."""
    made = api.package(bundle.folder, tmp_path / "models", slots=3, chunk=16, threads=1, draft_max=3)
    name = made.models[0]
    text = (made.folder / name / "config.pbtxt").read_text()
    assert 'key: "draft_max" value { string_value: "3" }' in text
    parameters = dict(slots="3", queue="128", chunk="16", draft_max="3", max_tokens="256", threads="1")
    parameters |= dict(executor="onnxruntime", device="cpu", cuda_graphs="1", kernels="0", check_files="1")
    config = {"parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    place = {"model_repository": str(made.folder / name), "model_version": "1", "model_name": name}
    utilities, answers = triton_utilities()
    model = Model(utilities, {"model_config": json.dumps(config), **place, "model_instance_device_id": "0"})
    prompts = ["def main():", "class Reader:", "import os", "x"]
    model.execute([triton_request(prompt, 24, answers, draft_max=n) for n, prompt in enumerate(prompts)])
    assert all(one.wait() for one in answers.values())
    model.finalize()
    for prompt in prompts:
        wanted = api.run(bundle.folder, prompt=prompt, max_new_tokens=24, ignore_eos=True, draft_max=0)
        assert (answers[prompt].tokens, answers[prompt].text) == ([*wanted.tokens], wanted.text)


def test_more_than_the_server_drafts(bundle):
    reader = Reader(bundle, load_tokenizer(bundle.folder), None, draft_max=2)
    assert reader.read({"text_input": "x"}).request.draft_max == 2
    assert reader.read({"text_input": "x", "draft_max": 0}).request.draft_max == 0
    for asked in (3, -1):
        with pytest.raises(BadInput, match="give 0 to 2"):
            reader.read({"text_input": "x", "draft_max": asked})


def test_a_bundle_without_drafts(tiny_bundle, tmp_path):
    folder: Path = tiny_bundle("fp32").folder
    with pytest.raises(BadInput, match="no draft graph"):
        api.package(folder, tmp_path / "models", draft_max=2)
    with pytest.raises(BadInput, match="no draft graph"):
        api.run(folder, prompt="x", draft_max=1)
