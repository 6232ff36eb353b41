"""transformers, in float32, as the independent opinion on every option of DeepSeek-V4."""

from __future__ import annotations

from typing import Any

import hub_models
import numpy as np
import pytest
import torch
from checks import Exported, check, check_sequence, check_unequal, random_ids, reference
from hub_models import hub_model, twin
from hypothesis import given, settings
from hypothesis import strategies as st
from runners import TorchRunner, run_one

from v4export.model import Transformer

pytestmark = pytest.mark.slow


def layers(*kinds: str, hashed: int = 1) -> dict[str, Any]:
    """Config keys of a schedule whose first layers route by hash."""
    routing = ["hash_moe"] * min(hashed, len(kinds)) + ["moe"] * max(0, len(kinds) - hashed)
    return {"num_hidden_layers": len(kinds), "layer_types": list(kinds), "mlp_layer_types": routing}


def rates(csa: int, hca: int) -> dict[str, Any]:
    """Config keys of how many tokens an entry stands for."""
    return {"compress_rates": {"csa": csa, "hca": hca}}


CASES: dict[str, dict[str, Any]] = {
    "flash": layers("window", "window", "csa", "hca", "csa", hashed=3),
    "pro": layers("hca", "hca", "csa", "hca", "csa", hashed=3),
    "window only": layers("window", "window"),
    "csa only": layers("csa", "csa", hashed=0),
    "hca only": layers("hca", "hca", hashed=2),
    "one stream": {"hc_mult": 1},
    "two streams": {"hc_mult": 2},
    "three streams": {"hc_mult": 3},
    "one sinkhorn iteration": {"hc_sinkhorn_iters": 1},
    "large hyper eps": {"hc_eps": 1e-3},
    "released ratios": rates(4, 128) | {"sliding_window": 128},
    "odd ratios": rates(3, 7),
    "ratios of one and two": rates(1, 2),
    "short window": {"sliding_window": 3},
    "one entry selected": {"index_topk": 1},
    "all entries selected": {"index_topk": 500},
    "one output group": {"o_groups": 1},
    "an output group a head": {"o_groups": 4},
    "one head": {"num_attention_heads": 1, "o_groups": 1},
    "wide rotation": {"partial_rotary_factor": 0.5},
    "no yarn": {"rope_parameters": None},
    "yarn with a narrow ramp": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 1.0,
            "beta_slow": 1.0,
        }
    },
    "no limit to speak of": {"swiglu_limit": 1000.0},
    "tight limit": {"swiglu_limit": 0.1},
    "every expert chosen": {"num_experts_per_tok": 8},
    "scaling factor": {"routed_scaling_factor": 2.5},
    "eps": {"rms_norm_eps": 1e-4},
    "bases": {"rope_theta": 500.0, "compress_rope_theta": 20000.0},
}  # fmt: skip

EXPORTED = {name: CASES[name] for name in ("flash", "pro", "released ratios", "three streams", "odd ratios")}


def runner_of(mine: Transformer) -> Any:
    return lambda batch: TorchRunner(mine, batch)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_definition(changes):
    model = hub_model("deepseek_v4", **changes)
    mine = twin(model)
    check_sequence(model, runner_of(mine))
    check_unequal(model, runner_of(mine))


RELEASED = {**layers("window", "csa", "hca"), **rates(4, 128), "sliding_window": 128, "index_topk": 24}


@pytest.fixture(scope="module")
def released() -> tuple[torch.nn.Module, Transformer, np.ndarray]:
    """A model with the released window and ratios, and logits of a sequence that passes two entries of 128 tokens."""
    model = hub_model("deepseek_v4", **RELEASED)
    return model, twin(model), reference(model, random_ids(290))


@pytest.mark.parametrize("first", range(16))
def test_every_offset_of_a_boundary(released, first):
    """A step may begin at any token of a window, of an entry of 4 and of one of 128: 16 offsets by 8 = every one."""
    _, mine, theirs = released
    for start in range(first, 128, 16):
        check(run_one(TorchRunner(mine, 1), random_ids(290), [n for n in (start, 290 - start) if n], 0), theirs)


def test_token_by_token(released):
    _, mine, theirs = released
    check(run_one(TorchRunner(mine, 1), random_ids(290), [], 290), theirs)


@given(st.lists(st.integers(1, 150), min_size=2, max_size=6), st.integers(0, 99))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_state_does_not_depend_on_chunks(chunks, seed):
    """The rows that a chunked prefill leaves are those that single steps leave."""
    mine = twin(hub_model("deepseek_v4", **RELEASED))
    ids = random_ids(min(sum(chunks), 290), seed)
    chunked, single = TorchRunner(mine, 1), TorchRunner(mine, 1)
    at = 0
    for size in chunks:
        piece = ids[at : at + size]
        if len(piece):
            chunked.step(piece[None], np.array([len(piece)]))
        at += size
    run_one(single, ids, [], len(ids))
    assert chunked.state.lengths_B == single.state.lengths_B == len(ids)
    for layer, buffers in enumerate(chunked.state.layers):
        for name in buffers:
            ours, theirs = (runner.state.rows(layer, name, 0) for runner in (chunked, single))
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


@st.composite
def configs(draw) -> dict[str, Any]:
    """Any valid combination of the options."""
    kinds = draw(st.lists(st.sampled_from(["window", "csa", "hca"]), min_size=1, max_size=4))
    heads = draw(st.sampled_from([1, 2, 4]))
    experts = draw(st.integers(2, 9))
    return {
        **layers(*kinds, hashed=draw(st.integers(0, 4))),
        **rates(draw(st.integers(1, 6)), draw(st.integers(2, 40))),
        "num_attention_heads": heads,
        "o_groups": draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0])),
        "o_lora_rank": draw(st.sampled_from([4, 12])),
        "head_dim": draw(st.sampled_from([32, 64])),
        "partial_rotary_factor": draw(st.sampled_from([0.125, 0.25])),
        "q_lora_rank": draw(st.sampled_from([24, 40])),
        "sliding_window": draw(st.integers(2, 40)),
        "index_topk": draw(st.integers(1, 30)),
        "hc_mult": draw(st.integers(1, 4)),
        "hc_sinkhorn_iters": draw(st.sampled_from([1, 3, 20])),
        "n_routed_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, min(experts, 4))),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 1.5, 2.5])),
        "swiglu_limit": draw(st.sampled_from([0.5, 10.0])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
    }


@given(configs(), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_definition_of_any_config(changes, seed):
    model = hub_model("deepseek_v4", seed, **changes)
    mine, ids = twin(model), random_ids(60 + 6, seed)
    check(run_one(TorchRunner(mine, 1), ids, (13, 1, 46), 6), reference(model, ids))
    check_unequal(model, runner_of(mine))


@pytest.fixture(scope="module", params=EXPORTED.values(), ids=EXPORTED)
def exported(request, tmp_path_factory) -> Exported:
    return Exported(tmp_path_factory.mktemp("exported"), hub_model("deepseek_v4", 1, **request.param))


def test_exported_sequence(exported):
    check_sequence(exported.model, exported.runner, (1, 5, 133, 2, 17))


def test_exported_unequal(exported):
    check_unequal(exported.model, exported.runner)


def test_check_would_see_a_wrong_number():
    """The limit is tight enough: a hundredth more on a sink, or on an entry's gate, is beyond it."""
    model, ids = hub_model("deepseek_v4"), random_ids(60)
    theirs = reference(model, ids)
    for layer, name in ((1, "sinks"), (2, "compressor.position_bias")):
        mine = twin(model)
        check(run_one(TorchRunner(mine, 1), ids, (60,), 0), theirs)
        mine.layers[layer].self_attn.get_parameter(name).data *= 1.01
        with pytest.raises(AssertionError):
            check(run_one(TorchRunner(mine, 1), ids, (60,), 0), theirs)


def test_small_config_has_every_kind():
    assert set(hub_models.SMALL_V4["layer_types"]) == {"window", "csa", "hca"}
