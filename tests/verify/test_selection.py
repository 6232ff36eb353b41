"""A different selection is a near tie only where rounding explains it; what cannot be seen is never one."""

from __future__ import annotations

import pytest
import torch

from v4export.plugins.index_select.op import index_select
from v4export.verify.routing import Choices
from v4export.verify.selection import Indexed, IndexErrors, compare_selections

#: One index head of width 4 that scores key n as ``KEYS[n]``, for a single query that sees them all.
WIDTH = 4
ERROR = 0.01


def index(scores: list[float], top_k: int = 2, weight: float = 1.0, tokens: int = 1) -> tuple:
    """Arguments of ``index_select`` for one sequence that began with as many tokens as there are keys."""
    q = torch.zeros(tokens, 1, WIDTH)
    q[..., 0] = 1
    keys = torch.zeros(1, len(scores), WIDTH)
    keys[0, :, 0] = torch.tensor(scores)
    weights = torch.full((tokens, 1), weight)
    # Keys are held, and the query comes after them; its own key scores below all.
    new = torch.zeros(1, tokens, WIDTH)
    new[..., 0] = -9
    return q, weights, new, keys, torch.tensor([len(scores)]), top_k, 1, 1.0


def compare(scores: list[float], taken: list[int], **options: float) -> Choices:
    top_k = int(options.pop("top_k", 2))
    return compare_selections(
        Indexed(index(scores, top_k, **options)), torch.tensor([taken]), IndexErrors(ERROR * WIDTH**0.5, 0.0, 0.0)
    )


@pytest.mark.parametrize("taken", [[0, 1], [1, 0], [1, 0, -1]])
def test_the_same_set_in_any_order(taken):
    assert compare([3.0, 2.0, 1.0], taken) == Choices(0, (), (), 1)


def test_a_near_tie_says_what_it_goes_by():
    found = compare([3.0, 2.0, 2.0 - ERROR], [0, 2])
    assert (found.ties, found.wrong) == (1, ())
    (line,) = found.evidence
    # Either score may be off by ERROR * |q| |k|, whose errors are independent.
    assert line == (
        "token 0: selected [2], the reference [1]; scores 1.99 and 2, 0.01 apart where rounding explains 0.028; "
        "1 of 4 equal the last one selected, 1 are exactly 0"
    )


def test_what_rounding_does_not_explain_is_wrong():
    found = compare([3.0, 2.0, 1.9], [0, 2])
    assert found.ties == 0 and found.wrong[0].startswith("token 0: selected [2], the reference [1]; scores 1.9 and 2")
    assert compare([3.0, 2.0, 1.0], [1, 2]).wrong


def test_scores_that_relu_makes_zero_are_a_near_tie_at_any_precision():
    exact = IndexErrors(0.0, 0.0, 0.0)
    arguments = index([3.0, -1.0, -2.0, -3.0])
    assert index_select(*arguments).tolist() == [[0, 1]]  # the lower number
    found = compare_selections(Indexed(arguments), torch.tensor([[0, 3]]), exact)
    assert found.ties == 1 and "scores 0 and 0, 0 apart" in found.evidence[0]
    assert "4 of 5 equal the last one selected, 4 are exactly 0" in found.evidence[0]


def test_a_head_far_below_zero_moves_nothing():
    q, _, *rest = index([-5.0, -5.0, -5.0], top_k=1)
    found = compare_selections(Indexed((q, torch.ones(1, 1), *rest)), torch.tensor([[1]]), IndexErrors(0.1, 0.1, 0.1))
    assert "rounding explains 0;" in found.evidence[0]


@pytest.mark.parametrize(
    ("taken", "says"),
    [
        ([0, -1], "selected [0] where 2 of the 4 that it can see were to be"),
        ([0, 1, 2], "selected [0, 1, 2] where 2 of the 4"),
        ([0, 0], "selected [0, 0] where 2"),  # twice the same
        ([0, 9], "selected [0, 9] where 2"),  # there is none
        ([-1, -1], "selected [] where 2"),
    ],
)
def test_another_number_or_what_is_not_there(taken, says):
    found = compare([3.0, 2.0, 1.0], taken)
    assert found.ties == 0 and says in found.wrong[0]


def test_a_later_token_cannot_be_selected():
    # Two tokens at once: the first must not select the second's key, number 3.
    arguments = index([3.0, 2.0, 1.0], tokens=2)
    sound = index_select(*arguments)
    exact = IndexErrors(0.0, 0.0, 0.0)
    assert compare_selections(Indexed(arguments), sound, exact) == Choices(0, (), (), 2)
    early = sound.clone()
    early[0, 1] = 4
    assert (
        compare_selections(Indexed(arguments), early, exact)
        .wrong[0]
        .startswith("token 0: selected [0, 4] where 2 of the 4")
    )


def test_fewer_than_may_be_selected():
    found = compare([3.0, 2.0], [0, 1, 2, -1, -1], top_k=5)
    assert found == Choices(0, (), (), 0)
    assert compare([3.0, 2.0], [0, 1, -1, -1, -1], top_k=5).wrong


def test_an_error_of_the_weights_moves_scores_too():
    def ties(error: float) -> int:
        return compare_selections(
            Indexed(index([3.0, 2.0, 1.95])), torch.tensor([[0, 2]]), IndexErrors(0, 0, error)
        ).ties

    assert [ties(error) for error in (0.001, 0.1)] == [0, 1]


def test_nan_is_no_near_tie():
    q, weights, new, keys, *rest = index([3.0, 2.0, 1.9])
    keys[0, 1] = float("nan")
    assert compare_selections(
        Indexed((q, weights, new, keys, *rest)), torch.tensor([[0, 2]]), IndexErrors(1.0, 1.0, 1.0)
    ).wrong
