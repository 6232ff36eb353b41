"""Text to token ids and back, from the files a checkpoint ships and never from its Python.

``tokenizer.json`` is read with the tokenizers library; Kimi's ``tiktoken.model`` (base64 token, space, rank on each
line) with tiktoken. Streams give text as tokens arrive, whole characters only.
"""

from __future__ import annotations

import base64
import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from v4export.errors import BadInput
from v4export.side_files import explained, file_of, json_object, parsed

# What a bundle copies, where the checkpoint has it.
TOKENIZER_FILES = (
    *("tokenizer.json", "tiktoken.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)

# Pre-tokenization of Moonshot's tiktoken vocabularies (Moonlight, Kimi-Linear, Kimi-K2): runs of Han characters stand
# alone, letters of other scripts split at a change from lower to upper case, digits go in threes.
_UPPER, _LOWER = (rf"[{case}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for case in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_BEFORE, _CONTRACTION = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = (
    r"[\p{Han}]+"
    rf"|{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}"
    rf"|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI_RESERVED = 256  # ids after the ranks; those the configuration does not name are <|reserved_token_{id}|>
_KIMI_PIECE, _KIMI_RUN = 400_000, 25_000  # characters; tiktoken overflows its stack on longer ones, so Kimi cuts there


_SAME = "take all of the tokenizer's files from the same checkpoint"
_ENCODING = "the tokenizer cannot encode a text", _SAME
_DECODING = "the tokenizer cannot decode tokens", _SAME


class TextStream:
    """Turns token ids into text piece by piece: an incremental UTF-8 decoder over the bytes that tokens stand for.

    The pieces joined are what ``decode`` gives.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly none."""
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never got its last byte."""
        return self._decoder.decode(b"", final=True)


class _LibraryStream(TextStream):
    """For decoders that are not byte-level: the library's stream, which decodes the last few tokens again."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        with explained(*_DECODING):
            text = self._stream.step(self._backend, token_id)
        if text:
            self._pending.clear()
        return text or ""

    def flush(self) -> str:
        with explained(*_DECODING):
            return self._backend.decode(self._pending, skip_special_tokens=True)


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: one more than the largest id that stands for text. A model may have more rows (padding).
        special_ids: ids that ``decode`` and streams leave out.
        bos_id, eos_id: of the tokens that tokenizer_config.json calls ``bos_token`` and ``eos_token``, or None.
    """

    def __init__(
        self,
        config: dict[str, Any],
        id_of: Callable[[str], int | None],
        special_ids: Iterable[int],
        vocab_size: int,
        template: tuple[list[int], list[int]] = ([], []),
    ) -> None:
        self.bos_id, self.eos_id = _named_id(config, "bos", id_of), _named_id(config, "eos", id_of)
        self.special_ids, self.vocab_size = frozenset(special_ids), vocab_size
        self._prefix, self._suffix = template
        # Where tokenizer_config.json has either switch, the switches replace the template, as in transformers 4.
        if config.get("add_bos_token") is not None or config.get("add_eos_token") is not None:
            self._prefix = [self.bos_id] if config.get("add_bos_token") and self.bos_id is not None else []
            self._suffix = [self.eos_id] if config.get("add_eos_token") and self.eos_id is not None else []

    def ends(self, ids: Iterable[int]) -> frozenset[int]:
        """Tokens that end a text: these, and the one that the tokenizer calls so."""
        return frozenset(ids) if self.eos_id is None else frozenset((*ids, self.eos_id))

    @property
    def prefix(self) -> list[int]:
        """What ``encode`` puts in front of every text."""
        return list(self._prefix)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. The name of a special token inside it becomes that token.

        Args:
            text: any text.
            add_special_tokens: put around it what the checkpoint asks for (DeepSeek: the begin token in front).

        Raises:
            BadInput: the text holds half a UTF-16 pair, so it has no UTF-8 bytes.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"{error.reason} at character {error.start}"
            raise BadInput("the text cannot be encoded as UTF-8", where, "give valid UTF-8") from None
        ids = self._ids(text)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    @abstractmethod
    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Ids that stand for nothing are left out; bytes that are not UTF-8 become U+FFFD."""

    def stream(self) -> TextStream:
        """A new stream, which leaves special tokens out."""
        return TextStream(lambda i: b"" if i in self.special_ids else self._bytes_of(i))

    @abstractmethod
    def _ids(self, text: str) -> list[int]: ...

    @abstractmethod
    def _bytes_of(self, token_id: int) -> bytes: ...


class _JsonTokenizer(Tokenizer):
    """A tokenizer.json. ``backend`` neither truncates nor pads."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        self._backend = backend
        special_ids = (i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # What the post-processor puts before and after a text.
        with explained(*_ENCODING):
            bare, framed = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
        extra = len(framed) - len(bare)
        start = next((i for i in range(extra) if bare and framed[i : i + len(bare)] == bare), extra)
        template = (framed[:start], framed[start + len(bare) :])
        super().__init__(config, backend.token_to_id, special_ids, vocab_size, template)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        with explained(*_DECODING):
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self) -> TextStream:
        is_byte_level = isinstance(self._backend.decoder, tokenizers.decoders.ByteLevel)
        return super().stream() if is_byte_level else _LibraryStream(self._backend)

    def _ids(self, text: str) -> list[int]:
        with explained(*_ENCODING):
            return self._backend.encode(text, add_special_tokens=False).ids

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # added by name, as plain text; the library's decoder tells by the same sign
            return token.encode()


class _TiktokenTokenizer(Tokenizer):
    """Byte ranks and reserved tokens after them."""

    def __init__(self, ranks: dict[bytes, int], config: dict[str, Any]) -> None:
        import tiktoken

        reserved, special_ids = _kimi_reserved(len(ranks), config)
        with explained("tiktoken.model and tokenizer_config.json do not fit together", _SAME):
            self._backend = tiktoken.Encoding(
                "kimi", pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=reserved
            )
        super().__init__(config, reserved.get, special_ids, len(ranks) + KIMI_RESERVED)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        kept = (i for i in ids if not (skip_special_tokens and i in self.special_ids))
        return b"".join(map(self._bytes_of, kept)).decode("utf-8", errors="replace")

    def _ids(self, text: str) -> list[int]:
        return [i for piece in _kimi_pieces(text) for i in self._backend.encode(piece, allowed_special="all")]

    def _bytes_of(self, token_id: int) -> bytes:
        return self._backend.decode_single_token_bytes(token_id) if token_id < self.vocab_size else b""


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint or bundle directory.

    Raises:
        BadInput: there is no tokenizer file, one is malformed, or one is a link that leads out of the directory.
    """
    config_path = file_of(directory, "tokenizer_config.json")
    config = parsed(config_path, json_object) if config_path else {}
    if path := file_of(directory, "tokenizer.json"):
        backend = parsed(path, tokenizers.Tokenizer.from_buffer)
        # Settings of the run that saved the file would cut prompts without a word.
        backend.no_truncation()
        backend.no_padding()
        return _JsonTokenizer(backend, config)
    if path := file_of(directory, "tiktoken.model"):
        return _TiktokenTokenizer(parsed(path, _ranks), config)
    found = f"{directory}: neither tokenizer.json nor tiktoken.model"
    raise BadInput("the directory has no tokenizer", found, "copy the tokenizer files of the checkpoint there")


def _named_id(config: dict[str, Any], role: str, id_of: Callable[[str], int | None]) -> int | None:
    token = config.get(f"{role}_token")
    name = token.get("content") if isinstance(token, dict) else token
    token_id = id_of(name) if isinstance(name, str) else None
    if config.get(f"add_{role}_token") and token_id is None:
        raise BadInput(
            f"tokenizer_config.json asks for {role}_token around every text, and the vocabulary has no such token",
            f"add_{role}_token: true, {role}_token: {name!r}",
            f"name a token of the vocabulary as {role}_token, or set add_{role}_token to false",
        )
    return token_id


def _ranks(data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"line {number} is {line[:40]!r}; expected a base64 token, a space and its rank") from None
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        wanted = f"the ranks have to be 0 to {len(ranks) - 1}, each once"
        raise ValueError(f"{len(ranks)} tokens, {missing} of the 256 single bytes missing; {wanted}")
    return ranks


def _kimi_reserved(num_ranks: int, config: dict[str, Any]) -> tuple[dict[str, int], set[int]]:
    """Reserved tokens by name, and those of them that are not text (a tool-call marker is reserved, yet is text)."""
    tokens = {i: (f"<|reserved_token_{i}|>", True) for i in range(num_ranks, num_ranks + KIMI_RESERVED)}
    for key, token in dict(config.get("added_tokens_decoder") or {}).items():
        content = token.get("content") if isinstance(token, dict) else None
        if not key.isdecimal() or int(key) not in tokens or not isinstance(content, str):
            raise BadInput(
                "tokenizer_config.json names a token that is not one of the reserved",
                f"added_tokens_decoder has {key!r}: {token!r}; reserved are {min(tokens)} to {max(tokens)}",
                "take tokenizer_config.json and tiktoken.model from the same checkpoint",
            )
        tokens[int(key)] = (content, token.get("special", False))
    return {name: i for i, (name, _) in tokens.items()}, {i for i, (_, special) in tokens.items() if special}


def _kimi_pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), _KIMI_PIECE):
        piece, begin = text[start : start + _KIMI_PIECE], 0
        for run in re.finditer(r"\s+|\S+", piece):
            for cut in range(run.start() + _KIMI_RUN, run.end(), _KIMI_RUN):
                yield piece[begin:cut]
                begin = cut
        yield piece[begin:]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, other bytes for U+0100 onwards, in order."""
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
