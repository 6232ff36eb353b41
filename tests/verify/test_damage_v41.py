"""What can be wrong with Engram, shared entries and single-pass hyper-connections is found, and where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from eager import EagerExecutor

from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.tensor import StoredTensor
from v4export.engram import files
from v4export.engram.vocabulary import read_token_map
from v4export.graphs.export import engram_tables
from v4export.model import engram, residual, shared_entries
from v4export.precision import precision as find_precision
from v4export.verify.boundary import Boundary
from v4export.verify.compare import compare, expected_boundaries
from v4export.verify.looked_up import engram_faults
from v4export.verify.prompts import default_prompts
from v4export.verify.recording import record


class Checked:
    """tiny-v4.1 as the definition runs it, compared with itself."""

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        self.config, self.weights = checkpoint.config, audit(checkpoint).weights
        self.words = read_token_map(folder, self.config.engram, self.config.vocab_size)
        self.prompts = default_prompts(folder, self.config, 70)

    def executor(self, precision: str) -> EagerExecutor:
        return EagerExecutor(self.weights, self.config, find_precision(precision, self.config), token_map=self.words)

    def compare(self, executor: EagerExecutor, precision: str, damage: Any = None) -> list[Boundary]:
        """Boundaries of all prompts, and of one of which half is only remembered; ``damage`` is a context to run in."""
        with damage or mock.patch.object(self, "prompts", self.prompts):
            recordings = record(executor, self.config, self.prompts, chunk=13, decode=3)
            recordings += record(executor, self.config, [self.prompts[-1]], chunk=13, decode=3, remembered=30)
        how = find_precision(precision, self.config)
        return compare(self.weights, self.config, how, recordings, token_map=self.words)


@pytest.fixture(scope="module")
def checked(random_checkpoint: Callable[[str], Path]) -> Checked:
    return Checked(random_checkpoint("tiny-v4.1"))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_sound_model_passes(checked: Checked, precision: str) -> None:
    boundaries = checked.compare(checked.executor(precision), precision)
    assert all(b.ok for b in boundaries), [b for b in boundaries if not b.ok]
    assert len(boundaries) == expected_boundaries(checked.config) - 2  # weights and remembered rows are elsewhere
    names = [b.name for b in boundaries]
    assert {"layer 1 engram rows", "layer 5 shares of streams", "layer 6 reindex keys"} <= {*names}


def patched(where: Any, name: str, by: Callable[..., Any]) -> Any:
    """A context in which a function of the definition is another one, which is given the sound one first."""
    sound = getattr(where, name)
    return mock.patch.object(where, name, lambda *args, **kwargs: by(sound, *args, **kwargs))


@contextmanager
def forgetful(executor: EagerExecutor) -> Iterator[None]:
    """Every step looks back as if nothing were before it."""
    rows = executor.feed.rows
    empty = executor.feed.hasher.empty_history
    with mock.patch.object(executor.feed, "rows", lambda ids, history, lengths: rows(ids, empty(len(ids)), lengths)):
        yield


@contextmanager
def other_words(executor: EagerExecutor) -> Iterator[None]:
    """Every other token has its neighbour's compressed id."""
    with mock.patch.object(executor.feed.hasher, "token_map", executor.feed.hasher.token_map[::-1].copy()):
        yield


def without_a_root(sound: Any, h: Any, k: Any, v: Any, *rest: Any) -> Any:
    return torch.sigmoid((h * k).mean(-1))[..., None] * v[:, None]


def shares_in_other_streams(sound: Any, *args: Any) -> Any:
    pre, *rest = sound(*args)
    return pre.roll(1, 1), *rest


def a_token_more(sound: Any, rows: Any, ring: Any, bias: Any, position: Any, *rest: Any) -> Any:
    return sound(rows, ring, bias, position + 1, *rest)


def of_turned_latents(sound: Any, self: Any, latent: Any, cos: Any, sin: Any) -> Any:
    return sound(self, latent.flip(-1), cos, sin)


def any_candidate(sound: Any, q: Any, w: Any, new: Any, held: Any, blocks: Any, *rest: Any) -> Any:
    every = torch.arange(-(-(new.shape[1] + held.shape[1]) // rest[-1]))
    return sound(q, w, new, held, every.expand(len(q), -1), *rest)


def without_the_newest(sound: Any, *args: Any) -> Any:
    numbers, blocks = sound(*args)
    return numbers, torch.cat([blocks[:, 1:], torch.full_like(blocks[:, :1], -1)], 1)


def numbers_shifted(sound: Any, q: Any, new: Any, ring: Any, made: Any, held: Any, chosen: Any, *rest: Any) -> Any:
    return sound(q, new, ring, made, held, (chosen - 1).clamp(min=-1), *rest)


def since_the_first(sound: Any, *args: Any) -> Any:
    *rest, since = args
    return sound(*rest, torch.zeros_like(since))


def keys_in_other_streams(sound: Any, h: Any, k: Any, *rest: Any) -> Any:
    return sound(h, k.roll(1, 1), *rest)


def collapsed_otherwise(sound: Any, x: Any, pre: Any) -> Any:
    return sound(x, pre.roll(1, 1))


def _damage(where: Any, name: str, by: Callable[..., Any]) -> Callable[[EagerExecutor], Any]:
    return lambda _: patched(where, name, by)


_KEEPS, _AMONG = "layer 5 full/1 decoder keeping candidates", "layer 6 reindex/1 decoder among candidates"
# what is wrong -> how it is brought about, and the first boundary that is to show it
DAMAGES: dict[str, tuple[Callable[[EagerExecutor], Any], str]] = {
    "history is lost between steps": (forgetful, "layer 1 engram rows"),
    "another tokenizer's words": (other_words, "layer 1 engram rows"),
    "a gate without its root": (_damage(engram, "engram_gating", without_a_root), "layer 1 window engram"),
    "keys of other streams": (_damage(engram, "engram_gating", keys_in_other_streams), "layer 1 window engram"),
    "collapsed by other shares": (_damage(residual, "collapse", collapsed_otherwise), "layer 0 window"),
    "shares of other streams": (_damage(residual, "hyper_coefficients", shares_in_other_streams), "layer 0 window"),
    "entries of a token more": (_damage(shared_entries, "compress_tokens", a_token_more), "layer 2 full/2"),
    "index keys of turned latents": (
        _damage(shared_entries.SharedIndexer, "keys", of_turned_latents),
        "layer 2 full/2",
    ),
    "candidates are not heeded": (_damage(shared_entries, "index_reselect", any_candidate), _AMONG),
    "the newest block is not kept": (_damage(shared_entries, "candidate_select", without_the_newest), _KEEPS),
    "numbers of other entries": (_damage(shared_entries, "sparse_attention", numbers_shifted), "layer 2 full/2"),
    "tokens that never passed the decoder": (_damage(shared_entries, "sparse_attention", since_the_first), _KEEPS),
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_fails_where_it_is(checked: Checked, name: str, precision: str) -> None:
    damage, where = DAMAGES[name]
    executor = checked.executor(precision)
    bad = [b for b in checked.compare(executor, precision, damage(executor)) if not b.ok]
    assert bad, name
    assert bad[0].name == where, (bad[0].name, bad[0].notes)
    assert bad[0].notes


@pytest.fixture
def described(checked: Checked, tmp_path: Path) -> tuple[Checked, Path, dict[int, tuple[StoredTensor, Any]]]:
    """What a bundle says of its look-up, sound; and its tables."""
    folder = tmp_path / "bundle"
    (folder / "weights").mkdir(parents=True)
    tables = {}
    for layer, stored in engram_tables(checked.weights).items():
        for tensor in stored:
            link = folder / "weights" / tensor.file.name
            if not link.exists():
                link.hardlink_to(tensor.file)
        tables[layer] = tuple(replace(tensor, file=folder / "weights" / tensor.file.name) for tensor in stored)
    return checked, folder, tables


def faults(described: Any, words: np.ndarray, tables: Any) -> tuple[str, ...]:
    checked, folder, _ = described
    files.write(folder, checked.config.engram, words, tables)
    return engram_faults(folder, checked.config.engram, checked.weights, checked.words)


def test_a_sound_description_has_no_fault(described: Any) -> None:
    assert faults(described, described[0].words, described[2]) == ()


def test_another_map_is_a_fault(described: Any) -> None:
    words = described[0].words.copy()
    words[[40, 60]] = words[[60, 40]]
    assert "not that of the checkpoint's tokenizer" in faults(described, words, described[2])[0]


@pytest.mark.parametrize("what", ["another place", "multipliers of another place"])
def test_another_place_is_a_fault(described: Any, what: str) -> None:
    checked, _, tables = described
    data, scale = tables[1]
    moved = (replace(data, offset=data.offset + 32), scale)
    if what != "another place":
        moved = (data, replace(scale, offset=scale.offset + 1))
    (line,) = faults(described, checked.words, tables | {1: moved})
    assert line.startswith("the Engram table of layer 1 is read at")
