"""A copy of a bundle that is about to be damaged, as a defect of an exporter would."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from v4export.graphs.export import PORTABLE, for_cpu
from v4export.graphs.lower import lower_for_cpu
from v4export.graphs.stamp import portable_bodies
from v4export.package.bundle import MANIFEST, Bundle, write_manifest


class Damaged:
    """A copy of a bundle one of whose graphs is about to be damaged; weights are shared until written to."""

    def __init__(self, bundle: Path, copy: Path, graph: str = PORTABLE) -> None:
        self.folder = Path(shutil.copytree(bundle, copy, copy_function=os.link))
        self.graph, self.fast = graph, for_cpu(graph)
        self.model = onnx.load(self.folder / graph, load_external_data=False)
        self.lowered = False

    def lower(self) -> None:
        """From here on it is onnxruntime's copy that is damaged."""
        self._write(self.graph)
        (self.folder / self.fast).unlink()
        ir.save(lower_for_cpu(self.folder / self.graph), self.folder / self.fast)
        self.model = onnx.load(self.folder / self.fast, load_external_data=False)
        self.lowered = True

    def rebuild(self) -> None:
        """Make the bodies of custom ops again from their nodes."""
        nodes = list(ir.from_proto(self.model).graph)
        functions = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10, functions=portable_bodies(nodes))
        del self.model.functions[:]
        self.model.functions.extend(ir.to_proto(functions).functions)

    def save(self) -> None:
        """Write what onnxruntime runs, and a manifest that knows of no damage: the exporter itself was wrong."""
        if not self.lowered:
            self.lower()
        self._write(self.fast)
        self._record()

    def save_portable(self) -> None:
        """Write the portable graph alone: what onnxruntime runs on a CPU stays sound."""
        self._write(self.graph)
        self._record()

    def bundle(self) -> Bundle:
        """What it has become."""
        return Bundle.open(self.folder)

    def _record(self) -> None:
        manifest = dict(Bundle.open(self.folder).manifest)
        facts = {name: fact for name, fact in manifest.items() if name not in ("format", "versions", "files")}
        (self.folder / MANIFEST).unlink()  # a link, too
        write_manifest(self.folder, facts, frozenset(facts["graphs"]["linked"]))

    def _write(self, name: str) -> None:
        (self.folder / name).unlink()  # a link to the sound one
        onnx.save(self.model, self.folder / name)

    def nodes(self, *op_types: str) -> Iterator[onnx.NodeProto]:
        """The graph's nodes and those of functions."""
        for nodes in (self.model.graph.node, *(f.node for f in self.model.functions)):
            yield from (n for n in nodes if not op_types or n.op_type in op_types)

    def pointer(self, weight: str) -> onnx.TensorProto:
        return next(i for i in self.model.graph.initializer if i.name == weight)

    def place(self, weight: str) -> dict[str, str]:
        """A weight's location, offset and length."""
        return {entry.key: entry.value for entry in self.pointer(weight).external_data}

    def point(self, weight: str, place: dict[str, str]) -> None:
        for entry in self.pointer(weight).external_data:
            entry.value = place[entry.key]

    def swap(self, one: str, other: str) -> None:
        first, second = self.place(one), self.place(other)
        self.point(one, second)
        self.point(other, first)

    def set_constants(self, old: float, new: float) -> int:
        """Replace float scalars; how many there were."""
        count = 0
        for node in self.nodes("Constant"):
            for attribute in node.attribute:
                if attribute.name != "value" or attribute.t.data_type != onnx.TensorProto.FLOAT:
                    continue
                value = numpy_helper.to_array(attribute.t)
                if value.size == 1 and np.isclose(value, old, rtol=1e-6).all():
                    attribute.t.CopyFrom(numpy_helper.from_array(np.full_like(value, new)))
                    count += 1
        return count

    def set_attribute(self, op_type: str, name: str, value: float, layer: int | None = None) -> int:
        count = 0
        for node in self.nodes(op_type):
            if layer is not None and f"layers.{layer}." not in node.name:
                continue
            for attribute in [a for a in node.attribute if a.name == name]:
                attribute.CopyFrom(helper.make_attribute(name, value))
                count += 1
        return count
