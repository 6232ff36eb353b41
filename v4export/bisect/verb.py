"""``v4export bisect``: a bundle with its checkpoint or with another one, graphs with each other or with engines."""

from __future__ import annotations

from pathlib import Path

from v4export.bisect.asked import Asked
from v4export.bisect.bundles import with_bundle, with_checkpoint
from v4export.bisect.foreign import foreign, with_engine
from v4export.bisect.result import Bisection
from v4export.errors import BadInput
from v4export.package.bundle import MANIFEST, Bundle
from v4export.progress import Stages


def bisect(subject: Path, asked: Asked, stages: Stages) -> Bisection:
    """Find the first node at which ``subject``, a bundle or an ONNX file, parts from what it is to be like.

    Raises:
        BadInput: something is no bundle or graph, or inputs do not go together.
        NotSupported: a reference cannot be run here.
    """
    if asked.out is not None and asked.out.exists():
        raise BadInput(f"{asked.out} exists", fix="choose another -o")
    if not (subject / MANIFEST).is_file() and subject.suffix != ".onnx":
        raise BadInput(f"{subject} is neither a bundle nor an ONNX file", fix="make a bundle with v4export build")
    if asked.engine and asked.against is not None:
        raise BadInput("an engine is compared with its own graph", fix="give --engine or --against, not both")
    if subject.is_dir():
        bundle = Bundle.open(subject)
        if asked.engine:
            return with_engine(bundle, asked, stages)
        return with_bundle(bundle, asked, stages) if asked.against else with_checkpoint(bundle, asked, stages)
    if asked.against is None and not asked.engine:
        raise BadInput(f"{subject} is to be compared with nothing", fix="give --against OTHER.onnx, or --engine")
    return foreign(subject, asked, stages)
