"""What a table of the vocabulary is: names, and for each its shape and role."""

from __future__ import annotations

from collections.abc import Callable

from v4export.config import ModelConfig

#: From a configuration to a tensor's shape.
Shape = Callable[[ModelConfig], tuple[int, ...]]
#: Tensors of one part of a model, in reading order.
Table = dict[str, tuple[Shape, str]]
