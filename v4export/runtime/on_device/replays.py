"""Decode steps as CUDA graphs: one launch in place of some hundreds.

A graph holds shapes and addresses. So it is made of a context that nobody else uses, memory that only its steps are
fed through, and rows at their addresses; it holds until rows move, as they grow, or another state comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from v4export.runtime.on_device.device import Device, Fed
from v4export.runtime.on_device.loaded import Context, Engine
from v4export.runtime.on_device.state import DeviceBuffer, kind_of, places_name

_LOG = logging.getLogger(__name__)


class Pass:
    """A step bound to a context: everything but the numbers that the host feeds.

    Args:
        device: that it is on.
        context: that runs it.
        fed: arrays of the host, by the engine's names, and places of new rows, by ``places_name``.
        held: rows that it reads, by the engine's names.
        written: where new rows go, by the engine's names.

    Attributes:
        outputs: of the engine, by name.
    """

    def __init__(
        self,
        device: Device,
        context: Context,
        fed: Mapping[str, np.ndarray],
        held: Mapping[str, torch.Tensor],
        written: Mapping[str, DeviceBuffer],
    ) -> None:
        self._context, self._fed = context, Fed(device, fed)
        self.outputs = context.bind({**self._fed.tensors, **held})
        self._moves = [
            (buffer, self._fed.tensors[places_name(kind_of(buffer.tensor))], self.outputs[name])
            for name, buffer in written.items()
            if name in self.outputs
        ]

    def feed(self, fed: Mapping[str, np.ndarray]) -> None:
        """Other numbers, of the same shapes; those that are not given stay."""
        self._fed.feed(fed)

    def compute(self) -> None:
        """The step, and nothing of its new rows."""
        self._context.enqueue()

    def work(self) -> None:
        """The step, and its new rows put in their places."""
        self.compute()
        self.put()

    def put(self) -> None:
        """Its new rows put in their places."""
        for buffer, places, new in self._moves:
            buffer.write(places, new)

    def let_go(self) -> None:
        """Of the state, whose memory a captured step must not keep: it is used only while the state has it."""
        self._moves = []


@dataclass
class _Lane:
    """Steps of one number of sequences."""

    seen: Any = None
    profile: int = -1
    context: Context | None = None
    step: Pass | None = None
    replay: Callable[[], None] | None = None


class Replays:
    """Runs decode steps of an engine, and from a state's third on replays them.

    The first is run as any other, since many a state has no second. That one is run in a context of its own, which
    settles what TensorRT does when shapes are new, and is then captured.

    Args:
        engine: that runs them.
        reason: why none is to be captured; None where any may be.

    Attributes:
        captured, replayed: how many graphs there were, and steps of them.
        reason: why there are none; None where there are, or may be.
    """

    def __init__(self, engine: Engine, reason: str | None) -> None:
        self._engine, self.reason = engine, reason
        self.captured = self.replayed = 0
        self._lanes: dict[int, _Lane] = {}

    def run(
        self,
        count: int,
        key: Any,
        fed: Mapping[str, np.ndarray],
        profile: Callable[[], int],
        make: Callable[[Context], Pass],
    ) -> Pass:
        """Run a decode step; it is on the stream when this returns.

        Args:
            count: its sequences.
            key: of shapes and addresses of the rows that it reads.
            fed: what the host feeds.
            profile: that it fits, where it is not replayed.
            make: the step in a context.
        """
        lane = self._lanes.setdefault(count, _Lane())
        again, lane.seen = lane.seen == key, key
        if again and lane.step and lane.replay:
            lane.step.feed(fed)
            lane.replay()
            self.replayed += 1
            return lane.step
        lane.step = lane.replay = None  # gives its memory back before more is taken
        own, fits = again and self.reason is None, profile()
        if own and lane.profile != fits:
            lane.profile, lane.context = fits, self._engine.context(fits)
        step = make(lane.context if own and lane.context else self._engine.shared_context(fits))
        step.feed(fed)
        step.work()
        if own and (replay := self._captured(step)):
            lane.step, lane.replay = step, replay
            step.let_go()
        return step

    def _captured(self, step: Pass) -> Callable[[], None] | None:
        try:
            replay = self._engine.device.capture(step.work)
        except Exception as error:  # PyTorch's, CUDA's or TensorRT's: the step itself has been run
            self.reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            _LOG.warning("decode steps are not replayed as CUDA graphs: %s", self.reason)
            return None
        self.captured += 1
        return replay
