"""Kernels in TensorRT as ``IPluginV3``, written in Python: one class for all, told by a node's attributes.

It builds engines wherever Python is; loading one needs the C++ library (``plugins/library``) or this module again.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from v4export.plugins.function_body import VERSION
from v4export.plugins.kernels.kernel import Launch
from v4export.plugins.kernels.nodes import CODE, LAUNCH, NAMESPACE

#: Names of types in TensorRT.
TYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "int64": "int64",
    "int32": "int32",
    "uint8": "uint8",
}


def register(trt: Any, names: Iterable[str]) -> list[Any]:
    """Creators of the kernels' plugins, in TensorRT's registry and to be kept for as long as it is used.

    Args:
        trt: the package, ``tensorrt`` or ``tensorrt_rtx``.
        names: of the kernels.
    """
    make = _creator_class(trt, _plugin_class(trt))
    creators = [make(name) for name in names]
    for creator in creators:
        trt.get_plugin_registry().register_creator(creator, NAMESPACE)
    return creators


def symbolic(trt: Any, builder: Any) -> dict[str, Any]:
    """The operations of sizes over TensorRT's symbolic dimensions."""
    operations = {
        "+": "SUM",
        "-": "SUB",
        "*": "PROD",
        "div": "FLOOR_DIV",
        "cdiv": "CEIL_DIV",
        "min": "MIN",
        "max": "MAX",
    }
    kinds = {name: getattr(trt.DimensionOperation, operation) for name, operation in operations.items()}
    return {name: partial(builder.operation, kind) for name, kind in kinds.items()}


def _plugin_class(trt: Any) -> Any:
    class KernelPlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        """One kernel's launch."""

        def __init__(self, name: str, launch: str, code: str) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = name, str(VERSION), NAMESPACE
            self._texts = {LAUNCH: launch, CODE: code}
            # TensorRT reads fields after they were handed to it, and keeps nothing of Python's alive.
            self._bytes = {key: _characters(text) for key, text in self._texts.items()}
            self._fields = [_field(trt, key, one) for key, one in self._bytes.items()]
            self._collection = trt.PluginFieldCollection(self._fields)
            self._launch = Launch.parse(launch)
            self.num_outputs = len(self._launch.outputs)

        def get_capability_interface(self, _type: Any) -> Any:
            return self

        def clone(self) -> Any:
            return KernelPlugin(self.plugin_name, self._texts[LAUNCH], self._texts[CODE])

        def get_output_data_types(self, _types: Any) -> list[Any]:
            return [getattr(trt, TYPES[dtype]) for dtype, _ in self._launch.outputs]

        def get_output_shapes(self, inputs: Any, _shapes: Any, builder: Any) -> list[Any]:
            dims = {f"i{i}.{axis}": one[axis] for i, one in enumerate(inputs) for axis in range(len(one))}
            algebra, results = symbolic(trt, builder), []
            for _, sizes in self._launch.outputs:
                result = trt.DimsExprs(len(sizes))
                for axis, size in enumerate(sizes):
                    result[axis] = size.evaluate(dims, algebra, builder.constant)
                results.append(result)
            return results

        def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
            """Rows behind each other, inputs in the types that the network gives them."""
            one = tensors[position].desc
            right = position < inputs or one.type == self.get_output_data_types(None)[position - inputs]
            return bool(one.format == trt.TensorFormat.LINEAR and right)

        def configure_plugin(self, _inputs: Any, _outputs: Any) -> None:
            pass

        def on_shape_change(self, _inputs: Any, _outputs: Any) -> None:
            pass

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, _tactic: int) -> None:
            pass

        def get_fields_to_serialize(self) -> Any:
            """All there is of it, for whoever loads the engine."""
            return self._collection

        def attach_to_context(self, _context: Any) -> Any:
            return self.clone()

        def enqueue(self, inputs: Any, outputs: Any, sources: Any, results: Any, _workspace: int, stream: int) -> None:
            from v4export.plugins.kernels.cuda import launch_text

            dims = {f"i{i}.{axis}": n for i, one in enumerate(inputs) for axis, n in enumerate(one.dims)}
            launch_text(self._launch, self._texts[CODE], dims, [*sources], [*results], stream)

    return KernelPlugin


def _creator_class(trt: Any, plugin: Any) -> Any:
    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes the plugin of a node, or of an engine's layer, from its two texts."""

        def __init__(self, name: str) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = name, str(VERSION), NAMESPACE
            self._nothing = _characters("")
            self.field_names = trt.PluginFieldCollection([_field(trt, key, self._nothing) for key in (LAUNCH, CODE)])

        def create_plugin(self, _name: str, fields: Any, _phase: Any) -> Any:
            texts = {field.name: _text(field) for field in fields}
            return plugin(self.name, texts[LAUNCH], texts[CODE])

    return Creator


def _characters(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.int8)


def _field(trt: Any, name: str, characters: np.ndarray) -> Any:
    return trt.PluginField(name, characters, trt.PluginFieldType.CHAR)


def _text(field: Any) -> str:
    return np.asarray(field.data).astype(np.uint8).tobytes().rstrip(b"\0").decode()
