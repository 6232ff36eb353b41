"""The report of a build of 61 layers, opened in a browser: seconds, bytes, and a picture of its top.

``python benchmarks/report_page.py`` builds a checkpoint of DeepSeek-V3's depth with few and narrow experts; writes
``docs/report.png`` and a line of ``docs/verification.md``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from page import replace_between

from v4export import api, presets
from v4export.checkpoint.synth import synth

ROOT = Path(__file__).resolve().parents[1]
BROWSER = ROOT / "tests" / "verify" / "browser.py"
PAGE, BEGIN, END = ROOT / "docs" / "verification.md", "<!-- measured: report -->", "<!-- end: report -->"
LAYERS, EXPERTS = 61, 32
OPENED = 5


def main() -> None:
    """Build, open, write."""
    narrow = presets.load("tiny-v3")
    routed = {"num_experts": EXPERTS, "num_groups": 1, "topk_groups": 1, "experts_per_token": 8}
    config = replace(narrow, num_layers=LAYERS, moe_layers=tuple(range(1, LAYERS)), **routed)
    with tempfile.TemporaryDirectory() as scratch:
        hub, out = synth(config, Path(scratch) / "hub"), Path(scratch) / "out"
        built = api.build(
            hub, out, precision="bf16", engine=None, max_seq_len=512, command="v4export build MODEL -o OUT"
        )
        report = out / "report.html"
        report.write_text(report.read_text().replace(str(hub), "MODEL"))
        seconds = []
        for _ in range(OPENED):
            command = [sys.executable, str(BROWSER), str(report), str(ROOT / "docs" / "report.png"), "1100", "1500"]
            done = subprocess.run([*command, "() => document.title"], capture_output=True, text=True, check=True)
            seconds.append(json.loads(done.stdout)["seconds"])
        assert built.verification is not None
        boundaries, size = len(built.verification.boundaries), report.stat().st_size
        line = (
            f"{LAYERS} layers, {EXPERTS} experts, {boundaries} boundaries: {size / 1e3:.0f} kB, "
            f"loaded and laid out in {max(seconds):.2f} s at most of {OPENED} times (Qt WebEngine {_engine()}, no GPU, "
            "2 cores; `python benchmarks/report_page.py`)."
        )
    replace_between(PAGE, BEGIN, END, [line])
    print(line)


def _engine() -> str:
    from importlib.metadata import version

    return version("PySide6-WebEngine")


if __name__ == "__main__":
    main()
