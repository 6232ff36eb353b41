"""What TensorRT says, and how a worker's failure is told to its parent."""

from __future__ import annotations

import re
from typing import Any

#: A message that means the engine would compute something else than the graph says.
DROPPED = re.compile(r"Unused Input|input.* (?:dropped|ignored)", re.IGNORECASE)
#: Failures to reach a GPU follow any other error on a machine without one, and say nothing of its cause.
NOISE = re.compile(r"catchCudaError|^--- (Begin|End) node ---")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+)")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+)")


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
