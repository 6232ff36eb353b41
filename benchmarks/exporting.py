"""Export, each attempt in a child process that reports its time and peak memory.

The child is this file: ``python exporting.py HOW MODEL OUT``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def attempt(how: str, model: Path, out: Path, limit_s: float) -> str:
    """A sentence with the time and peak memory of one export, or with what became of it."""
    command = [sys.executable, __file__, how, str(model), str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return f"not finished after {limit_s:.0f} s"
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        return f"fails: {errors[-1].strip()[:160] if errors else f'exit code {done.returncode}'}"
    found = json.loads(done.stdout.splitlines()[-1])
    return f"{found['seconds']:.1f} s, {found['peak_gb']:.2f} GB"


def ours(model: Path, out: Path) -> None:
    from subject import MAX_SEQ_LEN

    from v4export import api

    api.export(model, out, precision="fp32", max_seq_len=MAX_SEQ_LEN, force=True)


def torch_onnx(model: Path, out: Path, experts: str | None = None, dtype: str = "float32") -> None:
    """``torch.onnx.export`` of the transformers model, without a cache (it takes none)."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager").eval()
    if experts:
        loaded.set_experts_implementation(experts)
    out.mkdir(exist_ok=True)
    ids = torch.randint(0, loaded.config.vocab_size, (1, 8))
    shapes = {"input_ids": {1: torch.export.Dim.DYNAMIC}}
    torch.onnx.export(
        loaded, (), out / "model.onnx", kwargs={"input_ids": ids, "use_cache": False}, dynamo=True,
        dynamic_shapes={**shapes, "use_cache": None}, external_data=True,
    )  # fmt: skip


HOW = {
    "v4export": ours,
    "torch.onnx": torch_onnx,
    "torch.onnx, batched_mm": lambda model, out: torch_onnx(model, out, "batched_mm"),
}

if __name__ == "__main__":
    how, model, out = sys.argv[1:]
    start = time.perf_counter()
    HOW[how](Path(model), Path(out))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_gb": peak}))
