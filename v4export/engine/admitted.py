"""What is proved of an engine's file before TensorRT deserialises it, which believes what it is given."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from v4export.engine.evidence import HEADER_BYTES, PlanHeader, plan_header
from v4export.errors import BadInput
from v4export.side_files import file_of

_AGAIN = "build it again: v4export engine"


def check_engine(folder: Path, report: Mapping[str, Any]) -> Path:
    """The file of an engine that a bundle's manifest reports on, once it is that very file.

    Raises:
        BadInput: it is missing, leads out of the folder, or has another size, hash or version.
    """
    name = report["path"]
    path = file_of(folder, name)
    if path is None:
        raise BadInput(f"{folder} has lost an engine", f"{name} is missing", _AGAIN)
    with path.open("rb") as file:
        size, start = path.stat().st_size, file.read(HEADER_BYTES)
        file.seek(0)
        fault = misfit(report, size, plan_header(start))
        if fault is None and hashlib.file_digest(file, "sha256").hexdigest() != report["sha256"]:
            fault = "its sha256 is not the manifest's"
    if fault:
        raise BadInput(f"{path} is not the engine that was built", fault, _AGAIN)
    return path


def misfit(report: Mapping[str, Any], size: int, header: PlanHeader | None) -> str | None:
    """How a file of ``size`` bytes with this header cannot be the engine that a manifest reports on."""
    if size != report["bytes"]:
        return f"it has {size} bytes, the manifest says {report['bytes']}"
    if header is None:  # only TensorRT-RTX's header is known
        return "it has no header of a plan" if report["backend"] == "tensorrt_rtx" else None
    if header.size != size:
        return f"its header says {header.size} bytes, it has {size}"
    if header.version != report["backend_version"]:
        return f"its header says version {header.version}, the manifest {report['backend_version']}"
    if not set(report["targets"]) <= set(header.targets):
        return f"its header is for {', '.join(header.targets) or 'no GPU'}, the manifest {', '.join(report['targets'])}"
    return None
