"""Scales from what a user gives: a text, or a file of scales that was made before."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from v4export.calibrate.calibration import Calibration, calibrate, parts
from v4export.calibrate.magnitudes import Method
from v4export.checkpoint.activation_scales import ActivationScales, check_checkpoint, read_scales
from v4export.checkpoint.audit import Audit
from v4export.checkpoint.index import Checkpoint
from v4export.errors import BadInput
from v4export.evaluate.windows import cut, read_text
from v4export.precision import Precision
from v4export.progress import Stages
from v4export.runtime.tokenizer import load_tokenizer

#: Tokens of a text that are run, unless the user says otherwise.
TOKENS = 16384
#: Ends the name of a file of scales; any other file is text.
SUFFIX = ".safetensors"


def check_asked(recipe: Precision, given: Path | None) -> None:
    """Raise BadInput where a recipe rounds inputs and nothing is given to calibrate by, or the other way round."""
    if recipe.inputs and given is None:
        raise BadInput(
            f"--precision {recipe.name} rounds inputs by scales, and there are none",
            fix="give --calibrate TEXT, or a file that v4export calibrate has made",
        )
    if given is not None and not recipe.inputs:
        raise BadInput(
            f"--precision {recipe.name} rounds no inputs, so there is nothing to calibrate",
            f"{given}",
            "leave --calibrate out, or take --precision fp8-w8a8",
        )


def scales_of(
    given: Path,
    checkpoint: Checkpoint,
    account: Audit,
    stages: Stages,
    *,
    token_map: np.ndarray | None,
    saved: Path | None,
) -> ActivationScales:
    """The scales of a file, or of a text that is run now.

    Args:
        given: the file.
        checkpoint: the model.
        account: where its weights are.
        stages: shows progress.
        token_map: token id -> compressed id, of a model with Engram.
        saved: keeps the state of a calibration that is stopped; the caller removes it. None keeps nothing.
    """
    if given.suffix == SUFFIX:
        found = read_scales(given, checkpoint.config)
        check_checkpoint(found, given, checkpoint.header_hash)
        return found
    return from_text(given, checkpoint, account, stages, token_map=token_map, saved=saved).scales


def from_text(
    text: Path,
    checkpoint: Checkpoint,
    account: Audit,
    stages: Stages,
    *,
    token_map: np.ndarray | None,
    saved: Path | None,
    method: Method | None = None,
    tokens: int = TOKENS,
    context: int | None = None,
) -> Calibration:
    """Run a text; arguments as for ``scales_of``, and as ``v4export calibrate`` has them."""
    config = checkpoint.config
    windows = cut(load_tokenizer(checkpoint.directory), read_text(text), config, context, tokens)
    with stages.stage("calibrate", parts(config)) as advance:
        return calibrate(
            config,
            account.weights,
            windows.ids,
            method or Method(),
            checkpoint=checkpoint.header_hash,
            token_map=token_map,
            saved=saved,
            advance=advance,
        )


def saved_beside(out: Path) -> Path:
    """Where the state of a calibration for some result lies until that is there."""
    return out.with_name(f".{out.name}.calibration")
