"""What a batch of sequences has cached, kept outside the graph and never copied per token."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from v4export.config import ModelConfig
from v4export.errors import BadInput
from v4export.graphs.shards import numpy_dtype
from v4export.graphs.stamp import state_name
from v4export.state_contract import StateTensor, remembered, state_tensors

_FIRST_CAPACITY = 256

#: Tokens [B, S] of a step that is yet to come, and how many of each row are real; None where all are.
Coming = tuple[np.ndarray, np.ndarray | None]


@dataclass
class Buffer:
    """One tensor of a layer's state: where its rows are, and where a step's new ones go first.

    Attributes:
        tensor: what it holds.
        array: [B, capacity, W], or [B, ring, W].
        remembered: whether a step whose tokens do not pass the decoder returns rows of it, too.
        scratch: [B, U, W], for new rows that cannot be written in their places.
    """

    tensor: StateTensor
    array: np.ndarray
    remembered: bool = True
    scratch: np.ndarray | None = None

    @classmethod
    def of(cls, tensor: StateTensor, batch: int, dtype: np.dtype, remembered: bool) -> Buffer:
        """A buffer that holds nothing, with all rows of a ring or a first one."""
        return cls(tensor, np.zeros((batch, tensor.ring or 1, tensor.width), dtype), remembered)

    def first(self, count: int) -> Buffer:
        """The same memory of the first sequences alone."""
        return Buffer(self.tensor, self.array[:count], self.remembered)

    def grow(self, rows: int) -> None:
        """Make room for so many rows."""
        batch, had, width = self.array.shape
        if self.tensor.ring is None and rows > had:
            old, self.array = self.array, np.zeros((batch, rows, width), self.array.dtype)
            self.array[:, :had] = old

    def kept(self, rows: int) -> np.ndarray:
        """The first rows of the first sequence, [rows, W], on the host."""
        return self.array[0, :rows]

    def restore(self, rows: np.ndarray) -> None:
        """Make rows [n, W] the first of the first sequence."""
        self.array[0, : len(rows)] = rows

    def take(self, b: int, first: int, new: np.ndarray) -> None:
        """Put a sequence's new rows, numbered from ``first``, in their places."""
        if self.tensor.ring is None:
            self.array[b, first : first + len(new)] = new
        else:
            kept = new[-self.tensor.ring :] if len(new) else new
            numbers = np.arange(first + len(new) - len(kept), first + len(new))
            self.array[b, numbers % self.tensor.ring] = kept


@dataclass
class State:
    """Buffers of every layer (``v4export/state_contract.py``).

    With one sequence, the graph reads the rows it needs where they lie and writes new ones straight to their places.
    With several, whose lengths may differ, it reads whole buffers (the graph ignores rows beyond each sequence's
    length) and the new rows are put in their places afterwards; so are those of a ring, unless there is only one, whose
    place is that of a row nobody needs any more.

    Attributes:
        layers: per layer, buffers by name.
        lengths_B: tokens held by each sequence.
        limit: most tokens a sequence may hold.
        decoder_start_B: the first token of each sequence that has passed the decoder, in a model that has one.
        history_BN: what a look-up needs to know of earlier tokens, in a model with Engram.
    """

    layers: list[dict[str, Buffer]]
    lengths_B: np.ndarray
    limit: int
    decoder_start_B: np.ndarray
    history_BN: np.ndarray | None = None
    _capacity: int = 0
    _steps: int = field(default=0)

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int,
        dtype: np.dtype,
        limit: int,
        held: Container[str] | None = None,
        make: Callable[[StateTensor, int, np.dtype, bool], Buffer] = Buffer.of,
    ) -> Self:
        """A state that holds no token.

        Args:
            config: the model.
            batch: sequences.
            dtype: of activations.
            limit: most tokens of a sequence.
            held: the only tensors it has, by the graph's names; all unless given.
            make: a buffer of a tensor, for so many sequences, of a type, remembered or not.
        """

        def buffer(tensor: StateTensor, layer: int) -> Buffer:
            kind = numpy_dtype(tensor.dtype) if tensor.dtype else dtype
            return make(tensor, batch, kind, tensor in remembered(config, layer))

        def there(layer: int) -> list[StateTensor]:
            return [t for t in state_tensors(config, layer) if held is None or state_name(layer, t.name) in held]

        layers = [{t.name: buffer(t, i) for t in there(i)} for i in range(config.state_layers)]
        state = cls(layers, np.zeros(batch, np.int64), limit, np.zeros(batch, np.int64))
        state._grow(min(_FIRST_CAPACITY, limit))
        return state

    @property
    def buffers(self) -> list[Buffer]:
        """All of them, layer by layer."""
        return [buffer for layer in self.layers for buffer in layer.values()]

    @property
    def single(self) -> bool:
        """Whether there is one sequence, so that rows can be read and written in place."""
        return len(self.lengths_B) == 1

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(b.array.nbytes for b in self.buffers)

    def reserve(self, S: int, lengths_B: np.ndarray | None = None) -> None:
        """Make room for a step of S tokens; capacity doubles, so that growing costs a constant per token.

        Args:
            S: tokens of the step, padding included.
            lengths_B: how many of them each sequence keeps, S unless given.

        Raises:
            BadInput: a sequence would pass the limit.
        """
        longest = int((self.lengths_B + (S if lengths_B is None else lengths_B)).max())
        if longest > self.limit:
            raise BadInput(
                "the sequence is longer than this model was exported for",
                f"{longest} tokens, at most {self.limit}",
                "export with a larger --max-seq-len",
            )
        self._steps = S
        # Rows written in place include the padding's.
        needed = int(self.lengths_B[0]) + S if self.single else longest
        if needed > self._capacity:
            self._grow(max(needed, min(2 * self._capacity, self.limit)))

    def _grow(self, tokens: int) -> None:
        self._capacity = tokens
        for buffer in self.buffers:
            # The rows a step returns may be one more than it completes.
            buffer.grow(buffer.tensor.complete(tokens) + 1 if buffer.tensor.every > 1 else tokens)

    def held(self, layer: int, name: str) -> np.ndarray:
        """What the graph reads: [B, rows, W]; never without a row, since operators refuse to gather from nothing."""
        buffer = self.layers[layer][name]
        if not self.single or buffer.tensor.ring:
            return buffer.array
        return buffer.array[:, : max(1, buffer.tensor.complete(int(self.lengths_B[0])))]

    def room(self, layer: int, name: str) -> np.ndarray:
        """Where the graph writes the rows that the reserved step returns: [B, U, W]."""
        buffer = self.layers[layer][name]
        tensor, rows = buffer.tensor, buffer.tensor.returned(self._steps)
        if self._in_place(tensor):
            first = tensor.complete(int(self.lengths_B[0]))
            first = first % tensor.ring if tensor.ring else first
            return buffer.array[:, first : first + rows]
        if buffer.scratch is None or buffer.scratch.shape[1] != rows:
            buffer.scratch = np.empty((len(self.lengths_B), rows, tensor.width), buffer.array.dtype)
        return buffer.scratch

    def _in_place(self, tensor: StateTensor) -> bool:
        return self.single and (tensor.ring is None or (self._steps == 1 and not tensor.reads_oldest))

    def commit(self, lengths_B: np.ndarray, past_decoder: bool = True) -> None:
        """Take the rows that the first ``lengths`` new tokens of each sequence complete as held.

        Args:
            lengths_B: how many tokens.
            past_decoder: whether they have passed the decoder; if not, it knows of none before them either.
        """
        after_B = self.lengths_B + lengths_B
        self._take(after_B, past_decoder)
        if not past_decoder:
            self.decoder_start_B = np.where(lengths_B > 0, after_B, self.decoder_start_B)
        self.lengths_B = after_B

    def _take(self, after_B: np.ndarray, past_decoder: bool) -> None:
        """Put new rows in their places, where they were not written there."""
        for buffer in self.buffers:
            tensor, scratch = buffer.tensor, buffer.scratch
            if self._in_place(tensor) or not (past_decoder or buffer.remembered):
                continue
            assert scratch is not None
            for b, (before, after) in enumerate(zip(self.lengths_B.tolist(), after_B.tolist(), strict=True)):
                first = tensor.complete(before)
                buffer.take(b, first, scratch[b, : tensor.complete(after) - first])

    def put(self, b: int, other: State) -> None:
        """Make sequence ``b`` hold what ``other``, a state of one sequence of the same model, holds."""
        tokens = int(other.lengths_B[0])
        if tokens > self._capacity:
            self._grow(max(tokens, min(2 * self._capacity, self.limit)))
        for mine, its in zip(self.buffers, other.buffers, strict=True):
            rows = its.tensor.ring or its.tensor.complete(tokens)
            mine.array[b, :rows] = its.array[0, :rows]
        # Arrays of numbers may be those that a caller looked at before the step.
        self.lengths_B, self.decoder_start_B = self.lengths_B.copy(), self.decoder_start_B.copy()
        self.lengths_B[b], self.decoder_start_B[b] = tokens, other.decoder_start_B[0]
        if self.history_BN is not None:
            assert other.history_BN is not None
            self.history_BN = self.history_BN.copy()
            self.history_BN[b] = other.history_BN[0]

    def first(self, count: int, room: int = 1) -> Self:
        """A state of the first ``count`` sequences in the same memory, with room for so many more tokens of each.

        A step of it costs nothing for the others. Until ``adopt`` has taken back how long they are now, it alone is
        valid.
        """
        longest = min(int(self.lengths_B[:count].max()) + room, self.limit)
        if self._capacity < longest:
            self._grow(max(longest, min(2 * self._capacity, self.limit)))
        layers = [{name: buffer.first(count) for name, buffer in one.items()} for one in self.layers]
        history = None if self.history_BN is None else self.history_BN[:count]
        starts = self.decoder_start_B[:count]
        return replace(
            self, layers=layers, lengths_B=self.lengths_B[:count], decoder_start_B=starts, history_BN=history
        )

    def adopt(self, first: State) -> None:
        """Take what a step has changed of the first sequences, whose rows lie here already."""
        count = len(first.lengths_B)
        self.lengths_B = np.concatenate([first.lengths_B, self.lengths_B[count:]])
        self.decoder_start_B = np.concatenate([first.decoder_start_B, self.decoder_start_B[count:]])
        if self.history_BN is not None and first.history_BN is not None:
            self.history_BN = np.concatenate([first.history_BN, self.history_BN[count:]])

    def rows(self, layer: int, name: str, b: int) -> np.ndarray:
        """A sequence's rows that can still be seen, oldest first: [n, W]."""
        buffer = self.layers[layer][name]
        count, ring = buffer.tensor.complete(int(self.lengths_B[b])), buffer.tensor.ring
        if ring is None:
            return buffer.array[b, :count]
        return buffer.array[b, np.arange(max(0, count - ring), count) % ring]

    def stored(self) -> dict[str, np.ndarray]:
        """What the only sequence holds, by the graph's names: rows [n, W], rings as they lie."""
        tokens = int(self.lengths_B[0])
        return {name: buffer.kept(buffer.tensor.stored(tokens)) for name, buffer in self._by_name()}

    def restore(self, tokens: int, rows: Mapping[str, np.ndarray]) -> None:
        """Hold so many tokens, in a state of one sequence that holds none, by what was stored of as many or more."""
        self.reserve(tokens)
        for name, buffer in self._by_name():
            buffer.restore(rows[name][: buffer.tensor.stored(tokens)])
        self.lengths_B = np.array([tokens])

    def _by_name(self) -> Iterator[tuple[str, Buffer]]:
        for layer, buffers in enumerate(self.layers):
            for name, buffer in buffers.items():
                yield state_name(layer, name), buffer
