"""Both engines, each in a process of its own, so that each has its own peak memory."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from subject import MAX_SEQ_LEN

THREADS = 2
#: Prompt tokens of a step.
CHUNK = 512


class Onnx:
    """onnxruntime over an exported bundle."""

    def __init__(
        self,
        bundle: Path,
        prepack: bool,
        max_seq_len: int = MAX_SEQ_LEN,
        accuracy_level: int = 0,
        kernels: bool = False,
    ) -> None:
        from v4export.package.bundle import Bundle
        from v4export.runtime.onnx import OnnxExecutor

        b = Bundle.open(bundle)
        self.engine = OnnxExecutor(
            b.folder, b.config, b.precision, max_seq_len=max_seq_len, threads=THREADS, prepack=prepack,
            accuracy_level=accuracy_level, kernels=kernels,
        )  # fmt: skip
        self.vocabulary = b.config.vocab_size
        self.state: Any = None

    def hold(self, tokens: int) -> None:
        """A state of so many random rows: what they hold does not change what a step costs."""
        self.state = self.engine.new_state()
        self.state.reserve(tokens + 64)
        for buffer in self.state.buffers:
            buffer.array[:] = np.random.default_rng(0).standard_normal(buffer.array.shape, np.float32)
        self.state.lengths_B = np.array([tokens])

    def step(self, tokens: int) -> None:
        ids = np.random.default_rng(tokens).integers(0, self.vocabulary, (1, tokens))
        self.engine.step(ids, self.state, logits_at_BQ=np.array([[tokens - 1]]))


class Transformers:
    """transformers, float32, eager attention, with its default implementation of experts; compiled if so asked.

    The first steps of a compiled model are what compiles it.
    """

    def __init__(self, checkpoint: Path, compiled: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(THREADS)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
        self.model.eval()
        self._forward = torch.compile(self.model, dynamic=True) if compiled else self.model
        self.experts = self.model.config._experts_implementation
        self.cache: Any = None

    def hold(self, tokens: int) -> None:
        """Random rows, where a layer's are all of a kind; else the rows of random tokens."""
        import torch
        from transformers import DynamicCache

        c = self.model.config
        self.cache = DynamicCache(config=c)
        if hasattr(c, "kv_lora_rank"):
            # Also none at all: a compiled model is compiled anew for each cache that has never had rows.
            for layer in range(c.num_hidden_layers):
                rows = [torch.randn(1, 1, tokens, width) for width in (c.kv_lora_rank, c.qk_rope_head_dim)]
                self.cache.update(*rows, layer)
            return
        for at in range(0, tokens, CHUNK):
            self._run(self.model, min(CHUNK, tokens - at))

    def step(self, tokens: int) -> None:
        self._run(self._forward, tokens)

    def _run(self, model: Any, tokens: int) -> None:
        import torch

        with torch.inference_mode():
            ids = torch.randint(0, self.model.config.vocab_size, (1, tokens))
            model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)


class Child:
    """An engine in a child process: ``time`` runs steps there and returns the seconds of each."""

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of a process is noticed
        self.load_s, self.note = self._pipe.recv()

    def time(self, held: int, new: int, steps: int, limit_s: float | None = None) -> list[float]:
        """Seconds of each of ``steps`` steps of ``new`` tokens, the first after ``held`` cached ones.

        Raises:
            TimeoutError: they take longer than the limit; the process is no more.
            EOFError: it has ended of itself.
        """
        self._pipe.send((held, new, steps))
        if not self._pipe.poll(limit_s):
            self._process.kill()
            raise TimeoutError(f"over {limit_s:.0f} s")
        return list(self._pipe.recv())

    def held(self) -> tuple[float, float]:
        """Resident memory of the process in GB, and how much of it is in no file."""
        self._pipe.send("memory")
        resident, anonymous = self._pipe.recv()
        return float(resident), float(anonymous)

    def close(self) -> float:
        """End the process; its peak resident memory in GB, mapped pages of weights included."""
        self._pipe.send(None)
        peak = float(self._pipe.recv())
        self._process.join()
        return peak


def _serve(pipe: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    start = time.perf_counter()
    engine = make(*arguments)
    pipe.send((time.perf_counter() - start, getattr(engine, "experts", "")))
    while (request := pipe.recv()) is not None:
        if request == "memory":
            pipe.send(_memory())
            continue
        held, new, steps = request
        seconds = []
        engine.hold(held)
        for _ in range(steps):
            if not held:
                engine.hold(0)
            start = time.perf_counter()
            engine.step(new)
            seconds.append(time.perf_counter() - start)
        pipe.send(seconds)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def _memory() -> tuple[float, float]:
    """Resident and anonymous memory of this process in GB."""
    facts = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(facts[name].split()[0]) * 1024 / 1e9 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]
