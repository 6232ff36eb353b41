"""What a calibration has come to, on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from v4export.calibrate.ranges import Found

#: What changes when a state that was saved before cannot be gone on from.
_FORMAT = 1


def key_of(ids: Any, **facts: Any) -> str:
    """A hash of everything that a calibration depends on: its tokens, and facts that have a text each."""
    digest = hashlib.sha256(json.dumps([_FORMAT, {n: str(v) for n, v in sorted(facts.items())}]).encode())
    digest.update(repr(ids.shape).encode() + ids.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Progress:
    """After some parts of the model.

    Attributes:
        done: how many.
        shared: of each batch of windows, what the next part reads.
        found: so far.
    """

    done: int
    shared: Sequence[dict[str, torch.Tensor]]
    found: Mapping[str, Found]


class Saved:
    """A file that holds the newest state; it appears whole or not at all.

    Args:
        file: None keeps nothing.
        key: of ``key_of``; a file of another is not gone on from.
    """

    def __init__(self, file: Path | None, key: str) -> None:
        self.file, self.key = file, key

    def read(self) -> Progress | None:
        """The state, where there is one of this calibration."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            stored = torch.load(self.file, weights_only=True)
            if stored["key"] != self.key:
                return None
            found = {name: Found(**_tuples(one)) for name, one in stored["found"].items()}
            return Progress(stored["done"], stored["shared"], found)
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
            return None  # damaged: the calibration starts anew

    def write(self, progress: Progress) -> None:
        """Put a state in the place of the one before it."""
        if self.file is None:
            return
        partial = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        found = {name: asdict(one) for name, one in progress.found.items()}
        # A view would be saved with all that it is a view of.
        shared = [{name: value.clone() for name, value in one.items()} for one in progress.shared]
        # Writing to a disk, PyTorch says of whatever goes wrong that positions are unexpected.
        made = io.BytesIO()
        torch.save({"key": self.key, "done": progress.done, "shared": shared, "found": found}, made)
        try:
            with open(partial, "wb") as stream:
                stream.write(made.getbuffer())
            os.replace(partial, self.file)
        finally:
            partial.unlink(missing_ok=True)


def _tuples(one: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in one.items()}
