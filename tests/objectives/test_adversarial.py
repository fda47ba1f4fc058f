"""Adversarial training: two passes with the gradient of the mean, perturbations of one length, and no NaN."""

import copy

import pytest
import torch

from qlora.data import collate
from qlora.data.tokens import make_example
from qlora.lora import add_lora, lora_layers
from qlora.model import SUPERVISED, evaluate, load_base
from qlora.objectives.adversarial import perturbation, with_adversary
from tests.reference.adversarial import adversarial_loss
from tests.training.test_loop import Trainer, random_examples

EPSILON = 0.3


@pytest.mark.parametrize("capacity", [None, 80], ids=["apart", "packed"])
@pytest.mark.parametrize("rows", [[], ["embed_tokens"]], ids=["frozen rows", "trained rows"])
def test_losses_and_gradient_are_those_of_plain_autograd(rows, capacity, tiny_base, generator):
    examples = random_examples(generator, 8)
    trainer = Trainer(tiny_base, examples, micro=2, accumulation=2, capacity=capacity, rows=rows)
    for _, layer in lora_layers(trainer.model):
        layer.lora_B.data.normal_(std=0.05, generator=generator)
    trainer.loss = with_adversary(SUPERVISED, EPSILON)
    window = [examples[index] for index in trainer.plan.window(0)]
    reference = copy.deepcopy(trainer.model)
    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    clean, adversarial, expected = adversarial_loss(reference, window, EPSILON, trained)
    trainer.run(1)
    report = trainer.reports[0]
    assert report.loss == pytest.approx((clean + adversarial) / 2, rel=1e-4)
    assert report.metrics == pytest.approx({"clean_loss": clean, "adversarial_loss": adversarial}, rel=1e-4)
    assert adversarial > clean
    found = [parameter.grad for parameter in trainer.model.parameters() if parameter.requires_grad]
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        assert (one - other).norm() < 2e-3 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_perturbation_has_the_gradients_direction_and_one_length(dtype, generator):
    gradient = torch.randn(2, 5, 64, generator=generator)
    expected = EPSILON * gradient / gradient.norm(dim=-1, keepdim=True)
    found = perturbation(gradient.to(dtype), EPSILON)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected, atol=2**-8 * EPSILON)
    assert torch.equal(perturbation(gradient.to(dtype) * 2**9, EPSILON), found)  # a power of two: no rounding


def test_tiny_zero_and_broken_gradients_give_finite_perturbations():
    gradient = torch.ones(1, 5, 16)
    gradient[0, 1], gradient[0, 2], gradient[0, 3, 4], gradient[0, 4, 2] = 1e-30, 0, float("inf"), float("nan")
    norms = perturbation(gradient, EPSILON).norm(dim=-1)[0]
    assert norms.tolist() == pytest.approx([EPSILON, EPSILON, 0, 0, 0])


def test_tokens_without_a_gradient_are_not_perturbed(tiny_base, generator):
    """Those after the last supervised token."""
    model, _ = load_base(str(tiny_base), compute_dtype="float32")
    add_lora(model, rank=4, alpha=8)
    ids = torch.randint(256, (10,), generator=generator).numpy()
    batch = collate([make_example(ids, [False] * 4 + [True] * 2 + [False] * 4)])
    seen = []
    handle = model.base_model.layers[0].register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].detach())
    )
    for part in with_adversary(SUPERVISED, EPSILON).training_passes(model.train(), batch):
        part.total.backward()
    handle.remove()
    clean, perturbed = seen
    norms = (perturbed - clean).norm(dim=-1)[0]
    assert norms.tolist() == pytest.approx([EPSILON] * 5 + [0] * 5, rel=1e-4)


def test_the_perturbation_does_not_depend_on_the_loss_scale(tiny_base, generator):
    examples = random_examples(generator, 4)
    losses = []
    for scale in (2.0**10, 2.0**14):
        trainer = Trainer(tiny_base, examples, 2, 1, compute_dtype="float16")
        trainer.loss, trainer.progress.loss_scale = with_adversary(SUPERVISED, EPSILON), scale
        losses.append(trainer.run(1).reports[0].metrics["adversarial_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_evaluation_has_the_clean_loss_only(tiny_base, generator):
    model, _ = load_base(str(tiny_base), compute_dtype="float32")
    add_lora(model, rank=4, alpha=8)
    batch = collate(random_examples(generator, 3), packed=True)
    assert evaluate(model, [batch], loss=SUPERVISED).loss == pytest.approx(
        SUPERVISED.compute(model, batch).total.item() / batch.total_weight, rel=1e-6
    )
