"""How many tokens a prefill step of an engine gets, and in which precision it is built."""

from __future__ import annotations

from dataclasses import replace

import pytest

from v4export import presets
from v4export.engine import options as options_module
from v4export.engine.backend import Device
from v4export.engine.options import EngineOptions, precision_for, prefill_chunk
from v4export.engine.scratch import scratch
from v4export.errors import NotSupported
from v4export.plugins.limits import MAX_ELEMENTS
from v4export.precision import PRECISIONS

LENGTH = 4096


@pytest.mark.parametrize(
    ("name", "batch", "chunk"),
    [
        ("tiny-v3", 1, 512),  # as many as are worth it
        ("deepseek-v2-lite", 1, 10),  # 1 GiB over 6 experts of 3 * 1408 * 2048 numbers in 16 bits
        ("deepseek-v2-lite", 4, 2),
        ("deepseek-v3", 1, 1),  # 8 experts of 3 * 2048 * 7168: one token's are 0.7 GB
        ("deepseek-v3", 8, 1),  # never none
        ("deepseek-v4-flash", 1, 3),  # 6 experts of 3 * 2048 * 4096, dequantised from FP4
        ("tiny-v4-fp4", 1, 512),
    ],
)
def test_gathered_experts_fit_a_gibibyte(name: str, batch: int, chunk: int) -> None:
    assert prefill_chunk(presets.load(name), EngineOptions(max_batch=batch), LENGTH) == chunk


def test_float32_takes_twice_as_much() -> None:
    assert prefill_chunk(presets.load("deepseek-v2-lite"), EngineOptions(), LENGTH, precision=PRECISIONS["fp32"]) == 5


def test_what_was_asked_for_wins() -> None:
    assert prefill_chunk(presets.load("deepseek-v2-lite"), EngineOptions(max_chunk=64), LENGTH) == 64


def test_a_dense_model_gathers_nothing() -> None:
    assert prefill_chunk(replace(presets.load("deepseek-v3"), moe_layers=()), EngineOptions(), LENGTH) == 512


@pytest.mark.parametrize(
    ("name", "length", "what", "numbers"),
    [
        ("deepseek-v3", 131072, "attention scores", 128 * 131072),
        ("deepseek-v3.2", 131072, "index scores", 64 * 131072),
        ("deepseek-v3.2", 131072, "selected rows", 2048 * 576),
        ("deepseek-v3.2", 131072, "attention scores", 128 * 2048),
        ("deepseek-v3.2", 100, "selected rows", 100 * 576),
        ("deepseek-v4-flash", 1 << 20, "index scores", 64 * (1 << 18)),
        ("deepseek-v4-flash", 1 << 20, "selected rows", 512 * 512),
        ("deepseek-v4-flash", 1 << 20, "attention scores", 64 * (128 + 8192)),
        ("deepseek-v4-pro", 1 << 20, "gathered experts", 6 * 3072 * 7168 // 4),
    ],
)
def test_places(name: str, length: int, what: str, numbers: int) -> None:
    assert max(one.elements for one in scratch(presets.load(name), length) if one.what == what) == numbers


@pytest.mark.parametrize("name", ["deepseek-v3.2", "deepseek-v4-flash"])
def test_index_scores_shorten_the_chunk_of_a_long_sequence(name: str) -> None:
    config = replace(presets.load(name), moe_layers=())
    short, long = (prefill_chunk(config, EngineOptions(), length) for length in (4096, 1 << 20))
    keys = (1 << 20) // (4 if config.compressed else 1)
    assert short > long == (1 << 30) // (config.indexer.num_heads * keys * 4)


def test_no_tensor_is_larger_than_tensorrt_takes() -> None:
    config = presets.load("deepseek-v3")
    most = MAX_ELEMENTS // (8 * 1024 * 7168)
    assert prefill_chunk(config, EngineOptions(max_chunk=most), LENGTH) == most
    with pytest.raises(NotSupported, match=rf"gathered experts of a prefill step.*\n.*\n.*--max-chunk {most} or less"):
        prefill_chunk(config, EngineOptions(max_chunk=most + 1), LENGTH)
    with pytest.raises(NotSupported, match="smaller --max-batch"):
        prefill_chunk(config, EngineOptions(max_batch=most + 1), LENGTH)


def _machine(monkeypatch: pytest.MonkeyPatch, backend: str, *capabilities: str) -> None:
    monkeypatch.setattr(options_module, "choose_backend", lambda prefer: backend)
    devices = tuple(Device("GPU", capability, 80.0) for capability in capabilities)
    monkeypatch.setattr(options_module, "cuda_devices", lambda: devices)


@pytest.mark.parametrize(
    ("backend", "present", "targets", "expected"),
    [
        ("tensorrt_rtx", (), None, "mxfp4"),
        ("tensorrt_rtx", ("sm89",), None, "mxfp4"),  # this machine's GPU is not what engines are built for
        ("tensorrt_rtx", (), ["rtx5090"], "mxfp4"),
        ("tensorrt_rtx", (), ["rtx4090"], "fp8"),
        ("tensorrt_rtx", (), ["rtx4090", "rtx5090"], "fp8"),
        ("tensorrt", ("sm90",), None, "mxfp4"),  # by kernels, which read experts' FP4 themselves
        ("tensorrt", ("sm80",), None, "mxfp4"),  # which is refused: linear layers are FP8
        ("tensorrt", ("sm100",), None, "mxfp4"),
        ("tensorrt", ("sm100",), ["h200"], "mxfp4"),
    ],
)
def test_fp4_only_for_targets_that_have_it(monkeypatch, backend, present, targets, expected) -> None:
    _machine(monkeypatch, backend, *present)
    name, note = precision_for(EngineOptions(targets=targets), "mxfp4")
    assert name == expected and (note is None) == (expected == "mxfp4")
    assert note is None or note.endswith("no FP4: experts are FP8 E4M3 in blocks")


def test_without_kernels_hopper_has_no_fp4(monkeypatch) -> None:
    _machine(monkeypatch, "tensorrt", "sm90")
    assert precision_for(EngineOptions(plugins="none"), "mxfp4")[0] == "fp8"
    assert precision_for(EngineOptions(), "nvfp4")[0] == "fp8"  # which no kernel reads


def test_other_precisions_stay(monkeypatch) -> None:
    _machine(monkeypatch, "tensorrt", "sm80")
    assert precision_for(EngineOptions(), "fp8") == ("fp8", None)


@pytest.mark.parametrize("name", ["deepseek-v3", "kimi-k2", "deepseek-v4-flash", "deepseek-v4.1-flash"])
def test_kernels_gather_nothing(name):
    """Their chunk is as long as any; where launches do not fit, in float32, that of bodies stays."""
    pytest.importorskip("tensorrt_rtx")
    config, library = presets.load(name), EngineOptions(backend="tensorrt_rtx", plugins="library")
    assert prefill_chunk(config, library, LENGTH) == 512
    assert prefill_chunk(config, library, LENGTH, precision=PRECISIONS["fp32"]) == prefill_chunk(
        config, EngineOptions(backend="tensorrt_rtx"), LENGTH, precision=PRECISIONS["fp32"]
    )
    assert prefill_chunk(config, EngineOptions(backend="tensorrt_rtx"), LENGTH) < 64
