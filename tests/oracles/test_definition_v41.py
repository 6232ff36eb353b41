"""DeepSeek-V4.1 against a literal implementation of its equations in float64, which no public library has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import CHUNKS, UNEQUAL, check, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_v41 import LiteralV41
from runners import OnnxRunner, Runner, TorchRunner, run_batch, run_one
from traced import export_bundle
from v41_models import Pair, literal_of, pair

from v4export import api
from v4export.runtime.onnx import OnnxExecutor

pytestmark = pytest.mark.slow


def schedule(ratios: list[int], kv: list[int], index: list[int], candidates: int = -1) -> dict[str, Any]:
    """Config keys of which layer makes entries, which selects, and which keeps candidates."""
    return {
        "num_hidden_layers": len(ratios),
        "compress_ratios": ratios,
        "kv_source_layer_ids": kv,
        "index_source_layer_ids": index,
        "candidate_source_layer_id": candidates,
        "engram_layer_ids": [1],
    }


CASES: dict[str, dict[str, Any]] = {
    "every kind of layer": {},
    "no candidates": {"candidate_source_layer_id": -1},
    "candidates of one entry": {"candidate_block_size": 1, "candidate_topk_blocks": 14},
    "one block": {"candidate_topk_blocks": 1},
    "all blocks": {"candidate_topk_blocks": 500},
    "one entry selected": {"index_topk": 1},
    "all entries selected": {"index_topk": 500},
    "window only": schedule([0, 0], [], []),
    "one source": schedule([0, 1, 1], [1], [1]),
    "pairs to the end": schedule([0, 2, 2, 2], [1], [1, 3]),
    "two sources of pairs": schedule([2, 2, 2, 2], [0, 2], [0, 1, 2]),
    "entries of three": schedule([0, 3, 3, 1], [1, 3], [1, 3]),
    "no engram": {"engram_layer_ids": []},
    "engram in the decoder": {"engram_layer_ids": [0, 5, 6]},
    "n-grams of two": {"engram_max_ngram_size": 2},
    "one head": {"num_attention_heads": 1, "o_groups": 1},
    "two streams": {"hc_mult": 2},
    "one stream": {"hc_mult": 1},
    "one sinkhorn iteration": {"hc_sinkhorn_iters": 1},
    "short window": {"sliding_window": 3},
    "no yarn": {"rope_scaling": None},
    "yarn with its whole ramp": {
        "qk_rope_head_dim": 32, "index_head_dim": 32, "compress_rope_theta": 10000.0,
        "rope_scaling": {"factor": 8.0, "beta_fast": 4, "beta_slow": 1, "original_max_position_embeddings": 256},
    },
    "large eps": {"rms_norm_eps": 1e-3},
    "tight limit": {"swiglu_limit": 0.1},
    "every expert chosen": {"num_experts_per_tok": 8},
}  # fmt: skip


SINGLES = 12


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_definition(changes: dict[str, Any]) -> None:
    both = pair(**changes)
    ids = random_ids(sum(CHUNKS) + SINGLES)
    check(run_one(TorchRunner(both.model, 1, both.lookup), ids, CHUNKS, SINGLES), both.reference(ids))


def test_unequal_lengths() -> None:
    both = pair()
    check_unequal(both, lambda batch: TorchRunner(both.model, batch, both.lookup))


def check_unequal(both: Pair | Any, runner: Any) -> None:
    """A batch of unequal lengths equals each sequence alone, and the literal model."""
    sequences = [random_ids(length, seed) for seed, length in enumerate(UNEQUAL)]
    for ids, logits in zip(sequences, run_batch(runner(len(sequences)), sequences, 11), strict=True):
        check(logits, both.reference(ids))
        check(logits, run_one(runner(1), ids, [len(ids)], 0))


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    """Any valid combination of the options."""
    layers, heads = draw(st.integers(2, 7)), draw(st.sampled_from([1, 2, 4]))
    kv = sorted(draw(st.sets(st.integers(0, layers - 1), max_size=3)))
    index = sorted({*kv, *draw(st.sets(st.integers(kv[0], layers - 1), max_size=3))}) if kv else []
    ratios = [0] * layers
    for source in kv:
        ratios[source:] = [draw(st.integers(1, 3))] * (layers - source)
    candidates = draw(st.sampled_from([-1, *(i for i in index if i >= kv[-1])])) if kv else -1
    experts = draw(st.integers(2, 9))
    return {
        **schedule(ratios, kv, index, candidates),
        "candidate_topk_blocks": draw(st.integers(1, 8)),
        "candidate_block_size": draw(st.integers(1, 6)),
        "index_topk": draw(st.integers(1, 30)),
        "num_attention_heads": heads,
        "o_groups": draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0])),
        "head_dim": draw(st.sampled_from([32, 64])),
        "qk_rope_head_dim": draw(st.sampled_from([4, 8])),
        "sliding_window": draw(st.integers(2, 40)),
        "hc_mult": draw(st.integers(1, 4)),
        "hc_sinkhorn_iters": draw(st.sampled_from([1, 3, 20])),
        "n_routed_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, min(experts, 4))),
        "rms_norm_eps": draw(st.sampled_from([1e-20, 1e-6])),
        "engram_layer_ids": sorted(draw(st.sets(st.integers(0, layers - 1), max_size=2))),
        "engram_max_ngram_size": draw(st.integers(2, 4)),
        "engram_n_heads": draw(st.integers(1, 3)),
    }


@given(configs(), st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_definition_of_any_config(changes: dict[str, Any], seed: int) -> None:
    both, ids = pair(seed, **changes), random_ids(66, seed)
    check(run_one(TorchRunner(both.model, 1, both.lookup), ids, (13, 1, 46), 6), both.reference(ids))


def prompt_then_decode(runner: Runner | Any, ids: np.ndarray, cut: int, chunks: tuple[int, ...]) -> np.ndarray:
    """Logits of the tokens from ``cut`` on; those before it do not pass the decoder."""
    at = 0
    for size in chunks:
        piece = ids[at : min(at + size, cut)]
        if len(piece):
            runner.remember(piece[None], np.array([len(piece)]))
        at += len(piece)
    return run_one(runner, ids[cut:], [len(ids) - cut - 5], 5)


@pytest.mark.parametrize("cut", [1, 16, 33, 70])
def test_prompts_that_skip_the_decoder(cut: int) -> None:
    """The literal model deletes what tokens before ``decoder_start`` never computed, and would fail if it were used."""
    both = pair()
    ids = random_ids(110)
    theirs = both.reference(ids, decoder_start=cut)[cut:]
    check(prompt_then_decode(TorchRunner(both.model, 1, both.lookup), ids, cut, (40, 1, 40)), theirs)
    assert np.abs(theirs - both.reference(ids)[cut:]).max() > 1e-3, "skipping must make a difference"


def test_check_would_see_a_wrong_number() -> None:
    both, ids = pair(), random_ids(60)
    theirs = both.reference(ids)
    for layer, name in ((0, "attn_hc.scale"), (1, "engram.k_weight"), (2, "self_attn.compressor.kv_norm.weight")):
        parameter = both.model.layers[layer].get_parameter(name)
        parameter.data *= 1.01
        with pytest.raises(AssertionError):
            check(run_one(TorchRunner(both.model, 1, both.lookup), ids, (60,), 0), theirs)
        parameter.data /= 1.01


class Exported:
    """A checkpoint's graph through onnxruntime, and the literal model of the same checkpoint."""

    def __init__(self, folder: Path, **options: Any) -> None:
        hub = api.synth("tiny-v4.1", folder / "hub")
        self.literal: LiteralV41 = literal_of(hub)
        bundle = export_bundle(hub, folder / "out", "fp32", **options)
        how = (bundle.folder, bundle.config, bundle.precision)
        self.executors = [
            OnnxExecutor(*how, max_seq_len=bundle.max_seq_len, threads=1, bodies=bodies) for bodies in (False, True)
        ]

    def reference(self, ids: np.ndarray, decoder_start: int = 0) -> np.ndarray:
        return self.literal.logits(ids.tolist(), decoder_start).numpy()


@pytest.fixture(scope="module", params=[False, True], ids=["tables beside the graph", "tables inside"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("exported"), engram_inside=request.param)


@pytest.mark.parametrize("bodies", [0, 1])
def test_exported_sequence(exported: Exported, bodies: int) -> None:
    ids = random_ids(90)
    check(run_one(OnnxRunner(exported.executors[bodies], 1), ids, (1, 5, 33, 2, 17), 32), exported.reference(ids))


def test_exported_unequal(exported: Exported) -> None:
    check_unequal(exported, lambda batch: OnnxRunner(exported.executors[0], batch))


@pytest.mark.parametrize("bodies", [0, 1])
def test_exported_prompts_that_skip_the_decoder(exported: Exported, bodies: int) -> None:
    ids, cut = random_ids(90), 41
    theirs = exported.reference(ids, decoder_start=cut)[cut:]
    check(prompt_then_decode(OnnxRunner(exported.executors[bodies], 1), ids, cut, (17, 40)), theirs)
