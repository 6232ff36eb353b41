"""What is asked of a bisection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asked:
    """Options.

    Attributes:
        against: a bundle or an ONNX file that is to be the reference; a bundle's checkpoint, unless given.
        checkpoint: where a bundle's is now, if it has moved.
        prompt: text to run; built-in text unless given.
        inputs: ``.npz`` of a graph's inputs by name, for foreign graphs.
        seed: of tokens and inputs that are random.
        out: folder to make of the smallest case.
        engine: compare what TensorRT makes of the graph with what onnxruntime does.
    """

    against: Path | None = None
    checkpoint: Path | None = None
    prompt: str | None = None
    inputs: Path | None = None
    seed: int = 0
    out: Path | None = None
    engine: bool = False
