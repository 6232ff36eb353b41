"""Where hidden states wait between layers: in memory, or in files where they are large."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Store:
    """Dictionaries of tensors by a key.

    Args:
        folder: where they are written; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[Hashable, dict[str, torch.Tensor]] = {}
        self._files: dict[Hashable, Path] = {}

    def __setitem__(self, key: Hashable, tensors: dict[str, torch.Tensor]) -> None:
        if self._folder is None:
            self._held[key] = tensors
        else:
            # A view would be written with all that it is a view of.
            whole = {name: value.clone() for name, value in tensors.items()}
            torch.save(whole, self._files.setdefault(key, self._folder / f"{len(self._files)}.pt"))

    def __getitem__(self, key: Hashable) -> dict[str, torch.Tensor]:
        return torch.load(self._files[key]) if key in self._files else self._held[key]


@contextmanager
def scratch(on_disk: bool) -> Iterator[Store]:
    """A store; its files, if it has any, lie where the system has temporary ones, and are removed in the end."""
    if not on_disk:
        yield Store()
        return
    with tempfile.TemporaryDirectory(prefix="v4export-eval-") as folder:
        yield Store(Path(folder))
