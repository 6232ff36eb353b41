"""Plants faults one after another, and says of each whether ``verify`` catches it and ``bisect`` names the node."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from damaged import Damaged
from mutations import Fault, Site

from v4export import api
from v4export.bisect.asked import Asked
from v4export.bisect.bundles import with_checkpoint
from v4export.bisect.feeds import is_small, steps_of
from v4export.bisect.runners import of_bundle
from v4export.errors import V4Error
from v4export.graphs.export import PORTABLE, for_cpu, graphs_in
from v4export.package.bundle import Bundle
from v4export.progress import Stages
from v4export.verify.prompts import default_prompts


@dataclass(frozen=True)
class Outcome:
    """Of one fault.

    Attributes:
        kind, place: of the fault.
        planted: a copy of the bundle could be written with it.
        changes: some result of some graph differs in a bit; known only where ``verify`` passes.
        caught: by ``verify``; how, in a few words.
        named: the node that ``bisect`` names.
        right: that is one of those at fault.
        text: all that it says.
    """

    kind: str
    place: str
    planted: bool
    changes: bool = True
    caught: str = ""
    named: str = ""
    right: bool = False
    text: str = ""

    @property
    def verdict(self) -> str:
        """In a word."""
        if not self.planted:
            return "not planted"
        if not self.changes:
            return "unchanged"
        return "missed" if not self.caught else "named" if self.right else "not named"


class Sound:
    """A bundle that faults are planted in copies of."""

    def __init__(self, bundle: Bundle, graph: str = PORTABLE) -> None:
        self.bundle, self.graph = bundle, graph
        model, lowered = (onnx.load(bundle.folder / n, load_external_data=False) for n in (graph, for_cpu(graph)))
        self.site = Site.of(model, lowered)
        #: Nodes of any graph that read a weight, which all graphs share.
        self.readers: dict[str, tuple[str, ...]] = {}
        for name in graphs_in(bundle.folder):
            read = Site.of(onnx.load(bundle.folder / name, load_external_data=False)).weights
            self.readers |= {weight: self.readers.get(weight, ()) + nodes for weight, nodes in read.items()}
        prompts = default_prompts(bundle.folder, bundle.config, bundle.max_seq_len // 2)
        self.feeds = steps_of(bundle, prompts)

    def try_fault(self, fault: Fault, copy: Path) -> Outcome:
        """Plant it, verify, bisect."""
        shutil.rmtree(copy, ignore_errors=True)
        damaged = Damaged(self.bundle.folder, copy, self.graph)
        try:
            fault.plant(damaged)
            damaged.save()
        except Exception:  # whatever the lowering makes of a graph that no exporter would write
            return Outcome(fault.kind, fault.place, planted=False)
        caught, found = "", None
        try:
            found = api.verify(copy)
            bad = [b for b in found.boundaries if not b.ok]
            caught = next((b.name for b in bad if b.name != "weights"), bad[0].name) if bad else ""
        except V4Error as error:
            caught = f"cannot run: {error.values}"
        if not caught:
            return Outcome(fault.kind, fault.place, True, self.changes(copy))
        sound = (self.bundle, self.feeds)
        said = with_checkpoint(Bundle.open(copy), Asked(), Stages(quiet=True), sound=sound, found=found)
        named = said.node.name if said.node else ""
        return Outcome(
            fault.kind,
            fault.place,
            True,
            True,
            caught,
            named,
            _right(named, fault.nodes + self.readers.get(fault.place, ())),
            said.text(),
        )

    def changes(self, copy: Path) -> bool:
        """Whether a bit of any result of any graph differs, over all that the graphs are fed."""
        for name in graphs_in(copy):
            for portable in (True, False):
                file = name if portable else for_cpu(name)
                one, other = (of_bundle(folder, file, portable) for folder in (self.bundle.folder, copy))
                for inputs in self.feeds.get(name, []):
                    if portable and not is_small(inputs):
                        continue
                    made = [graph.values(graph.outputs, inputs) for graph in (one, other)]
                    if any(not _same(made[0][n], made[1][n]) for n in one.outputs):
                        return True
        return False


def _right(named: str, nodes: Sequence[str]) -> bool:
    """Whether a node is one at fault; or of those that onnxruntime's copy has in the place of one."""
    return any(named == node or named.startswith(f"{node}.") for node in nodes)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()
