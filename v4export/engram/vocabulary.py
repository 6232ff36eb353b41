"""Tokenizer compression: tokens whose text differs only in case, accents or white space count as one for a hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

from v4export.config import Engram
from v4export.errors import BadInput, NotSupported
from v4export.side_files import file_of, parsed

_NOT_TEXT = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are part of a character only
_ONE_SPACE = "\ue000"  # stands for a text that is one space, which stripping would leave nothing of

_NORMALISE = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), _ONE_SPACE),
        normalizers.Strip(),
        normalizers.Replace(_ONE_SPACE, " "),
    ]
)


def compress(tokenizer: Tokenizer, vocab_size: int, pad_token_id: int) -> tuple[np.ndarray, int]:
    """Compressed ids, numbered in the order in which their first token has its id.

    Args:
        tokenizer: of the model.
        vocab_size: V, rows of the model's embedding. Those that stand for no token count as the pad token.
        pad_token_id: what stands for tokens before the first.

    Returns:
        int32 [V], token id -> compressed id; and how many compressed ids there are.

    Raises:
        BadInput: the pad token is not in the vocabulary.
    """
    names = [tokenizer.id_to_token(i) for i in range(vocab_size)]
    if not 0 <= pad_token_id < vocab_size or names[pad_token_id] is None:
        raise BadInput(
            "the tokenizer does not have Engram's pad token",
            f"pad_token_id {pad_token_id}, vocabulary of {vocab_size}",
            "take config.json and tokenizer.json from the same checkpoint",
        )
    texts = tokenizer.decode_batch([[i] for i in range(vocab_size)], skip_special_tokens=False)
    numbers: dict[str, int] = {}
    ids = [
        None if name is None else numbers.setdefault(_key(name, text), len(numbers))
        for name, text in zip(names, texts, strict=True)
    ]
    pad = ids[pad_token_id]
    return np.array([pad if number is None else number for number in ids], np.int32), len(numbers)


def token_map(tokenizer: Tokenizer, engram: Engram, vocab_size: int) -> np.ndarray:
    """Int32 [V], token id -> compressed id, for tables that were trained with so many compressed ids.

    Raises:
        BadInput: this tokenizer gives another number of them. Every multiplier depends on it, so no row would be right.
    """
    ids, count = compress(tokenizer, vocab_size, engram.pad_token_id)
    if count != engram.compressed_vocab:
        raise BadInput(
            "the tokenizer does not match the Engram tables",
            f"it has {count} different tokens, the tables were made for {engram.compressed_vocab}",
            "take config.json, tokenizer.json and the weights from the same checkpoint",
        )
    return ids


def read_token_map(directory: Path, engram: Engram, vocab_size: int) -> np.ndarray:
    """``token_map`` of the tokenizer.json of a checkpoint.

    Raises:
        BadInput: there is none, it is malformed, or it is of another model.
        NotSupported: the tokenizer is a tiktoken.model, which names no token whose bytes are not text.
    """
    path = file_of(directory, "tokenizer.json")
    if path is None:
        if (directory / "tiktoken.model").is_file():
            raise NotSupported(
                "Engram memory needs the names of tokens",
                f"{directory} has tiktoken.model, which holds their bytes only",
                "put the model's tokenizer.json beside it",
            )
        raise BadInput(
            "Engram memory needs the tokenizer of the model",
            f"there is no {directory / 'tokenizer.json'}",
            "copy the tokenizer files of the checkpoint there",
        )
    return token_map(parsed(path, Tokenizer.from_buffer), engram, vocab_size)


def _key(name: str, text: str) -> str:
    """What tokens have in common that become one."""
    return name if _NOT_TEXT in text else _NORMALISE.normalize_str(text) or text
