"""What a config adds to the loss while training keeps the loop's promises, alone and together."""

import copy

import pytest
import torch

from qlora.config import TrainSection
from qlora.data import BatchPlan
from qlora.layers import apply_recompute, recompute_levels
from qlora.lora import lora_layers
from qlora.objectives import training_loss
from qlora.processes import Processes
from qlora.training import replay, train
from qlora.training.assemble import assemble
from qlora.training.replay import save_step
from tests.training.same_run import lines_of
from tests.training.test_loop import CAPACITIES, Trainer, lengths_of, random_examples

ADDED = {
    "token loss": {"token_loss": "dft", "label_smoothing": 0.1},
    "noise": {"neftune_alpha": 20.0},
    "adversary": {"adversarial": {"epsilon": 0.2}},
    "divergence": {"keep": {"kl": 0.7}},
}
ADDED["all"] = {key: value for each in ADDED.values() for key, value in each.items()}
EACH = pytest.mark.parametrize("added", ADDED.values(), ids=ADDED)


def added_loss(added):
    return training_loss(TrainSection(output_dir="runs/any", **added))


@pytest.fixture
def trainer(tiny_base, generator):
    """Build trainers whose adapters are not zero, on the same examples."""
    examples, seed = random_examples(generator, 16), int(torch.randint(2**31, (), generator=generator))

    def build(added, micro=2, accumulation=2, **settings):
        trainer = Trainer(tiny_base, examples, micro, accumulation, **settings)
        own = torch.Generator().manual_seed(seed)
        for _, layer in lora_layers(trainer.model):
            layer.lora_B.data.normal_(std=0.05, generator=own)
        trainer.loss = added_loss(added)
        return trainer

    return build


def assert_same_steps(one, other):
    assert one.losses == pytest.approx(other.losses, rel=1e-4)
    for report, expected in zip(one.reports, other.reports, strict=True):
        assert report.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-6)
    for grad, expected in zip(one.grads, other.grads, strict=True):
        assert (grad - expected).norm() < 2e-3 * expected.norm()


@EACH
@CAPACITIES
def test_four_micro_batches_of_one_are_one_of_four(added, capacity, trainer):
    assert_same_steps(*(trainer(added, micro, 4 // micro, capacity=capacity).run(2) for micro in (1, 4)))


@EACH
def test_packed_documents_are_those_apart(added, trainer):
    """A step with all examples, in one packed row or in a row each."""
    packed, apart = trainer(added, 1, 1, capacity=1024), trainer(added, 16, 1)
    assert sorted(packed.plan.window(0)) == sorted(apart.plan.window(0)) == list(range(16))
    assert_same_steps(packed.run(1), apart.run(1))


@EACH
def test_parts_of_a_micro_batch_are_the_whole(added, trainer):
    whole, parts = trainer(added, 4, 1), trainer(added, 4, 1)
    parts.progress.num_parts = 3
    assert_same_steps(whole.run(1), parts.run(1))


@EACH
def test_two_processes_are_one_with_twice_the_batch(added, trainer):
    single = trainer(added, 1, 4).run(1)
    gradients, sums = [], []
    for rank in range(2):
        one = trainer(added, 1, 2)
        one.plan = BatchPlan(lengths_of(one.examples), 1, 2, rank=rank, world_size=2)
        seen = []
        processes = Processes(rank, 2)
        processes.sum = lambda tensor, seen=seen: seen.append(tensor.clone()) or tensor
        one.run(1, processes=processes)
        gradients.append(seen[0])
        sums.append(seen[1])
    assert not torch.allclose(*gradients)
    assert (sum(gradients) - single.grads[0]).norm() < 2e-3 * single.grads[0].norm()
    loss, *metrics, _, _ = sum(sums).tolist()
    assert loss == pytest.approx(single.losses[0], rel=1e-4)
    assert metrics == pytest.approx(list(single.reports[0].metrics.values()), rel=1e-3, abs=1e-6)


@EACH
@CAPACITIES
def test_it_continues_as_if_it_had_never_stopped(added, capacity, trainer):
    whole = trainer(added, dropout=0.2, capacity=capacity).run(4)
    parts = trainer(added, dropout=0.2, capacity=capacity).run(4, stop=2).run(4)
    assert parts.losses == whole.losses
    assert [report.metrics for report in parts.reports] == [report.metrics for report in whole.reports]
    assert torch.equal(parts.flat.data, whole.flat.data)


@EACH
def test_every_level_of_recomputation_has_the_same_gradient(added, trainer):
    found = []
    for level in recompute_levels(trainer(added).model):
        one = trainer(added, dropout=0.2)
        apply_recompute(one.model, level)
        found.append(one.run(1))
    assert len(found) > 2
    for one in found[1:]:
        assert one.losses == found[0].losses
        assert torch.equal(one.grads[0], found[0].grads[0])


@EACH
def test_only_the_adapters_change_and_every_step_differs_from_the_plain_one(added, trainer):
    plain, one = trainer({}), trainer(added)
    before = copy.deepcopy(one.model.state_dict())
    assert plain.run(1).losses != one.run(1).losses
    changed = {name for name, value in one.model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed
    assert all(".lora_" in name for name in changed)


@EACH
def test_metrics_are_reported_by_their_names(added, trainer):
    report = trainer(added).run(1).reports[0]
    assert tuple(report.metrics) == added_loss(added).metrics
    if "adversarial" in added:
        clean, adversarial = report.metrics["clean_loss"], report.metrics["adversarial_loss"]
        assert report.loss == pytest.approx((clean + adversarial) / 2, rel=1e-5)


@EACH
def test_a_replayed_step_repeats_its_numbers(added, configure, tmp_path):
    config = configure(**{f"train__{key}": value for key, value in added.items()})
    train(config, stop_at=1)
    (line,) = (line for line in lines_of(tmp_path / "run") if "loss" in line)
    parts = assemble(config, Processes(device=torch.device("cpu"))).loop_parts
    kept = tmp_path / "step.safetensors"
    about = {"loss": line["loss"], "grad_norm": line["grad_norm"], "loss_scale": 1.0, "rows": {}, "label_weights": None}
    save_step(kept, parts, 0, 1, about)
    report = replay(config, kept)
    assert report.loss == pytest.approx(report.recorded_loss, rel=1e-6)
    assert report.grad_norm == pytest.approx(report.recorded_grad_norm, rel=1e-5)
