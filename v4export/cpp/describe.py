"""What the C++ runner is told of a bundle: ``model.txt``, a line a fact; ``project/src/description.hpp`` is its format.

The runner knows no families of models. It is told the graph's inputs, among them the state contract's tensors, and a
graph that has others is refused here, so that nothing is ever run without an input that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx_ir as ir

from v4export.checkpoint.tensor import StoredTensor
from v4export.engine.options import ENGINE_SUFFIX
from v4export.engram.files import MAP, EngramFiles
from v4export.errors import BadInput, NotSupported
from v4export.graphs.admitted import admit
from v4export.graphs.export import PORTABLE, for_cpu
from v4export.graphs.passes.accuracy import is_widened, set_accuracy
from v4export.graphs.shards import numpy_dtype
from v4export.graphs.stamp import engram_name, new_state_name, state_name
from v4export.graphs.trace import DECODER_START
from v4export.package.bundle import Bundle
from v4export.state_contract import state_tensors

GRAPH, DESCRIPTION = for_cpu(PORTABLE), "model.txt"
ENGINE = PORTABLE.removesuffix(".onnx") + ENGINE_SUFFIX
#: Inputs that the runner always gives.
_ALWAYS = ("input_ids", "position", "logits_at")
#: Types of looked-up rows that engram.hpp makes.
_LOOKED_UP = ("float32", "bfloat16")


def describe(bundle: Bundle, stop_ids: Iterable[int], refused_ids: Mapping[int, str]) -> dict[str, bytes]:
    """``model.txt``, and the graph where onnxruntime is not to run the bundle's as it is: name -> bytes of a file.

    Args:
        bundle: to be run.
        stop_ids: tokens that end a text.
        refused_ids: tokens that a prompt may not have, and why.

    Raises:
        NotSupported: the runner cannot run it as ``v4export run`` does, or not at all.
        BadInput: the bundle is not whole.
    """
    if bundle.sharding:
        raise NotSupported(
            "the C++ runner runs no ranks", f"{bundle.folder} is shared among some", "export without --tp --ep --pp"
        )
    model = _model(bundle.folder)
    graph, own = model.graph, {}
    files = _weights(graph)
    if any(map(is_widened, graph)):
        set_accuracy(model, 0)
        own[GRAPH] = ir.to_proto(model).SerializeToString()
    else:
        files.add(GRAPH)
    activations = numpy_dtype(bundle.precision.activations).name
    home = "here" if own else "bundle"
    lines = [f"format 1\ngraph {home} {GRAPH}", f"vocab {bundle.config.vocab_size}", f"limit {bundle.max_seq_len}"]
    lines += [f"activations {activations}", *(f"stop {number}" for number in sorted(set(stop_ids)))]
    lines += [f"refuse {number} {why}" for number, why in refused_ids.items()]
    state, reads = _state(bundle, graph, activations)
    known = {*_ALWAYS, *reads}
    if DECODER_START in _inputs(graph):
        lines.append(f"zeros {DECODER_START}")
        known.add(DECODER_START)
    lines += state
    if bundle.config.engram:
        engram, looked_up, tables = _engram(bundle.folder, activations)
        lines, known, files = [*lines, *engram], known | looked_up, files | tables
    _check_inputs(bundle.folder, _inputs(graph), known)
    sizes = bundle.manifest["files"]
    lines += [f"engine {sizes[ENGINE]['bytes']} {ENGINE}"] if ENGINE in sizes else []
    lines += [f"file {sizes[name]['bytes']} {name}" for name in sorted(files)]
    return {DESCRIPTION: ("\n".join(lines) + "\n").encode(), **own}


def _model(folder: Path) -> ir.Model:
    admit(folder / GRAPH)
    try:
        return ir.load(folder / GRAPH)
    except Exception as error:  # protobuf's own errors have no common base
        raise BadInput(f"cannot read {folder / GRAPH}", str(error), "build it again") from error


def _inputs(graph: ir.Graph) -> set[str]:
    return {value.name for value in graph.inputs if value.name}


def _check_inputs(folder: Path, found: set[str], known: set[str]) -> None:
    if found != known:
        raise NotSupported(
            f"the C++ runner cannot run {folder / GRAPH}",
            f"inputs that it does not know, or does not find: {', '.join(sorted(found ^ known)[:5])}",
            "build the bundle again with this v4export",
        )


def _weights(graph: ir.Graph) -> set[str]:
    """Files that its weights are in."""
    values = (value.const_value for value in graph.initializers.values())
    return {str(tensor.location) for tensor in values if isinstance(tensor, ir.ExternalTensor)}


def _state(bundle: Bundle, graph: ir.Graph, activations: str) -> tuple[list[str], set[str]]:
    """Lines of the state tensors, and the inputs they are.

    What the graph does not read is what thoughts do, and the runner has none.
    """
    lines, reads = [], _inputs(graph)
    layers = range(bundle.config.state_layers)
    tensors = [(layer, t) for layer in layers for t in state_tensors(bundle.config, layer)]
    held = {state_name(layer, t.name): (layer, t) for layer, t in tensors}
    for name, (layer, t) in held.items():
        if name in reads:
            facts = (t.dtype or activations, t.width, t.every, t.ring or 0, int(t.reads_oldest))
            lines.append(" ".join(map(str, ("state", *facts, name, new_state_name(layer, t.name)))))
    return lines, held.keys() & reads


def _engram(folder: Path, activations: str) -> tuple[list[str], set[str], set[str]]:
    """Lines of what is looked up, the inputs it is, and the files it is in."""
    found = EngramFiles.read(folder)
    if found.tables and activations not in _LOOKED_UP:
        raise NotSupported(
            "the C++ runner looks up no rows of this type", activations, "export with --precision bf16 or fp32"
        )
    hasher = found.hasher
    sizes = (hasher.heads, hasher.pad, hasher.compressed_vocab, hasher.token_map.size)
    lines, files = [" ".join(map(str, ("engram", *sizes, MAP)))], {MAP}
    for layer, hashes in hasher.layers.items():
        numbers = (len(hashes.multipliers), *hashes.multipliers, *hashes.primes)
        lines.append(" ".join(map(str, ("hashes", engram_name(layer), *numbers))))
        for kind, tensor in zip(("table", "scale"), found.tables.get(layer, ()), strict=False):
            if tensor:
                files.add(tensor.file.relative_to(folder.resolve()).as_posix())
                lines.append(" ".join(_place(kind, tensor, folder)))
    return lines, {engram_name(layer) for layer in hasher.layers}, files


def _place(kind: str, tensor: StoredTensor, folder: Path) -> Iterator[str]:
    yield from (kind, tensor.dtype, *map(str, (tensor.offset, *tensor.shape)))
    yield tensor.file.relative_to(folder.resolve()).as_posix()
