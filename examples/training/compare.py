"""Training several models on the same tokens, side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from tokenizers import Tokenizer

from training import data
from training.loop import Rows, Run, no_rows, train
from training.recipe import PAD_ID, VOCAB, Training, build
from v4export.config import ModelConfig
from v4export.engram.hashing import Hasher
from v4export.engram.vocabulary import compress


@dataclass(frozen=True)
class Corpus:
    """What models are trained on and measured with.

    Attributes:
        tokenizer: trained on the files to train on.
        token_map: token id -> compressed id.
        compressed_vocab: how many compressed ids there are.
        train: windows [windows, S + 1].
        held_out: the same of text held out.
        held_out_bytes: of text in the targets of ``held_out``.
        files: to train on, and held out.
    """

    tokenizer: Tokenizer
    token_map: np.ndarray
    compressed_vocab: int
    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int
    files: tuple[int, int]

    @property
    def counts(self) -> dict[str, int]:
        """Files and tokens, to train on and held out."""
        return {
            "train_files": self.files[0],
            "held_out_files": self.files[1],
            "train_tokens": self.train[:, 1:].size,
            "held_out_tokens": self.held_out[:, 1:].size,
        }

    @property
    def summary(self) -> str:
        """The same in words."""
        return f"{self.counts['train_tokens']:,} tokens to train on, {self.counts['held_out_tokens']:,} held out"

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Of held-out text."""
        return nats_per_token * self.held_out[:, 1:].size / self.held_out_bytes / math.log(2)


def corpus(text: data.Text, window: int, vocab: int = VOCAB) -> Corpus:
    """The tokenizer, and text as tokens."""
    tokenizer = data.train_tokenizer(text.train, vocab)
    token_map, count = compress(tokenizer, vocab, PAD_ID)
    train_data, held_out = (data.windows(tokenizer, files, window) for files in (text.train, text.held_out))
    size = int(data.bytes_of_tokens(tokenizer)[held_out[:, 1:]].sum())
    return Corpus(tokenizer, token_map, count, train_data, held_out, size, (len(text.train), len(text.held_out)))


def rows_of(config: ModelConfig, token_map: np.ndarray) -> Rows:
    """Which rows windows look up: before the first token is nothing."""
    if config.engram is None:
        return no_rows
    hasher = Hasher.of(config.engram, token_map)
    return lambda ids_BS: hasher.rows(ids_BS, hasher.empty_history(len(ids_BS)))[0]


@dataclass(frozen=True)
class Job:
    """One training: the seed decides the weights at the start, and the order of the windows."""

    name: str
    config: ModelConfig
    seed: int
    keep: bool  # return the weights


def one(
    job: Job, token_map: np.ndarray, train_data: np.ndarray, held_out: np.ndarray, options: Training, threads: int
) -> tuple[Run, dict[str, np.ndarray]]:
    """What a training gave, and the weights where they are wanted."""
    torch.set_num_threads(threads)
    torch.manual_seed(job.seed)
    model = build(job.config)
    rows = rows_of(job.config, token_map)
    run = train(model, rows, train_data, held_out, options, job.seed, f"{job.name}, seed {job.seed}")
    return run, {name: weight.numpy() for name, weight in model.state_dict().items()} if job.keep else {}


def side_by_side(
    corpus: Corpus, models: Mapping[str, ModelConfig], seeds: Sequence[int], options: Training, workers: int
) -> dict[str, list[tuple[Run, dict[str, np.ndarray]]]]:
    """Every model with every seed, ``workers`` at a time; of the first seed the weights are kept."""
    jobs = [Job(name, config, seed, seed == seeds[0]) for seed in seeds for name, config in models.items()]
    rest = (corpus.token_map, corpus.train, corpus.held_out, options, max(1, (os.cpu_count() or 1) // workers))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        results = [(job.name, pool.submit(one, job, *rest)) for job in jobs]
        return {name: [result.result() for other, result in results if other == name] for name in models}
