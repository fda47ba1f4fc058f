"""Reward models: the loss and its gradients, however pairs are batched."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qlora.data import collate, make_example
from qlora.lora import ScoreHead, add_lora, train_rows
from qlora.model import load_base
from qlora.objectives.reward import reward_objective
from tests.reference.reward import bradley_terry, scores_one_by_one


@pytest.fixture
def scorer(tiny_base, generator):
    """A reward model with adapters that have an effect, in fp32."""
    model, _ = load_base(str(tiny_base), compute_dtype="float32", head=ScoreHead(1), seed=3)
    add_lora(model, rank=2, dtype=torch.float32)
    train_rows(model, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator).mul_(0.05)
    return model


@pytest.fixture
def pairs(generator):
    """Three pairs of documents of different lengths with margins."""
    lengths = torch.randint(2, 30, (6,), generator=generator).tolist()
    margins = torch.rand(3, generator=generator).repeat_interleave(2).numpy()
    return [
        make_example(
            torch.randint(256, (length,), generator=generator).tolist(), [True] * length, {"margin": np.float32(margin)}
        )
        for length, margin in zip(lengths, margins, strict=True)
    ]


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.requires_grad}


def assert_close(found, expected):
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm().clamp_min(1e-6), name


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("center", [0.0, 0.1])
def test_loss_gradients_and_metrics_are_the_references(packed, center, scorer, pairs):
    loss = reward_objective(center).loss
    batch = collate(pairs, packed=packed)
    step = loss.compute(scorer, batch)
    rewards = scores_one_by_one(scorer, pairs).view(-1, 2)
    expected = bradley_terry(rewards, [pair.values["margin"].item() for pair in pairs[::2]], center)
    assert step.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients(scorer, step.total), gradients(scorer, expected))
    chosen, rejected = rewards.detach().unbind(1)
    wanted = {
        "reward_accuracy": (chosen > rejected).sum(), "reward_margin": (chosen - rejected).sum(),
        "reward_chosen": chosen.sum(), "reward_rejected": rejected.sum(),
    }  # fmt: skip
    assert {*wanted} == {*loss.metrics} == {*step.metrics}
    for name, value in wanted.items():
        assert step.metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def test_the_loss_of_a_batch_is_the_sum_over_its_pairs(scorer, pairs):
    loss = reward_objective().loss
    whole = loss.compute(scorer, collate(pairs))
    parts = [loss.compute(scorer, collate(pairs[start : start + 2])).total for start in range(0, 6, 2)]
    assert whole.total.item() == pytest.approx(sum(parts).item(), rel=1e-5)
    assert loss.units(collate(pairs)) == sum(map(loss.units, pairs)) == 3


@pytest.mark.parametrize("center", [None, 0.1])
def test_loss_and_gradients_are_trls(center, scorer, pairs):
    trainer = pytest.importorskip("trl.trainer.reward_trainer")
    # The trainer's own formula over a stand-in of its state: pairs are the two halves of its batch.
    gather = SimpleNamespace(gather=lambda value: value, gather_for_metrics=lambda value: value)
    state = SimpleNamespace(
        model=scorer.eval(),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=gather,
        _metrics={
            "eval": {key: [] for key in ("num_tokens", "min_reward", "mean_reward", "max_reward", "accuracy", "margin")}
        },
        _total_train_tokens=0,
        _tp_size=1,
    )
    halves = collate([*pairs[::2], *pairs[1::2]])
    scorer.config.pad_token_id = 258
    ids = halves.input_ids.masked_fill(halves.attention_mask == 0, 258)
    inputs = {"input_ids": ids, "attention_mask": halves.attention_mask, "margin": halves.values["margin"][:3]}
    theirs = trainer.RewardTrainer.compute_loss(state, scorer, inputs)
    step = reward_objective(center or 0.0).loss.compute(scorer, collate(pairs, packed=True))
    assert (step.total / 3).item() == pytest.approx(theirs.item(), rel=1e-5)
    assert_close(gradients(scorer, step.total / 3), gradients(scorer, theirs))
    assert (step.metrics["reward_accuracy"] / 3).item() == pytest.approx(state._metrics["eval"]["accuracy"][0])
    assert (step.metrics["reward_margin"] / 3).item() == pytest.approx(state._metrics["eval"]["margin"][0], rel=1e-4)
