"""What a batch of sequences has cached, in the device's memory; rows never pass through the host.

Letters: B sequences, S new tokens, U new rows of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import torch

from v4export.runtime.on_device.device import Device, as_bits, torch_dtype
from v4export.runtime.state import Buffer, State
from v4export.state_contract import StateTensor

#: Tensors whose new rows have the same places: tokens of a row, and rows of the ring.
Kind = tuple[int, int | None]


def kind_of(tensor: StateTensor) -> Kind:
    """Which tensors it shares its places with."""
    return tensor.every, tensor.ring


def places_name(kind: Kind) -> str:
    """The name that places of new rows are fed by."""
    return f"places of {kind}"


class Waiting(Protocol):
    """A step, as far as it waits for places of its rows."""

    def feed(self, fed: Mapping[str, np.ndarray]) -> None:
        """Other numbers, some of those that it was fed."""

    def put(self) -> None:
        """Its new rows put in their places."""


@dataclass
class DeviceBuffer(Buffer):
    """One tensor of a layer's state on the device.

    Attributes:
        array: torch.Tensor [B, capacity, W], of whole memory or of its first sequences.
        memory: [sequences * capacity + 1, W]: the rows of all sequences and one that takes those to be dropped, so that
            as many rows are written in every step.
    """

    array: Any
    memory: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def on(cls, device: Device, tensor: StateTensor, batch: int, dtype: np.dtype, remembered: bool) -> DeviceBuffer:
        """A buffer that holds nothing, with all rows of a ring or a first one."""
        capacity = tensor.ring or 1
        memory = torch.zeros(batch * capacity + 1, tensor.width, dtype=torch_dtype(dtype), device=device.name)
        return cls(tensor, _sequences(memory, capacity), remembered, None, memory)

    def first(self, count: int) -> DeviceBuffer:
        """The same memory of the first sequences alone."""
        return DeviceBuffer(self.tensor, self.array[:count], self.remembered, None, self.memory)

    def grow(self, rows: int) -> None:
        """Make room for so many rows."""
        batch, had, width = self.array.shape
        if self.tensor.ring is None and rows > had:
            old, self.memory = self.array, self.memory.new_zeros(batch * rows + 1, width)
            self.array = _sequences(self.memory, rows)
            self.array[:, :had] = old

    def kept(self, rows: int) -> np.ndarray:
        """The first rows of the first sequence, [rows, W], copied to the host."""
        return Device.fetch(self.array[0, :rows])

    def restore(self, rows: np.ndarray) -> None:
        """Copy rows [n, W] to the first of the first sequence."""
        bits = torch.from_numpy(np.array(rows).reshape(-1).view(np.uint8))
        self.array[0, : len(rows)] = bits.view(self.array.dtype).view(rows.shape)

    def read(self, count: int) -> torch.Tensor:
        """The rows of the first ``count`` sequences of the memory, [count, capacity, W]."""
        return self.array if count == len(self.array) else _sequences(self.memory, self.array.shape[1])[:count]

    def write(self, places: torch.Tensor, new: torch.Tensor) -> None:
        """Put new rows [B, U, W] in their places, int64 [B * U]."""
        as_bits(self.memory).index_copy_(0, places, as_bits(new).flatten(0, 1))

    @property
    def dropped(self) -> int:
        """The place of rows that are not to be kept."""
        return len(self.memory) - 1


def _sequences(memory: torch.Tensor, capacity: int) -> torch.Tensor:
    return memory[:-1].view(-1, capacity, memory.shape[-1])


@dataclass
class DeviceState(State):
    """Buffers of every layer on a device.

    A step reads whole buffers, whatever they hold, so that its shapes change only as they grow, and its new rows are
    put in their places on the device.
    """

    device: Device | None = None
    #: A step whose rows are not in their places yet.
    waiting: Waiting | None = None

    @property
    def single(self) -> bool:
        """Never: rows are not read or written in place, at addresses that would differ in every step."""
        return False

    @property
    def sequences(self) -> int:
        """That there is memory for; as many as there are, or more where it is the beginning of another."""
        _, _, buffer = next(self.named())
        return buffer.dropped // buffer.array.shape[1]

    def put(self, b: int, other: State) -> None:
        """Make sequence ``b`` hold what ``other`` does, by copies on the device."""
        assert self.device
        with self.device.scope():
            super().put(b, other)

    def stored(self) -> dict[str, np.ndarray]:
        """What the only sequence holds, copied to the host."""
        assert self.device
        with self.device.scope():
            return super().stored()

    def restore(self, tokens: int, rows: Mapping[str, np.ndarray]) -> None:
        """Hold so many tokens, by copies to the device."""
        assert self.device
        with self.device.scope():
            super().restore(tokens, rows)

    def first(self, count: int, room: int = 1) -> Self:
        """A state of the first ``count`` sequences in the same memory, with room for so many more tokens of each."""
        assert self.device
        with self.device.scope():
            return super().first(count, room)

    def named(self) -> Iterator[tuple[int, str, DeviceBuffer]]:
        """All buffers, with their layers and names."""
        for layer, buffers in enumerate(self.layers):
            for name, buffer in buffers.items():
                assert isinstance(buffer, DeviceBuffer)
                yield layer, name, buffer

    def places(self, lengths_B: np.ndarray, count: int) -> Mapping[Kind, np.ndarray]:
        """Where the new rows of the reserved step go, int64 [count * U] for each kind of tensor.

        Args:
            lengths_B: by how many tokens each sequence advances.
            count: sequences of the step; those behind the state's own keep none.
        """
        before_B, after_B = (np.zeros(count, np.int64) for _ in range(2))
        before_B[: len(lengths_B)], after_B[: len(lengths_B)] = self.lengths_B, self.lengths_B + lengths_B
        kinds = {kind_of(buffer.tensor): buffer for _, _, buffer in self.named()}
        return {kind: _places(buffer, before_B, after_B, self._steps) for kind, buffer in kinds.items()}

    def _take(self, after_B: np.ndarray, past_decoder: bool) -> None:
        """The step has put them there, unless it waited to be told how many."""
        if self.waiting and self.device:
            step, self.waiting = self.waiting, None
            places = self.places(after_B - self.lengths_B, len(after_B))
            with self.device.scope():
                step.feed({places_name(kind): one for kind, one in places.items()})
                step.put()


def _places(buffer: DeviceBuffer, before_B: np.ndarray, after_B: np.ndarray, steps: int) -> np.ndarray:
    """Indices into a buffer's memory."""
    tensor, capacity = buffer.tensor, buffer.array.shape[1]
    numbers_BU = (before_B // tensor.every)[:, None] + np.arange(tensor.returned(steps))
    end_B1 = (after_B // tensor.every)[:, None]
    kept_BU = numbers_BU < end_B1
    if tensor.ring:
        kept_BU &= numbers_BU >= end_B1 - tensor.ring
    own_BU = np.arange(len(before_B))[:, None] * capacity + numbers_BU % capacity
    return np.where(kept_BU, own_BU, buffer.dropped).reshape(-1)
