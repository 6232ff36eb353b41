"""The script that trains a layer that drafts leaves a checkpoint that is exported, and drafts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from v4export import api
from v4export.checkpoint.audit import audit
from v4export.config.chosen import Chosen
from v4export.opened import open_checkpoint

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_draft.py"


@pytest.mark.slow
def test_a_short_training(trained_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    hub = tmp_path / "hub"
    few = ["--steps", "3", "--files", "8", "--window", "32", "--batch", "2"]
    command = [sys.executable, str(SCRIPT), str(trained_checkpoint), "--save", str(hub), *few]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(depth \d: \d+\.\d%\n){3}", done.stdout) and re.search(r"3: loss \d", done.stderr)
    account = audit(open_checkpoint(hub, Chosen(draft=True)))
    assert not account.skipped and account.counts["used"] > audit(open_checkpoint(trained_checkpoint)).counts["used"]
    bundle = api.export(hub, tmp_path / "out", precision="fp32", max_seq_len=64, draft=True).bundle
    plain, drafted = (
        api.run(bundle.folder, prompt="def f(x):", max_new_tokens=20, ignore_eos=True, draft_max=n) for n in (0, 2)
    )
    assert plain.tokens == drafted.tokens and drafted.drafted and not plain.drafted
