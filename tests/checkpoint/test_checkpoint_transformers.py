"""transformers as the independent opinion on names, shapes and configurations."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from v4export import presets
from v4export.checkpoint.aliases import native
from v4export.checkpoint.audit import audit
from v4export.checkpoint.count import parameter_counts
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.names import expected
from v4export.checkpoint.synth import synth
from v4export.checkpoint.tensor import DTYPES
from v4export.config.readers import read_config, to_hub_config

CLASSES = {
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "deepseek_v32": "DeepseekV32",
    "deepseek_v4": "DeepseekV4",
    "kimi_k2": "DeepseekV3",
}
# importing transformers with its models takes seconds
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def classes(transformers, family):
    return (getattr(transformers, CLASSES[family] + kind) for kind in ("Config", "ForCausalLM"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["tiny-v2-lite", "tiny-v3", "tiny-v3.2", "tiny-kimi-k2"])
def test_saved_by_transformers(transformers, tmp_path, name, bias):
    config = replace(presets.load(name), attention_bias=bias)
    config_class, model_class = classes(transformers, config.family)
    raw = {key: value for key, value in to_hub_config(config).items() if key != "model_type"}
    model = model_class(config_class(**raw)).to(config_dtype(config))
    assert model.num_parameters() == parameter_counts(config).total
    model.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    checkpoint = Checkpoint.open(tmp_path / "saved")
    assert len(checkpoint.files) > 1
    family = "deepseek_v3" if config.family == "kimi_k2" else config.family
    assert checkpoint.config == replace(config, family=family)
    account = audit(checkpoint)
    assert {*account.used} == expected(config).keys()
    compare(account, model.state_dict())


def compare(account, state):
    """Every weight against the model in memory, whose experts are fused."""
    state = {name: value.float().numpy() for name, value in state.items()}
    for name, weight in account.weights.items():
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if expert:
            part = "down_proj" if expert[3] == "down" else "gate_up_proj"
            wanted = state[f"{expert[1]}.{part}"][int(expert[2])]
            if part == "gate_up_proj":
                wanted = np.split(wanted, 2)[expert[3] == "up"]
        else:
            wanted = state[name]
        np.testing.assert_array_equal(weight.decode(), wanted, name)


@pytest.fixture(scope="module")
def v4(transformers):
    """A model with weights, tables and buffers that differ everywhere."""
    import torch

    config_class, model_class = classes(transformers, "deepseek_v4")
    raw = {key: value for key, value in to_hub_config(presets.load("tiny-v4")).items() if key != "model_type"}
    torch.manual_seed(0)
    model = model_class(config_class(**raw)).to(torch.bfloat16)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("tid2eid"):
                value.copy_(torch.rand(320, 8).argsort(1)[:, :2])
            else:
                value.copy_(torch.randn_like(value))
    return model


def test_v4_saved_by_transformers(v4, tmp_path):
    config = presets.load("tiny-v4")
    assert v4.num_parameters() == parameter_counts(config).total
    v4.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    checkpoint = Checkpoint.open(tmp_path / "saved")
    assert len(checkpoint.files) > 1
    assert checkpoint.config == config
    stored = {tensor.name for tensor in checkpoint.tensors.values()}
    assert {"head.weight", "model.layers.1.attn.norm.weight", "model.hc_head.hc_fn"} <= stored
    account = audit(checkpoint)
    assert {*account.used} == expected(config).keys()
    compare(account, v4.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_v4_by_other_names(v4, tmp_path, fused):
    """DeepSeek's names, and those of the modules in memory with fused experts."""
    from safetensors.torch import save_file

    directory = synth(presets.load("tiny-v4"), tmp_path / "checkpoint", sparse=True)
    if fused:
        state = v4.state_dict()
    else:
        v4.save_pretrained(tmp_path / "saved")
        tensors = Checkpoint.open(tmp_path / "saved").tensors
        state = {native(name): tensor.read() for name, tensor in tensors.items()}
        state = {name: torch_of(array) for name, array in state.items()}
        assert state.keys() == {t.name for t in Checkpoint.open(directory).tensors.values()}
    save_file({name: value.contiguous() for name, value in state.items()}, directory / "model.safetensors")
    account = audit(Checkpoint.open(directory))
    compare(account, v4.state_dict())
    assert bool(account.merged) == fused


def torch_of(array):
    import torch

    if array.dtype == DTYPES["BF16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def config_dtype(config):
    import torch

    return getattr(torch, config.dtype)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["tiny-v2-lite", "tiny-v3", "tiny-v3.2", "tiny-kimi-k2", "tiny-v4"])
def test_read_by_transformers(transformers, tmp_path, name, fused):
    config = presets.load(name)
    directory = synth(config, tmp_path / "written", fused=fused)
    # transformers reads kimi_k2 with its V3 classes, whose name conversions go by model_type.
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace("kimi_k2", "deepseek_v3"))
    _, model_class = classes(transformers, config.family)
    model, report = model_class.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    weights = audit(Checkpoint.open(directory)).weights
    gate_up = state["model.layers.1.mlp.experts.gate_up_proj"].float().numpy()
    width = config.moe_intermediate_size
    assert (gate_up[2, :width] == weights["model.layers.1.mlp.experts.2.gate_proj.weight"].decode()).all()
    assert (gate_up[2, width:] == weights["model.layers.1.mlp.experts.2.up_proj.weight"].decode()).all()


@pytest.mark.parametrize("name", ["tiny-v2-lite", "tiny-v3", "tiny-v3.2", "tiny-v4", "deepseek-v4-pro-0813"])
def test_both_spellings_of_a_configuration(transformers, name):
    config = presets.load(name)
    config_class, _ = classes(transformers, config.family)
    raw = {key: value for key, value in to_hub_config(config).items() if key != "model_type"}
    assert read_config(config_class(**raw).to_dict()) == config


@pytest.mark.parametrize("name", ["tiny-v2-lite", "tiny-v3", "tiny-v3.2", "tiny-v4"])
def test_default_configuration_of_transformers(transformers, name):
    config_class, _ = classes(transformers, presets.load(name).family)
    overrides = {"num_experts_per_tok": 6} if name == "tiny-v2-lite" else {}
    config = read_config(config_class(**overrides).to_dict())
    assert config.yarn is None
    assert config.family == presets.load(name).family
