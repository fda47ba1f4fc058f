"""What holds for every objective: its mean does not depend on batches, packing, processes or additions to the loss."""

import pytest
import torch

from qlora.data import collate, eval_batches
from qlora.lora import lora_layers
from qlora.model import evaluate
from qlora.objectives import training_loss
from qlora.processes import Processes
from tests.objectives.kinds import IMAGES, OBJECTIVES, examples_of, loss_of, section_of
from tests.training.test_loop import CAPACITIES, Trainer

pytestmark = pytest.mark.parametrize("name", OBJECTIVES)


@pytest.fixture
def base_of_kind(name, request):
    return request.getfixturevalue("tiny_image_base" if name == IMAGES else "tiny_base")


def trainer_of(name, base, examples, generator=None, **settings):
    trainer = Trainer(base, examples, **{"loss": loss_of(name)} | settings)
    if generator is not None:
        for _, layer in lora_layers(trainer.model):
            layer.lora_B.data.normal_(std=0.05, generator=generator)
    return trainer


@CAPACITIES
def test_four_micro_batches_of_one_are_one_of_four(name, capacity, base_of_kind, generator):
    examples = examples_of(name, generator, 15)
    one, other = (
        trainer_of(name, base_of_kind, examples, micro=micro, accumulation=4 // micro, capacity=capacity).run(3, 3e-3)
        for micro in (1, 4)
    )
    assert one.losses == pytest.approx(other.losses, rel=1e-4)
    for grad, expected in zip(one.grads, other.grads, strict=True):
        assert (grad - expected).norm() < 2e-3 * expected.norm()


def test_packed_rows_have_the_gradient_of_padded_ones(name, base_of_kind, generator):
    examples, losses, grads = examples_of(name, generator, 6), [], []
    seed = generator.get_state()
    for capacity in (None, 4000):
        generator.set_state(seed)
        trainer = trainer_of(name, base_of_kind, examples, generator, micro=6, accumulation=1, capacity=capacity).run(1)
        losses += trainer.losses
        grads += trainer.grads
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


def test_processes_share_a_window_and_add_up_its_gradient(name, base_of_kind, generator):
    """Each of two processes computes its part of what both look ahead at, and of the gradient."""
    examples = examples_of(name, generator, 4)
    whole = trainer_of(name, base_of_kind, examples, micro=2, accumulation=2).run(1)
    loss = loss_of(name)

    class Other(Processes):
        """Adds what the other process would contribute."""

        def __init__(self, rank, contributions):
            super().__init__(rank, 2, "cpu")
            self.contributions, self.own = contributions, []

        def sum(self, tensor):
            self.own.append(tensor.clone())
            return tensor + self.contributions[len(self.own) - 1] if self.contributions else tensor

    def run(rank, contributions):
        processes = Other(rank, contributions)
        trainer = trainer_of(name, base_of_kind, examples, micro=1, accumulation=2)
        trainer.plan = type(trainer.plan)(
            trainer.plan.lengths, 1, 2, rank=rank, world_size=2, group_size=loss.group_size
        )
        return trainer.run(1, processes=processes), processes.own

    sums = [run(rank, [])[1] for rank in (0, 1)]
    if loss.ahead is not None:  # the gradients depend on what is known after the first exchange
        sums = [[sums[rank][0], *run(rank, [sums[1 - rank][0], 0, 0])[1][1:]] for rank in (0, 1)]
    both, _ = run(0, sums[1])
    assert both.losses == pytest.approx(whole.losses, rel=1e-4)
    assert (both.grads[0] - whole.grads[0]).norm() < 2e-3 * whole.grads[0].norm()


def test_an_evaluation_does_not_depend_on_its_batches(name, base_of_kind, generator):
    loss = loss_of(name)
    trainer = trainer_of(name, base_of_kind, examples_of(name, generator, 5), generator)
    groups = [
        trainer.examples[start : start + loss.group_size] for start in range(0, len(trainer.examples), loss.group_size)
    ]
    one = evaluate(trainer.model, [collate(group) for group in groups], loss=loss)
    other = evaluate(trainer.model, [collate(trainer.examples, packed=True)], loss=loss)
    assert one.loss == pytest.approx(other.loss, rel=1e-4)
    assert one.metrics == pytest.approx(other.metrics, rel=1e-3, abs=1e-4)
    assert one.total_weight == other.total_weight
    assert one.counts == other.counts


def test_a_repeated_evaluation_is_the_same_and_leaves_the_random_numbers_alone(name, base_of_kind, generator):
    trainer = trainer_of(name, base_of_kind, examples_of(name, generator, 3), dropout=0.3)
    state = torch.get_rng_state()
    batches = list(eval_batches(trainer.examples, 100))
    one, other = (evaluate(trainer.model, batches, loss=loss_of(name)).loss for _ in range(2))
    assert one == other
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_an_adversary_and_the_bases_divergence_are_added_to_every_loss(name, base_of_kind, generator):
    if name == IMAGES:
        pytest.skip("images have no embedded tokens, and the config refuses what changes these")
    settings = {"neftune_alpha": 5.0, "adversarial": {"epsilon": 0.02}}
    predicts_tokens = loss_of(name).head is None
    if predicts_tokens:
        settings["keep"] = {"kl": 0.2}
    loss = training_loss(section_of(name, **settings), loss_of(name))
    added = {"clean_loss", "adversarial_loss", *(["kl"] if predicts_tokens else [])}
    assert {*loss_of(name).metrics, *added} == {*loss.metrics}
    examples = examples_of(name, generator, 4)
    report = trainer_of(name, base_of_kind, examples, loss=loss, micro=4, accumulation=1).run(2, 3e-3).reports[1]
    assert not predicts_tokens or report.metrics["kl"] > 0
    assert report.loss == pytest.approx(
        (report.metrics["clean_loss"] + report.metrics["adversarial_loss"]) / 2, rel=1e-4
    )
