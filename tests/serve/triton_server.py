"""A real tritonserver from the wheel nvidia-pytriton, on a CPU, and clients of it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

STUB = "triton_python_backend_stub"
WAIT_S = 60
_TYPES = {str: ("BYTES", np.object_), bool: ("BOOL", bool), int: ("INT32", np.int32), float: ("FP32", np.float32)}


def missing() -> str | None:
    """Why no server can be started here; None if one can."""
    if not (find_spec("pytriton") and find_spec("tritonclient")):
        return "needs a real Triton: pip install 'v4export[triton]' into an environment of its own"
    if int(np.__version__.split(".")[0]) > 1:
        return "the Python backend of nvidia-pytriton's server needs numpy<2"
    if not (_installed() / "tritonserver" / "python_backend_stubs" / _python() / STUB).is_file():
        return f"nvidia-pytriton has no stub for Python {_python()}"
    return None


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _installed() -> Path:
    return Path(next(iter(find_spec("pytriton").submodule_search_locations)))


def assembled(folder: Path) -> Path:
    """The wheel's files as they lie to each other, with the stub of this Python beside its backend; tritonserver."""
    for name in ("pytriton", "nvidia_pytriton.libs"):
        shutil.copytree(_installed().with_name(name), folder / name, copy_function=_link)
    home = folder / "pytriton" / "tritonserver"
    stub = home / "backends" / "python" / STUB
    _link(home / "python_backend_stubs" / _python() / STUB, stub)
    server = home / "bin" / "tritonserver"
    for file in (stub, server):
        file.chmod(0o755)
    return server


def _link(source: str | Path, place: str | Path) -> None:
    try:
        os.link(source, place)
    except OSError:
        shutil.copy2(source, place)


class Server:
    """A running server. Its ports stay the same when it is started anew."""

    def __init__(self, binary: Path, repository: Path) -> None:
        self.model = next(repository.iterdir()).name
        self._binary, self._repository = binary, repository
        self.http, self.grpc, self.metrics_port = _free_ports(3)
        self.log = repository.with_suffix(".log")
        self._shared = f"v4export_{os.getpid()}_{self.grpc}_"
        self.start()

    def start(self) -> None:
        """Until it is ready."""
        ports = (("http", self.http), ("grpc", self.grpc), ("metrics", self.metrics_port))
        command = [
            str(self._binary),
            f"--model-repository={self._repository}",
            f"--backend-directory={self._binary.parents[1] / 'backends'}",
            "--disable-auto-complete-config",
            f"--backend-config=python,shm-region-prefix-name={self._shared}",
            *(f"--{name}-address=127.0.0.1" for name, _ in ports),
            *(f"--{name}-port={port}" for name, port in ports),
        ]
        path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **own}, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + WAIT_S
        while not self.ready():
            assert self._process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)

    def ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(self._url("v2/health/ready"), timeout=2):
            return True
        return False

    def kill(self) -> None:
        """At once, with its stubs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # One that is killed leaves the memory that it shares with its stubs.
        for left in Path("/dev/shm").glob(f"{self._shared}*"):
            left.unlink()

    def stop(self) -> int:
        """As one is asked to."""
        self._process.terminate()
        try:
            return self._process.wait(WAIT_S)
        finally:
            self.kill()

    def metrics(self) -> dict[str, float]:
        """Ours, by name without the prefix."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as found:
            lines = found.read().decode().splitlines()
        ours = (line.removeprefix("v4export_").rsplit(" ", 1) for line in lines if line.startswith("v4export_"))
        return {name.partition("{")[0].removesuffix("_total"): float(value) for name, value in ours}

    def post(self, endpoint: str = "generate_stream", **body: Any) -> Any:
        """An open HTTP response."""
        request = urllib.request.Request(
            self._url(f"v2/models/{self.model}/{endpoint}"),
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=WAIT_S)

    def streamed(self, **body: Any) -> tuple[str, list[int], str]:
        """Text, tokens and reason, gathered from server-sent events.

        Raises:
            RuntimeError: the server says that something is wrong, or ends before the answer has.
        """
        text, tokens, reason = "", [], ""
        with self.post(**body) as response:
            for event in events(response):
                text += event["text_output"]
                token = event["token_ids"]
                tokens += token if isinstance(token, list) else [token]
                reason = event["finish_reason"]
        if not reason:
            raise RuntimeError("the stream has ended before the answer")
        return text, tokens, reason

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http}/{path}"


def events(response: Any) -> Iterator[dict[str, Any]]:
    """Server-sent events of a response."""
    for line in response:
        if line.startswith(b"data:"):
            event = json.loads(line[5:])
            if "error" in event:
                raise RuntimeError(event["error"])
            yield event


class Stream:
    """One gRPC stream. A context manager."""

    def __init__(self, server: Server) -> None:
        import tritonclient.grpc as grpc

        self._grpc, self._model = grpc, server.model
        self._client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        self.heard: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: self.heard.put((result, error)))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._client.close()

    def ask(self, **inputs: Any) -> None:
        tensors = []
        for name, value in inputs.items():
            kind, dtype = _TYPES[type(value)]
            array = np.array([value.encode() if isinstance(value, str) else value], dtype)
            tensors.append(self._grpc.InferInput(name, array.shape, kind))
            tensors[-1].set_data_from_numpy(array)
        self._client.async_stream_infer(self._model, tensors)

    def next(self) -> dict[str, list[Any]]:
        """The next response; raises what it is in place of one."""
        result, error = self.heard.get(timeout=WAIT_S)
        if error is not None:
            raise error
        names = ("text_output", "token_ids", "finish_reason")
        return {name: result.as_numpy(name).tolist() for name in names}

    def answer(self) -> tuple[str, list[int], str]:
        """Text, tokens and reason."""
        text, tokens, reason = "", [], ""
        while not reason:
            found = self.next()
            text += found["text_output"][0].decode()
            tokens += found["token_ids"]
            reason = found["finish_reason"][0].decode()
        return text, tokens, reason

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
