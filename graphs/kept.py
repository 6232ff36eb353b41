"""The graph that kernels for a CPU take, kept between runs as compiled kernels are."""

from __future__ import annotations

import functools
import hashlib
from importlib import metadata
from pathlib import Path

import onnx
import onnx_ir as ir

from v4export import graphs, plugins
from v4export.graphs.lower import lower_for_kernels
from v4export.plugins.kernels.store import stored


def graph_for_kernels(path: Path) -> onnx.ModelProto:
    """What ``lower_for_kernels`` makes of a graph; weights stay references into the graph's folder."""

    def write(to: Path) -> None:
        to.write_bytes(ir.to_proto(lower_for_kernels(path)).SerializeToString())

    # By what it is made of and what makes it, so that nothing that is kept can be out of date.
    made_of = hashlib.sha256(_maker() + path.read_bytes()).hexdigest()
    try:
        return onnx.load_model_from_string(stored(f"graph-{made_of[:32]}.onnx", write).read_bytes())
    except OSError:  # a cache without room costs time, never a run
        return ir.to_proto(lower_for_kernels(path))


@functools.cache
def _maker() -> bytes:
    """A digest of the code that lowers graphs."""
    sources = sorted(source for package in (graphs, plugins) for source in Path(package.__path__[0]).rglob("*.py"))
    versions = [metadata.version(name) for name in ("onnx", "onnx-ir")]
    return hashlib.sha256("\0".join([*versions, *(source.read_text() for source in sources)]).encode()).digest()
