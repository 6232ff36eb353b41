"""Runs a graph of kernels on the CPU: launches by the emulator, all other nodes by onnx's reference implementation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from v4export.graphs.lower import lower_for_engine
from v4export.plugins.kernels.call import Caller
from v4export.plugins.kernels.kernel import Compilable
from v4export.plugins.kernels.nodes import NAMESPACE, kernel_nodes


class EmulatedGraph:
    """The graph of a bundle with every op as its kernels.

    Args:
        path: the portable graph; its weights must be copies, since onnx refuses links.
        patch: replaces the compiler, as the emulator compiles from the source.
        budget: shared memory of a launch.
    """

    def __init__(self, path: Path, patch: pytest.MonkeyPatch, budget: int = 99 << 10) -> None:
        self.compiled: dict[str, Compilable] = {}
        patch.setattr("v4export.plugins.kernels.nodes.nvrtc.ptx", self._numbered)
        model, self.kept = lower_for_engine(path, lambda _: True, budget, dict)
        ir.save(model, path.with_suffix(".tensorrt.onnx"))
        kinds = {node.op_type for node in kernel_nodes(path.with_suffix(".tensorrt.onnx"))}
        proto = onnx.load(path.with_suffix(".tensorrt.onnx"))
        self.launches = sum(node.op_type in kinds for node in proto.graph.node)
        self._evaluator = ReferenceEvaluator(proto, new_ops=[self._operator(kind) for kind in kinds])

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        return dict(zip(self._evaluator.output_names, self._evaluator.run(None, dict(feeds)), strict=True))

    def _numbered(self, compilable: Compilable) -> str:
        """A name for what would be compiled, in place of its code."""
        code = f"// {len(self.compiled)}"
        self.compiled[code] = compilable
        return code

    def _operator(self, kind: str) -> type[OpRun]:
        compiled = self.compiled

        def run(_self: OpRun, *arrays: np.ndarray, launch: str, ptx: str, **_hints: Any) -> tuple[np.ndarray, ...]:
            one = compiled[ptx]
            assert one.launch.text() == launch
            inputs = [torch.from_numpy(np.array(array, order="C")) for array in arrays]
            return tuple(output.numpy() for output in Caller().run(one, inputs))

        return type(kind, (OpRun,), {"op_domain": NAMESPACE, "_run": run})
