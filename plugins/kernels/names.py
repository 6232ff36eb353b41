"""Every kernel that a graph can have nodes of, by name.

``python -m v4export.plugins.kernels.names`` prints the list that the C++ library registers plugins by.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from v4export.plugins import OPS
from v4export.plugins.kernels import attention
from v4export.plugins.kernels.kernel import Kernel
from v4export.plugins.moe_experts.kernel import FORMATS, PLAIN, down_kernel, up_kernel

#: In how many stacks of as many elements as TensorRT takes any model's experts come, and more.
MOST_PARTS = 4


def kernels() -> dict[str, Kernel]:
    """All kernels, sorted by name."""
    return {kernel.name: kernel for kernel in sorted(_all(), key=lambda one: one.name)}


def _all() -> Iterator[Kernel]:
    modules = [import_module(op.kernels.__module__) for op in OPS if op.kernels]
    for module in (attention, *modules):
        yield from (value for value in vars(module).values() if isinstance(value, Kernel))
    for stored in {PLAIN, *FORMATS.values()}:
        for parts in range(1, MOST_PARTS + 1):
            yield up_kernel(stored, parts)
            yield down_kernel(stored, parts)


def main() -> None:
    """Prints ``kernels.inc``."""
    print("\n".join(f"KERNEL({name})" for name in kernels()))


if __name__ == "__main__":
    main()
