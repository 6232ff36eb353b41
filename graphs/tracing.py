"""Parts traced by two processes at a time: tracing is all Python, which threads take turns at.

Each part is claimed by who comes first: this process goes through them from the front, its helper from the back, where
the longest are. What a helper that failed has claimed is traced here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from v4export.children import end_with_parent
from v4export.config import ModelConfig
from v4export.graphs.trace import Part, part_names, trace_parts
from v4export.precision import Precision

#: Parts below which a helper is not worth the seconds that it takes to import PyTorch.
_WORTH = 7
_DONE = "done"


def traced(config: ModelConfig, precision: Precision) -> dict[str, Part]:
    """``trace_parts``, by two processes where there are cores and parts enough."""
    names = part_names(config, precision)
    if len(names) < _WORTH or _cores() < 2:
        return trace_parts(config, precision)
    with tempfile.TemporaryDirectory() as scratch, _helper(config, precision, Path(scratch)) as helper:
        found = _as_if_stored(trace_parts(config, precision, claim=_Claims(Path(scratch))))
        helper.wait()
        with contextlib.suppress(FileNotFoundError):
            stored = pickle.loads((Path(scratch) / _DONE).read_bytes())
            found |= {name: restored(part) for name, part in stored.items()}
    found |= _as_if_stored(trace_parts(config, precision, claim=lambda name: name not in found))
    return {name: found[name] for name in names}


def _as_if_stored(parts: dict[str, Part]) -> dict[str, Part]:
    """Parts with every number as ONNX has it, float32: nodes of one kind must not differ by who traced them."""
    return {name: restored(stored(part)) for name, part in parts.items()}


def stored(part: Part) -> Any:
    """A part as what can be pickled."""
    graph = ir.serde.serialize_graph(part.graph).SerializeToString()
    return graph, dict(part.graph.opset_imports), part.reads, part.weights, part.outputs


def restored(kept: Any) -> Part:
    """The part that ``stored`` was given."""
    proto, (written, opsets, *rest) = onnx.GraphProto(), kept
    proto.ParseFromString(written)
    graph = ir.serde.deserialize_graph(proto)
    graph.opset_imports.update(opsets)
    return Part(graph, *rest)


class _Claims:
    """Asked for the right to a part by name, which it gives once, whoever asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> bool:
        try:
            os.close(os.open(self.folder / hashlib.sha256(name.encode()).hexdigest(), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _helper(config: ModelConfig, precision: Precision, scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The other process, which is stopped where this one fails."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    helper = subprocess.Popen([sys.executable, "-m", __name__, str(scratch)], stdin=subprocess.PIPE, **quiet)
    assert helper.stdin
    try:
        with contextlib.suppress(BrokenPipeError), helper.stdin:
            pickle.dump((config, precision), helper.stdin)
        yield helper
    finally:
        helper.kill()
        helper.wait()


def _help(scratch: Path) -> None:
    """What the helper does: traces what it may, the last part first."""
    end_with_parent()
    config, precision = pickle.load(sys.stdin.buffer)
    found = trace_parts(config, precision, claim=_Claims(scratch), last_first=True)
    partial = scratch / "partial"
    partial.write_bytes(pickle.dumps({name: stored(part) for name, part in found.items()}))
    partial.replace(scratch / _DONE)


if __name__ == "__main__":
    _help(Path(sys.argv[1]))
