"""A model repository for Triton Inference Server, made of a bundle and of nothing outside itself."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from v4export.chat import ChatTemplate
from v4export.errors import BadInput, NotSupported
from v4export.package.bundle import Bundle
from v4export.package.whole import whole_folder
from v4export.runtime.executors import TENSORRT, Choice
from v4export.runtime.sessions import PROVIDERS
from v4export.runtime.tokenizer import load_tokenizer
from v4export.serve.asked import INPUTS, OUTPUTS, Input
from v4export.serve.limits import Limits
from v4export.serve.model import BUNDLE

CONFIG, VERSION, MODEL_FILE = "config.pbtxt", "1", "model.py"
_GRAPH, _ENGINE, _TENSORRT = "model.onnx", "model.engine", "tensorrt"
_LOADED = Path(__file__).with_name("loaded.py")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_KINDS = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}
#: Types of a graph's values -> Triton's. It has none of eight bits or fewer but integers.
_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
    onnx.TensorProto.INT8: "TYPE_INT8",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
}


@dataclass(frozen=True)
class Packaged:
    """What was written.

    Attributes:
        folder: the model repository.
        models: names of its models.
        chat: whether there is a chat template, so that messages can be given.
        no_engine: why there is no model of the engine; None where there is one.
    """

    folder: Path
    models: tuple[str, ...]
    chat: bool
    no_engine: str | None


def write_repository(
    bundle: Bundle,
    out: Path,
    *,
    name: str | None = None,
    choice: Choice | None = None,
    limits: Limits | None = None,
    max_tokens: int = 256,
    check_files: bool = True,
) -> Packaged:
    """Write a model repository, whole or not at all.

    Args:
        bundle: what is to be served.
        out: the folder to make.
        name: of the model; the bundle's folder's unless given.
        choice: what runs it in the server; onnxruntime on a CPU unless given.
        limits: of the scheduler; the defaults unless given.
        max_tokens: new tokens where a client names no number.
        check_files: whether the server compares files with the manifest's hashes whenever it loads the model.

    Raises:
        BadInput: ``out`` exists, the name is none, the bundle has no tokenizer or has changed, or its engine is for
            fewer sequences than there are slots.
        NotSupported: TensorRT is to run it, and it has no engine.
    """
    name = bundle.folder.resolve().name if name is None else name
    if not _NAME.fullmatch(name):
        raise BadInput(f"{name!r} is no name of a model", fix="give --name of letters, digits, dots, _ and -")
    choice = choice or Choice()
    if choice.device not in PROVIDERS:
        raise BadInput(f"unknown device {choice.device!r}", f"known: {', '.join(PROVIDERS)}", "choose one of them")
    limits = limits or Limits()
    if choice.executor == TENSORRT:
        _check_engine(bundle, limits.slots)
    bundle.check_files()
    load_tokenizer(bundle.folder)
    chat = ChatTemplate.find(bundle.folder, bundle.config) is not None
    set_up = {
        "executor": choice.executor,
        "device": choice.runs_on,
        "threads": choice.threads,
        "cuda_graphs": int(choice.cuda_graphs),
        "kernels": int(choice.kernels),
        "max_tokens": max_tokens,
        "check_files": int(check_files),
        **vars(limits),
    }
    with whole_folder(out, force=False) as folder:
        version = _version(folder / name, python_config(name, choice.runs_on, set_up))
        shutil.copyfile(_LOADED, version / MODEL_FILE)
        _bring(bundle.folder, version / BUNDLE)
        models, reason = [name], None
        try:
            config = engine_config(f"{name}-engine", bundle)
            _link(bundle.folder / _ENGINE, _version(folder / f"{name}-engine", config) / _ENGINE)
            models.append(f"{name}-engine")
        except NotSupported as error:
            reason = f"{error.what}: {error.values}" if error.values else error.what
    return Packaged(out, tuple(models), chat, reason)


def _check_engine(bundle: Bundle, slots: int) -> None:
    engines = dict(bundle.manifest.get("engines") or {})
    if _GRAPH not in engines:
        raise NotSupported("the bundle has no engine for --executor tensorrt", fix="build one: v4export engine")
    if slots > (most := engines[_GRAPH].get("max_batch", slots)):
        raise BadInput(
            "the engine was built for fewer sequences than there are to be slots",
            f"{slots} slots, at most {most} sequences",
            f"give --slots {most} or fewer, or build it with v4export engine --max-batch-size {slots}",
        )


def python_config(name: str, device: str, set_up: Mapping[str, object]) -> str:
    """``config.pbtxt`` of a model that is text to text."""
    return "\n".join(
        [
            f"name: {_quoted(name)}",
            'backend: "python"',
            "max_batch_size: 0",
            "model_transaction_policy { decoupled: true }",
            _values("input", [(n, one.type, _dims(one), True) for n, one in INPUTS.items()]),
            _values("output", [(n, one.type, _dims(one), False) for n, one in OUTPUTS.items()]),
            f"instance_group [ {{ kind: {_KINDS[device]} count: 1 }} ]",
            *(
                f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(str(value))} }} }}"
                for key, value in set_up.items()
            ),
            "",
        ]
    )


def engine_config(name: str, bundle: Bundle) -> str:
    """``config.pbtxt`` of a bundle's engine, for Triton's TensorRT backend and callers with a token loop of their own.

    Raises:
        NotSupported: there is no such engine, or Triton cannot run it, and why.
    """
    report = dict(bundle.manifest.get("engines") or {}).get(_GRAPH)
    if bundle.sharding:
        raise NotSupported("the model is shared among ranks", "Triton's TensorRT backend runs one engine for a model")
    if report is None or not (bundle.folder / _ENGINE).is_file():
        raise NotSupported("the bundle has no engine")
    if report["backend"] != _TENSORRT:
        raise NotSupported("Triton runs engines of TensorRT only", f"this one is of {report['backend']}")
    graph = onnx.load(bundle.folder / _GRAPH, load_external_data=False).graph
    return "\n".join(
        [
            f"name: {_quoted(name)}",
            f"backend: {_quoted(_TENSORRT)}",
            "max_batch_size: 0",
            f"default_model_filename: {_quoted(_ENGINE)}",
            _values("input", list(_graph_values(graph.input))),
            _values("output", list(_graph_values(graph.output))),
            "instance_group [ { kind: KIND_GPU count: 1 } ]",
            "",
        ]
    )


#: Name, Triton's type, sizes, and whether it may be left out.
_Value = tuple[str, str, list[int], bool]


def _graph_values(values: Iterator[onnx.ValueInfoProto]) -> Iterator[_Value]:
    for value in values:
        kind = value.type.tensor_type.elem_type
        if kind not in _TYPES:
            spelt = onnx.TensorProto.DataType.Name(kind)
            raise NotSupported(f"Triton has no type for the engine's {value.name}", f"it is {spelt}")
        dims = value.type.tensor_type.shape.dim
        yield value.name, _TYPES[kind], [dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims], False


def _values(field: str, values: list[_Value]) -> str:
    lines = [
        f"  {{ name: {_quoted(name)} data_type: {kind} dims: {dims}{' optional: true' if optional else ''} }}"
        for name, kind, dims, optional in values
    ]
    return f"{field} [\n" + ",\n".join(lines) + "\n]"


def _dims(value: Input) -> list[int]:
    return [-1] if value.several else [1]


def _quoted(text: str) -> str:
    return json.dumps(text)


def _version(model: Path, config: str) -> Path:
    """The folder of a model's version, beside its configuration."""
    version = model / VERSION
    version.mkdir(parents=True)
    (model / CONFIG).write_text(config)
    return version


def _bring(source: Path, folder: Path) -> None:
    """A bundle's files: what is big as hard links, and the rest copied, since ``v4export engine`` writes some anew."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = folder / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.parent.name == "weights" or place.suffix == ".engine":
            _link(file, place)
        else:
            shutil.copyfile(file, place)


def _link(file: Path, place: Path) -> None:
    """A hard link or, across file systems, a copy; never one that leads out of the repository."""
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copyfile(file, place)
