"""The loop: gradients of the whole window, only adapters changed, and errors instead of silent failure."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qlora.data import IGNORE_INDEX, BatchPlan, collate
from qlora.data.tokens import make_example
from qlora.errors import ModelError
from qlora.lora import add_lora, lora_layers, train_rows
from qlora.model import SUPERVISED, Loss, StepLoss, frozen_checksum, load_base, supervised_loss
from qlora.optim import FlatParameters, make_optimizer
from qlora.processes import Processes
from qlora.training.loop import LoopCallbacks, LoopParts, LoopSchedule, run_loop
from qlora.training.progress import Progress


def random_examples(generator, count):
    """Return examples of different lengths, with different shares supervised."""
    examples = []
    for index in range(count):
        length = int(torch.randint(6, 40, (), generator=generator))
        ids = torch.randint(256, (length,), generator=generator).numpy()
        examples.append(make_example(ids, (torch.arange(length) >= (1 + 3 * index) % length).numpy()))
    return examples


def lengths_of(examples):
    return np.array(list(map(len, examples)))


# Rows of one document each, and of several.
CAPACITIES = pytest.mark.parametrize("capacity", [None, 80], ids=["apart", "packed"])


class Trainer:
    """A model with adapters and the loop's other arguments; keeps reports and each step's gradient."""

    loss = SUPERVISED

    def __init__(
        self, base, examples, micro=2, accumulation=2, compute_dtype="float32", capacity=None, rows=(), loss=None,
        **settings,
    ):  # fmt: skip
        self.loss = loss or self.loss
        self.model, _ = load_base(str(base), compute_dtype=compute_dtype, head=self.loss.head)
        add_lora(self.model, rank=4, alpha=8, **{"dtype": torch.float32, **settings})
        train_rows(self.model, rows, dtype=torch.float32)
        self.model.train()
        self.flat = FlatParameters((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        self.optimizer = make_optimizer("adamw_32bit", self.flat)
        self.examples, self.plan = (
            examples,
            BatchPlan(lengths_of(examples), micro, accumulation, capacity, group_size=self.loss.group_size),
        )
        self.progress, self.reports, self.grads = Progress(), [], []

    def run(self, steps, rate=1e-2, max_grad_norm=None, stop=None, processes=None, **callbacks):
        def after_step(report):
            self.reports.append(report)
            self.grads.append(self.flat.grad.clone())
            return not report.stop_asked

        processes = processes or Processes(device=self.model.device)
        run_loop(
            LoopParts(self.model, self.optimizer, self.loss, self.examples, self.plan, processes),
            self.progress,
            LoopSchedule(steps, lambda step: rate, max_grad_norm),
            LoopCallbacks(after_step, lambda: self.progress.step + 1 == stop, **callbacks),
        )
        return self

    @property
    def losses(self):
        return [report.loss for report in self.reports]


def counting(loss):
    """Return a loss with two metrics: its total, and the supervised tokens."""

    def compute(model, batch):
        total = loss.compute(model, batch).total
        return StepLoss(total, {"total": total, "tokens": torch.full_like(total, batch.num_supervised)})

    return Loss(compute, loss.units, ("total", "tokens"))


def reference_gradient(model, examples):
    """Return the gradient of the mean cross-entropy over the window's supervised tokens, as one batch, by autograd."""
    batch = collate(examples)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX)
    layers = [parameter for _, layer in lora_layers(model) for parameter in (layer.lora_A, layer.lora_B)]
    return loss.item(), torch.autograd.grad(loss, layers)


@CAPACITIES
def test_a_steps_gradient_is_that_of_its_whole_window_as_one_batch(capacity, tiny_base, generator):
    trainer = Trainer(tiny_base, random_examples(generator, 16), micro=1, accumulation=4, capacity=capacity)
    for _, layer in lora_layers(trainer.model):
        layer.lora_B.data.normal_(std=0.05, generator=generator)
    window = [trainer.examples[index] for index in trainer.plan.window(0)]
    assert len({example.num_supervised for example in window}) > 1
    loss, expected = reference_gradient(copy.deepcopy(trainer.model), window)
    trainer.run(1)
    assert trainer.losses == pytest.approx([loss], rel=1e-5)
    found = [p.grad for _, layer in lora_layers(trainer.model) for p in (layer.lora_A, layer.lora_B)]
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * other.abs().max().item())
    norm = torch.cat([grad.flatten() for grad in expected]).norm().item()
    assert trainer.reports[0].grad_norm == pytest.approx(norm, rel=1e-4)


@CAPACITIES
@pytest.mark.parametrize("count", [16, 15], ids=["even", "a short last window"])
def test_four_micro_batches_of_one_are_one_of_four(count, capacity, any_base, generator):
    examples = random_examples(generator, count)
    one, other = (Trainer(any_base, examples, micro, 4 // micro, capacity=capacity).run(4) for micro in (1, 4))
    assert one.losses == pytest.approx(other.losses, rel=1e-4)
    for grad, expected in zip(one.grads, other.grads, strict=True):
        assert (grad - expected).norm() < 1e-3 * expected.norm()
    assert one.progress.supervised_tokens == other.progress.supervised_tokens


def test_a_weighted_token_counts_as_often_as_its_weight_says(tiny_base, generator):
    """Weights of 1 and 0.5 are the mean over tokens that count twice and once."""
    examples = random_examples(generator, 4)
    weighted = [make_example(each.input_ids, each.weights * (1 if number % 2 else 0.5)) for number, each in
                enumerate(examples)]  # fmt: skip
    trainer = Trainer(tiny_base, weighted, 4, 1)
    twice = [each for number, each in enumerate(examples) for _ in range(1 + number % 2)]
    loss, expected = reference_gradient(copy.deepcopy(trainer.model), twice)
    trainer.run(1)
    assert trainer.losses == pytest.approx([loss], rel=1e-5)
    found = [p.grad for _, layer in lora_layers(trainer.model) for p in (layer.lora_A, layer.lora_B)]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * max(1e-3, other.abs().max().item()))


def test_clipping_scales_the_gradient_and_reports_the_norm_before(tiny_base, generator):
    examples = random_examples(generator, 4)
    free, clipped = (Trainer(tiny_base, examples).run(1, max_grad_norm=limit) for limit in (None, 1e-3))
    assert clipped.reports[0].grad_norm == pytest.approx(free.reports[0].grad_norm)
    assert clipped.grads[0].norm().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_only_the_adapters_change(compute_dtype, tiny_base, generator):
    trainer = Trainer(
        tiny_base, random_examples(generator, 8), compute_dtype=compute_dtype, dtype=torch.bfloat16, dropout=0.1
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    checksum = frozen_checksum(trainer.model)
    trainer.run(3)
    assert frozen_checksum(trainer.model) == checksum
    changed = {n for n, value in trainer.model.named_parameters() if not torch.equal(before[n], value)}
    assert changed == {name for name in before if ".lora_" in name}


def test_the_loss_decreases(tiny_base, generator):
    losses = Trainer(tiny_base, random_examples(generator, 4)).run(12).losses
    assert losses[-1] < 0.7 * losses[0]


def test_the_first_loss_is_the_bases_own(tiny_base, generator):
    trainer = Trainer(tiny_base, random_examples(generator, 4))
    plain, _ = load_base(str(tiny_base), compute_dtype="float32")
    batch = collate(trainer.examples)
    logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX)
    assert trainer.run(1).losses == pytest.approx([expected.item()], rel=1e-5)


def test_progress_counts_steps_and_tokens(tiny_base, generator):
    examples = random_examples(generator, 6)
    trainer = Trainer(tiny_base, examples, 2, 1).run(3)
    assert trainer.progress.step == 3
    assert trainer.progress.tokens == sum(map(len, examples))
    assert trainer.progress.supervised_tokens == sum(example.num_supervised for example in examples)
    assert sum(report.tokens for report in trainer.reports) == trainer.progress.tokens
    assert all(report.seconds > 0 for report in trainer.reports)


@CAPACITIES
def test_it_stops_when_asked_and_continues_from_there(capacity, tiny_base, generator):
    examples = random_examples(generator, 16)
    whole = Trainer(tiny_base, examples, dropout=0.2, capacity=capacity).run(5)
    parts = Trainer(tiny_base, examples, dropout=0.2, capacity=capacity).run(5, stop=2)
    assert parts.progress.step == 2
    parts.run(5)
    assert parts.losses == whole.losses
    assert torch.equal(parts.flat.data, whole.flat.data)


def test_every_step_drops_other_inputs(tiny_base, generator):
    """The rate is so low that only dropout can change the loss of the same window."""
    trainer = Trainer(tiny_base, random_examples(generator, 4), dropout=0.5)
    for _, layer in lora_layers(trainer.model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    losses = trainer.run(3, rate=1e-12).losses
    assert len({round(loss, 5) for loss in losses}) == 3


def test_an_adapter_that_the_forward_never_uses_is_named(tiny_base, generator):
    trainer = Trainer(tiny_base, random_examples(generator, 4))
    layer = trainer.model.model.layers[1]
    layer.self_attn.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    before = trainer.flat.data.clone()
    with pytest.raises(ModelError, match=r"4 of 14 adapters, .*model\.layers\.1\.self_attn\.q_proj"):
        trainer.run(2)
    assert torch.equal(trainer.flat.data, before)
    assert trainer.reports == []


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(value, tiny_base, generator):
    trainer = Trainer(tiny_base, random_examples(generator, 8)).run(4, stop=2)
    trainer.model.model.layers[0].mlp.up_proj.lora_A.data[0, 0] = value
    before = trainer.flat.data.clone()
    with pytest.raises(ModelError, match=r"Step 3: the loss is nan.* Nothing was updated"):
        trainer.run(4)
    assert torch.equal(trainer.flat.data.nan_to_num(9.0), before.nan_to_num(9.0))
    assert trainer.optimizer.step_count == 2
    assert trainer.progress.step == 2


@CAPACITIES
def test_processes_share_a_window_and_add_up_its_gradient(capacity, any_base, generator):
    """Two processes in turn, each given the sum of both gradients, as by an all-reduce."""
    examples = random_examples(generator, 24)
    single = Trainer(any_base, examples, micro=1, accumulation=4, capacity=capacity)
    single.loss = counting(SUPERVISED)
    single.run(1)
    ranks = [Trainer(any_base, examples) for _ in range(2)]
    local = []
    for collect in (True, False):
        for rank, trainer in enumerate(ranks):
            trainer.plan = BatchPlan(lengths_of(examples), 1, 2, capacity, rank=rank, world_size=2)
            seen = []

            def reduce(tensor, rank=rank, seen=seen, collect=collect):
                seen.append(tensor.clone())
                return tensor if collect else sum(values[len(seen) - 1] for values in local)

            processes = Processes(rank, 2)
            processes.sum = reduce
            if collect:
                trainer = Trainer(any_base, examples)
                trainer.plan = BatchPlan(lengths_of(examples), 1, 2, capacity, rank=rank, world_size=2)
            trainer.loss = counting(SUPERVISED)
            trainer.run(1, processes=processes)
            if collect:
                local.append(seen)
    assert not torch.allclose(local[0][0], local[1][0])
    for trainer in ranks:
        assert trainer.losses == pytest.approx(single.losses, rel=1e-5)
        assert trainer.reports[0].metrics == pytest.approx(single.reports[0].metrics, rel=1e-5)
        assert (trainer.flat.grad - single.grads[0]).norm() < 1e-3 * single.grads[0].norm()
    assert torch.equal(ranks[0].flat.data, ranks[1].flat.data)


def test_gradients_that_overflow_whatever_the_scale_stop_the_run(tiny_base, generator):
    """The scale is halved at each, from 65536; below 1 the gradients themselves overflow."""
    trainer = Trainer(tiny_base, random_examples(generator, 4), micro=1, accumulation=1, compute_dtype="float16")
    layer = next(layer for _, layer in lora_layers(trainer.model))
    layer.lora_B.register_hook(lambda grad: torch.full_like(grad, float("inf")))
    before = trainer.flat.data.clone()
    with pytest.raises(ModelError, match=r"Step 18: the loss is \d.* norm (inf|nan)\. Nothing was updated"):
        trainer.run(40)
    assert [report.zero_update_share for report in trainer.reports] == [None] * 17
    assert torch.equal(trainer.flat.data, before)
    assert trainer.optimizer.step_count == 0


def test_a_gradient_that_overflows_once_halves_the_scale_and_is_skipped(tiny_base, generator):
    # The mean over many tokens: that of one or two may overflow by itself.
    examples = [make_example(each.input_ids, [True] * len(each)) for each in random_examples(generator, 4)]
    trainer = Trainer(tiny_base, examples, micro=4, accumulation=1, compute_dtype="float16")
    layer = next(layer for _, layer in lora_layers(trainer.model))
    trainer.run(3, stop=1)
    before = trainer.flat.data.clone()
    handle = layer.lora_B.register_hook(lambda grad: torch.full_like(grad, float("inf")))
    trainer.run(3, stop=2)
    assert torch.equal(trainer.flat.data, before)
    assert trainer.progress.loss_scale == 2**15
    handle.remove()
    trainer.run(3)
    assert not torch.equal(trainer.flat.data, before)
    assert trainer.optimizer.step_count == 2


@CAPACITIES
def test_metrics_are_means_over_the_units_of_the_whole_window(capacity, tiny_base, generator):
    examples = [make_example(each.input_ids, each.weights * 0.5) for each in random_examples(generator, 8)]
    plain, trainer = (Trainer(tiny_base, examples, 1, 4, capacity=capacity) for _ in range(2))
    trainer.loss = counting(SUPERVISED)
    plain.run(2)
    trainer.run(2)
    assert [report.metrics for report in plain.reports] == [{}, {}]
    assert [report.metrics for report in trainer.reports] == [
        {"total": loss, "tokens": pytest.approx(2.0)} for loss in plain.losses
    ]
    assert torch.equal(trainer.flat.data, plain.flat.data)


def test_a_loss_of_other_units_is_their_mean(tiny_base, generator):
    """Documents instead of supervised tokens, without any change to the loop."""
    examples = random_examples(generator, 4)
    trainer = Trainer(tiny_base, examples, 2, 2)
    trainer.loss = Loss(lambda model, batch: StepLoss(supervised_loss(model, batch)), units=lambda part: 1.0)
    loss, _ = reference_gradient(copy.deepcopy(trainer.model), examples)
    tokens = sum(example.num_supervised for example in examples)
    assert trainer.run(1).losses == pytest.approx([loss * tokens / len(examples)], rel=1e-5)
