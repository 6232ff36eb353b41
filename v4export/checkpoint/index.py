"""Opens a checkpoint directory: which tensors it has, of what dtype and shape, at which bytes of which file.

Only safetensors is read, and only its headers are, until a value is asked for. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4export.checkpoint.aliases import by_canonical_name
from v4export.checkpoint.tensor import StoredTensor, read_header
from v4export.config import ModelConfig
from v4export.config.readers import load_config, read_config
from v4export.errors import BadInput
from v4export.side_files import file_of, json_value, read

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "tiktoken.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NUMBERED = re.compile(r"(.*-)(\d+)(-of-\d+\.safetensors)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that has been looked through; no weight has been read."""

    directory: Path
    config: ModelConfig
    config_json: dict[str, Any]
    tensors: dict[str, StoredTensor]  # by the names of the vocabulary where it has one; each knows its stored name
    files: tuple[Path, ...]
    header_hash: str  # sha256 over every file's name, size and safetensors header
    tokenizer_files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def state(self) -> list[Any]:
        """What shows, without a weight being read, whether they are those that were there before."""
        status = [(file.name, file.stat()) for file in self.files]
        return [self.header_hash, [(name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in status]]

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """Reads config.json, the index and every header of a Hugging Face directory.

        Raises:
            BadInput: no such directory, no safetensors in it, a missing, truncated or inconsistent file.
            NotSupported: the configuration asks for what is not supported.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise BadInput(f"{directory} is not a directory", fix="Give a Hugging Face checkpoint directory.")
        config_json = load_config(directory)
        config = read_config(config_json)
        weight_map = _weight_map(directory)
        files = _files(directory, weight_map)
        tensors: dict[str, StoredTensor] = {}
        digest = hashlib.sha256()
        for file in files:
            try:
                header, found = read_header(file)
            except OSError as error:
                raise BadInput(f"cannot read {file}", str(error)) from error
            digest.update(json.dumps([file.name, file.stat().st_size, len(header)]).encode() + header)
            twice = sorted(tensors.keys() & found.keys())
            if twice:
                raise BadInput(
                    f"{len(twice)} tensors are stored twice",
                    f"{twice[0]} in {tensors[twice[0]].file.name} and {file.name}",
                )
            tensors |= found
        _compare(directory, weight_map, tensors)
        tensors = by_canonical_name(config, tensors)
        text = tuple(directory / name for name in TOKENIZER_FILES if (directory / name).is_file())
        return Checkpoint(directory, config, config_json, tensors, files, digest.hexdigest(), text)


def _weight_map(directory: Path) -> dict[str, str] | None:
    path = file_of(directory, INDEX)
    if path is None and (directory / INDEX).exists():
        raise BadInput(f"{directory / INDEX} is not a regular file")
    try:
        return None if path is None else parse_weight_map(path, read(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be read", str(error)) from error


def parse_weight_map(path: Path, data: bytes) -> dict[str, str]:
    """Tensor -> file, of an index whose bytes were read from ``path``.

    Raises:
        BadInput: it is none, or names a file elsewhere.
    """
    try:
        weight_map = json_value(data)["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} has no weight_map that can be read", f"{type(error).__name__}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{path} has no weight_map that can be read", "weight_map is not an object with entries")
    for tensor, file in weight_map.items():
        # The file may be a link, as in the Hub's cache; its name may not lead out of the directory.
        if (
            not isinstance(file, str)
            or not file
            or "\0" in file
            or file != re.split(r"[/\\]", file)[-1]
            or file == ".."
        ):
            raise BadInput(
                f"{INDEX} names a file outside the checkpoint", f"{tensor}: {file!r}", "Use plain file names."
            )
        if not file.endswith(".safetensors"):
            raise BadInput(f"{INDEX} names a file that is not safetensors", f"{tensor}: {file!r}")
    return weight_map


def _files(directory: Path, weight_map: dict[str, str] | None) -> tuple[Path, ...]:
    there = {file.name for file in directory.glob("*.safetensors")}
    wanted = set(weight_map.values()) if weight_map is not None else there | _numbered(there)
    if not wanted:
        pickled = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLED)
        if pickled:
            fix = "A pickle can run code, so it is never unpickled; convert the checkpoint to safetensors."
            raise BadInput(f"{directory} has weights only as pickles", ", ".join(pickled[:5]), fix)
        raise BadInput(f"{directory} has no *.safetensors file", fix="Give a Hugging Face checkpoint directory.")
    files = tuple(directory / name for name in sorted(wanted))
    missing = [file.name for file in files if not file.exists()]
    if missing:
        values = f"{len(missing)} of {len(files)}: {', '.join(missing[:5])}"
        raise BadInput("shards of the checkpoint are missing", values, "Download them again.")
    for file in files:
        if not stat.S_ISREG(file.stat().st_mode):
            raise BadInput(f"{file} is not a regular file")
    extra = sorted(there - wanted)
    if extra:
        fix = f"Remove them, or name their tensors in {INDEX}."
        raise BadInput("safetensors files lie beside the index that it does not name", ", ".join(extra[:5]), fix)
    return files


def _numbered(names: set[str]) -> set[str]:
    """Without an index, the names that shards `...-i-of-n` imply."""
    groups: dict[tuple[str, str], list[str]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, names)):
        groups.setdefault((match[1], match[3]), []).append(match[2])
    wanted = set()
    for (stem, tail), numbers in groups.items():
        # Zero-padded or not, the shortest number there is tells the width: 00001-of-000163, 1-of-61.
        width, total = min(map(len, numbers)), int(tail[len("-of-") :].split(".")[0])
        if total <= 100_000:
            wanted |= {f"{stem}{i:0{width}}{tail}" for i in range(1, total + 1)}
    return wanted


def _compare(directory: Path, weight_map: dict[str, str] | None, tensors: dict[str, StoredTensor]) -> None:
    stored = {name: tensor.file.name for name, tensor in tensors.items()}
    if weight_map is None or weight_map == stored:
        return
    absent = sorted(name for name, file in weight_map.items() if stored.get(name) != file)
    unnamed = sorted(stored.keys() - weight_map.keys())
    values = []
    if absent:
        values.append(f"{len(absent)} named and not in their file: {', '.join(absent[:5])}")
    if unnamed:
        values.append(f"{len(unnamed)} stored and not named: {', '.join(unnamed[:5])}")
    raise BadInput(f"{directory / INDEX} and the files beside it disagree", "; ".join(values), "Download them again.")
