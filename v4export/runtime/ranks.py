"""Runs the graphs of a model that is shared among ranks: cut into segments, between which ranks exchange their sums.

Two ways to exchange: all ranks in this process, one after another, or each in its own by torch.distributed.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from v4export.config.sharding import Sharding
from v4export.errors import BadInput
from v4export.graphs.ranks import rank_graph
from v4export.graphs.shards import numpy_dtype
from v4export.graphs.split import segments
from v4export.runtime.sessions import Running, Session, graph_to_run

Arrays = Mapping[str, np.ndarray]
#: A step of one rank: gives what is to be summed, is given the sum, and ends with all that it knows.
Step = Generator[np.ndarray, np.ndarray, dict[str, np.ndarray]]


class Rank:
    """One rank's segments.

    Attributes:
        reads: names of its inputs, those that come from the stage before it included.
        returns: names of what its graph returns, of which some go to later stages.
    """

    def __init__(self, how: Running, graph: str, taps: Sequence[str] = ()) -> None:
        model = graph_to_run(how, graph)
        self.reads = {value.name for value in model.graph.input}
        self.returns = {value.name for value in model.graph.output}
        inside = {name for node in model.graph.node for name in node.output}
        own = [name for name in taps if name in inside and name not in self.returns]
        model.graph.output.extend(value for value in model.graph.value_info if value.name in own)
        parts = segments(model)
        self._sums = [part.sums for part in parts]
        self._sessions = [Session(how, part.model) for part in parts]

    def step(self, given: Arrays, outputs: Arrays) -> Step:
        """Run it over arrays: what it reads, and where it is to write, by name."""
        known = dict(given)
        for session, sums in zip(self._sessions, self._sums, strict=True):
            there = {name: outputs[name] for name in session.returns if name in outputs}
            known |= there | session.run(known, there, [name for name in session.returns if name not in there])
            for summand, total in sums:
                known[total] = yield known[summand]
        return known


class Together:
    """All ranks in this process. Those of a stage hold the same rows, of which there is one copy.

    Args and ``run`` are as those of ``Session``, of which it takes the place.
    """

    def __init__(self, how: Running, graph: str, sharding: Sharding, taps: Sequence[str] = ()) -> None:
        self._taps, width = taps, sharding.width
        ranks = [Rank(how, rank_graph(graph, number), taps) for number in range(sharding.ranks)]
        self._stages = [ranks[first : first + width] for first in range(0, len(ranks), width)]
        self.reads = {name for rank in ranks for name in rank.reads}

    def run(self, inputs: Arrays, outputs: Arrays) -> dict[str, np.ndarray]:
        """Run a step of all ranks, stage by stage."""
        known = dict(inputs)
        for stage in self._stages:
            own = [
                {n: outputs[n] if not r else np.empty_like(outputs[n]) for n in rank.returns & outputs.keys()}
                for r, rank in enumerate(stage)
            ]
            steps = [rank.step(known, where) for rank, where in zip(stage, own, strict=True)]
            found = _in_step(steps)
            for name in own[0]:
                if not all(np.array_equal(own[0][name].view(np.uint8), o[name].view(np.uint8)) for o in own[1:]):
                    raise RuntimeError(f"ranks of a stage do not agree on {name}, which each of them holds")
            known |= found
        return {name: known[name] for name in self._taps}


def _in_step(steps: Sequence[Step]) -> dict[str, np.ndarray]:
    """Run the ranks of a stage together; what the first of them knows at the end."""
    sent: list[Any] = [None] * len(steps)
    while True:
        summands, ends = [], []
        for step, value in zip(steps, sent, strict=True):
            try:
                summands.append(step.send(value))
            except StopIteration as end:
                ends.append(end.value)
        if ends:
            return ends[0]
        total = np.sum(summands, axis=0, dtype=summands[0].dtype)
        sent = [total.copy() for _ in steps]


class Distributed:
    """This process's rank, beside others that were started with it.

    What the last stage says is sent to all, so that every rank chooses the same tokens.

    Args and ``run`` are as those of ``Session``, of which it takes the place.
    """

    def __init__(self, how: Running, graph: str, sharding: Sharding, taps: Sequence[str] = ()) -> None:
        if taps:
            raise BadInput("nothing inside a rank's graph can be looked at from another", fix="run without torchrun")
        self._group = torch.distributed
        if not self._group.is_initialized():
            self._group.init_process_group("nccl" if how.device == "cuda" else "gloo")
            # gloo's threads abort a process that ends while they still listen to others.
            atexit.register(self._group.destroy_process_group)
        if self._group.get_world_size() != sharding.ranks:
            raise BadInput(
                f"this bundle is for {sharding.ranks} ranks",
                f"torchrun started {self._group.get_world_size()}",
                f"start it with --nproc-per-node {sharding.ranks}",
            )
        self._number, self._sharding, width = self._group.get_rank(), sharding, sharding.width
        first = self._number // width * width
        # Every process has to make every group, in the same order.
        made = [self._group.new_group(list(range(start, start + width))) for start in range(0, sharding.ranks, width)]
        self._stage = made[first // width]
        self._rank = Rank(how, rank_graph(graph, self._number))
        self.reads = self._rank.reads
        behind = range(self._number + width, sharding.ranks, width)
        self._later = {v.name for rank in behind for v in graph_to_run(how, rank_graph(graph, rank)).graph.input}
        self._device = "cuda" if how.device == "cuda" else "cpu"

    def run(self, inputs: Arrays, outputs: Arrays) -> dict[str, np.ndarray]:
        """Run a step of this rank, once the stage before it has sent what it knows."""
        width, known = self._sharding.width, dict(inputs)
        if self._number >= width:
            received = self._receive(self._number - width)
            known |= received
            for name in received.keys() & outputs.keys():
                outputs[name][...] = received[name]
        step = self._rank.step(known, {n: outputs[n] for n in self._rank.returns & outputs.keys()})
        found = _alone(step, self._summed)
        if self._later:
            made = {n: v for n, v in found.items() if n not in inputs}
            self._send(self._number + width, {n: made[n] for n in sorted(self._later & made.keys())})
        last = self._sharding.ranks - width
        for name in outputs.keys() - {n for n in outputs if n.startswith("new_state.")}:
            self._group.broadcast(torch.from_numpy(outputs[name]), last)
        return {}

    def _summed(self, summand: np.ndarray) -> np.ndarray:
        total = torch.from_numpy(summand.copy()).to(self._device)
        self._group.all_reduce(total, group=self._stage)
        return total.cpu().numpy()

    def _send(self, to: int, values: Arrays) -> None:
        header = json.dumps([(name, v.dtype.name, v.shape) for name, v in values.items()]).encode()
        self._group.send(torch.tensor([len(header)]), to)
        for array in (np.frombuffer(header, np.uint8).copy(), *values.values()):
            self._group.send(_bytes_of(np.ascontiguousarray(array)), to)

    def _receive(self, source: int) -> dict[str, np.ndarray]:
        length = torch.zeros(1, dtype=torch.int64)
        self._group.recv(length, source)
        header = np.empty(int(length), np.uint8)
        self._group.recv(_bytes_of(header), source)
        found = {name: np.empty(shape, numpy_dtype(dtype)) for name, dtype, shape in json.loads(header.tobytes())}
        for value in found.values():
            self._group.recv(_bytes_of(value), source)
        return found


def _bytes_of(array: np.ndarray) -> torch.Tensor:
    """An array's own memory; torch.distributed knows no FP8, and NumPy's bfloat16 is not PyTorch's."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def _alone(step: Step, summed: Any) -> dict[str, np.ndarray]:
    value: Any = None
    while True:
        try:
            value = summed(step.send(value))
        except StopIteration as end:
            return end.value


def session(how: Running, graph: str, sharding: Sharding | None, taps: Sequence[str] = ()) -> Any:
    """What runs a graph of a bundle: a session, or its ranks, all here or, started by torchrun, one of them."""
    if sharding is None:
        return Session(how, graph, taps)
    return (Distributed if os.environ.get("WORLD_SIZE", "1") != "1" else Together)(how, graph, sharding, taps)
