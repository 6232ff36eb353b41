"""Which tokens become one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engram_subject import SMALL
from tokenizers import Tokenizer, decoders, models

from v4export.engram.vocabulary import compress, read_token_map, token_map
from v4export.errors import BadInput, NotSupported

#: Token -> its compressed id, in the order of ids: GPT-2's alphabet, where Ġ is a space, Ċ a line feed, and Ã the first
#: byte of a character.
TOKENS = {
    "<pad>": 0, "a": 1, "A": 1, "Ġa": 1, "Ã¡": 1, "Ġ": 2, "Ċ": 2, "ĠĠĊ": 2, "Ã": 3, "Â": 4,
    "ï¬ģ": 5, "fi": 5, "aĊb": 6, "AĠĠB": 6, "<Pad>": 0, "b": 7, "ï¼¢": 7,
}  # fmt: skip


def byte_level(tokens: list[str], gaps: int = 0) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({token: i + gaps * (i > 3) for i, token in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_case_accents_width_and_white_space_make_no_difference():
    ids, count = compress(byte_level(list(TOKENS)), len(TOKENS), 0)
    assert dict(zip(TOKENS, ids.tolist(), strict=True)) == TOKENS
    assert count == 8 and ids.dtype == np.int32


def test_ids_without_a_token_count_as_pad():
    ids, count = compress(byte_level(list(TOKENS), gaps=2), len(TOKENS) + 5, 3)
    tokens = list(TOKENS.values())
    assert ids.tolist() == [*tokens[:4], tokens[3], tokens[3], *tokens[4:], *[tokens[3]] * 3] and count == 8


def test_special_tokens_are_text():
    tokenizer = byte_level(["a", "b"])
    tokenizer.add_special_tokens(["<|A|>", "<|a|>"])
    assert compress(tokenizer, 4, 0)[0].tolist() == [0, 1, 2, 2]


def test_a_real_vocabulary(request):
    tokenizer = Tokenizer.from_file(str(request.config.rootpath / "examples" / "tiny-v3" / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    ids, count = compress(tokenizer, size, 0)
    assert sorted(set(ids.tolist())) == list(range(count)) and count < size
    firsts = [int(np.argmax(ids == i)) for i in range(count)]
    assert firsts == sorted(firsts)
    assert ids[tokenizer.token_to_id("A")] == ids[tokenizer.token_to_id("a")]


def test_another_tokenizer_is_refused():
    tokenizer = byte_level(list(TOKENS))
    engram = replace(SMALL, pad_token_id=0, compressed_vocab=8)
    assert token_map(tokenizer, engram, len(TOKENS)).max() == 7
    with pytest.raises(BadInput, match=r"does not match the Engram tables\n.*8 different tokens, .* made for 9\n"):
        token_map(tokenizer, replace(engram, compressed_vocab=9), len(TOKENS))
    with pytest.raises(BadInput, match="pad token"):
        token_map(tokenizer, replace(engram, pad_token_id=len(TOKENS)), len(TOKENS) + 1)


def test_from_a_directory(tmp_path):
    engram = replace(SMALL, pad_token_id=0, compressed_vocab=8)
    with pytest.raises(BadInput, match=r"there is no .*tokenizer\.json"):
        read_token_map(tmp_path, engram, len(TOKENS))
    (tmp_path / "tiktoken.model").touch()
    with pytest.raises(NotSupported, match=r"tiktoken\.model"):
        read_token_map(tmp_path, engram, len(TOKENS))
    byte_level(list(TOKENS)).save(str(tmp_path / "tokenizer.json"))
    assert read_token_map(tmp_path, engram, len(TOKENS)).tolist() == list(TOKENS.values())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="not what its name says"):
        read_token_map(tmp_path, engram, len(TOKENS))


def test_a_text_of_one_space_is_not_stripped_away():
    ids, _ = compress(byte_level(["Ġ", "ĠĠ", "x"]), 3, 0)
    assert ids.tolist() == [0, 0, 1]
