"""What is fuzzed: a table of readers, each with seeds, and what has to hold of every case.

A case is the bytes of one file. A reader either takes it or raises a V4Error; it may neither open a file outside the
case's folder, nor start a process, unpickle or run anything, nor exceed its limits of time and memory.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from v4export import presets
from v4export.chat.template import ChatTemplate
from v4export.checkpoint.index import parse_weight_map
from v4export.checkpoint.tensor import DTYPES, parse_header
from v4export.config.readers import parse_config, read_config, to_hub_config
from v4export.engine.admitted import misfit
from v4export.engine.evidence import HEADER_BYTES, plan_header
from v4export.engram.files import EngramFiles
from v4export.errors import V4Error
from v4export.graphs.admitted import parse_graph
from v4export.package.bundle import MANIFEST, Bundle
from v4export.runtime.prompt_cache import layout
from v4export.runtime.prompt_cache import read as read_prompt_cache
from v4export.runtime.prompt_cache import write as write_prompt_cache
from v4export.runtime.tokenizer import load_tokenizer

FLOAT32 = np.dtype(np.float32)
ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).with_name("corpus")
#: Of one case: seconds, and bytes beyond what the process has before.
SECONDS, MEMORY = 5.0, 256 << 20

#: Events of Python's audit by which code is run that is not this package's.
_FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.")


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        read: called with a case; what it raises but V4Error is a fault.
        seeds: cases to begin with, of which at least the first is taken.
        prefix: bytes before JSON, for mutations that keep it JSON; None of a reader of something else.
        most: bytes of a case.
    """

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    prefix: int | None = 0
    most: int = 4096
    words: tuple[str, ...] = field(default=())


def run(reader: Reader, case: bytes) -> bool:
    """Whether a reader takes a case; anything but that or a V4Error is raised."""
    with _watched():
        try:
            reader.read(case)
        except V4Error as error:
            str(error).encode("utf-8", "backslashreplace")
            assert error.exit_code in (1, 2, 3, 4) and error.what
            return False
    return True


@contextmanager
def _watched() -> Iterator[None]:
    _install()
    _watch["on"] = True
    try:
        yield
    finally:
        _watch["on"] = False


_watch: dict[str, Any] = {"on": False}


@cache
def _install() -> None:
    """The hook, once a process: hooks cannot be removed."""
    home = str(_home())
    libraries = tuple({sys.prefix, sys.base_prefix, str(ROOT / "v4export"), *map(os.path.abspath, sys.path[1:])})

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not _watch["on"]:
            return
        if event.startswith(_FORBIDDEN):
            raise AssertionError(f"{event} {arguments!r:.200}")
        if event == "open" and isinstance(arguments[0], str | bytes):
            name = os.fsdecode(arguments[0])
            # Modules that are imported late, and what a device is asked for, are no file of a case.
            if not name.startswith((home, *libraries, "/dev/", "/proc/")):
                raise AssertionError(f"a file outside of the folder was opened: {name!r}")

    sys.addaudithook(hook)


@cache
def _home() -> Path:
    """A folder for cases that have to be files, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    home = Path(tempfile.mkdtemp(prefix="v4export-fuzz-", dir=memory if memory.is_dir() else None))
    import atexit

    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


def _header(case: bytes) -> None:
    header, tensors = parse_header(Path("model.safetensors"), io.BytesIO(case), len(case))
    # What is taken covers the file, without gaps, in arrays that NumPy can have.
    end = 8 + len(header)
    for tensor in tensors.values():
        assert tensor.offset == end and tensor.dtype in DTYPES and len(tensor.shape) <= 64
        end += tensor.nbytes
    assert end == len(case)


def safetensors(header: Any, data: int = 0) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def _header_seeds() -> list[bytes]:
    one = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
    two = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [12, 16]}
    empty = {"dtype": "I64", "shape": [0, 5], "data_offsets": [12, 12]}
    return [
        safetensors({"a.weight": one, "b": two, "__metadata__": {"format": "pt"}}, 16),
        safetensors({"a": one, "e": empty}, 12),
        safetensors({}, 0),
        safetensors({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, 4),
    ]


def _index(case: bytes) -> None:
    for file in parse_weight_map(Path("index.json"), case).values():
        assert Path(file).name == file and file.endswith(".safetensors")


def _index_seeds() -> list[bytes]:
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    return [json.dumps({"metadata": {"total_size": 9}, "weight_map": {"a": files[0], "b": files[1]}}).encode()]


def _config(case: bytes) -> None:
    raw = parse_config(Path("config.json"), case)
    config = read_config(raw)
    assert 0 < config.num_layers <= 4096
    # What is taken is understood: written down and read again it is the same.
    assert read_config(to_hub_config(config)) == config


def _config_seeds() -> list[bytes]:
    names = ("tiny-v3", "tiny-v2-lite", "tiny-v3.2", "tiny-v4", "tiny-v4-fp4", "tiny-v4.1", "tiny-v4x", "tiny-kimi-k2")
    return [(ROOT / "v4export" / "presets" / f"{name}.json").read_bytes() for name in names]


#: Which file of a tokenizer a case is, by its first byte; the others are those of the seed.
_TOKENIZER_FILES = (b"J", "tokenizer.json"), (b"C", "tokenizer_config.json"), (b"T", "tiktoken.model")
_SMALL_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "add_bos_token": True,
    "chat_template": "{{ messages[0]['content'] }}",
}


def _small_tokenizer(model: dict[str, Any]) -> dict[str, Any]:
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": name, **special} for i, name in enumerate(("<s>", "</s>"))]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }


def _sequence(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}


def _tokenizer_seeds() -> list[bytes]:
    words = {word: i for i, word in enumerate(("<s>", "</s>", "a", "b", "c", "ab", "Ġ"))}
    models: list[dict[str, Any]] = [
        {"type": "BPE", "vocab": words, "merges": [["a", "b"]], "unk_token": "c", "byte_fallback": False},
        {"type": "WordLevel", "vocab": words, "unk_token": "c"},
        {"type": "WordPiece", "vocab": words, "unk_token": "c", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 100},
        {"type": "Unigram", "unk_id": 0, "vocab": [[word, -float(i)] for word, i in words.items()]},
    ]  # fmt: skip
    made = [b"J" + json.dumps(_small_tokenizer(model)).encode() for model in models]
    split = _small_tokenizer(models[0]) | {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": False}
            ],
        },
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "StripAccents"}]},
        "decoder": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, _sequence("A", 0)],
            "pair": [_sequence("A", 0), _sequence("B", 1)],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
    }
    reserved = {"added_tokens_decoder": {"256": {"content": "[BOS]", "special": True}}, "bos_token": "[BOS]"}
    ranks = b"\n".join(base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256))
    return [*made, b"J" + json.dumps(split).encode(), b"C" + json.dumps(_SMALL_CONFIG).encode(), b"T" + ranks,
            b"C" + json.dumps(reserved).encode()]  # fmt: skip


def _tokenizer(case: bytes) -> None:
    folder = _home() / "tokenizer"
    if not folder.is_dir():
        folder.mkdir()
    own = dict(_own_files())
    kind = dict(_TOKENIZER_FILES).get(case[:1], "tokenizer.json")
    if kind == "tiktoken.model":
        own.pop("tokenizer.json")
    for _, name in _TOKENIZER_FILES:
        _put(folder / name, case[1:] if name == kind else own.get(name))
    settings = None
    try:
        settings = ChatTemplate.find(folder, _model())
    finally:
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("<s>ab c 12 é\n")
        tokenizer.decode(ids)
        stream = tokenizer.stream()
        "".join([*map(stream.push, [*ids, 0, 1, 2, 300, tokenizer.vocab_size]), stream.flush()])
    assert settings is None or isinstance(settings.text, str)


@cache
def _own_files() -> dict[str, bytes]:
    config = json.dumps(_SMALL_CONFIG).encode()
    return {"tokenizer.json": _tokenizer_seeds()[0][1:], "tokenizer_config.json": config}


_there: dict[Path, bytes | None] = {}


def _put(file: Path, content: bytes | None) -> None:
    """Write a file, or remove it, unless it is so already: most files stay from case to case."""
    if file not in _there or _there[file] != content:
        file.write_bytes(content) if content is not None else file.unlink(missing_ok=True)
        _there[file] = content


@cache
def _model() -> Any:
    return presets.load("tiny-v3")


_BUNDLED = {"model.onnx": b"graph", "weights/a.safetensors": b"weights"}


@cache
def _manifest_text() -> bytes:
    import hashlib

    files: dict[str, Any] = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in _BUNDLED.items()
    }
    files["weights/b.safetensors"] = {"bytes": 3, "shared": True}
    report = {"path": "model.engine", "bytes": 9, "sha256": "0" * 64, "backend": "tensorrt_rtx"}
    report |= {"backend_version": "1.2.0.54", "targets": ["sm89"], "max_batch": 1, "plugins": "none"}
    manifest = {
        "format": 1,
        "precision": "bf16",
        "keep": ["fp32:layers.0.*"],
        "max_seq_len": 128,
        "command": "v4export build hub -o out",
        "config": json.loads((ROOT / "v4export" / "presets" / "tiny-v3.json").read_bytes()),
        "chosen": {"layers": None, "engram_inside": False, "think_steps": None, "state": None},
        "sharing": {"sharding": {"tp": 2, "ep": 1, "pp": 1}},
        "thinking": None,
        "checkpoint": {"path": "/hub", "header_sha256": "0" * 64},
        "engines": {"model.onnx": report},
        "versions": {"torch": "2.9"},
        "files": files,
    }
    return json.dumps(manifest).encode()


def _manifest(case: bytes) -> None:
    bundle = Bundle.parse(Path("out"), case)
    assert bundle.max_seq_len >= 0 and isinstance(bundle.source, Path)
    for report in (bundle.manifest.get("engines") or {}).values():
        assert not Path(report["path"]).is_absolute() and ".." not in Path(report["path"]).parts
        misfit(report, 9, None)


def _manifest_seeds() -> list[bytes]:
    return [_manifest_text()]


def _bundle(case: bytes) -> None:
    """A manifest beside real files: what passes has them all, and nothing else is looked at."""
    folder = _home() / "bundle"
    if not folder.is_dir():
        (folder / "weights").mkdir(parents=True)
        for name, data in (_BUNDLED | {"weights/b.safetensors": b"abc"}).items():
            (folder / name).write_bytes(data)
        (folder / "weights" / "out").symlink_to("/etc/passwd")
    (folder / MANIFEST).write_bytes(case)
    bundle = Bundle.open(folder)
    bundle.check_files()
    for name in bundle.manifest["files"]:
        assert (folder / name).resolve().is_relative_to(folder.resolve())


def _engine(case: bytes) -> None:
    """The first byte says whether the manifest goes by the header."""
    data = case[1:]
    header = plan_header(data[:HEADER_BYTES])
    report = {"bytes": len(data), "backend": "tensorrt_rtx", "backend_version": "1.7.1.116", "targets": ["sm86"]}
    fault = misfit(report, len(data), header)
    if fault is None:
        assert header and header.size == len(data) and header.version == "1.7.1.116" and "sm86" in header.targets


def plan(size: int, version: bytes = bytes([1, 7, 1, 116]), mask: int = 4) -> bytes:
    start = b"vtrt" + bytes(4) + (2).to_bytes(8, "little") + size.to_bytes(8, "little") + version + b"vtrt"
    return (start + mask.to_bytes(4, "little")).ljust(size, b"\0")


def _engine_seeds() -> list[bytes]:
    return [b"e" + plan(48), b"e" + plan(40, mask=63), b"e" + b"ftrt".ljust(40, b"\0")]


def _graph(case: bytes) -> None:
    folder = _home() / "graph"
    if not folder.is_dir():
        folder.mkdir()
        (folder / "w").write_bytes(bytes(64))
        (folder / "out").symlink_to("/etc/passwd")
    model = parse_graph(folder / "model.onnx", case)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and tensor.data_location == 1:
                assert (folder / entry.value).resolve().is_relative_to(folder.resolve())


def _graph_seeds() -> list[bytes]:
    import onnx
    from onnx import helper

    weight = onnx.TensorProto(name="w", data_type=1, dims=[2, 2], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "w"), ("offset", "16"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    x, y = (helper.make_tensor_value_info(name, 1, ["B", 2]) for name in "xy")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    inner = helper.make_graph([node], "then", [], [y], [weight])
    branch = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    graphs = [helper.make_graph([one], "g", [x], [y], [weight]) for one in (node, branch)]
    return [helper.make_model(graph).SerializeToString() for graph in graphs]


def _engram(case: bytes) -> None:
    folder = _home() / "engram"
    if not folder.is_dir():
        folder.mkdir()
        (folder / "engram.map").write_bytes(_MAP)
    (folder / "engram.json").write_bytes(case)
    found = EngramFiles.read(folder)
    rows, _ = found.hasher.rows([[0, 1, 3]], found.hasher.empty_history(1))
    for layer, found_rows in rows.items():
        assert (found_rows >= 0).all() and (found_rows < found.hasher.layers[layer].rows).all()


_MAP = b"".join(i.to_bytes(4, "little") for i in (0, 1, 1, 2))


def _engram_seeds() -> list[bytes]:
    import hashlib

    layer = {"multipliers": ["3", "5"], "primes": [7, 11], "offsets": [0, 7], "table": None, "scale": None}
    described = {
        "format": 1,
        "max_order": 2,
        "heads": 2,
        "width": 4,
        "seed": 0,
        "pad": 0,
        "compressed_vocab": 3,
        "map": {"file": "engram.map", "tokens": 4, "sha256": hashlib.sha256(_MAP).hexdigest()},
        "layers": {"1": layer},
    }
    return [json.dumps(described).encode()]


def _prompt_cache(case: bytes) -> None:
    file = _home() / "prompt.cache"
    file.write_bytes(case)
    held = read_prompt_cache(file, _model(), FLOAT32, "key")
    wanted = layout(_model(), FLOAT32, len(held.tokens))
    assert {name: (t.numpy().dtype, t.shape) for name, t in held.tensors.items()} == wanted
    assert 0 <= held.common([0, 1, 2]) <= 3


def _prompt_cache_seeds() -> list[bytes]:
    file = _home() / "prompt.seed"
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout(_model(), FLOAT32, 2).items()}
    write_prompt_cache(file, arrays, "key")
    return [file.read_bytes()]


READERS: dict[str, Reader] = {
    "header": Reader(_header, _header_seeds, prefix=8),
    "index": Reader(_index, _index_seeds),
    "config": Reader(_config, _config_seeds),
    "tokenizer": Reader(_tokenizer, _tokenizer_seeds, prefix=1, most=8192),
    "manifest": Reader(_manifest, _manifest_seeds, most=8192),
    "bundle": Reader(_bundle, _manifest_seeds, most=8192),
    "graph": Reader(_graph, _graph_seeds, prefix=None),
    "engine": Reader(_engine, _engine_seeds, prefix=None, most=256),
    "engram": Reader(_engram, _engram_seeds),
    "prompt_cache": Reader(_prompt_cache, _prompt_cache_seeds, prefix=8),
}
