"""A different choice of experts is a near tie only where rounding explains it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from v4export import presets
from v4export.config import ModelConfig
from v4export.model.moe import Router
from v4export.verify.routing import Choices, compare_choices

#: 8 experts, 2 a token, without groups and, as V3, with 4 groups of 2 of which 2 are open.
BASE = dataclasses.replace(presets.load("tiny-v3"), hidden_size=8, num_experts=8, experts_per_token=2)
PLAIN = dataclasses.replace(BASE, num_groups=1, topk_groups=1, topk_method="noaux_tc", scoring="sigmoid")
SOFTMAX = dataclasses.replace(PLAIN, topk_method="greedy", scoring="softmax")
SOFTPLUS = dataclasses.replace(PLAIN, scoring="sqrtsoftplus")
GROUPS = dataclasses.replace(BASE, num_groups=4, topk_groups=2, topk_method="noaux_tc", scoring="sigmoid")
MAXIMUM = dataclasses.replace(GROUPS, topk_method="group_limited_greedy", scoring="softmax")

#: Relative error of the router's input: moves a logit by at most this times |x| |w| / sqrt(D) = ERROR here.
ERROR = 0.01


def router(config: ModelConfig, bias: list[float] | None = None) -> Router:
    """With the identity for its matrix, so that the input is the logits."""
    made = Router(config, torch.float32)
    made.weight.data.copy_(torch.eye(8))
    if bias:
        made.e_score_correction_bias.data.copy_(torch.tensor(bias))
    return made


def compare(config: ModelConfig, logits: list[float], taken: list[int], bias: list[float] | None = None):
    x = torch.tensor([logits])
    # |w| is 1, so the slack of a logit is error * |x| / sqrt(8): ask for the error that makes it ERROR.
    error = ERROR * 8**0.5 / float(x.norm())
    return compare_choices(router(config, bias), config, x, torch.tensor([taken]), error)


CLOSE = [2.0, 1.0, 1.0 - ERROR, 0, 0, 0, 0, 0]  # experts 1 and 2 are within twice the slack
APART = [2.0, 1.0, 1.0 - 4 * ERROR, 0, 0, 0, 0, 0]
# Groups {0,1} {2,3} {4,5} {6,7}: the first is open; the second and third are close, or not.
CLOSE_GROUPS = [2.0, 2.0, 1.0, 0.5, 1.0 - ERROR, 0.5, -3, -3]
APART_GROUPS = [2.0, 0.0, 1.9, 0.5, 1.0, 0.5, -3, -3]


@pytest.mark.parametrize(
    ("config", "logits", "taken", "ties"),
    [
        (PLAIN, CLOSE, [0, 1], 0),
        (PLAIN, CLOSE, [1, 0], 0),
        (PLAIN, CLOSE, [0, 2], 1),
        (SOFTPLUS, CLOSE, [0, 2], 1),
        (SOFTMAX, CLOSE, [0, 2], 1),
        (GROUPS, [2.0, 1.0, 2.0 - ERROR, 1.0, 0, 0, 0, 0], [0, 2], 0),
        (GROUPS, [2.0, 1.0, 1.0 - ERROR, 0.9, 0, 0, 0, 0], [0, 2], 1),
        (GROUPS, [1.0, 0.5, 1.0, 0.5, 1.0 - ERROR, 0.5, -3, -3], [0, 4], 1),
        (MAXIMUM, [1.0, 0.5, 1.0, 0.5, 1.0 - ERROR, 0.5, -3, -3], [0, 4], 1),
    ],
)
def test_the_same_or_a_near_tie(config, logits, taken, ties):
    found = compare(config, logits, taken)
    assert (found.ties, found.wrong, len(found.evidence)) == (ties, (), ties)
    assert all("took experts" in line and "apart where rounding explains" in line for line in found.evidence)


@pytest.mark.parametrize(
    ("config", "logits", "taken"),
    [
        (PLAIN, APART, [0, 2]),
        (SOFTPLUS, APART, [0, 2]),
        (PLAIN, CLOSE, [0, 3]),
        (PLAIN, CLOSE, [1, 2]),
        (SOFTMAX, APART, [0, 2]),
        (GROUPS, APART_GROUPS, [0, 4]),  # of a closed group
        (GROUPS, APART_GROUPS, [0, 6]),
        (GROUPS, APART_GROUPS, [2, 3]),  # open groups, and expert 0 is far better than 3
        (MAXIMUM, APART_GROUPS, [0, 4]),
    ],
)
def test_a_wrong_choice(config, logits, taken):
    found = compare(config, logits, taken)
    assert found.ties == 0 and len(found.wrong) == 1
    assert f"token 0: took experts {sorted(taken)}" in found.wrong[0] and "beyond a near tie by" in found.wrong[0]


def test_the_correction_bias_decides():
    bias = [0.0] * 3 + [5.0] + [0.0] * 4
    assert compare(PLAIN, APART, [0, 3], bias) == compare(PLAIN, APART, [3, 0], bias)
    assert compare(PLAIN, APART, [0, 3], bias).wrong == ()
    assert compare(PLAIN, APART, [0, 1], bias).wrong


def test_the_slack_follows_the_error():
    x = torch.tensor([APART])
    verdicts = [
        compare_choices(router(PLAIN), PLAIN, x, torch.tensor([[0, 2]]), error).ties for error in (0.0, 0.01, 0.1)
    ]
    assert verdicts == [0, 0, 1]


def test_tokens_are_counted_one_by_one():
    x = torch.tensor([CLOSE, APART, CLOSE])
    found = compare_choices(router(PLAIN), PLAIN, x, torch.tensor([[0, 2], [0, 2], [0, 1]]), ERROR)
    assert found.ties == 1 and len(found.wrong) == 1 and found.wrong[0].startswith("token 1:")


def test_another_number_of_experts():
    found = compare_choices(router(PLAIN), PLAIN, torch.tensor([CLOSE]), torch.tensor([[0, 1, 2]]), ERROR)
    assert found.wrong == ("3 experts taken for a token, not 2",)


def test_of_experts_that_a_table_names_no_other_is_right():
    made = Router(PLAIN, torch.float32, hashed=True)
    made.weight.data.copy_(torch.eye(8))
    made.tid2eid.data.copy_(torch.arange(2 * PLAIN.vocab_size).reshape(-1, 2) % 8)
    x, ids = torch.tensor([CLOSE, CLOSE]), torch.tensor([1, 2])
    same = compare_choices(made, PLAIN, x, torch.tensor([[3, 2], [4, 5]]), 1.0, ids)
    assert same == Choices(0, ())
    found = compare_choices(made, PLAIN, x, torch.tensor([[3, 2], [4, 6]]), 1.0, ids)
    assert found.wrong == ("token 1: took experts [4, 6], the reference takes [4, 5] by its table",)


def test_each_token_has_its_own_slack():
    x, taken = torch.tensor([APART, APART]), torch.tensor([[0, 2], [0, 2]])
    found = compare_choices(router(PLAIN), PLAIN, x, taken, torch.tensor([0.1, 0.01]))
    assert found.ties == 1 and found.wrong[0].startswith("token 1:")
