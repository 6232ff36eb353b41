"""Text, tokenizer and batches: Python's standard library, every 20th file held out."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"  # ids 0, 1, 2
#: Not every installation has the tests, and two folders are tables and manuals rather than programs.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class Text:
    """Files to train on, and files held out."""

    train: list[str]
    held_out: list[str]


def standard_library() -> Text:
    """The running interpreter's own modules, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    paths = [path for path in paths if not LEFT_OUT & set(path.parts)]
    files = [(root / path).read_text(encoding="utf-8", errors="replace") for path in paths]
    kept_back = files[::HELD_OUT_EVERY]
    return Text([text for n, text in enumerate(files) if n % HELD_OUT_EVERY], kept_back)


def train_tokenizer(files: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; a document starts with ``<|bos|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(files, trainer)
    begin = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
    return tokenizer


def windows(tokenizer: Tokenizer, files: list[str], length: int) -> np.ndarray:
    """The files one after another, cut into int64 [windows, length + 1]: inputs, and the targets one further on."""
    eos = tokenizer.token_to_id(EOS)
    ids = np.array([token for one in tokenizer.encode_batch_fast(files) for token in [*one.ids, eos]], np.int64)
    count = (len(ids) - 1) // length
    return np.stack([ids[n * length : (n + 1) * length + 1] for n in range(count)])


def bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each token stands for, int64 [V]; special tokens stand for none."""
    vocab = tokenizer.get_vocab()
    sizes = np.zeros(len(vocab), np.int64)
    for symbols, token in vocab.items():
        sizes[token] = 0 if symbols in SPECIAL else len(symbols)
    return sizes


def batches(data: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Windows in random order, without end; every window comes once before any comes again."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    while True:
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(len(data))])
        chosen, order = order[:size], order[size:]
        yield data[chosen]
