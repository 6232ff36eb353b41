"""How a model is shared among devices: layers in stages, and of a stage heads, experts and widths among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from v4export.errors import BadInput

if TYPE_CHECKING:
    from v4export.config import ModelConfig


@dataclass(frozen=True)
class Sharding:
    """Ranks are numbered stage by stage; those of a stage hold the same hidden states and the same cached rows.

    Attributes:
        tp: ranks that share attention's heads; 1 leaves attention whole in every rank.
        ep: ranks, or groups of them, among which experts are dealt out. It divides ``tp``, and the ``tp / ep`` ranks of
            a group share the width of their experts; or ``tp`` is 1.
        pp: stages, each with some consecutive layers.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1

    @property
    def width(self) -> int:
        """Ranks of a stage, which share the width of dense layers and of shared experts."""
        return max(self.tp, self.ep)

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.width * self.pp

    @property
    def expert_parts(self) -> int:
        """Ranks that share the width of an expert."""
        return self.width // self.ep

    @property
    def is_one(self) -> bool:
        """Whether there is nothing to share with."""
        return self.ranks == 1

    def __str__(self) -> str:
        return f"--tp {self.tp} --ep {self.ep} --pp {self.pp}"

    def check(self, config: ModelConfig) -> None:
        """Prove that a model can be shared so.

        Raises:
            BadInput: something is not divided evenly.
        """
        if self.tp > 1 and self.tp % self.ep:
            raise BadInput(f"{self}: --ep must divide --tp", fix="or leave --tp out, which keeps attention whole")
        c = config.compressed
        divided = [
            ("heads", config.num_heads, self.tp),
            *([("groups of heads", c.o_groups, self.tp)] if c else []),
            ("intermediate_size", config.intermediate_size, self.width),
            *(
                [
                    ("experts", config.num_experts, self.ep),
                    ("width of an expert", config.moe_intermediate_size, self.expert_parts),
                    ("width of shared experts", config.shared_experts_width, self.width),
                ]
                if config.moe_layers
                else []
            ),
        ]
        for what, size, among in divided:
            if size % among:
                raise BadInput(f"{self}: {what} cannot be dealt out evenly", f"{size} among {among}", "choose divisors")
        if self.pp > config.num_layers:
            raise BadInput(f"{self}: more stages than layers", f"{config.num_layers} layers", "take fewer stages")


#: All in one rank.
WHOLE = Sharding()


def balanced(sizes: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """Where to cut a list into so many parts, none empty, that the largest sum is least: (first, behind the last)."""

    def cut(limit: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        start = total = 0
        for i, size in enumerate(sizes):
            # A part also ends where as many items are left as parts have to be begun.
            must = parts - len(found) - 1 == len(sizes) - i
            if i > start and (total + size > limit or must):
                found.append((start, i))
                start, total = i, 0
            total += size
        return [*found, (start, len(sizes))]

    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= parts else (middle + 1, high)
    return cut(low)
