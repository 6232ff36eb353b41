"""Checkpoints as commands take them: opened, audited, and what belongs to a bundle's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from v4export import presets
from v4export.checkpoint.aliases import with_drafter
from v4export.checkpoint.audit import Audit, audit
from v4export.checkpoint.index import Checkpoint
from v4export.config import ModelConfig
from v4export.config.chosen import UNCHANGED, Chosen
from v4export.engram.vocabulary import read_token_map
from v4export.errors import BadInput
from v4export.package.bundle import Bundle
from v4export.progress import Stages
from v4export.units import Units

#: Longest sequence of a bundle, where neither the user nor the model says less.
DEFAULT_MAX_SEQ_LEN = 4096


def open_checkpoint(model: str | Path, chosen: Chosen = UNCHANGED) -> Checkpoint:
    """A checkpoint directory, its model changed as the user chose.

    Raises:
        BadInput: there is no such directory, or it is not a checkpoint this project reads, or it lacks what was chosen.
    """
    path = Path(model)
    if not path.exists() and str(model) in presets.names():
        raise BadInput(
            f"{model} is a preset: a configuration without weights",
            fix=f"make random weights for it: v4export synth {model} -o DIR",
        )
    if not path.exists():
        raise BadInput(
            f"{model} is neither a directory nor a preset",
            f"presets: {', '.join(presets.names())}",
            "give a Hugging Face checkpoint directory",
        )
    checkpoint = Checkpoint.open(path)
    config = chosen.of(checkpoint.config)
    return replace(checkpoint, config=config, tensors=with_drafter(config, checkpoint.tensors))


def audited(model: str | Path, chosen: Chosen, scan_values: bool, stages: Stages) -> tuple[Checkpoint, Audit]:
    """Open and audit a checkpoint."""
    checkpoint = open_checkpoint(model, chosen)
    return checkpoint, account_of(checkpoint, scan_values, stages)


def account_of(checkpoint: Checkpoint, scan_values: bool, stages: Stages, units: Units | None = None) -> Audit:
    """The audit of a checkpoint, whose values are read once for all that is finished of a build."""
    depends = [checkpoint.state, checkpoint.config]
    with stages.stage("audit", checkpoint.nbytes) as advance:
        scan_values = scan_values and not (units and units.find("values", depends, bool))
        account = audit(checkpoint, scan_values=scan_values, advance=advance)
        if scan_values and units:
            units.make("values", depends, lambda _: True)
    return account


def longest(config: ModelConfig, asked: int | None) -> int:
    """Longest sequence of a bundle."""
    own = config.max_position_embeddings
    if asked and asked > own:
        raise BadInput(
            "--max-seq-len is longer than the model",
            f"{asked}, max_position_embeddings is {own}",
            f"give at most {own}",
        )
    return asked or min(DEFAULT_MAX_SEQ_LEN, own)


def token_map_of(config: ModelConfig, directory: Path) -> np.ndarray | None:
    """Token id -> compressed id, by which Engram looks rows up."""
    return read_token_map(directory, config.engram, config.vocab_size) if config.engram else None


def read_expert_load(file: Path) -> dict[int, list[float]]:
    """Layer -> how often each of its experts is chosen, of a JSON file.

    Raises:
        BadInput: it is not that.
    """
    try:
        return {
            int(layer): [float(count) for count in counts] for layer, counts in json.loads(file.read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        form = 'give {"3": [17, 4, ..], ..}: for a layer, how often each of its experts was chosen'
        raise BadInput(f"{file} says nothing of experts", str(error), form) from error


def first_layers(layers: range | None) -> int | None:
    """How many first layers a range is."""
    if layers is not None and layers.start:
        values = f"{layers.start}:{layers.stop}"
        raise BadInput("layers that are not the first ones cannot be had alone", values, "give --layers 0:N")
    return None if layers is None else layers.stop


def checkpoint_of(bundle: Bundle, given: str | Path | None, stages: Stages) -> tuple[Checkpoint, Audit]:
    """The checkpoint that a bundle, whose files are checked, was made from."""
    bundle.check_files()
    opened, account = audited(given or bundle.source, bundle.chosen, False, stages)
    recorded = bundle.manifest["checkpoint"]["header_sha256"]
    if opened.header_hash != recorded:
        raise BadInput(
            f"{opened.directory} is not the checkpoint that {bundle.folder} was made from",
            f"header hash {opened.header_hash[:12]}, the manifest has {recorded[:12]}",
            "give the right one with --checkpoint, or build again",
        )
    return opened, account
