"""Where a model pauses to think, and what that does to its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from v4export.config import ENTROPY, MARGIN
from v4export.errors import BadInput
from v4export.runtime.pausing import Pause, Pausing, Thought, entropy, margin, paused

VOCAB = 8
UNIFORM, ONE_HOT, TWO, UNEVEN = [0.25] * 4, [0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0], [0.0, 0.25, 0.0, 0.75]
NEVER = -np.inf
#: What a manifest says of thoughts.
STORED = {"steps": 3, "confidence": MARGIN, "threshold": 0.25}


@pytest.mark.parametrize(
    ("p_V", "nats", "apart"),
    [
        (UNIFORM, np.log(4), 0.0),
        (ONE_HOT, 0.0, 1.0),
        (TWO, np.log(2), 0.0),
        (UNEVEN, np.log(4) - 0.75 * np.log(3), 0.5),
        ([0.5, 0.5], np.log(2), 0.0),
    ],
)
def test_entropy_and_margin(p_V: list[float], nats: float, apart: float) -> None:
    p_BV = np.array([p_V])
    assert entropy(p_BV) == pytest.approx([nats], abs=1e-15) and margin(p_BV) == pytest.approx([apart], abs=1e-15)


def test_rows_do_not_mix() -> None:
    p_BV = np.array([UNIFORM, ONE_HOT, UNEVEN])
    assert entropy(p_BV) == pytest.approx([entropy(row[None])[0] for row in p_BV], abs=1e-15)
    assert margin(p_BV).tolist() == [0.0, 1.0, 0.5] and p_BV[2].tolist() == UNEVEN


#: Logits, their entropy, and how far the likeliest two are apart.
LOGITS = [
    ([0.0] * 4, np.log(4), 0.0),
    ([7.5] * 4, np.log(4), 0.0),
    ([3.0, NEVER, 3.0, NEVER], np.log(2), 0.0),
    ([NEVER, NEVER, -2.0, NEVER], 0.0, 1.0),
    ([0.0, 0.0, np.log(2), NEVER], 1.5 * np.log(2), 0.25),
    ([1e4, 1e4, -1e4, NEVER], np.log(2), 0.0),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("logits_V", "nats", "apart"), LOGITS)
def test_a_threshold_is_between_sure_and_unsure(logits_V: list[float], nats: float, apart: float) -> None:
    logits_BV, near = np.array([logits_V], np.float32), 1e-6
    for confidence, value, above in ((ENTROPY, nats, True), (MARGIN, apart, False)):
        wanted = [Pausing(confidence=confidence, threshold=value + d).wanted(logits_BV)[0] for d in (-near, near)]
        assert wanted == [above, not above]


@pytest.mark.parametrize("confidence", [ENTROPY, MARGIN])
def test_each_row_is_judged_alone(confidence: str) -> None:
    logits_BV = np.array([logits_V for logits_V, *_ in LOGITS], np.float32)
    pausing = Pausing(confidence=confidence, threshold={ENTROPY: 0.9, MARGIN: 0.3}[confidence])
    assert pausing.wanted(logits_BV).tolist() == [pausing.wanted(row[None])[0] for row in logits_BV]
    assert 0 < pausing.wanted(logits_BV).sum() < len(LOGITS)
    assert Pausing(always=True, confidence=confidence).wanted(logits_BV).tolist() == [True] * len(LOGITS)


@pytest.mark.parametrize(
    ("asked", "stored", "threshold", "pausing"),
    [
        (None, None, None, None),
        ("off", None, None, None),
        ("0", None, None, None),
        ("off", STORED, 0.5, None),
        ("0", STORED, None, None),
        (None, STORED, None, Pausing(None, False, MARGIN, 0.25)),
        ("auto", STORED, None, Pausing(None, False, MARGIN, 0.25)),
        ("auto", STORED, 0.5, Pausing(None, False, MARGIN, 0.5)),
        ("auto", STORED, 0.0, Pausing(None, False, MARGIN, 0.0)),
        (None, STORED | {"confidence": ENTROPY}, 2.0, Pausing(None, False, ENTROPY, 2.0)),
        ("1", STORED, None, Pausing(1, True, MARGIN, 0.25)),
        ("3", STORED, 0.5, Pausing(3, True, MARGIN, 0.5)),
    ],
)
def test_what_is_asked_for(
    asked: str | None, stored: dict[str, Any] | None, threshold: float | None, pausing: Pausing | None
) -> None:
    assert Pausing.read(asked, stored, threshold) == pausing


@pytest.mark.parametrize("asked", ["", "yes", "on", "AUTO", "-1", "1.5", "3 ", "²"])
def test_what_is_not_understood(asked: str) -> None:
    with pytest.raises(BadInput, match="--think is not understood") as raised:
        Pausing.read(asked, STORED)
    assert f"--think {asked}\n" in str(raised.value) and "a number of steps, auto or off" in str(raised.value)


@pytest.mark.parametrize("asked", ["auto", "2", "yes"])
def test_a_model_without_thoughts(asked: str) -> None:
    with pytest.raises(BadInput, match="no reasoning layers") as raised:
        Pausing.read(asked, None)
    assert f"--think {asked}\n" in str(raised.value) and "--think-steps 0" in str(raised.value)


@pytest.mark.parametrize("asked", ["00", "4", "99"])
def test_more_steps_than_there_are(asked: str) -> None:
    with pytest.raises(BadInput, match=f"{asked} steps cannot be had"):
        Pausing.read(asked, STORED)


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_a_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(BadInput, match="threshold is out of range"):
        Pausing.read("auto", STORED, threshold)


def test_a_threshold_where_there_are_no_thoughts() -> None:
    with pytest.raises(BadInput, match="no reasoning layers"):
        Pausing.read(None, None, 0.5)


@dataclass
class Thinker:
    """Thoughts whose numbers say of which row they are; remembers what it was asked."""

    asked: list[tuple[np.ndarray, Any, int | None]] = field(default_factory=list)

    def think(self, trunk_BQD: np.ndarray, state: Any, *, steps: int | None = None) -> Thought:
        self.asked.append((trunk_BQD, state, steps))
        row_B = np.arange(len(trunk_BQD))
        logits_BV = (100 + row_B[:, None]).repeat(VOCAB, 1).astype(np.float32)
        weight_B = (row_B / 4).astype(np.float32)
        return Thought(logits_BV[:, None], weight_B[:, None], np.stack([row_B, row_B + 7], -1)[:, None])


#: A sure row, an unsure one, and the same again.
PLAIN = np.array([[50, *[NEVER] * 7], [0] * 8, [*[-0.0] * 7, 50], [1e-42] * 8], np.float32)
UNSURE = (1, 3)
TRUNK = np.arange(8, dtype=np.float32).reshape(4, 2)


def pause(
    pausing: Pausing | None, running: Sequence[bool] = (True,) * 4, plain: np.ndarray = PLAIN
) -> tuple[np.ndarray, tuple[Pause | None, ...], Thinker]:
    thinker, before = Thinker(), plain.tobytes()
    logits_BV, pauses = paused(thinker, "the state", pausing, plain, TRUNK, np.array(running), 5)
    assert plain.tobytes() == before and logits_BV.dtype == np.float32
    return logits_BV, pauses, thinker


def check(logits_BV: np.ndarray, pauses: tuple[Pause | None, ...], rows: Sequence[int]) -> None:
    """Just these rows have been thought about; the others are as they were, bit for bit."""
    for b, plain_V in enumerate(PLAIN):
        thought_V = np.full(VOCAB, 100 + b, np.float32)
        assert logits_BV[b].tobytes() == (thought_V if b in rows else plain_V).tobytes()
    assert pauses == tuple(Pause(5, b / 4, (b, b + 7)) if b in rows else None for b in range(4))


@pytest.mark.parametrize("pausing", [None, Pausing(threshold=99.0), Pausing(confidence=MARGIN, threshold=0.0)])
def test_never(pausing: Pausing | None) -> None:
    logits_BV, pauses, thinker = pause(pausing)
    assert logits_BV is PLAIN and pauses == (None,) * 4 and not thinker.asked


def test_never_needs_no_trunk() -> None:
    assert paused(Thinker(), None, None, PLAIN, None, np.ones(4, bool), 0) == (PLAIN, (None,) * 4)


@pytest.mark.parametrize("steps", [None, 1, 4])
def test_always(steps: int | None) -> None:
    logits_BV, pauses, thinker = pause(Pausing(steps, always=True))
    check(logits_BV, pauses, range(4))
    ((trunk_BQD, state, asked),) = thinker.asked
    assert asked == steps and state == "the state" and trunk_BQD.tolist() == TRUNK[:, None].tolist()
    assert all(type(number) is int for one in pauses if one for number in one.tokens)


@pytest.mark.parametrize("pausing", [Pausing(threshold=1.0), Pausing(confidence=MARGIN, threshold=0.5)])
def test_where_it_is_not_sure(pausing: Pausing) -> None:
    logits_BV, pauses, thinker = pause(pausing)
    check(logits_BV, pauses, UNSURE)
    assert len(thinker.asked) == 1 and thinker.asked[0][2] is None


@pytest.mark.parametrize("pausing", [Pausing(always=True), Pausing(threshold=1.0)])
@pytest.mark.parametrize("finished", [(), (1,), (0, 3), (1, 3), (0, 1, 2)])
def test_finished_rows_are_not_thought_about(pausing: Pausing, finished: tuple[int, ...]) -> None:
    logits_BV, pauses, thinker = pause(pausing, [b not in finished for b in range(4)])
    rows = [b for b in (range(4) if pausing.always else UNSURE) if b not in finished]
    check(logits_BV, pauses, rows)
    assert len(thinker.asked) == bool(rows)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pausing", [Pausing(always=True), Pausing(threshold=1.0)])
def test_a_finished_row_may_be_no_numbers(pausing: Pausing) -> None:
    plain = PLAIN.copy()
    plain[3] = np.nan
    logits_BV, pauses, _ = pause(pausing, [True, True, True, False], plain)
    assert np.isnan(logits_BV[3]).all() and pauses[3] is None and pauses[1] == Pause(5, 0.25, (1, 8))
