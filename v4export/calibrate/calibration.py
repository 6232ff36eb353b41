"""Runs text through the float32 definition, one layer's weights in memory at a time, and finds scales of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch

from v4export.calibrate.magnitudes import Method
from v4export.calibrate.ranges import Found, found
from v4export.calibrate.saved import Progress, Saved, key_of
from v4export.calibrate.watch import watch
from v4export.checkpoint.activation_scales import ActivationScales, all_scales
from v4export.checkpoint.audit import Weight
from v4export.config import ModelConfig
from v4export.evaluate.lane import Lane, Shared
from v4export.model.block import Block
from v4export.model.load import fill
from v4export.model.reasoning import ThinkingHead
from v4export.precision import PRECISIONS

#: Tokens that pass a layer at once.
_BATCH = 4096
#: An expert that fewer tokens chose borrows its range.
ENOUGH = 16


@dataclass(frozen=True)
class Calibration:
    """What a calibration came to.

    Attributes:
        scales: with the names and shapes that the model needs.
        found: what each is made of, by name.
        tokens: that were run.
        resumed: parts of the model that an earlier run, which was stopped, had done.
    """

    scales: ActivationScales
    found: Mapping[str, Found]
    tokens: int
    resumed: int = 0


def calibrate(
    config: ModelConfig,
    weights: Mapping[str, Weight],
    ids: np.ndarray,
    method: Method,
    *,
    checkpoint: str,
    token_map: np.ndarray | None = None,
    enough: int = ENOUGH,
    saved: Path | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> Calibration:
    """Find the scale of every linear layer's and expert's inputs.

    Args:
        config: the model.
        weights: of the audited checkpoint.
        ids: windows of text, int64 [n, S], each of which begins a sequence.
        method: how a range is chosen.
        checkpoint: its header hash.
        token_map: token id -> compressed id, of a model with Engram.
        enough: tokens that make an expert's own range count.
        saved: file that keeps the state after every layer; a run that was stopped goes on from it.
        advance: told each time that a layer, or what thinks behind the last, is done: ``parts`` times.

    Returns:
        the scales. A run that was stopped and gone on gives the same bits as one that was not.

    Raises:
        NotSupported: a number is not finite.
    """
    # What rounding cached rows does to inputs is less than what a step does, and one file serves both kinds of state.
    config = replace(config, state_fp8=False)
    key = key_of(ids, checkpoint=checkpoint, config=config, method=method, enough=enough)
    with torch.inference_mode(), _Run(config, weights, ids, method, token_map, enough, Saved(saved, key)) as run:
        resumed = run.progress.done
        advance(resumed)
        for _ in range(resumed, parts(config)):
            run.next()
            advance(1)
        made = {"method": str(method), "tokens": int(ids.size), "windows": len(ids), "context": ids.shape[1]}
        every = {name: run.progress.found[name] for name in all_scales(config)}
    values = {name: one.values for name, one in every.items()}
    return Calibration(ActivationScales(values, checkpoint, made), every, int(ids.size), resumed)


def parts(config: ModelConfig) -> int:
    """How many parts of a model are calibrated one after another: its layers, and what thinks behind them."""
    return config.num_layers + config.thinks


class _Run:
    """A calibration under way."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Weight],
        ids: np.ndarray,
        method: Method,
        token_map: np.ndarray | None,
        enough: int,
        saved: Saved,
    ) -> None:
        self.config, self.weights, self.method, self.enough, self.saved = config, weights, method, enough, saved
        self.lane = Lane("fp32", PRECISIONS["fp32"], config, weights, token_map)
        count = max(1, _BATCH // ids.shape[1])
        self.batches = [ids[i : i + count] for i in range(0, len(ids), count)]
        self.wanted = all_scales(config)
        self.progress = saved.read() or Progress(0, self._embedded(), {})
        self.worker = ThreadPoolExecutor(1, "decode")
        self.coming: Future[Block] | None = None

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.shutdown(wait=True, cancel_futures=True)

    def next(self) -> None:
        """One more part."""
        layer, shared = self.progress.done, list(self.progress.shared)
        with self._watching(layer) as (part, seen):
            for i, batch in enumerate(self.batches):
                if isinstance(part, Block):
                    shared[i] = self.lane.step(part, layer, batch, shared[i])
                else:
                    _think(part, batch, shared[i])
        self.progress = Progress(layer + 1, shared, {**self.progress.found, **seen})
        self.saved.write(self.progress)

    @contextmanager
    def _watching(self, layer: int) -> Iterator[tuple[torch.nn.Module, dict[str, Found]]]:
        """A part, and what was found of it once it has run."""
        part, number = (self._block(layer), layer) if layer < self.config.num_layers else (self._head(), None)
        seen = watch(part, number, self.config, self.wanted, self.method.watcher)
        results: dict[str, Found] = {}
        yield part, results
        for name, magnitudes in seen.items():
            each = bool(self.wanted[name])
            results[name] = found(name, each, magnitudes, self.method, self.enough)

    def _block(self, layer: int) -> Block:
        """A layer, decoded ahead or now; and the next begun where memory holds both."""
        block = self.coming.result() if self.coming else self._decoded(layer)
        self.coming = None
        if layer + 1 < self.config.num_layers and self._bytes(layer + 1) < psutil.virtual_memory().available // 2:
            self.coming = self.worker.submit(self._decoded, layer + 1)
        return block

    @torch.inference_mode()
    def _decoded(self, layer: int) -> Block:
        return self.lane.block(layer, self._value)

    def _head(self) -> ThinkingHead:
        head = ThinkingHead(self.config)
        fill(head, self.config, self._value)
        return head

    def _value(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.weights[name].decode())

    def _bytes(self, layer: int) -> int:
        """Of a layer in float32."""
        prefix = f"model.layers.{layer}."
        return sum(4 * int(np.prod(w.shape)) for name, w in self.weights.items() if name.startswith(prefix))

    def _embedded(self) -> list[Shared]:
        embed, found = self.lane.embedding(self._value), []
        for batch in self.batches:
            hidden, shared = embed.shared(torch.from_numpy(batch), torch.zeros(len(batch), dtype=torch.int64))
            found.append(shared | {"hidden": hidden})
        return found


def _think(head: torch.nn.Module, ids_BS: np.ndarray, given: Shared) -> None:
    """Let a head make the rows of reasoning layers, and think about every token."""
    assert isinstance(head, ThinkingHead)
    B, S = ids_BS.shape
    hidden, pre = given["hidden"], given.get("pre")
    latents = [rows["latent"] for rows in head.rows(hidden, torch.zeros(B, dtype=torch.int64), pre)]
    trunk_BQD = head.collapsed(hidden, pre).unflatten(0, (B, S))
    head.think(trunk_BQD, torch.arange(S).expand(B, S), *latents)
