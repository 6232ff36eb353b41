"""What a bisection found."""

from __future__ import annotations

from dataclasses import dataclass

from v4export.bisect.difference import Difference
from v4export.errors import NumbersDiffer


@dataclass(frozen=True)
class Node:
    """The first node at which two executions part.

    Attributes:
        graph: the file that it is in.
        name, op_type: of the node.
        boundary: the layer, or other part, that it belongs to.
        causes: in what it differs from its counterpart.
        differences: of the values behind it, computed from equal ones ahead of it.
        between: nodes among which it is, where cuts between them have no counterpart.
        inside: of a custom op, the first node of its body that parts.
    """

    graph: str
    name: str
    op_type: str
    boundary: str
    causes: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    between: tuple[str, ...] = ()
    inside: str = ""


@dataclass(frozen=True)
class Bisection:
    """The outcome.

    Attributes:
        compared: what with what.
        boundary: the first boundary at which they part; empty where they do not.
        node: the first node; None where none was found.
        passed: nodes that differ within what rounding explains.
        unmatched: nodes without a counterpart.
        notes: what else is to be said.
        case: folder of the smallest case, where one was asked for.
        commands: that show the case.
    """

    compared: str
    boundary: str = ""
    node: Node | None = None
    passed: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    case: str | None = None
    commands: tuple[str, ...] = ()

    @property
    def parted(self) -> bool:
        """Whether a difference beyond limits was found."""
        return bool(self.boundary)

    def check(self) -> None:
        """Raise NumbersDiffer where they part."""
        if self.parted:
            where = f"node {self.node.name} of {self.node.graph}" if self.node else self.boundary
            values = "; ".join(self.node.causes if self.node else self.notes)
            raise NumbersDiffer(f"the executions part at {where}", values)

    def text(self) -> str:
        """For people."""
        if not self.parted:
            more = f"; {len(self.passed)} nodes differ within rounding" if self.passed else ""
            return "\n".join([f"NO DIFFERENCE beyond limits: {self.compared}{more}", *self._rest()])
        lines = [f"PARTED | {self.compared} | first at {self.boundary}"]
        if self.node:
            lines.append(f"node {self.node.name} ({self.node.op_type}) of {self.node.graph}, {self.node.boundary}")
            lines += [f"  among {', '.join(self.node.between)}"] if self.node.between else []
            lines += [f"  within its body: {self.node.inside}"] if self.node.inside else []
            lines += [f"  {line}" for line in self.node.causes]
            lines += [f"  {one.line()}" for one in self.node.differences[:4]]
        return "\n".join([*lines, *self._rest()])

    def _rest(self) -> list[str]:
        some = ", ".join(self.unmatched[:8]) + (f" and {len(self.unmatched) - 8} more" * (len(self.unmatched) > 8))
        lines = [f"without a counterpart, and so not compared by themselves: {some}"] if self.unmatched else []
        return [*lines, *self.notes, *self.commands]
