"""A prompt's state in a file, so that the same beginning is computed once: ``--prompt-cache``, as llama.cpp has it.

The file is safetensors: the ``tokens`` it holds, the ``logits`` after the last of them (and the ``trunk``, of a model
that thinks), and each tensor of the state by the graph's name, growing ones with the rows that the tokens complete,
rings whole. Rows that grow can be cut anywhere. A ring has the last rows only, so a model with rings can go on from the
end of what is held, or from wherever no row is missing (``StateTensor.reaches``), and reads other prompts anew.

Letters: S new tokens, Q positions whose logits are wanted, V vocabulary, D hidden, N tokens held, W row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from v4export.checkpoint.activation_scales import FILE as SCALES
from v4export.checkpoint.tensor import StoredTensor, read_header
from v4export.config import ModelConfig
from v4export.errors import BadInput
from v4export.graphs.shards import SAFETENSORS_NAMES, numpy_dtype
from v4export.graphs.stamp import state_name
from v4export.runtime.state import Coming
from v4export.state_contract import StateTensor, state_tensors

_FORMAT = "v4export prompt cache 1"
_TOKENS, _LOGITS, _TRUNK = "tokens", "logits", "trunk"


#: Of a manifest, what the numbers of a state follow from, besides the checkpoint's own and the scales of inputs.
_DETERMINING = ("config", "chosen", "precision", "keep")


def key_of(manifest: Mapping[str, Any], **options: Any) -> str:
    """A hash of all that a state follows from besides its tokens: of a bundle's manifest, and options of its run."""
    said = {key: manifest[key] for key in _DETERMINING}
    # A checkpoint may have moved.
    said["checkpoint"] = {key: value for key, value in manifest["checkpoint"].items() if key != "path"}
    said["scales"] = manifest["files"].get(SCALES)
    return hashlib.sha256(json.dumps([_FORMAT, said, options], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Held:
    """What a file holds.

    Attributes:
        tokens: int64 [N].
        tensors: where the rest lies, by name.
    """

    tokens: np.ndarray
    tensors: dict[str, StoredTensor]

    def common(self, prompt: Sequence[int]) -> int:
        """How many tokens a prompt has in common with it, from the first."""
        count = min(len(prompt), len(self.tokens))
        same = self.tokens[:count] == np.asarray(prompt[:count], np.int64)
        return count if same.all() else int(same.argmin())  # the first that is not


def layout(config: ModelConfig, activations: np.dtype, tokens: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor of a file that holds so many tokens."""
    found: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
        _TOKENS: (np.dtype(np.int64), (tokens,)),
        _LOGITS: (np.dtype(np.float32), (config.vocab_size,)),
    }
    if config.thinks:
        found[_TRUNK] = activations, (config.hidden_size,)
    for name, tensor in _tensors(config):
        dtype = numpy_dtype(tensor.dtype) if tensor.dtype else activations
        found[name] = dtype, (tensor.stored(tokens), tensor.width)
    return found


def reusable(config: ModelConfig, common: int, held: int, wanted: int) -> int:
    """From how many of the tokens that a file holds a prompt can go on.

    Args:
        config: the model.
        common: tokens that both begin with.
        held: by the file.
        wanted: tokens of the prompt.
    """
    # Predictions are kept after the last token alone, so a prompt that ends before it has one token to be run.
    start = common - (common == wanted < held)
    return start if all(tensor.reaches(start, held) for _, tensor in _tensors(config)) else 0


def _tensors(config: ModelConfig) -> Iterator[tuple[str, StateTensor]]:
    for layer in range(config.state_layers):
        for tensor in state_tensors(config, layer):
            yield state_name(layer, tensor.name), tensor


def read(file: Path, config: ModelConfig, activations: np.dtype, key: str) -> Held:
    """What a file holds, of which only the header and the tokens are read.

    Args:
        file: to read.
        config: the model.
        activations: type of rows that have none of their own.
        key: of ``key_of``.

    Raises:
        BadInput: it is no such file, or of another bundle, or damaged.
    """
    fix = "name another file, or remove this one"
    if not file.is_file():
        raise BadInput(f"{file} is not a regular file", fix=fix)
    try:
        header, tensors = read_header(file)
    except OSError as error:
        raise BadInput(f"cannot read {file}", str(error), fix) from error
    said = json.loads(header).get("__metadata__")
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        raise BadInput(f"{file} is not a prompt cache", fix=fix)
    if said.get("bundle") != key:
        values = f"it is of {str(said.get('bundle'))[:12]}, this is {key[:12]}"
        raise BadInput(f"the prompt cache {file} was made with another bundle, or other options", values, fix)
    tokens = tensors.get(_TOKENS)
    wanted = layout(config, activations, tokens.shape[0] if tokens and tokens.shape else 0)
    found = {name: (_dtype(tensor), tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if wrong or tokens is None or not tokens.shape[0]:
        raise BadInput(f"{file} does not hold the state of this model", f"wrong: {', '.join(wrong[:3])}", fix)
    return Held(tokens.numpy(), tensors)


def _dtype(tensor: StoredTensor) -> np.dtype | None:
    names = [name for name, stored in SAFETENSORS_NAMES.items() if stored == tensor.dtype]
    return numpy_dtype(names[0]) if names else None


def write(file: Path, arrays: dict[str, np.ndarray], key: str) -> None:
    """Write a file, whole or not at all."""
    # Wide items first, so that each lies at a multiple of its size.
    ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": _FORMAT, "bundle": key}}
    end = 0
    for name, array in ordered:
        offsets = [end, end + array.nbytes]
        header[name] = {"dtype": SAFETENSORS_NAMES[array.dtype.name], "shape": array.shape, "data_offsets": offsets}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for _, array in ordered:
                stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class PromptCache:
    """A file, and what is to be done with it.

    Attributes:
        file: need not exist, unless ``read_only``.
        key: of ``key_of``.
        all: keep what was generated as well, not the prompt alone.
        read_only: do not write it.
    """

    file: Path
    key: str
    all: bool = False
    read_only: bool = False

    def __post_init__(self) -> None:
        if not (self.file if self.read_only else self.file.parent).exists():
            what = f"{self.file} does not exist" if self.read_only else f"there is no folder {self.file.parent}"
            raise BadInput(f"the prompt cache cannot be used: {what}", fix="give another --prompt-cache")

    def over(self, executor: Any, prompt: Sequence[int]) -> CachedPrompt:
        """An executor for one prompt, of which it runs only what the file does not hold.

        Raises:
            BadInput: the file is no prompt cache of this bundle.
        """
        held = read(self.file, executor.config, executor.activations, self.key) if self.file.exists() else None
        return CachedPrompt(executor, self, prompt, held)


@dataclass
class CachedPrompt:
    """An executor (``generate.Executor``) for one sequence that begins with a prompt.

    Attributes:
        executor: a ``GraphExecutor``, that runs what is not held.
        cache: the file.
        prompt: its tokens.
        held: what the file holds; None where there is none.
        reused: how many of the prompt's tokens it was that are not run.
        trunk: as of every executor.
    """

    executor: Any
    cache: PromptCache
    prompt: Sequence[int]
    held: Held | None
    reused: int = 0
    trunk: np.ndarray | None = None
    _ahead: int = 0  # tokens that are held and are yet to be fed
    _tokens: list[int] = field(default_factory=list)
    _state: Any = None
    _last: tuple[np.ndarray, np.ndarray] | None = None  # positions [Q] of the last step, and their logits [Q, V]
    _written: int = 0  # tokens that the file holds, of this sequence

    def __post_init__(self) -> None:
        if self.held is not None:
            config, count = self.executor.config, len(self.held.tokens)
            self.reused = reusable(config, self.held.common(self.prompt), count, len(self.prompt))
            self._written = count if self.reused == count else 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    def new_state(self, batch: int = 1) -> Any:
        """A state that holds what is reused of the prompt, and takes it as new all the same."""
        assert batch == 1, "a file holds one sequence"
        state = self.executor.new_state()
        if self.reused:
            assert self.held is not None
            self._tokens = list(self.prompt[: self.reused])
            state.restore(self.reused, {name: tensor.numpy() for name, tensor in self.held.tensors.items()})
            state.history_BN = self.executor.history_of(np.array(self._tokens))
        self._ahead, self._state = self.reused, state
        return state

    def step(
        self,
        tokens_BS: np.ndarray,
        state: Any,
        *,
        logits_at_BQ: np.ndarray,
        lengths_B: np.ndarray | None = None,
        coming: Coming | None = None,
        commit: bool = True,
    ) -> np.ndarray:
        """As ``Executor.step``; of tokens that are held, nothing is run."""
        assert commit, "nothing is drafted behind a prompt cache"
        skipped = min(self._ahead, tokens_BS.shape[1])
        self._ahead -= skipped
        if skipped == tokens_BS.shape[1]:
            return self._kept(logits_at_BQ)
        tokens_BS, logits_at_BQ = tokens_BS[:, skipped:], logits_at_BQ - skipped
        # Steps may have been taken back, of which the state is no longer.
        del self._tokens[int(state.lengths_B[0]) :]
        logits = self.executor.step(tokens_BS, state, logits_at_BQ=logits_at_BQ, lengths_B=lengths_B, coming=coming)
        self.trunk = self.executor.trunk
        self._last = logits_at_BQ[0] + len(self._tokens), logits[0]
        self._tokens += tokens_BS[0].tolist()
        if not self.cache.all and int(state.lengths_B[0]) == len(self.prompt):
            self._write()
        return logits

    def _kept(self, logits_at_BQ: np.ndarray) -> np.ndarray:
        """Logits that a file has: none, or those after its last token."""
        assert self.held is not None
        if not logits_at_BQ.size:
            return np.zeros((1, 0, self.executor.config.vocab_size), np.float32)
        if _TRUNK in self.held.tensors:
            self.trunk = self.held.tensors[_TRUNK].read()[None, None]
        return self.held.tensors[_LOGITS].read()[None, None]

    def close(self) -> None:
        """Write what was generated as well, if that is to be kept."""
        if self.cache.all:
            self._write()

    def _write(self) -> None:
        count = int(self._state.lengths_B[0])
        if self.cache.read_only or count == self._written:
            return
        assert self._last is not None
        place = self._last[0].tolist().index(count - 1)
        arrays = {_TOKENS: np.array(self._tokens[:count], np.int64), _LOGITS: self._last[1][place]}
        if self.trunk is not None:
            arrays[_TRUNK] = self.trunk[0, place]
        write(self.cache.file, arrays | self._state.stored(), self.cache.key)
        self._written = count
