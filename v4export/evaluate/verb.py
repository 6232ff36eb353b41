"""From a checkpoint and what a user asks for to an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from v4export.checkpoint.activation_scales import FILE, read_scales
from v4export.checkpoint.audit import Audit
from v4export.checkpoint.index import Checkpoint
from v4export.errors import BadInput
from v4export.evaluate.budget import budget
from v4export.evaluate.evaluation import measure, steps
from v4export.evaluate.recipes import Subject
from v4export.evaluate.results import Evaluation
from v4export.evaluate.windows import cut, read_text
from v4export.package.bundle import Bundle
from v4export.progress import Stages
from v4export.runtime.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Asked:
    """What a user asks for.

    Attributes:
        text: file.
        precisions: names of recipes, ``native`` or ``all``.
        keep: exceptions to each.
        state_fp8: evaluate each once more with cached rows in E4M3.
        context: tokens of a window.
        tokens: most tokens of the text to use.
        device: that runs a bundle's graph.
    """

    text: Path
    precisions: tuple[str, ...]
    keep: tuple[str, ...] = ()
    state_fp8: bool = False
    context: int | None = None
    tokens: int | None = None
    device: str = "cpu"


def evaluate(
    model: str,
    checkpoint: Checkpoint,
    account: Audit,
    asked: Asked,
    stages: Stages,
    *,
    token_map: np.ndarray | None = None,
    scales: Mapping[str, np.ndarray] | None = None,
    bundle: Bundle | None = None,
) -> Evaluation:
    """Evaluate recipes, and a bundle's graph beside its own.

    Args:
        model: what the user calls it.
        checkpoint: it, or what the bundle was made from.
        account: where its weights are.
        asked: what for.
        stages: shows progress.
        token_map: token id -> compressed id, of a model with Engram.
        scales: by which inputs are rounded to FP8.
        bundle: whose graph is run.

    Raises:
        BadInput: of the text there is not a window, or a recipe lacks something.
        NotSupported: a recipe cannot be had.
        NotEnough: a layer does not fit into memory.
    """
    config = replace(checkpoint.config, state_fp8=False)
    limited = config
    if bundle:
        limited = replace(config, max_position_embeddings=min(bundle.max_seq_len, config.max_position_embeddings))
        if bundle.config.left_out_layers:
            raise BadInput(
                f"{model} has the first {config.num_layers} of {config.num_layers + config.left_out_layers} layers",
                fix="its predictions are worth nothing; evaluate the checkpoint with --layers 0:N",
            )
    tokenizer = load_tokenizer(checkpoint.directory)
    windows = cut(tokenizer, read_text(asked.text), limited, asked.context, asked.tokens)
    subject = Subject(config, account.weights, token_map, scales)
    lanes, notes = subject.lanes(asked.precisions, asked.keep, asked.state_fp8)
    if bundle:
        if bundle.precision.inputs:
            subject = replace(subject, scales=read_scales(bundle.folder / FILE, config).values)
        own = subject.lane(bundle.precision, bundle.config.state_fp8)
        lanes = [*(lane for lane in lanes if lane.name != own.name), own]
    plan = budget(subject.reference, lanes, windows.ids.shape[1], len(windows.ids))
    with stages.stage("evaluate", steps(subject, lanes, windows, plan, bundle)) as advance:
        found = measure(subject, lanes, windows, plan, bundle=bundle, device=asked.device, advance=advance)
    return Evaluation(
        model,
        str(asked.text),
        windows.text_tokens,
        len(windows.ids),
        windows.ids.shape[1],
        windows.scored,
        config.num_layers,
        config.num_layers + config.left_out_layers,
        found,
        tuple(notes),
    )
