"""Kernels on PyTorch tensors: on the GPU they are on, or emulated on the CPU."""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from v4export.plugins.kernels import cuda, emulate
from v4export.plugins.kernels.kernel import Compilable, Constant, Kernel, Typed

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: What an emulated launch may have: as much as the smaller GPUs give.
_EMULATED_SHARED = 99 << 10


class Caller:
    """Runs kernels on tensors as the rest of a program calls functions.

    Args:
        budget: shared memory of a launch, in bytes; what the device has unless given.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        # What tables of addresses point at, kept for as long as a launch may be under way.
        self._kept: deque[list[torch.Tensor]] = deque(maxlen=32)

    def __call__(self, kernel: Kernel, *tensors: torch.Tensor, **constants: Constant) -> tuple[torch.Tensor, ...]:
        """Run a kernel; its dimensions and types are those of the tensors.

        Args:
            kernel: which.
            tensors: its inputs, on one device.
            constants: of its compilation.

        Returns:
            its outputs, new tensors.
        """
        device = tensors[0].device
        inputs = [_readable(tensor) for tensor in tensors]
        operands = tuple(Typed(_NAMES[t.dtype], tuple(t.shape)) for t in inputs)
        return self.run(_compilable(kernel, operands, tuple(sorted(constants.items())), self._budget(device)), inputs)

    def run(self, compiled: Compilable, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Outputs of a kernel that was made ready for inputs of these types, as kernels read them."""
        dims = {f"i{i}.{axis}": d for i, one in enumerate(inputs) for axis, d in enumerate(one.shape)}
        outputs = tuple(
            torch.empty([d.evaluate(dims) for d in shape], dtype=_DTYPES[dtype], device=inputs[0].device)
            for dtype, shape in compiled.launch.outputs
        )
        self.launch(compiled, dims, inputs, outputs)
        return outputs

    def tables(self, *lists: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, int]]:
        """Operands by which a kernel finds the matrices of each list that has any: tables of their addresses.

        Returns:
            int64 [E] for each list, and the constants that say so to the kernel.
        """
        tables = []
        for matrices in filter(None, lists):
            aligned = [_readable(matrix) for matrix in matrices]
            table = _addresses(tuple(m.data_ptr() for m in aligned), aligned[0].device)
            tables.append(table)
            self._kept.append(aligned)
        return tables, {"PARTS": 0, "PART": len(lists[0])}

    def dtype_of(self, tensor: torch.Tensor) -> str:
        """A tensor's type as kernels call it."""
        return _NAMES[tensor.dtype]

    def reshape(self, tensor: torch.Tensor, *dims: int) -> torch.Tensor:
        """The same numbers in another shape."""
        return tensor.reshape(dims)

    def _budget(self, device: torch.device) -> int:
        if self.budget is not None:
            return self.budget
        return cuda.shared_limit(device.index or 0) if device.type == "cuda" else _EMULATED_SHARED

    def launch(
        self,
        compiled: Compilable,
        dims: Mapping[str, int],
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> None:
        """Launch one kernel. What an emulated one does not write stays rubbish that tests recognise."""
        on_gpu = outputs[0].device.type == "cuda"
        if not on_gpu:
            for output in outputs:
                output.view(torch.uint8).fill_(0xFF)
        x, y, z = (blocks.evaluate(dims) for blocks in compiled.launch.grid)
        if x and y and z:
            scalars = [ctypes.c_int(scalar.evaluate(dims)) for scalar in compiled.launch.scalars]
            sources, results = ([ctypes.c_void_p(t.data_ptr()) for t in group] for group in (inputs, outputs))
            (cuda if on_gpu else emulate).launch(compiled, (x, y, z), [*sources, *scalars, *results])


class Recorder(Caller):
    """Launches nothing and notes what would be compiled; for tensors on the device ``meta``."""

    def __init__(self, budget: int | None = None) -> None:
        super().__init__(budget)
        self.compiled: list[Compilable] = []

    def launch(
        self,
        compiled: Compilable,
        dims: Mapping[str, int],
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> None:
        """Note it."""
        self.compiled.append(compiled)

    def tables(self, *lists: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, int]]:
        """As many addresses as there are matrices."""
        tables = [torch.empty(len(one), dtype=torch.int64, device="meta") for one in lists if one]
        return tables, {"PARTS": 0, "PART": len(lists[0])}


call = Caller()


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers behind each other and on a multiple of 16 bytes, as kernels read them."""
    packed = tensor.contiguous()
    return packed if packed.data_ptr() % 16 == 0 else packed.clone()


@functools.lru_cache(maxsize=4096)
def _addresses(addresses: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)


@functools.cache
def _compilable(
    kernel: Kernel, operands: tuple[Typed, ...], constants: tuple[tuple[str, Constant], ...], budget: int
) -> Compilable:
    """With only those dimensions fixed that are compiled, so that one compilation serves every number of tokens."""
    return kernel.compilable([_open(kernel, i, one) for i, one in enumerate(operands)], dict(constants), budget)


def _open(kernel: Kernel, index: int, typed: Typed) -> Typed:
    names, fixed = kernel.inputs[index].split()[2:], kernel.compiled.split()
    if len(names) != len(typed.dims):
        return typed
    return Typed(typed.dtype, tuple(d if n in fixed else None for n, d in zip(names, typed.dims, strict=True)))
