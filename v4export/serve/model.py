"""What Triton's Python backend runs, on top of a scheduler.

Python backends older than NumPy 2 misread its arrays without a word, which is found out when the model is loaded.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from v4export.chat import ChatTemplate
from v4export.errors import BadInput, NotSupported, V4Error
from v4export.package.bundle import Bundle
from v4export.runtime.executors import Choice
from v4export.runtime.tokenizer import load_tokenizer
from v4export.serve.answer import Cancelled, Closed, Failed, Piece, QueueFull
from v4export.serve.asked import INPUTS, TEXT, Reader
from v4export.serve.limits import Limits
from v4export.serve.metrics import COUNTER, MEASURES
from v4export.serve.scheduler import Scheduler

#: Where the bundle lies in a version's folder.
BUNDLE = "bundle"
#: Error -> Triton's code for it, by the name that the Python backend has; and gRPC's name of that.
CODES = (
    (BadInput, "INVALID_ARG", "INVALID_ARGUMENT"),
    (NotSupported, "UNSUPPORTED", "UNIMPLEMENTED"),
    (QueueFull, "UNAVAILABLE", "UNAVAILABLE"),
    (Closed, "UNAVAILABLE", "UNAVAILABLE"),
    (Cancelled, "CANCELLED", "CANCELLED"),
    (Exception, "INTERNAL", "INTERNAL"),
)
_PUBLISH_S = 0.25
_PREFIX = "v4export_"


class Model:
    """One instance of the model.

    Args:
        utilities: the module ``triton_python_backend_utils``, which only a server has.
        args: what Triton gives to ``initialize``.

    Raises:
        V4Error: the bundle cannot be run, or the backend misreads text.
    """

    def __init__(self, utilities: Any, args: Mapping[str, str]) -> None:
        self._pb = utilities
        check_arrays(utilities)
        set_up = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        bundle = Bundle.open(Path(args["model_repository"], args["model_version"], BUNDLE))
        bundle = bundle.checked(bool(int(set_up["check_files"])))
        choice = Choice(
            set_up["executor"],
            set_up["device"],
            int(set_up["threads"]),
            cuda_graphs=bool(int(set_up["cuda_graphs"])),
            kernels=bool(int(set_up["kernels"])),
            # Triton starts an instance on every GPU, unless told which.
            index=int(args["model_instance_device_id"]),
        )
        self._executor = choice.open(bundle)
        tokenizer, template = load_tokenizer(bundle.folder), ChatTemplate.find(bundle.folder, bundle.config)
        limits = Limits(*(int(set_up[name]) for name in ("slots", "queue", "chunk", "draft_max")))
        self._reader = Reader(bundle, tokenizer, template, int(set_up["max_tokens"]), limits.draft_max)
        self._scheduler = Scheduler(self._executor, tokenizer, limits)
        self._closed = threading.Event()
        self._publisher = Publisher(utilities, self._scheduler, {"model": args["model_name"]}, self._closed)

    def execute(self, requests: list[Any]) -> None:
        """Hand requests over; their answers are sent as they come."""
        for request in requests:
            sender = Sender(self._pb, request)
            try:
                asked = self._reader.read(self._inputs(request))
                sender.whole = not asked.stream
                self._scheduler.submit(asked.request, sender, sender.is_cancelled)
            except Exception as error:  # whatever it is, the other requests have nothing to do with it
                sender(Failed(error))

    def finalize(self) -> None:
        """Whatever is on its way fails with a clear error."""
        self._scheduler.close()
        self._closed.set()
        self._publisher.join()

    def _inputs(self, request: Any) -> dict[str, Any]:
        found = {}
        for name, about in INPUTS.items():
            tensor = self._pb.get_input_tensor_by_name(request, name)
            if tensor is not None:
                values = read_values(name, tensor)
                found[name] = values if about.several else _single(name, values)
        return found


class Sender:
    """Sends what becomes of a request.

    Attributes:
        whole: gather all of it into one response.
    """

    def __init__(self, utilities: Any, request: Any) -> None:
        self._pb, self._sender = utilities, request.get_response_sender()
        self.whole = False
        self._texts: list[str] = []
        self._tokens: list[int] = []

    def is_cancelled(self) -> bool:
        """Whether the client has gone, or has said that it wants no more."""
        return self._sender.is_cancelled()

    def __call__(self, event: Piece | Failed) -> None:
        """Send an event, or keep it until all is there."""
        final = self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if isinstance(event, Failed):
            self._sender.send(self._pb.InferenceResponse(error=triton_error(self._pb, event.error)), flags=final)
            return
        self._texts.append(event.text)
        self._tokens.append(event.token)
        if self.whole and not event.finish_reason:
            return
        usage = json.dumps(asdict(event.usage)) if event.usage else ""
        texts = {"text_output": "".join(self._texts), "finish_reason": event.finish_reason or "", "usage": usage}
        outputs = [self._pb.Tensor(n, np.array([t.encode()], np.object_)) for n, t in texts.items()]
        outputs.append(self._pb.Tensor("token_ids", np.array(self._tokens, np.int64)))
        self._texts, self._tokens = [], []
        response = self._pb.InferenceResponse(outputs)
        self._sender.send(response, **({"flags": final} if event.finish_reason else {}))


class Publisher(threading.Thread):
    """Tells Triton the scheduler's numbers a few times a second, where it takes any; a call for each would cost more
    than what is counted.
    """

    def __init__(self, utilities: Any, scheduler: Scheduler, labels: dict[str, str], closed: threading.Event) -> None:
        super().__init__(name="v4export metrics", daemon=True)
        self._scheduler, self._closed, self._told = scheduler, closed, dict.fromkeys(MEASURES, 0.0)
        self._families: list[Any] = []
        self._metrics: dict[str, Any] = {}
        family = getattr(utilities, "MetricFamily", None)
        for name, (kind, what) in MEASURES.items():
            if family is None:
                break
            full = f"{_PREFIX}{name}_total" if kind == COUNTER else _PREFIX + name
            made = family(name=full, description=what, kind=getattr(family, kind.upper()))
            self._families.append(made)  # which has to outlive its metrics
            self._metrics[name] = made.Metric(labels=labels)
        self.start()

    def run(self) -> None:
        """Until the model is unloaded."""
        while not self._closed.wait(_PUBLISH_S):
            self._publish()

    def _publish(self) -> None:
        values = self._scheduler.metrics.values()
        for name, metric in self._metrics.items():
            if values[name] == self._told[name]:
                continue
            if MEASURES[name][0] == COUNTER:
                metric.increment(values[name] - self._told[name])
            else:
                metric.set(values[name])
        self._told = values


def read_values(name: str, tensor: Any) -> list[Any]:
    """Values of an input tensor, as Python has them.

    Raises:
        BadInput: text is not UTF-8.
    """
    if INPUTS[name].type == TEXT:
        try:
            return [one.decode() for one in tensor.as_numpy().reshape(-1).tolist()]
        except UnicodeDecodeError as error:
            raise BadInput(f"{name} is not UTF-8", str(error), "encode it so") from error
    array = tensor.as_numpy().reshape(-1)
    # The shortest decimal of a float32 is what a client has written.
    return [float(str(x)) for x in array] if array.dtype == np.float32 else array.tolist()


def _single(name: str, values: list[Any]) -> Any:
    if len(values) != 1:
        raise BadInput(f"{name} takes one value", f"there are {len(values)}", "give one")
    return values[0]


def triton_error(utilities: Any, error: Exception) -> Any:
    """Triton's form of an error; one that nobody foresaw is internal.

    The text begins with gRPC's name of the code, since streams have no other place for it.
    """
    code, status = next(names for kind, *names in CODES if isinstance(error, kind))
    text = str(error) if isinstance(error, V4Error) else f"{type(error).__name__}: {error}"
    return utilities.TritonError(f"{status}: {text}", getattr(utilities.TritonError, code))


def check_arrays(utilities: Any) -> None:
    """Raises NotSupported if the backend misreads NumPy's arrays, as those do that are older than NumPy 2.

    An array that is handed to it is kept as it is, so what shows is one that it has to make itself.
    """
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        return
    numbers = np.arange(1, 4)
    found = utilities.Tensor.from_dlpack("numbers", numbers).as_numpy()
    if not np.array_equal(found, numbers):
        raise NotSupported(
            "this server's Python backend misreads arrays of this NumPy",
            f"NumPy {np.__version__}",
            "install numpy<2 in the server's Python, or take a later server",
        )
