"""Which checkpoint a bundle was made from: its headers, and a sample of its values.

Checkpoints of one model that were trained on have the same headers. Hashing them whole would read terabytes once more,
so a few bytes of every tensor tell them apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.tensor import StoredTensor
from v4export.errors import BadInput

#: Bytes from the middle of every tensor.
_SAMPLE = 256


def identity(checkpoint: Checkpoint) -> dict[str, str]:
    """What a manifest says of a checkpoint: where it is, and two hashes."""
    return {
        "path": str(checkpoint.directory.resolve()),
        "header_sha256": checkpoint.header_hash,
        "sample_sha256": _sampled(checkpoint),
    }


def check_same(checkpoint: Checkpoint, recorded: Mapping[str, Any], bundle: Path) -> None:
    """Prove that a checkpoint is the one that a manifest has recorded.

    Raises:
        BadInput: it is another.
    """
    found = identity(checkpoint)
    for key, what in (("header_sha256", "header hash"), ("sample_sha256", "hash of sampled values")):
        if found[key] != recorded.get(key):
            raise BadInput(
                f"{checkpoint.directory} is not the checkpoint that {bundle} was made from",
                f"{what} {found[key][:12]}, the manifest has {str(recorded.get(key))[:12]}",
                "give the right one as MODEL",
            )


def _sampled(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256()
    files: dict[Path, list[StoredTensor]] = {}
    for tensor in checkpoint.tensors.values():
        files.setdefault(tensor.file, []).append(tensor)
    for file in sorted(files):
        with file.open("rb", buffering=0) as stream:
            for tensor in sorted(files[file], key=lambda tensor: tensor.offset):
                stream.seek(tensor.offset + max(0, tensor.nbytes - _SAMPLE) // 2)
                digest.update(stream.read(min(_SAMPLE, tensor.nbytes)))
    return digest.hexdigest()
