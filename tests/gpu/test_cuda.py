"""What only a machine with a GPU can show: the portable graph through CUDA, and an engine that loads there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from v4export import api
from v4export.engine.backend import cuda_devices
from v4export.engine.options import EngineOptions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda_devices(), reason="no CUDA device")]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8", "mxfp4"])
def test_the_graph_passes_on_cuda(model: Path, precision: str, tmp_path: Path) -> None:
    if precision == "mxfp4" and api.open_checkpoint(model).config.moe_intermediate_size % 32:
        pytest.skip("its experts are not a whole number of FP4 blocks wide")
    built = api.build(model, tmp_path / "out", precision=precision, engine=None, device="cuda")
    assert built.verification is not None and built.verification.passed


def test_tokens_are_those_of_a_cpu(model: Path, tmp_path: Path) -> None:
    built = api.export(model, tmp_path / "out", precision="fp32", max_seq_len=256)
    here, there = (
        api.run(built.bundle.folder, prompt="def read(self):", max_new_tokens=48, device=device)
        for device in ("cpu", "cuda")
    )
    assert here.tokens == there.tokens
    assert [(p.token, p.tokens) for p in here.pauses] == [(p.token, p.tokens) for p in there.pauses]


def test_the_engine_loads_on_this_gpu(model: Path, tmp_path: Path) -> None:
    api.build(model, tmp_path / "out", precision="fp16", verify=False)
    # In a process of its own: a runtime that refuses an engine may take its process along.
    program = (
        "import sys; from pathlib import Path; from v4export.engine.backend import load_backend;"
        "from v4export.engine.evidence import prove_loads;"
        "proof = prove_loads(load_backend().module, Path(sys.argv[1])); print(proof); sys.exit(not proof.holds)"
    )
    engine = tmp_path / "out" / "model.engine"
    done = subprocess.run([sys.executable, "-c", program, str(engine)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_engine_gets_the_weights_of_another_checkpoint(tmp_path: Path) -> None:
    """Byte for byte the engine that a build makes of them, or one that is looked through as that is."""
    first, second = (api.synth("tiny-v3", tmp_path / f"hub{seed}", seed=seed) for seed in (0, 1))
    options = EngineOptions(refit=True)
    built = api.build(first, tmp_path / "first", precision="bf16", engine=options)
    api.export(second, tmp_path / "second", precision="bf16")
    engines = api.engine(tmp_path / "second", replace(options, refit_from=tmp_path / "first"))
    (report,) = engines.values()
    assert report.bytes == next(iter(built.engines.values())).bytes
    assert any(claim.startswith("weights are stored as") for claim, _ in report.proofs)
