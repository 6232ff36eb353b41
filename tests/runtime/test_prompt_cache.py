"""A prompt's state from a file: predictions and tokens are those without it, and nothing is run that is held."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from safetensors import safe_open
from small_models import small
from traced import export_bundle

from v4export import presets
from v4export.checkpoint.synth import synth
from v4export.config import Reasoning
from v4export.errors import BadInput, NotSupported
from v4export.runtime.generate import generate
from v4export.runtime.onnx import OnnxExecutor
from v4export.runtime.pausing import Pausing
from v4export.runtime.prompt_cache import CachedPrompt, PromptCache, key_of, layout, read, reusable, write
from v4export.runtime.sampling import Sampler, Sampling
from v4export.state_contract import StateTensor

V4 = small("tiny-v4")
V41 = small("tiny-v4.1")
#: Growing rows; index keys; rings and entries; entries of 1 and 2 tokens and look-ups; a convolution over what was
#: looked up, which reads its ring's oldest row; thoughts; thoughts and look-ups; narrow rows.
MODELS = {
    "tiny-v3": (small("tiny-v3"), "fp32", {}),
    "tiny-v3.2": (small("tiny-v3.2"), "fp32", {}),
    "tiny-v4": (V4, "fp32", {}),
    "tiny-v4.1": (V41, "fp32", {}),
    "convolution": (replace(V41, engram=replace(V41.engram, kernel=3, dilation=2)), "fp32", {}),
    "thinking": (
        replace(small("tiny-v3"), num_layers=2, moe_layers=(1,), reasoning=Reasoning(1, 3)),
        "fp32",
        {},
    ),
    "tiny-v4x": (small("tiny-v4x"), "fp32", {}),
    "narrow rows": (V4, "bf16", {"state": "fp8"}),
    "narrow rows, V3": (small("tiny-v3"), "bf16", {"state": "fp8"}),
}
IDS = np.random.default_rng(0).integers(3, 300, 400).tolist()
HELD, NEW, CHUNK = 150, 6, 64
#: Largest difference of logits, as a part of the largest: chunks of other lengths sum in another order.
SAME = {"fp32": 2e-5, "bf16": 3e-2}


class Recorded(Sampler):
    """Takes the likeliest tokens, and notes the predictions."""

    def __init__(self):
        super().__init__(Sampling())
        self.seen: list[np.ndarray] = []

    def pick(self, logits_BV):
        self.seen.append(np.array(logits_BV[0]))
        return super().pick(logits_BV)


class Counting:
    """An executor that notes how many tokens it runs."""

    def __init__(self, executor):
        self.executor, self.run = executor, 0

    def __getattr__(self, name):
        return getattr(self.executor, name)

    def step(self, tokens_BS, *args, **options):
        self.run += tokens_BS.shape[1]
        return self.executor.step(tokens_BS, *args, **options)


@pytest.fixture(scope="module")
def executors(tmp_path_factory):
    made: dict[str, OnnxExecutor] = {}

    def make(name: str) -> OnnxExecutor:
        if name not in made:
            config, precision, options = MODELS[name]
            folder = tmp_path_factory.mktemp(name)
            bundle = export_bundle(synth(config, folder / "hub"), folder / "out", precision, **options)
            made[name] = OnnxExecutor(bundle.folder, bundle.config, bundle.precision, max_seq_len=512, threads=1)
        return made[name]

    return make


def predictions(executor, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """Tokens [NEW] and what they were picked by [NEW, V]."""
    sampler, pausing = Recorded(), Pausing(threshold=2.0) if executor.config.thinks else None
    events = generate(executor, [prompt], max_new_tokens=NEW, sampler=sampler, chunk=CHUNK, pausing=pausing)
    return [event.tokens_B[0] for event in events], np.stack(sampler.seen)


def through(executor, cache: PromptCache, prompt: list[int]) -> tuple[CachedPrompt, int]:
    """A prompt through a cache, which gives what there is without; and how many tokens were run of the prompt."""
    counting = Counting(executor)
    cached = cache.over(counting, prompt)
    tokens, logits = predictions(cached, prompt)
    cached.close()
    wanted_tokens, wanted = predictions(executor, prompt)
    narrow = executor.activations != np.float32
    if not narrow:  # a near tie of a router may go either way in 16 bits
        assert tokens == wanted_tokens
    apart = np.abs(logits - wanted)[: 1 if narrow else NEW].max() / np.abs(wanted).max()
    assert apart <= SAME["bf16" if narrow else "fp32"]
    return cached, counting.run - (NEW - 1)


def has_rings(config) -> bool:
    return config.compressed is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_equal_with_and_without(executors, tmp_path, name):
    executor = executors(name)
    cache = PromptCache(tmp_path / "cache", "key")
    assert through(executor, cache, IDS[:HELD])[1] == HELD
    once = cache.file.read_bytes()

    cached, run = through(executor, cache, IDS[:HELD])
    assert (cached.reused, run) == (HELD, 0) and cache.file.read_bytes() == once
    again = predictions(cache.over(executor, IDS[:HELD]), IDS[:HELD])[1][0]
    assert (again == predictions(executor, IDS[:HELD])[1][0]).all()

    other = [*IDS[:100], *IDS[200:260]]
    expected = 0 if has_rings(executor.config) else 100
    only = replace(cache, read_only=True)
    cached, run = through(executor, only, other)
    assert (cached.reused, run) == (expected, len(other) - expected) and cache.file.read_bytes() == once

    cached, run = through(executor, cache, IDS[: HELD + 40])
    assert (cached.reused, run) == (HELD, 40) and cache.file.read_bytes() != once
    assert through(executor, cache, IDS[: HELD + 40])[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_wherever_a_state_can_be_cut(executors, tmp_path, name):
    """Of few tokens, before rings are full, and of many; all cuts that the rule allows, and no other."""
    executor = executors(name)
    cache = PromptCache(tmp_path / "cache", "key")
    for held in (7, 20):
        cache.file.unlink(missing_ok=True)
        through(executor, cache, IDS[:held])
        for common in range(1, held + 1):
            prompt = [*IDS[:common], *IDS[300:330]]
            cached, run = through(executor, replace(cache, read_only=True), prompt)
            assert cached.reused in (0, common) and run == len(prompt) - cached.reused
            if not has_rings(executor.config):
                assert cached.reused == common


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-v4", "tiny-v4.1"])
def test_the_rule_for_rings_is_needed(executors, tmp_path, name):
    """What goes on from a place that a ring has no rows of any more predicts something else."""
    executor, cache = executors(name), PromptCache(tmp_path / "cache", "key")
    through(executor, cache, IDS[:HELD])
    prompt = [*IDS[:100], *IDS[200:230]]
    cached = replace(cache, read_only=True).over(executor, prompt)
    assert cached.reused == 0
    cached.reused = 100
    wrong, wanted = predictions(cached, prompt)[1], predictions(executor, prompt)[1]
    assert np.abs(wrong - wanted).max() > 1e-3 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-v3", "tiny-v4", "tiny-v4x"])
def test_what_was_generated_is_kept_as_well(executors, tmp_path, name):
    """All but the last token, which is never fed: a conversation goes on from there."""
    executor, cache = executors(name), PromptCache(tmp_path / "cache", "key", all=True)
    tokens, _ = predictions(executor, IDS[:HELD])
    through(executor, cache, IDS[:HELD])
    held = [*IDS[:HELD], *tokens[:-1]]
    assert read(cache.file, executor.config, executor.activations, "key").tokens.tolist() == held
    cached, run = through(executor, cache, [*held, *IDS[200:220]])
    assert (cached.reused, run) == (len(held), 20)


def test_reaches_by_hand():
    ring = StateTensor("window", 8, ring=16)
    # Of 150 rows, 134 to 149 are kept, and a step reads 15 before its first.
    assert [ring.reaches(at, 150) for at in (148, 149, 150)] == [False, True, True]
    assert [replace(ring, reads_oldest=True).reaches(at, 150) for at in (149, 150)] == [False, True]
    assert all(ring.reaches(at, 16) for at in range(17)) and not ring.reaches(0, 17) and not ring.reaches(1, 17)
    assert all(StateTensor("entry", 8, every=4).reaches(at, 150) for at in range(151))
    assert ring.stored(3) == 16 and StateTensor("entry", 8, every=4).stored(11) == 2


@pytest.mark.parametrize(
    ("preset", "common", "held", "wanted", "start"),
    [
        ("tiny-v3", 100, 150, 120, 100),
        ("tiny-v3", 150, 150, 150, 150),
        ("tiny-v3", 120, 150, 120, 119),
        ("tiny-v3", 0, 150, 120, 0),
        ("tiny-v4", 100, 150, 120, 0),
        ("tiny-v4", 149, 150, 160, 149),
        ("tiny-v4", 149, 150, 149, 0),
        ("tiny-v4", 150, 150, 160, 150),
    ],
)
def test_where_a_prompt_goes_on(preset, common, held, wanted, start):
    assert reusable(presets.load(preset), common, held, wanted) == start


def _file(folder: Path, **changed) -> Path:
    """A file of tiny-v3 that holds 5 tokens of zeros, with other tensors in place of some."""
    arrays = {n: np.zeros(shape, dtype) for n, (dtype, shape) in layout(TINY, FLOAT, 5).items()}
    file = folder / "cache"
    write(file, {n: a for n, a in (arrays | changed).items() if a is not None}, "key")
    return file


TINY, FLOAT = presets.load("tiny-v3"), np.dtype(np.float32)


def test_the_file_is_safetensors(tmp_path):
    with safe_open(_file(tmp_path), "np") as found:
        assert {*found.keys()} == {"tokens", "logits", "state.0.latent", "state.1.latent", "state.2.latent"}
        assert found.metadata() == {"format": "v4export prompt cache 1", "bundle": "key"}
        assert found.get_tensor("state.0.latent").shape == (5, 40)
    assert read(tmp_path / "cache", TINY, FLOAT, "key").common([0, 0, 0, 1, 0, 0]) == 3
    assert [*tmp_path.iterdir()] == [tmp_path / "cache"]


@pytest.mark.parametrize(
    "changed",
    [
        {"logits": None},
        {"logits": np.zeros(7, np.float32)},
        {"tokens": np.zeros(6, np.int64)},
        {"tokens": np.zeros(0, np.int64)},
        {"tokens": np.zeros((5, 1), np.int64)},
        {"tokens": np.zeros((), np.int64)},
        {"tokens": np.zeros(5, np.float32)},
        {"state.0.latent": np.zeros((5, 41), np.float32)},
        {"state.0.latent": np.zeros((5, 40), np.float16)},
        {"state.3.latent": np.zeros((5, 40), np.float32)},
        {"trunk": np.zeros(128, np.float32)},
    ],
)
def test_another_form_is_refused(tmp_path, changed):
    with pytest.raises(BadInput, match="does not hold the state of this model"):
        read(_file(tmp_path, **changed), TINY, FLOAT, "key")


@pytest.mark.parametrize("cut", [0, 7, 8, 60, -1])
def test_a_file_that_was_cut_is_refused(tmp_path, cut):
    file = _file(tmp_path)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(BadInput, match="truncated"):
        read(file, TINY, FLOAT, "key")


def test_what_is_no_prompt_cache_is_refused(tmp_path, tiny_checkpoint):
    with pytest.raises(BadInput, match="another bundle"):
        read(_file(tmp_path), TINY, FLOAT, "other")
    with pytest.raises(BadInput, match="is not a prompt cache"):
        read(tiny_checkpoint / "model.safetensors", TINY, FLOAT, "key")
    with pytest.raises(BadInput, match="regular file"):
        read(tmp_path, TINY, FLOAT, "key")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="regular file"):
        read(tmp_path / "pipe", TINY, FLOAT, "key")


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = _file(tmp_path)
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        _file(tmp_path, logits=np.ones(320, np.float32))
    assert file.read_bytes() == before and [*tmp_path.iterdir()] == [file]


def test_the_key_is_of_the_model(tiny_bundle):
    manifest = tiny_bundle("fp32").manifest
    moved = {**manifest, "checkpoint": {**manifest["checkpoint"], "path": "/elsewhere"}, "max_seq_len": 7}
    assert key_of(manifest) == key_of(moved)
    trained = {**manifest, "checkpoint": {**manifest["checkpoint"], "sample_sha256": "0"}}
    others = [trained, {**manifest, "precision": "fp16"}, {**manifest, "chosen": {"state": "fp8"}}]
    scales = {**manifest, "files": {"activation_scales.safetensors": {"sha256": "0"}}}
    keys = [key_of(manifest), key_of(manifest, accuracy_level=4), *map(key_of, [*others, scales])]
    assert len({*keys}) == len(keys)


PROMPT = "def read_lines(self, path):"


def test_command(capfd, tiny_bundle, tmp_path):
    folder, file = tiny_bundle("fp32").folder, tmp_path / "cache"

    def run(prompt: str, *options, code: int = 0) -> dict:
        found = call(capfd, "run", folder, "--prompt", prompt, "-n", 4, "--json", *options)
        assert found.code == code, found.err
        return json.loads(found.out) if not code else {"error": found.err}

    plain = run(PROMPT)
    assert plain["cached_tokens"] == 0
    with_file = "--prompt-cache", file
    assert "does not exist" in run(PROMPT, *with_file, "--prompt-cache-ro", code=2)["error"]
    assert run(PROMPT, *with_file)["tokens"] == plain["tokens"]
    again = run(PROMPT, *with_file)
    assert again["tokens"] == plain["tokens"] and again["cached_tokens"] == plain["prompt_tokens"]
    longer = run(PROMPT + " pass", *with_file, "--prompt-cache-ro")
    assert longer["cached_tokens"] == plain["prompt_tokens"] and longer["tokens"] == run(PROMPT + " pass")["tokens"]
    run(PROMPT, *with_file, "--prompt-cache-all")
    config = tiny_bundle("fp32").config
    key = key_of(tiny_bundle("fp32").manifest, accuracy_level=0)
    assert len(read(file, config, FLOAT, key).tokens) == plain["prompt_tokens"] + 3
    shown = call(capfd, "run", folder, "--prompt", PROMPT, "-n", 2, *with_file, "--prompt-cache-ro").err
    assert f"[{plain['prompt_tokens']} prompt tokens ({plain['prompt_tokens'] - 1} from the prompt cache), " in shown


def test_refusals(capfd, tiny_bundle, tmp_path):
    folder, file = tiny_bundle("fp32").folder, tmp_path / "cache"
    for options in (["--prompt-cache-all"], ["--prompt-cache-ro"], ["--prompt-cache", tmp_path / "none" / "cache"]):
        found = call(capfd, "run", folder, "--prompt", PROMPT, *options)
        assert found.code == 2 and "prompt cache" in found.err
    assert call(capfd, "run", folder, "--prompt", PROMPT, "-n", 1, "--prompt-cache", file).code == 0
    other = call(capfd, "run", tiny_bundle("bf16").folder, "--prompt", PROMPT, "--prompt-cache", file)
    assert other.code == 2 and "another bundle" in other.err and "remove this one" in other.err
    skips = call(capfd, "run", folder, "--prompt", PROMPT, "--skip-decoder", "--prompt-cache", file)
    assert skips.code == NotSupported.exit_code
    drafts = call(capfd, "run", folder, "--prompt", PROMPT, "--draft-max", 2, "--prompt-cache", file)
    assert drafts.code == NotSupported.exit_code and "--draft-max" in drafts.err
    shared = tmp_path / "shared"
    shutil.copytree(folder, shared)
    manifest = json.loads((shared / "v4export.json").read_text())
    manifest["sharing"] = {"sharding": {"tp": 2, "ep": 1, "pp": 1}}
    (shared / "v4export.json").write_text(json.dumps(manifest))
    found = call(capfd, "run", shared, "--prompt", PROMPT, "--prompt-cache", file)
    assert found.code == NotSupported.exit_code and "ranks" in found.err
