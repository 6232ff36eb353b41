"""Files beside a checkpoint's weights, of a tokenizer and its chat template, as strangers may have made them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from v4export.errors import BadInput


def file_of(directory: Path, name: str) -> Path | None:
    """A file of the directory, or None. Links may not leave it, but from a snapshot of the Hub's cache to its blobs.

    Raises:
        BadInput: it is a link that does.
    """
    path = directory / name
    if not path.is_file():
        return None
    home, real = directory.resolve(), path.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(cache)):
        raise BadInput(f"{path} leads out of its directory", f"it links to {real}", "put a copy in place of the link")
    return path


def parsed(path: Path, parse: Callable[[bytes], Any]) -> Any:
    """What ``parse`` makes of a file.

    Raises:
        BadInput: it makes nothing of it.
    """
    try:
        return parse(path.read_bytes())
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BadInput(f"{path} is not what its name says", str(error), "download the file again") from None


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is none.
    """
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value
