"""What graphs are fed: the steps of a sound execution, or numbers of a seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from v4export.bisect.graph import Arrays
from v4export.errors import BadInput, NotSupported
from v4export.package.bundle import Bundle
from v4export.runtime.onnx import OnnxExecutor
from v4export.runtime.state import State
from v4export.verify.verification import BODIES_CHUNK, CHUNK

#: Axes of a decoder's inputs that no number is written for.
_SIZES = {"B": 1, "S": 3, "Q": 3, "T": 16}


def steps_of(bundle: Bundle, prompts: Sequence[Sequence[int]]) -> dict[str, list[Arrays]]:
    """Inputs of a bundle's graphs in the steps of some sequences, by the graphs' names.

    The longest prompt runs alone, two more as a batch of unequal lengths. Steps of few tokens over an empty and over a
    filled state, which the portable bodies can run, stand before and behind those of a prefill's size.
    """
    if bundle.sharding:
        raise NotSupported(
            "graphs of a shared model cannot be bisected", f"{bundle.sharding}", "build it without --tp, --ep and --pp"
        )
    taken: dict[str, list[Arrays]] = defaultdict(list)

    def seen(graph: str, inputs: Arrays) -> None:
        taken[graph].append({name: array.copy() for name, array in inputs.items()})

    how: dict[str, Any] = {"max_seq_len": bundle.max_seq_len, "prepack": False, "thought_taps": True, "on_run": seen}
    executor = OnnxExecutor(bundle.folder, bundle.config, bundle.precision, **how)
    by_length = sorted(prompts, key=len)
    for batch in ([by_length[-1]], by_length[-3:-1]):
        _run(executor, batch)
    if executor.tail is not None and len(by_length[-1]) > 1:
        _run(executor, by_length[-1:], remembered=len(by_length[-1]) // 2)
    return dict(taken)


def _run(executor: OnnxExecutor, batch: Sequence[Sequence[int]], remembered: int = 0) -> None:
    if not batch:
        return
    state = executor.new_state(len(batch))
    drafts = executor.new_draft_state(len(batch)) if executor.config.drafts else None
    for start in range(0, remembered, CHUNK):
        executor.remember(np.array([p[start : min(start + CHUNK, remembered)] for p in batch], np.int64), state)
    longest = max(map(len, batch))
    ends = [remembered + BODIES_CHUNK, *range(remembered + BODIES_CHUNK + CHUNK, longest - BODIES_CHUNK, CHUNK)]
    ends += [max(ends[-1], longest - BODIES_CHUNK - 1), longest - 1, longest]
    start = remembered
    for end in ends:
        if start < end <= longest:
            _step(executor, [prompt[start:end] for prompt in batch], state, drafts)
            start = end


def _step(executor: OnnxExecutor, pieces: Sequence[Sequence[int]], state: State, drafts: State | None) -> None:
    """One step; the layer that drafts, of these tokens as of any; and a thought about them if they are few."""
    lengths, S = np.array([len(piece) for piece in pieces]), max(map(len, pieces))
    ids = np.zeros((len(pieces), S), np.int64)
    for row, piece in zip(ids, pieces, strict=True):
        row[: len(piece)] = piece
    every = np.broadcast_to(np.arange(S), ids.shape)
    before = state.lengths_B.copy()
    executor.step(ids, state, logits_at_BQ=every, lengths_B=lengths)
    if drafts and executor.features is not None:
        executor.draft(ids, executor.features, drafts, logits_at_BQ=every, lengths_B=lengths)
    if executor.trunk is not None and S <= BODIES_CHUNK and lengths.min() == S:
        for looped in (False, True):
            executor.think(executor.trunk, state, at_BQ=before[:, None] + every, looped=looped)


def is_small(inputs: Arrays) -> bool:
    """Whether portable bodies, which gather the matrices of every token's experts, can run it."""
    ids = inputs.get("input_ids")
    return ids is None or ids.shape[1] <= BODIES_CHUNK


def is_decoder(model: onnx.ModelProto) -> bool:
    """Whether a graph's inputs are those of the state contract."""
    return {"input_ids", "position"} <= {value.name for value in model.graph.input}


def decoder_inputs(model: onnx.ModelProto, seed: int) -> Arrays:
    """Inputs of a graph of the state contract: tokens, and rows of the state, by a seed.

    Raises:
        BadInput: an input has an axis that the contract does not know.
    """
    rng = np.random.default_rng(seed)
    vocabulary = next((v for v in model.graph.output if v.name == "logits"), model.graph.output[0])
    V = vocabulary.type.tensor_type.shape.dim[-1].dim_value or 2
    fixed: Mapping[str, np.ndarray] = {
        "input_ids": rng.integers(0, V, (_SIZES["B"], _SIZES["S"])),
        "position": np.full(_SIZES["B"], _SIZES["T"]),
        "logits_at": np.tile(np.arange(_SIZES["Q"]), (_SIZES["B"], 1)),
        "decoder_start": np.zeros(_SIZES["B"], np.int64),
    }
    found: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        if value.name in fixed:
            found[value.name] = fixed[value.name].astype(np.int64)
            continue
        try:
            shape = [_size(d.dim_param) if d.dim_param else d.dim_value for d in kind.shape.dim]
        except (KeyError, ValueError):
            dims = [d.dim_param or d.dim_value for d in kind.shape.dim]
            raise BadInput(f"input {value.name} is not of the state contract", f"{dims}", "give --inputs") from None
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        whole = dtype.kind in "iu"
        found[value.name] = (rng.integers(0, 2, shape) if whole else rng.standard_normal(shape)).astype(dtype)
    return found


def _size(dim: str) -> int:
    letter, _, every = dim.partition("/")
    return _SIZES[letter] // int(every or 1)
