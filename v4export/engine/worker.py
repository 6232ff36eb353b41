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
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from v4export.children import end_with_parent
from v4export.engine.evidence import (
    QUANTIZED,
    WORDS,
    NetworkFacts,
    Proof,
    prove_loads,
    prove_network,
    prove_plan,
    prove_plugins,
    prove_sums,
    read_network,
    read_plan,
    read_weights,
)
from v4export.engine.log import NOISE, Failed, Log, make_logger
from v4export.engine.refit import refitted
from v4export.progress import peak_memory_mib

WRONG_TARGET = re.compile(r"Cannot compile for target\(s\) (?P<targets>sm\d+(?:, sm\d+)*), because (?P<why>[^.]*)")


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
    for flag in request["flags"]:
        config.set_flag(getattr(trt.BuilderFlag, flag))
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
    stored, partial = [*request["stored"]], Path(request["partial"])
    logger = make_logger(trt, log)
    launches, kept = register_plugins(trt, request)
    builder, network = parse(trt, logger, request["onnx"], log)
    facts: NetworkFacts = read_network(network)
    weights = read_weights(Path(request["onnx"]), [*stored, WORDS])
    proofs = [*prove_network(stored, weights, facts, request["inputs"]), *prove_plugins(launches, facts)]
    proofs += prove_sums(Path(request["onnx"]), facts)
    if not all(proof.holds for proof in proofs):
        raise Failed("precision", stage="graph", proofs=[asdict(proof) for proof in proofs])
    if launches and stored[0] in QUANTIZED:
        stored.append(WORDS)
    if request["refit_from"]:
        sha256 = refitted(trt, logger, Path(request["refit_from"]), request["onnx"], partial, log)
    else:
        config = configure(trt, builder, request)
        for flag in request["flags"]:
            is_on = config.get_flag(getattr(trt.BuilderFlag, flag))
            proofs.append(Proof(f"it was built with {flag}", f"the builder's flag is {is_on}", is_on))
        sha256 = write_plan(trt, builder, network, config, partial, log)
    log.check_dropped()
    plan = read_plan(partial)
    proofs += prove_plan(partial, plan, stored, weights, request["targets"], request["names_capabilities"])
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


def main(request_path: str, result_path: str) -> None:
    """Runs one request and writes its result; any failure is a result too."""
    end_with_parent()
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
