"""Statistics of inputs: against dense moments in fp64, over batches, masks and layers with one input."""

import pytest
import torch
from torch import nn

from qlora.lora.statistics import InputObserver, InputStatistics


def inputs(generator, tokens, features):
    """Return inputs with a mean, and a spectrum that falls as the activations of models do."""
    x = torch.randn(tokens, features, generator=generator)
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    spectrum = torch.arange(1, features + 1).float() ** -1.5
    return x * spectrum @ turn + torch.randn(features, generator=generator) * 0.1


def collected(x, directions, batches=3):
    statistics = InputStatistics(x.shape[1], directions)
    for batch in x.chunk(batches):
        statistics.add(batch)
    return statistics


def dense(x, centered=False):
    x = x.double() - (x.double().mean(0) if centered else 0)
    return x.T @ x / len(x)


@pytest.mark.parametrize("directions", [0, 12, 40, 100])
def test_mean_and_mean_square_are_exact(directions):
    x = inputs(torch.Generator().manual_seed(0), 300, 40)
    statistics = collected(x, directions)
    torch.testing.assert_close(statistics.mean.double(), x.double().mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(statistics.mean_square.double(), dense(x).diagonal(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("directions", "tolerance"), [(40, 1e-4), (24, 2e-2)])
def test_directions_are_those_of_the_dense_moment(directions, tolerance, centered):
    x = inputs(torch.Generator().manual_seed(1), 500, 40)
    found, shares = collected(x, directions).top_directions(5, centered)
    values, vectors = torch.linalg.eigh(dense(x, centered))
    torch.testing.assert_close(found.T @ found, torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(shares.double(), values.flip(0)[:5] / values.sum(), rtol=tolerance, atol=0)
    overlap = (found.double().T @ vectors.flip(1)[:, :5]).abs().diagonal()
    assert overlap.min() > 1 - tolerance


@pytest.mark.parametrize("directions", [40, 24])
def test_the_second_moment_has_the_main_directions_and_the_exact_diagonal(directions):
    x = inputs(torch.Generator().manual_seed(2), 500, 40)
    moment, wanted = collected(x, directions).second_moment().double(), dense(x)
    assert (moment - wanted).norm() / wanted.norm() < (1e-6 if directions == 40 else 1e-2)
    torch.testing.assert_close(moment.diagonal(), wanted.diagonal(), rtol=1e-4, atol=0)
    assert torch.linalg.eigvalsh(moment).min() > -1e-6 * wanted.diagonal().mean()


def test_sums_of_two_processes_are_those_of_one():
    x = inputs(torch.Generator().manual_seed(3), 200, 30)
    one, other, both = (InputStatistics(30, 10) for _ in range(3))
    one.add(x[:80])
    other.add(x[80:])
    both.add(x)
    for mine, theirs in zip(one.tensors(), other.tensors(), strict=True):
        mine += theirs
    torch.testing.assert_close(one.second_moment(), both.second_moment(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("directions", [0, 8, 24, 40])
def test_fewer_inputs_than_directions_give_a_finite_moment(directions):
    x = inputs(torch.Generator().manual_seed(5), 6, 40)
    moment = collected(x, directions).second_moment()
    torch.testing.assert_close(moment.diagonal(), dense(x).diagonal().float(), rtol=1e-3, atol=1e-7)
    assert collected(x * 0, directions).second_moment().abs().max() < 1e-30


def test_inputs_in_bf16_are_summed_in_fp32():
    statistics = InputStatistics(4, 4)
    for _ in range(1000):
        statistics.add(torch.full((1, 4), 3.0, dtype=torch.bfloat16))
    assert torch.equal(statistics.second_moment(), torch.full((4, 4), 9.0))


class Block(nn.Module):
    """Two layers over one input, one over another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.o(self.q(x) + self.k(x).repeat(1, 1, 2))


def test_layers_with_one_input_share_statistics_of_the_unmasked_positions():
    block, generator = Block(), torch.Generator().manual_seed(4)
    batches = [torch.randn(2, 5, 6, generator=generator) for _ in range(3)]
    masks = [torch.rand(2, 5, generator=generator) < 0.7 for _ in batches]
    with InputObserver(block, ["q", "k", "o"], directions=6) as observer, torch.inference_mode():
        for x, mask in zip(batches, masks, strict=True):
            observer.mask = mask
            block(x)
    block(batches[0])  # counts no more
    found = observer.statistics
    assert found["q"] is found["k"] is not found["o"]
    for tensor in found["o"].tensors():
        tensor += 0  # as a sum over processes does, outside of inference mode
    seen = torch.cat([x[mask] for x, mask in zip(batches, masks, strict=True)])
    torch.testing.assert_close(found["k"].second_moment().double(), dense(seen), rtol=1e-5, atol=1e-6)
    inner = torch.cat(
        [block.q(x)[mask] + block.k(x)[mask].repeat(1, 2) for x, mask in zip(batches, masks, strict=True)]
    )
    torch.testing.assert_close(found["o"].second_moment().double(), dense(inner.detach()), rtol=1e-5, atol=1e-6)


def test_wrong_use_is_reported():
    with pytest.raises(ValueError, match="in_features have statistics of inputs, not norm"):
        InputObserver(Block(), ["q", "norm"])
    with pytest.raises(ValueError, match="no input was seen"):
        InputStatistics(4, 4).second_moment()
    with pytest.raises(ValueError, match="k: 5 should be from 1 to 4"):
        collected(torch.randn(9, 8), 4).top_directions(5)
    with InputObserver(Block(), ["q"]) as observer:
        observer.mask = torch.ones(2, 4, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"mask: its shape \(2, 4\) should be \(2, 5\).* the input of q"):
            observer._layers["q"](torch.randn(2, 5, 6))
