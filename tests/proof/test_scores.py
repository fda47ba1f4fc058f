"""How far the losses of two models may differ whose scores differ by rounding."""

import pytest
import torch
import torch.nn.functional as F

from qlora.proof.scores import MAX_SCORE_DIFFERENCE, Scores, compare_scores


def distance_of(scores, differences):
    return compare_scores(Scores(scores, None), Scores(scores + differences, None))


def test_rounding_of_scores_explains_differences_of_losses_of_pairs(generator):
    scores = 4 * torch.randn(40, 1, generator=generator)
    differences = 0.02 * torch.randn(40, 1, generator=generator)
    one, other = (F.softplus(each[1::2] - each[::2]).mean() for each in (scores, scores + differences))
    assert (one - other).abs() <= distance_of(scores, differences).loss_noise < 0.1


def test_scores_that_are_too_far_apart_explain_no_more_than_those_at_the_limit():
    scores = torch.ones(6, 1)
    noises = [distance_of(scores, torch.full((6, 1), share)).loss_noise for share in (0.0, 0.01, 0.05, 0.5)]
    assert noises == pytest.approx([0, 0.02, 2 * MAX_SCORE_DIFFERENCE, 2 * MAX_SCORE_DIFFERENCE])
