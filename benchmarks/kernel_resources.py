"""What every kernel takes on every kind of GPU, compiled and not run: writes the table of ``docs/kernels.md``.

``python benchmarks/kernel_resources.py``
"""

from __future__ import annotations

from pathlib import Path

from kernel_cases import compiled
from page import replace_between, row

from v4export.plugins.kernels import nvrtc
from v4export.plugins.kernels.kernel import PLAIN_SHARED

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
BUDGETS = (PLAIN_SHARED, 99 << 10, 227 << 10)


def table() -> list[str]:
    """A line for each way that models compile a kernel: the first model of it, threads, shared memory, registers."""
    lines = [row("kernel", "first compiled for", "threads", "shared memory, bytes", *TARGETS)]
    lines.append(row(*["---"] * (4 + len(TARGETS))))
    for model, one in sorted(compiled(BUDGETS), key=lambda each: each[1].launch.entry):
        used = [nvrtc.cubin(one, target)[1] for target in TARGETS]
        spilled = [f"{each.registers}" + (f" ({each.spilled} spilled)" if each.spilled else "") for each in used]
        shared = one.launch.shared + max(each.shared for each in used)
        lines.append(row(one.launch.entry, model, str(one.launch.threads), f"{shared:,}", *spilled))
    return lines


if __name__ == "__main__":
    major, minor = nvrtc.version()
    note = f"NVRTC {major}.{minor}; registers of a thread, `python benchmarks/kernel_resources.py`"
    replace_between(PAGE, "<!-- measured: resources -->", "<!-- end: resources -->", [note, "\n".join(table())])
