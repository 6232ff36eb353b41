"""How much a scheduler takes on at a time."""

from __future__ import annotations

from dataclasses import dataclass

from v4export.errors import BadInput


@dataclass(frozen=True)
class Limits:
    """Of a scheduler.

    Attributes:
        slots: sequences that get tokens at the same time.
        queue: requests that may wait for one.
        chunk: the most prompt tokens read between two tokens of the others.
        draft_max: the most tokens drafted ahead of a step; 0 of a model that does not draft.
    """

    slots: int = 8
    queue: int = 128
    chunk: int = 256
    draft_max: int = 0

    def __post_init__(self) -> None:
        for name, value in (("slots", self.slots), ("queue", self.queue), ("chunk", self.chunk)):
            if value < 1:
                raise BadInput(f"{name} is too small", f"{name} = {value}", "it has to be 1 or more")
        if self.draft_max < 0:
            raise BadInput("draft_max is too small", f"draft_max = {self.draft_max}", "it has to be 0 or more")
