"""The form of a bundle's manifest: which of its values are what, before anything is made of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from v4export.side_files import is_inside

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_form(manifest: Mapping[str, Any]) -> None:
    """Prove that a manifest's values have their types, and that no path in it leads out of the bundle.

    Raises:
        KeyError: one is missing.
        ValueError: one is something else.
    """
    for key, (holds, wanted) in _FORM.items():
        value = manifest.get(key) if key in _OPTIONAL else manifest[key]
        if not holds(value):
            raise ValueError(f"{key} is not {wanted}: {value!r:.80}")


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(is_inside(name) and _is_facts(facts) for name, facts in value.items())


def _is_facts(facts: Any) -> bool:
    if not isinstance(facts, dict) or not _is_count(facts.get("bytes")):
        return False
    sha256 = facts.get("sha256")
    return (
        facts.get("shared") is True if sha256 is None else isinstance(sha256, str) and bool(_SHA256.fullmatch(sha256))
    )


def _is_engines(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_engine, value.values())))


def _is_engine(report: Any) -> bool:
    words = ("path", "sha256", "backend", "backend_version")
    return (
        isinstance(report, dict)
        and all(isinstance(report.get(word), str) for word in words)
        and is_inside(report["path"])
        and bool(_SHA256.fullmatch(report["sha256"]))
        and _is_count(report.get("bytes"))
        and _is_words(report.get("targets"))
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _is_checkpoint(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("path", "header_sha256"))


def _is_thinking(value: Any) -> bool:
    if value is None:
        return True
    kinds = {"steps": int, "confidence": str, "threshold": float}
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items())


def _is_sharing(value: Any) -> bool:
    if value is None:
        return True
    sharding = value.get("sharding") if isinstance(value, dict) else None
    return isinstance(sharding, dict) and all(_is_count(ranks) and ranks for ranks in sharding.values())


#: Key -> whether a value is one of its, and what that would be.
_FORM: dict[str, tuple[Callable[[Any], bool], str]] = {
    "chosen": (lambda value: isinstance(value, dict), "an object"),
    "config": (lambda value: isinstance(value, dict), "an object"),
    "precision": (lambda value: isinstance(value, str), "a word"),
    "keep": (_is_words, "a list of words"),
    "max_seq_len": (_is_count, "a number"),
    "checkpoint": (_is_checkpoint, "a path and a header's sha256"),
    "thinking": (_is_thinking, "steps, confidence and threshold, or null"),
    "sharing": (_is_sharing, "numbers of ranks, or null"),
    "files": (_is_files, "bytes and sha256 of files inside the bundle"),
    "engines": (_is_engines, "reports of engines inside the bundle"),
}
_OPTIONAL = ("engines", "thinking", "sharing")
