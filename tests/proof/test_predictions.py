"""The distance between two models' predictions, against the plain formulas."""

import pytest
import torch
from torch.nn import functional

from qlora.proof.predictions import MAX_KL, Predictions, compare, loss_noise


def test_the_distance_equals_the_formulas_over_all_positions(generator):
    sizes = (5, 1, 12)
    one, other = ([torch.randn(size, 40, generator=generator) for size in sizes] for _ in range(2))
    distance = compare(Predictions(one, 0.0, [[1]]), Predictions(other, 0.0, [[1]]))
    p, q = torch.cat(one).double(), torch.cat(other).double()
    kl = functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert distance.positions == 18
    assert distance.mean_kl == pytest.approx(kl.item(), rel=1e-5)
    assert distance.max_logit_difference == pytest.approx((p - q).abs().max().item())
    assert distance.mean_logit_difference == pytest.approx((p - q).abs().mean().item(), rel=1e-5)
    assert distance.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ([[1, 2, 3]], [[1, 2, 3]], 1),
        ([[1, 2, 3, 4]], [[1, 2, 9, 4]], 1 / 2),  # tokens after the first that differs do not count
        ([[1, 2]], [[1, 2, 3, 4]], 1 / 2),  # one ended earlier
        ([[7], [1, 2, 3]], [[8], [1, 2, 3]], 3 / 4),
    ],
)
def test_greedy_answers_agree_up_to_the_first_token_that_differs(one, other, share):
    logits = [torch.zeros(1, 3)]
    assert compare(Predictions(logits, 0.0, one), Predictions(logits, 0.0, other)).greedy_agreement == share


@pytest.mark.parametrize(("num_tokens", "share"), [(1, 0.6), (30, 0.99), (300, 0.99)])
def test_losses_of_close_models_differ_by_less_than_rounding_explains(num_tokens, share, generator):
    """The tokens are drawn from the first model, 500 times."""
    logits = torch.randn(num_tokens, 60, generator=generator, dtype=torch.float64)
    p, q = logits.log_softmax(-1), (logits + 0.01 * torch.randn(logits.shape, generator=generator)).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    tokens = torch.multinomial(p.exp(), 500, replacement=True, generator=generator)
    differences = (p.gather(1, tokens) - q.gather(1, tokens)).mean(0).abs()
    assert (differences <= loss_noise(kl)).double().mean() > share
    assert loss_noise(kl) < 0.03  # of logits that differ by 0.01


def test_a_larger_divergence_than_that_of_rounding_excuses_no_larger_difference_of_losses():
    assert loss_noise(0.5) == loss_noise(MAX_KL) > loss_noise(MAX_KL / 2)
