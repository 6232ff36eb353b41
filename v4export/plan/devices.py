"""GPUs by name: memory, bandwidth, products and links, of which there is one table.

Figures are those of NVIDIA's data sheets (per GPU, SXM where there are several forms; products of bfloat16 without
sparsity, summed in float32; links in one direction: half of what a data sheet says of NVLink, PCIe where there is no
NVLink). Memory is what a driver reports, which is a little less than a data sheet says.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from v4export.engine.targets import Target, find_target
from v4export.errors import BadInput

_NVLINK3, _NVLINK4, _NVLINK5, _PCIE4, _PCIE5 = 300.0, 450.0, 900.0, 32.0, 64.0


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: in lower case, words joined by ``-``.
        target: of TensorRT's (``engine/targets.py``).
        memory_gib: GiB.
        bandwidth_gbs: of its memory, 1e9 bytes a second.
        tflops: products of bfloat16, 1e12 operations a second.
        link_gbs: to another one of its kind, in one direction, 1e9 bytes a second.
    """

    name: str
    target: str
    memory_gib: float
    bandwidth_gbs: float
    tflops: float
    link_gbs: float


DEVICES = {
    one.name: one
    for one in (
        Device("a100-40g", "sm80", 39, 1555, 312, _NVLINK3),
        Device("a100-80g", "sm80", 79, 2039, 312, _NVLINK3),
        Device("rtx3090", "sm86", 24, 936, 71, _PCIE4),
        Device("a10", "sm86", 22, 600, 125, _PCIE4),
        Device("rtx4090", "sm89", 24, 1008, 165, _PCIE4),
        Device("rtx4080", "sm89", 16, 717, 97, _PCIE4),
        Device("l4", "sm89", 22, 300, 121, _PCIE4),
        Device("l40s", "sm89", 45, 864, 362, _PCIE4),
        Device("rtx6000ada", "sm89", 48, 960, 182, _PCIE4),
        Device("h100", "sm90", 79, 3350, 989, _NVLINK4),
        Device("h200", "sm90", 139, 4800, 989, _NVLINK4),
        Device("h20", "sm90", 95, 4000, 148, _NVLINK4),
        Device("b200", "sm100", 179, 8000, 2250, _NVLINK5),
        Device("b300", "sm103", 268, 8000, 2250, _NVLINK5),
        Device("rtx5090", "sm120", 32, 1792, 209, _PCIE5),
        Device("rtx5080", "sm120", 16, 960, 113, _PCIE5),
    )
}
#: A name that several devices share is the smallest of them.
_ALIASES = {"a100": "a100-40g", "a100-40gb": "a100-40g", "a100-80gb": "a100-80g"}


def find_device(name: str) -> Device | None:
    """The device that people call so, if the table has it: ``H200``, ``RTX 4090``, ``a100_80g``."""
    plain = re.sub(r"[\s_]+", "-", name.strip().lower())
    plain = _ALIASES.get(plain, plain)
    return DEVICES.get(plain) or DEVICES.get(plain.replace("-", ""))


def named_device(name: str) -> Device:
    """The same, which has to be there.

    Raises:
        BadInput: the table does not have it.
    """
    found = find_device(name)
    if found is None:
        close = difflib.get_close_matches(name.lower(), DEVICES, n=3, cutoff=0.5)
        raise BadInput(
            f"no device is called {name!r}",
            f"known: {', '.join(DEVICES)}",
            f"Did you mean {' or '.join(close)}?" if close else "choose one of them",
        )
    return found


def target_of(name: str) -> tuple[Target, Device | None]:
    """What engines are built for, of a capability's name or a device's; and the device, where that is one.

    Raises:
        BadInput: nobody calls a GPU that.
    """
    device = find_device(name)
    return find_target(device.target if device else name), device
