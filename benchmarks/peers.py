"""The engines that are measured side by side, and turns of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from engines import CHUNK, THREADS, Child, Onnx, Transformers
from subject import MAX_SEQ_LEN, SUBJECTS, checkpoint

from v4export.config import ModelConfig
from v4export.errors import NotSupported
from v4export.plan.reads import Reads, reads
from v4export.precision import precision
from v4export.runtime.bandwidth import read_bandwidth

#: Cached and new tokens of each column: a prompt, then decoded tokens, of the first of which the floor is told.
CASES = ((0, CHUNK), (128, 1), (2048, 1), (8192, 1))
#: Recipes of this project's, onnxruntime's accuracy level, and whether this project's kernels run them.
OURS = (
    *(("fp32", 0, False), ("int8", 4, False), ("int4", 4, False)),
    *((recipe, 0, True) for recipe in ("fp32", "bf16", "fp8", "mxfp4")),
)
#: Bytes of a number in GGUF's types: blocks of 32 share a float16.
_GGUF_BYTES = {"f32": 4.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
#: What a model is measured in, where not in all: three billion parameters in each would take 60 GB.
ONLY = dict.fromkeys(("large", "large-v4", "large-v41"), ("fp32", "int4", "mxfp4", "f32", "q4_0"))


@dataclass(frozen=True)
class Engine:
    """What is measured: its name, how a child makes it, and the bytes of weights and of state that a token reads."""

    name: str
    make: Callable[..., Any]
    arguments: tuple[Any, ...]
    reads: float
    compiles: bool = False


@dataclass
class Measured:
    """What became of an engine.

    Attributes:
        name: of it.
        reads: bytes of a token.
        seconds: of steps, by case.
        start_s: of each turn, until it could run; a compiled model's first steps are not among them.
        peak_gb: of its process.
        failed: why it could not run, and was not asked again.
    """

    name: str
    reads: float
    seconds: dict[tuple[int, int], list[float]] = field(default_factory=lambda: {case: [] for case in CASES})
    start_s: list[float] = field(default_factory=list)
    peak_gb: float = 0.0
    failed: str = ""

    def cells(self, gbs: float) -> list[str]:
        """Of its row, for a bandwidth; what it failed at first says why."""
        floor_ms = self.reads / gbs / 1e6
        cells = [self._rate(case) for case in CASES]
        if self.failed:
            cells[next((i for i, cell in enumerate(cells) if not cell), 0)] = self.failed
        if not self.start_s:
            return [*cells, *[""] * 4]
        token = self.seconds[CASES[1]]
        share = f"{floor_ms / (float(np.median(token)) * 1e3):.0%}" if token else ""
        peak = f"{self.peak_gb:.2f}" if self.peak_gb else ""
        return [*cells, f"{np.median(self.start_s):.1f}", peak, f"{floor_ms:.1f}", share]

    def _rate(self, case: tuple[int, int]) -> str:
        rates = [case[1] / s for s in self.seconds[case]]
        return f"{max(rates):.1f} ({np.median(rates):.1f})" if rates else ""


@functools.cache
def bandwidth() -> float:
    """Bytes a second."""
    return read_bandwidth(THREADS)


def engines_of(name: str, here: Path, compiled: bool) -> list[Engine]:
    """All that run a subject, whose files are made in a folder unless they are there."""
    config, source = SUBJECTS[name][1](), checkpoint(here, name)
    return [
        *_ours(name, config, source, here),
        *_transformers(config, source, compiled),
        *_llama(name, config, source, here),
    ]


def _ours(name: str, config: ModelConfig, source: Path, here: Path) -> list[Engine]:
    from v4export import api
    from v4export.graphs.kept import graph_for_kernels
    from v4export.plugins.cpu import library

    found = []
    for recipe, level, kernels in OURS:
        if recipe not in ONLY.get(name, (recipe,)):
            continue
        out = here / f"{name}-{recipe}"
        if not out.exists():
            api.export(source, out, precision=recipe, max_seq_len=MAX_SEQ_LEN, scan_values=False)
        how = " --kernels" if kernels else f" --accuracy-level {level}" if level else ""
        if kernels:  # made once and kept, as the files of other engines are
            library()
            graph_for_kernels(out / "model.onnx")
        nbytes = _read(config, recipe, widened=not kernels).total
        found.append(Engine(f"v4export, {recipe}{how}", Onnx, (out, True, MAX_SEQ_LEN, level, kernels), nbytes))
    return found


def _transformers(config: ModelConfig, source: Path, compiled: bool) -> list[Engine]:
    if config.family == "deepseek_v41":  # which it does not have
        return []
    nbytes = _read(config, "fp32").total
    ways = [("transformers, eager", False), *([("transformers, compiled", True)] if compiled else [])]
    return [Engine(title, Transformers, (source, how), nbytes, compiles=how) for title, how in ways]


def _llama(name: str, config: ModelConfig, source: Path, here: Path) -> list[Engine]:
    if not (find_spec("llama_cpp") and find_spec("gguf")):
        return []
    from llama import Llama
    from to_gguf import architecture, convert

    try:
        architecture(config)
    except NotSupported:
        return []
    states = here / f"{name}-states"
    states.mkdir(exist_ok=True)
    found, plain = [], _read(config, "fp32")
    # The narrowest first: it reads the long prompts that all go on from.
    for kind in reversed(_GGUF_BYTES):
        if kind not in ONLY.get(name, (kind,)):
            continue
        file = here / f"{name}.{kind}.gguf"
        if not file.exists():
            convert(source, file, kind)
        # Rows are float16 by default.
        nbytes = plain.weights / 4 * _GGUF_BYTES[kind] + plain.state / 2
        found.append(Engine(f"llama.cpp, {kind}", Llama, (file, states), nbytes))
    return found


def _read(config: ModelConfig, recipe: str, widened: bool = True) -> Reads:
    return reads(config, precision(recipe, config), CASES[1][0], widened=widened, repacked=True)


def measured(engines: list[Engine], rounds: int, steps: int, compile_limit_s: float) -> list[Measured]:
    """Engines in turns, each loaded, measured in every case, and ended."""
    found = [Measured(one.name, one.reads) for one in engines]
    for turn in range(rounds):
        for engine, result in zip(engines, found, strict=True):
            # What takes minutes to compile is compiled once.
            if not (result.failed or (turn and engine.compiles)):
                try:
                    _turn(engine, result, steps, compile_limit_s if engine.compiles else None)
                except (TimeoutError, EOFError) as error:
                    result.failed = str(error) or "ended by itself"
    return found


def _turn(engine: Engine, result: Measured, steps: int, limit_s: float | None) -> None:
    child = Child(engine.name, engine.make, *engine.arguments)
    result.start_s.append(child.load_s)
    for held, new in CASES:
        # A compiled model is compiled anew for another kind of step, the first two of them.
        child.time(held, new, 2, limit_s)
        result.seconds[held, new] += child.time(held, new, steps if new == 1 else -(-steps // 4))
    result.peak_gb = max(result.peak_gb, child.close())
