"""Integer expressions of a kernel's dimensions, evaluated over numbers or over TensorRT's symbolic dimensions.

A kernel's launch is known before its tensors are: grid, outputs and scalars are expressions of its inputs' dimensions.
They are written in Python once, and travel as text in postfix form (``i0.0 16 cdiv``: axis 0 of input 0, by 16 rounded
up), which every plugin reads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

#: Operations by their name in the text; each takes two.
Algebra: TypeAlias = Mapping[str, Callable[[Any, Any], Any]]

NUMBERS: Algebra = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "div": operator.floordiv,
    "cdiv": lambda a, b: -(-a // b),
    "min": min,
    "max": max,
}


@dataclass(frozen=True)
class Size:
    """A number, the name of a dimension, or an operation on two sizes."""

    value: int | str
    args: tuple[Size, ...] = ()

    def __add__(self, other: Size | int) -> Size:
        return operate("+", self, other)

    def __sub__(self, other: Size | int) -> Size:
        return operate("-", self, other)

    def __mul__(self, other: Size | int) -> Size:
        return operate("*", self, other)

    def __floordiv__(self, other: Size | int) -> Size:
        return operate("div", self, other)

    def __radd__(self, other: int) -> Size:
        return operate("+", other, self)

    def __rsub__(self, other: int) -> Size:
        return operate("-", other, self)

    def __rmul__(self, other: int) -> Size:
        return operate("*", other, self)

    def evaluate(
        self, dims: Mapping[str, Any], algebra: Algebra = NUMBERS, constant: Callable[[int], Any] = int
    ) -> Any:
        """The value, given that of every name; ``constant`` makes the algebra's own of a number."""
        if self.args:
            return algebra[str(self.value)](*(arg.evaluate(dims, algebra, constant) for arg in self.args))
        return constant(self.value) if isinstance(self.value, int) else dims[self.value]

    def text(self) -> str:
        """Postfix form."""
        return " ".join([*(arg.text() for arg in self.args), str(self.value)])

    @classmethod
    def parse(cls, text: str) -> Size:
        """From postfix form."""
        stack: list[Size] = []
        for word in text.split():
            if word in NUMBERS:
                right, left = stack.pop(), stack.pop()
                stack.append(cls(word, (left, right)))
            else:
                stack.append(cls(int(word) if word.isdigit() else word))
        (size,) = stack
        return size


def size(value: Size | int | str) -> Size:
    """A Size of a number or a name."""
    return value if isinstance(value, Size) else Size(value)


def operate(name: str, left: Size | int, right: Size | int) -> Size:
    """An operation, computed at once where both are numbers."""
    a, b = size(left), size(right)
    if isinstance(a.value, int) and isinstance(b.value, int):
        return Size(NUMBERS[name](a.value, b.value))
    return Size(name, (a, b))


def cdiv(left: Size | int, right: Size | int) -> Size:
    """The quotient rounded up."""
    return operate("cdiv", left, right)


def least(left: Size | int, right: Size | int) -> Size:
    """The smaller one."""
    return operate("min", left, right)


def most(left: Size | int, right: Size | int) -> Size:
    """The larger one."""
    return operate("max", left, right)
