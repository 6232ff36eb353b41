"""A text as windows of tokens, each of which is evaluated by itself from position 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from v4export.config import ModelConfig
from v4export.errors import BadInput
from v4export.runtime.tokenizer import Tokenizer

#: Tokens of a window, unless the user or the model says less.
CONTEXT = 512


@dataclass(frozen=True)
class Windows:
    """Whole windows of a text.

    Attributes:
        ids: int64 [n, S]. Each begins with what the tokenizer puts in front of a text.
        text_tokens: of the whole text.
    """

    ids: np.ndarray
    text_tokens: int

    @property
    def scored(self) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return self.ids.shape[0] * (self.ids.shape[1] - 1)

    def batches(self, count: int) -> Iterator[np.ndarray]:
        """Windows, ``count`` at a time."""
        return (self.ids[start : start + count] for start in range(0, len(self.ids), count))


def read_text(file: Path) -> str:
    """A text in UTF-8.

    Raises:
        BadInput: there is none.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {file}", str(error), "give a text file in UTF-8 with --text") from error


def cut(
    tokenizer: Tokenizer, text: str, config: ModelConfig, context: int | None = None, tokens: int | None = None
) -> Windows:
    """Cut a text into windows; what does not fill the last is left out.

    Args:
        tokenizer: the model's.
        text: any.
        config: the model, whose longest sequence is a limit.
        context: tokens of a window, those in front of the text included.
        tokens: most tokens of the text to use.

    Raises:
        BadInput: windows are too long or too short, or there is not one; or a token is not in the model's vocabulary.
    """
    longest, prefix = config.max_position_embeddings, tokenizer.prefix
    context = min(CONTEXT, longest) if context is None else context
    if not len(prefix) + 2 <= context <= longest:
        raise BadInput(
            f"windows cannot have {context} tokens",
            f"the model takes {longest}, and what comes in front of a text is {len(prefix)}",
            f"give --context {len(prefix) + 2} to {longest}",
        )
    ids = tokenizer.encode(text, add_special_tokens=False)
    own = context - len(prefix)
    count = min(len(ids), tokens or len(ids)) // own
    if not count:
        raise BadInput(
            "the text does not fill one window",
            f"{min(len(ids), tokens or len(ids))} tokens, a window has {own}",
            "give a longer --text or more --tokens, or a smaller --context",
        )
    body = np.array(ids[: count * own], np.int64).reshape(count, own)
    windows = np.concatenate([np.tile(np.array(prefix, np.int64), (count, 1)), body], 1)
    if windows.max() >= config.vocab_size:
        raise BadInput(
            "the tokenizer has tokens that the model does not know",
            f"token {windows.max()}, the vocabulary has {config.vocab_size}",
            "take tokenizer.json and config.json from the same checkpoint",
        )
    return Windows(windows, len(ids))
