"""Builds an engine from an ONNX file: starts the child that does it, watches over it, and explains how it failed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from v4export.engine.backend import choose_backend, cuda_devices, package_version, plugin_environment
from v4export.engine.profiles import ShapeOverride, derive_profiles, input_dims, most_sequences
from v4export.engine.targets import resolve_targets
from v4export.errors import BadInput, NotEnough, NotSupported, V4Error
from v4export.precision import Precision

_TAIL = 12
_NAMES = re.compile(r"(?<=named )\S+|(?<=input )\S+|\d+")
_MEMORY_WORDS = ("out of memory", "bad_alloc", "OutOfMemory", "insufficient memory", "workspace limit")


@dataclass(frozen=True)
class EngineReport:
    """What was built, and what shows that it is what was asked for.

    Attributes:
        path, bytes, sha256: the engine file, its size and digest.
        backend: import name of the package that built it.
        backend_version: that package's version; an engine runs with this version only.
        targets: compute capabilities it was built for.
        precision: what was asked for and shown to be there.
        plugins: how kernels got in, a name of ``implementations.WAYS``.
        max_batch: most sequences of a step.
        layers: layers of the parsed network, by type.
        dtypes: outputs of those layers, by type.
        proofs: (claim, evidence), each checked.
        warnings: what TensorRT warned of.
        seconds: time of the build.
        peak_mib: peak memory of the building process.
        weights_mib: weights in the engine.
        activations_mib: GPU memory one execution context needs beside them, in its largest profile.
    """

    path: Path
    bytes: int
    sha256: str
    backend: str
    backend_version: str
    targets: tuple[str, ...]
    precision: str
    plugins: str
    max_batch: int
    layers: dict[str, int]
    dtypes: dict[str, int]
    proofs: list[tuple[str, str]]
    warnings: list[str]
    seconds: float
    peak_mib: float
    weights_mib: float
    activations_mib: float


def build_engine(
    onnx: Path,
    engine: Path,
    *,
    precision: Precision,
    targets: Sequence[str] | None = None,
    backend: str | None = None,
    max_batch: int = 1,
    max_seq_len: int = 4096,
    max_chunk: int = 512,
    max_steps: int = 1,
    workspace_gib: float | None = None,
    shapes: ShapeOverride | None = None,
    plugins: str = "none",
    weight_streaming: bool = False,
    refit: bool = False,
    refit_from: Path | None = None,
    timeout_s: float | None = None,
    log: Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> EngineReport:
    """Builds ``engine`` from ``onnx``; on any failure nothing is left under that name or beside it.

    Args:
        onnx: the graph; external data is found beside it.
        engine: the file to write; one that is there is replaced when the build has succeeded.
        precision: the recipe; the build fails if the engine does not hold it.
        targets: compute capabilities or device names; see ``resolve_targets``.
        backend: tensorrt or tensorrt_rtx; see ``choose_backend``.
        max_batch: largest B.
        max_seq_len: largest T.
        max_chunk: largest S of a prefill step.
        max_steps: of a thought.
        workspace_gib: limit on the builder's scratch memory.
        shapes: a user's own shapes, instead of the two derived profiles.
        weight_streaming: let a program keep the engine's weights in host memory and send them as they are needed.
        refit: let a program replace the engine's weights; TensorRT-RTX needs a GPU's driver to build such an engine.
        refit_from: an engine of the same graph with other weights, built to be refitted: give it this graph's weights
            instead of building.
        plugins: how the graph's kernels get in, a name of ``implementations.WAYS``.
        timeout_s: after which the build is stopped.
        log: file for the builder's log.
        on_line: called with each line of it, from another thread.

    Raises:
        BadInput: the file, the targets, the precision or the shapes are wrong.
        NotEnough: memory, disk or time ran out.
        NotSupported: TensorRT cannot build this graph.
    """
    if not onnx.is_file():
        raise BadInput("There is no ONNX file to build from", f"path: {onnx}", "Export the model first.")
    name = choose_backend(backend)
    present = [device.capability for device in cuda_devices()]
    chosen = tuple(target.name for target in resolve_targets(targets, precision, name, present, plugins != "none"))
    sizes = {"max_batch": max_batch, "max_seq_len": max_seq_len, "max_chunk": max_chunk, "max_steps": max_steps}
    profiles = derive_profiles(input_dims(onnx), **sizes, override=shapes)
    engine.parent.mkdir(parents=True, exist_ok=True)
    partial = engine.with_name(engine.name + ".partial")
    request = {
        "onnx": str(onnx.resolve()),
        "engine": str(engine.resolve()),
        "partial": str(partial.resolve()),
        "backend": name,
        "names_capabilities": name == "tensorrt_rtx",
        "targets": chosen,
        "precision": precision.name,
        "stored": precision.stored,
        "inputs": precision.inputs,
        "inspect": bool(set(chosen) & set(present)),
        "profiles": [asdict(profile) for profile in profiles],
        "workspace_bytes": int((workspace_gib or 0) * 2**30),
        "plugins": plugins,
        "flags": [flag for flag, is_on in (("WEIGHT_STREAMING", weight_streaming), ("REFIT", refit)) if is_on],
        "refit_from": str(refit_from.resolve()) if refit_from else None,
    }
    try:
        result, tail = _run(request, timeout_s, log, on_line)
        if result["kind"] != "ok":
            raise _explain(result, request, tail)
    finally:
        partial.unlink(missing_ok=True)
    return EngineReport(
        path=engine,
        bytes=result["bytes"],
        sha256=result["sha256"],
        backend=name,
        backend_version=package_version(name) or result["version"],
        targets=chosen,
        precision=precision.name,
        plugins=plugins,
        max_batch=most_sequences(profiles, max_batch),
        layers=result["layers"],
        dtypes=result["dtypes"],
        proofs=[(proof["claim"], proof["evidence"]) for proof in result["proofs"]],
        warnings=condense(result["warnings"]),
        seconds=result["seconds"],
        peak_mib=result["peak_mib"],
        weights_mib=result["weight_bytes"] / 2**20,
        activations_mib=result["activation_bytes"] / 2**20,
    )


def condense(warnings: Sequence[str]) -> list[str]:
    """Warnings that differ in names and numbers only, once each with their count."""
    kinds: dict[str, list[str]] = {}
    for text in warnings:
        kinds.setdefault(_NAMES.sub("", text), []).append(text)
    return [same[0] + (f" (and {len(same) - 1} more like it)" if len(same) > 1 else "") for same in kinds.values()]


def _run(
    request: dict[str, Any], timeout_s: float | None, log: Path | None, on_line: Callable[[str], None] | None
) -> tuple[dict[str, Any], list[str]]:
    """The child's result and its last lines. Whatever ends this function ends the child.

    A callback that raises must not stop the pipe from being read, which would stop the child: its error waits.
    """
    tail: deque[str] = deque(maxlen=_TAIL)
    broken: list[Exception] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="v4export-engine-")))
        sink = stack.enter_context(log.open("w")) if log else None
        (folder / "request.json").write_text(json.dumps(request))
        files = [str(folder / "request.json"), str(folder / "result.json")]
        child = subprocess.Popen(
            [sys.executable, "-m", "v4export.engine.worker", *files],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, **plugin_environment(request["backend"], folder)},
        )

        def read() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                text = line.rstrip("\n")
                tail.append(text)
                if sink:
                    sink.write(line)
                if on_line and not broken:
                    try:
                        on_line(text)
                    except Exception as e:
                        broken.append(e)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise NotEnough(
                f"The engine was not built within {timeout_s:g} s",
                "last lines of the log:\n  " + "\n  ".join(tail),
                "Give it more time, or export fewer layers.",
            ) from None
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            reader.join(timeout=10)
        if broken:
            raise broken[0]
        if child.returncode or not (folder / "result.json").exists():
            return {"kind": "died", "code": child.returncode}, list(tail)
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result, list(tail)


def _explain(result: dict[str, Any], request: dict[str, Any], tail: list[str]) -> V4Error:
    messages = result.get("messages", [])
    if any(word.lower() in message.lower() for message in messages for word in _MEMORY_WORDS):
        result = {**result, "kind": "memory"}
    return _EXPLANATIONS[result["kind"]](result, request, tail)


def _died(result: dict[str, Any], request: dict[str, Any], tail: list[str]) -> V4Error:
    code = result["code"]
    name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    lines = f"{request['backend']} ended with {name}; last lines of its log:\n  " + "\n  ".join(tail or ["(none)"])
    if code == -signal.SIGKILL:
        return NotEnough(
            "The engine build was killed, most likely because memory ran out",
            lines,
            "Free memory, or build fewer layers: it takes about 1 to 2 times the weights.",
        )
    return NotSupported(
        f"{request['backend']} crashed while building the engine",
        lines,
        "The graph has something it does not expect: v4export.engine.preflight lists what is known to do this.",
    )


def _parse(result: dict[str, Any], request: dict[str, Any], tail: list[str]) -> V4Error:
    nodes = result["nodes"] or [{"node": "", "op": "", "message": "; ".join(result["messages"]) or "no message"}]
    values = "\n  ".join(f"node {n['node'] or '(unnamed)'}, op {n['op'] or '?'}: {n['message']}" for n in nodes)
    ops = ", ".join(sorted({n["op"] for n in nodes if n["op"]})) or "the file"
    return NotSupported(f"{request['backend']} cannot read {ops}", values, "Export it in a form this runtime has.")


def _target(result: dict[str, Any], request: dict[str, Any], tail: list[str]) -> V4Error:
    return BadInput(
        f"The graph cannot be compiled for {', '.join(result['targets'])}",
        f"{result['why']}; targets asked for: {', '.join(request['targets'])}",
        "Leave those targets out, or export in a precision they have.",
    )


def _precision(result: dict[str, Any], request: dict[str, Any], tail: list[str]) -> V4Error:
    failed = "\n  ".join(f"not so: {p['claim']}: {p['evidence']}" for p in result["proofs"] if not p["holds"])
    if result["stage"] == "graph":
        what = f"{request['precision']} was asked for, and the graph does not use it"
        return BadInput(what, failed, f"Export with --precision {request['precision']}, or build in the graph's own.")
    return NotSupported(f"The engine is not the {request['precision']} engine asked for", failed, "It was not kept.")


def _dropped(result: dict[str, Any], request: dict[str, Any], tail: list[str]) -> V4Error:
    return NotSupported(
        f"{request['backend']} would leave part of the graph out",
        "\n  ".join(result["messages"]),
        "The engine would compute something else. Remove the input, or use it in a form this runtime reads.",
    )


def _build(result: dict[str, Any], request: dict[str, Any], tail: list[str]) -> V4Error:
    return NotSupported(
        f"{request['backend']} could not build the engine",
        "\n  ".join(result["messages"][-_TAIL:]),
        "The message names the layer; its ONNX node has the same name.",
    )


def _refit(result: dict[str, Any], request: dict[str, Any], tail: list[str]) -> V4Error:
    return NotSupported(
        f"{request['refit_from']} cannot be given other weights: {result['why']}",
        "\n  ".join(result["messages"][-_TAIL:]),
        "It takes a GPU and an engine that was built with --refit; without --refit-from, an engine is built.",
    )


def _memory(result: dict[str, Any], request: dict[str, Any], tail: list[str]) -> V4Error:
    return NotEnough(
        "There is not enough memory to build the engine",
        "\n  ".join(result["messages"][-3:]),
        "Free memory, raise the workspace limit if one was given, or build fewer layers.",
    )


def _disk(result: dict[str, Any], request: dict[str, Any], tail: list[str]) -> V4Error:
    return NotEnough("The disk is full", f"{request['engine']}: {result['messages'][0]}", "It needs the weights' size.")


def _crash(result: dict[str, Any], request: dict[str, Any], tail: list[str]) -> V4Error:
    return NotSupported("The engine build failed unexpectedly", "\n".join(result["messages"]), "Please report this.")


_EXPLANATIONS: dict[str, Callable[[dict[str, Any], dict[str, Any], list[str]], V4Error]] = {
    "died": _died,
    "parse": _parse,
    "target": _target,
    "precision": _precision,
    "dropped": _dropped,
    "build": _build,
    "refit": _refit,
    "memory": _memory,
    "disk": _disk,
    "crash": _crash,
}
