"""Kernels in TensorRT as ahead-of-time Python plugins (``tensorrt.plugin``): the engine keeps the code and how it is
launched, and whoever loads it needs neither Python nor a library.

Such a plugin is a function of descriptions of tensors, with a parameter for each of them. What the functions do is told
by the node's attributes, so they differ in their signatures alone, which are made here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from v4export.plugins.kernels.kernel import Launch
from v4export.plugins.kernels.nodes import CODE, LAUNCH, NAMESPACE
from v4export.plugins.kernels.plugin_v3 import TYPES

#: How combinations of types are written; every other type is called as in ``trt.DataType``.
_SHORT = {"FLOAT": "FP32", "HALF": "FP16"}


def register(trtp: Any, trt: Any, kernels: Mapping[str, tuple[int, int]]) -> None:
    """Register a plugin for each kernel.

    Args:
        trtp: the module ``tensorrt.plugin``.
        trt: the package ``tensorrt``.
        kernels: of each name, how many inputs and outputs its nodes have.
    """
    for name, (inputs, outputs) in kernels.items():
        _Plugin(trtp, trt, inputs, outputs).register(f"{NAMESPACE}::{name}")


class _Plugin:
    """The functions of one kernel's plugin."""

    def __init__(self, trtp: Any, trt: Any, inputs: int, outputs: int) -> None:
        self.trtp, self.trt, self.inputs, self.outputs = trtp, trt, inputs, outputs
        self.algebra = {
            "+": lambda a, b: a + b,
            "-": lambda a, b: a - b,
            "*": lambda a, b: a * b,
            "div": lambda a, b: a // b,
            "cdiv": trtp.cdiv,
            "min": trtp.min,
            "max": trtp.max,
        }

    def register(self, plugin_id: str) -> None:
        trtp = self.trtp
        tensor, texts = trtp.TensorDesc, [(LAUNCH, str), (CODE, str)]
        tensors = [(f"input{i}", tensor) for i in range(self.inputs)]
        some = ("outputs", _tuple_of(tensor))
        compiled = _tuple_of(str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs)
        described = _signed(self.describe, [*tensors, *texts], _tuple_of(*[tensor] * self.outputs))
        trtp.register(plugin_id)(described)
        trtp.autotune(plugin_id)(
            _signed(self.types, [*tensors, some], list.__class_getitem__(trtp.AutoTuneCombination))
        )
        trtp.aot_impl(plugin_id)(_signed(self.compiled, [*tensors, *texts, some, ("tactic", int)], compiled))

    def describe(self, *args: Any) -> tuple[Any, ...]:
        """The outputs, from the inputs and the two texts."""
        launch, dims = _launch(args[self.inputs]), self._dims(args)
        return tuple(
            self.trtp.from_shape_expr(tuple(self._size(d, dims) for d in shape), getattr(self.trt, TYPES[dtype]))
            for dtype, shape in launch.outputs
        )

    def types(self, *args: Any) -> list[Any]:
        """The one combination of types: those that the network gives the inputs. Its tactic is the only one."""
        tensors = [*args[: self.inputs], *args[-1]]
        names = [str(one.dtype).rpartition(".")[2] for one in tensors]
        return [self.trtp.AutoTuneCombination(", ".join(_SHORT.get(name, name) for name in names), "LINEAR", [1])]

    def compiled(self, *args: Any) -> tuple[str, str, Any, Any]:
        """The kernel's name, its code, its launch, and its scalar parameters."""
        launch, dims = _launch(args[self.inputs]), self._dims(args)
        params = self.trtp.KernelLaunchParams()
        params.grid_x, params.grid_y, params.grid_z = (self._size(blocks, dims) for blocks in launch.grid)
        params.block_x, params.shared_mem = launch.threads, launch.shared
        scalars = self.trtp.SymIntExprs(len(launch.scalars))
        for i, scalar in enumerate(launch.scalars):
            scalars[i] = self.trtp.SymInt32(self._size(scalar, dims))
        return launch.entry, args[self.inputs + 1].rstrip("\0"), params, scalars

    def _dims(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return {f"i{i}.{axis}": d for i, one in enumerate(args[: self.inputs]) for axis, d in enumerate(one.shape_expr)}

    def _size(self, size: Any, dims: dict[str, Any]) -> Any:
        return size.evaluate(dims, self.algebra, self.trtp.ShapeExpr)


def _tuple_of(*types: Any) -> Any:
    """``tuple[...]`` of types that are only known here."""
    return tuple.__class_getitem__(types)


def _launch(text: str) -> Launch:
    return Launch.parse(text.rstrip("\0"))


def _signed(function: Callable[..., Any], parameters: list[tuple[str, Any]], returns: Any) -> Callable[..., Any]:
    """The function under a signature of named, typed parameters, which is all that ``tensorrt.plugin`` reads of it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters]
    names = [name for name, _ in parameters]

    def signed(*args: Any, **kwargs: Any) -> Any:
        return function(*args, *(kwargs[name] for name in names[len(args) :]))

    signed.__signature__ = inspect.Signature(named, return_annotation=returns)  # type: ignore[attr-defined]
    return signed
