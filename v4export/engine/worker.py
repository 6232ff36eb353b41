"""The build itself, in a process of its own: ``python -m v4export.engine.worker REQUEST.json RESULT.json``.

TensorRT aborts and segfaults on some graphs, and its memory is only surely given back when its process ends. The log
goes to stdout, a line a message. The result says ``kind``: ``ok``, or which of the failures that the parent explains.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from v4export.engine.evidence import (
    NetworkFacts,
    prove_loads,
    prove_network,
    prove_plan,
    prove_plugins,
    read_network,
    read_plan,
    read_weights,
)
from v4export.progress import peak_memory_mib

#: A message that means the engine would compute something else than the graph says.
DROPPED = re.compile(r"Unused Input|input.* (?:dropped|ignored)", re.IGNORECASE)
WRONG_TARGET = re.compile(r"Cannot compile for target\(s\) (?P<targets>sm\d+(?:, sm\d+)*), because (?P<why>[^.]*)")
#: Failures to reach a GPU follow any other error on a machine without one, and say nothing of its cause.
NOISE = re.compile(r"catchCudaError|^--- (Begin|End) node ---")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+)")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+)")
_PR_SET_PDEATHSIG = 1


class Failed(Exception):
    """A failure with the ``kind`` the parent explains, and its details."""

    def __init__(self, kind: str, **details: Any) -> None:
        super().__init__(kind)
        self.kind, self.details = kind, details


class Log:
    """What TensorRT said: every line printed, the bad ones kept."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.errors: list[str] = []
        self.activation_bytes = 0
        self.weight_bytes = 0

    def add(self, level: str, message: str) -> None:
        """Takes one message; level is TensorRT's own name of it."""
        if level == "VERBOSE":
            return
        print(f"{level}: {message}", flush=True)
        if level == "WARNING":
            self.warnings.append(message)
        elif level != "INFO" and not NOISE.search(message):
            self.errors.append(message)
        elif found := _ACTIVATIONS.search(message):
            self.activation_bytes = max(self.activation_bytes, int(found[1]))
        elif found := _WEIGHTS.search(message):
            self.weight_bytes = max(self.weight_bytes, int(found[1]))

    def check_dropped(self) -> None:
        """Raises if a warning says that part of the graph was left out."""
        if dropped := [message for message in self.warnings if DROPPED.search(message)]:
            raise Failed("dropped", messages=dropped)


def make_logger(trt: Any, log: Log) -> Any:
    """TensorRT's logger interface over ``log``."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(str(severity).rpartition(".")[2], message)

    return Logger()


def parse(trt: Any, logger: Any, path: str, log: Log) -> tuple[Any, Any]:
    """The builder, and the network parsed from the file; external data is found beside it."""
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        nodes = [{"node": e.node_name(), "op": e.node_operator(), "message": _first_line(e.desc())} for e in errors]
        raise Failed("parse", nodes=nodes, messages=log.errors)
    log.check_dropped()
    return builder, network


def _first_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not NOISE.search(line)]
    return " ".join(lines)[:600]


def register_plugins(trt: Any, request: dict[str, Any]) -> tuple[int, Any]:
    """How many nodes of the graph launch kernels, and their plugins' creators, registered."""
    if request["plugins"] == "none":
        return 0, None
    # Imported where there are any: ops bring PyTorch along, which takes longer than many a build.
    from v4export.plugins.kernels import plugin_aot, plugin_v3
    from v4export.plugins.kernels.nodes import kernel_nodes

    nodes = kernel_nodes(Path(request["onnx"]))
    kinds = {node.op_type: (len(node.input), len(node.output)) for node in nodes}
    if request["plugins"] == "aot":
        plugin_aot.register(importlib.import_module(f"{request['backend']}.plugin"), trt, kinds)
        return len(nodes), None
    return len(nodes), plugin_v3.register(trt, kinds)


def configure(trt: Any, builder: Any, request: dict[str, Any]) -> Any:
    """The builder's configuration: targets, workspace and profiles.

    Targets are always named: without them, types that only some of the default targets have are built silently.
    """
    config = builder.create_builder_config()
    if request["workspace_bytes"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    # What a graph computes in float32 (routing, hyper-connections, pooling) is meant to be, at any precision.
    config.clear_flag(trt.BuilderFlag.TF32)
    if request["names_capabilities"]:
        config.num_compute_capabilities = len(request["targets"])
        for index, target in enumerate(request["targets"]):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index):
                raise Failed("target", targets=[target], why="this version does not accept it")
    if request["inspect"]:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for wanted in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, bounds in wanted["shapes"].items():
            profile.set_shape(name, *(tuple(bound) for bound in bounds))
        if config.add_optimization_profile(profile) < 0:
            raise Failed("build", messages=[f"profile {wanted['name']} was refused"])
    return config


def write_plan(trt: Any, builder: Any, network: Any, config: Any, path: Path, log: Log) -> str:
    """Builds straight into the file, which needs half the memory of building into a buffer. Returns the sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        problems: list[OSError] = []

        class Writer(trt.IStreamWriter):
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: Any) -> int:
                try:
                    file.write(data)
                except OSError as e:
                    problems.append(e)
                    return 0
                digest.update(data)
                return len(data)

        done = builder.build_serialized_network_to_stream(network, config, Writer())
        file.flush()
        os.fsync(file.fileno())
    if problems:
        raise problems[0]
    if not done or log.errors:
        for message in log.errors:
            if found := WRONG_TARGET.search(message):
                raise Failed("target", targets=found["targets"].split(", "), why=found["why"])
        raise Failed("build", messages=log.errors or ["the builder returned nothing and said nothing"])
    return digest.hexdigest()


def build(request: dict[str, Any]) -> dict[str, Any]:
    """One build, as the request says; the engine appears under its name only when every claim about it holds."""
    start = time.monotonic()
    trt = importlib.import_module(request["backend"])
    log, engine = Log(), Path(request["engine"])
    precision, partial = request["precision"], Path(request["partial"])
    logger = make_logger(trt, log)
    launches, kept = register_plugins(trt, request)
    builder, network = parse(trt, logger, request["onnx"], log)
    facts: NetworkFacts = read_network(network)
    proofs = [prove_network(precision, facts), *prove_plugins(launches, facts)]
    if not all(proof.holds for proof in proofs):
        raise Failed("precision", stage="graph", proofs=[asdict(proof) for proof in proofs])
    weights = read_weights(Path(request["onnx"]), precision)
    sha256 = write_plan(trt, builder, network, configure(trt, builder, request), partial, log)
    log.check_dropped()
    plan = read_plan(partial)
    proofs += prove_plan(partial, plan, precision, weights, request["targets"], request["names_capabilities"])
    if request["inspect"]:
        proofs.append(prove_loads(trt, partial))
    if not all(proof.holds for proof in proofs):
        raise Failed("precision", stage="engine", proofs=[asdict(proof) for proof in proofs])
    os.replace(partial, engine)
    del kept  # TensorRT does not own the creators that it was given
    return {
        "kind": "ok",
        "bytes": plan.size,
        "sha256": sha256,
        "version": str(trt.__version__),
        "layers": dict(facts.layers),
        "dtypes": dict(facts.dtypes),
        "proofs": [asdict(proof) for proof in proofs],
        "warnings": list(dict.fromkeys(log.warnings)),
        "activation_bytes": log.activation_bytes,
        "weight_bytes": log.weight_bytes,
        "seconds": time.monotonic() - start,
        "peak_mib": peak_memory_mib(),
    }


def _die_with_parent() -> None:
    """On Linux, ends this process when the one that started it is killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(request_path: str, result_path: str) -> None:
    """Runs one request and writes its result; any failure is a result too."""
    _die_with_parent()
    request = json.loads(Path(request_path).read_text())
    try:
        result = build(request)
    except Failed as e:
        result = {"kind": e.kind, **e.details}
    except MemoryError:
        result = {"kind": "memory", "messages": ["MemoryError"]}
    except OSError as e:
        result = {"kind": "disk" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "crash", "messages": [str(e)]}
    except Exception:
        result = {"kind": "crash", "messages": [traceback.format_exc()]}
    if result["kind"] != "ok":
        Path(request["partial"]).unlink(missing_ok=True)
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:3])
