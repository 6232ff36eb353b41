"""Writing a trained model as a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from training.data import BOS, EOS, PAD
from v4export.checkpoint.names import expected
from v4export.config import ModelConfig
from v4export.config.readers import to_hub_config
from v4export.precision import FLOAT32_ROLES


def save(folder: Path, config: ModelConfig, weights: Mapping[str, torch.Tensor], tokenizer: Tokenizer) -> None:
    """config.json, model.safetensors, and the files of a tokenizer.

    Args:
        folder: made where it is missing.
        config: the model.
        weights: its state dict.
        tokenizer: what it was trained with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", to_hub_config(config))
    save_file({name: one.contiguous() for name, one in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write(folder / "tokenizer_config.json", kind | special | {"model_max_length": config.max_position_embeddings})
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_ids[0]}
    _write(folder / "generation_config.json", ids | {"pad_token_id": config.pad_token_id})


def in_bfloat16(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict rounded to bfloat16, but for what every checkpoint has in float32."""
    exact = {one.name for one in expected(config).values() if one.role in FLOAT32_ROLES}
    return {name: one if name in exact else one.bfloat16() for name, one in weights.items()}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
