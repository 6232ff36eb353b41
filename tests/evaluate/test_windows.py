"""How a text becomes windows: every token is accounted for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from v4export import presets
from v4export.checkpoint.byte_tokenizer import write_tokenizer
from v4export.errors import BadInput
from v4export.evaluate.windows import Windows, cut, read_text
from v4export.runtime.tokenizer import load_tokenizer

CONFIG = dataclasses.replace(presets.load("tiny-v3"), max_position_embeddings=40)


class Words:
    """A tokenizer of one token a letter, with something in front of every text."""

    def __init__(self, *prefix: int) -> None:
        self.prefix = list(prefix)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [*(self.prefix if add_special_tokens else []), *(ord(letter) - 90 for letter in text)]


def letters(count: int) -> str:
    return "".join(chr(97 + i % 26) for i in range(count))


def test_windows_are_the_text_in_order_and_its_rest_is_left_out():
    found = cut(Words(), letters(50), CONFIG, context=16)  # type: ignore[arg-type]
    assert found.ids.tolist() == np.array([ord(c) - 90 for c in letters(48)]).reshape(3, 16).tolist()
    assert (found.text_tokens, found.scored) == (50, 3 * 15)
    assert [len(batch) for batch in found.batches(2)] == [2, 1]


def test_every_window_begins_as_a_text_does():
    found = cut(Words(1), letters(50), CONFIG, context=16)  # type: ignore[arg-type]
    assert found.ids.shape == (3, 16) and (found.ids[:, 0] == 1).all()
    assert found.ids[:, 1:].flatten().tolist() == [ord(c) - 90 for c in letters(45)]


@pytest.mark.parametrize(("tokens", "windows"), [(None, 3), (47, 2), (48, 3), (100, 3)])
def test_no_more_tokens_are_used_than_wanted(tokens, windows):
    assert len(cut(Words(), letters(50), CONFIG, 16, tokens).ids) == windows  # type: ignore[arg-type]


def test_windows_are_no_longer_than_the_model():
    assert cut(Words(), letters(50), CONFIG).ids.shape == (1, 40)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "context", "says"),
    [(letters(50), 41, "cannot have 41"), (letters(50), 2, "cannot have 2"), (letters(14), 16, "does not fill"),
     ("", None, "does not fill"), ("⎀" * 50, 16, "does not know")],
)  # fmt: skip
def test_what_cannot_be_cut_is_an_error(text, context, says):
    with pytest.raises(BadInput, match=says):
        cut(Words(1), text, CONFIG, context)  # type: ignore[arg-type]


def test_a_text_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name in ("latin", "gone"):
        with pytest.raises(BadInput, match="cannot read"):
            read_text(tmp_path / name)


def test_scored_tokens_are_all_but_the_first_of_each():
    assert Windows(np.zeros((4, 9), np.int64), 36).scored == 32


def test_what_a_tokenizer_puts_in_front(tmp_path):
    assert write_tokenizer(presets.load("tiny-v3"), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [*tokenizer.prefix, *tokenizer.encode("a", add_special_tokens=False)]
