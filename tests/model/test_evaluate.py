"""Evaluation: the training loss over held-out examples, without side effects."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from qlora.data import collate, eval_batches
from qlora.data.tokens import make_example
from qlora.layers import apply_recompute
from qlora.lora import add_lora
from qlora.model import Evaluation, Loss, StepLoss, evaluate, load_base, supervised_loss
from qlora.optim import FlatParameters, make_optimizer


@pytest.fixture
def model(tiny_base):
    return load_base(str(tiny_base), compute_dtype="float32")[0]


def random_examples(generator, count=7):
    examples = []
    for _ in range(count):
        length = int(torch.randint(3, 24, (), generator=generator))
        ids = torch.randint(256, (length,), generator=generator).numpy()
        examples.append(make_example(ids, (torch.arange(length) > length // 2).numpy()))
    return examples


def test_the_loss_is_the_mean_over_all_supervised_tokens(model, generator):
    examples = random_examples(generator)
    total, count = 0.0, 0
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()
        log_probabilities = F.log_softmax(model(input_ids=ids[None]).logits[0].float(), dim=-1)
        for position in range(1, len(ids)):
            if example.loss_mask[position]:
                total -= log_probabilities[position - 1, ids[position]].item()
                count += 1
    found = evaluate(model, eval_batches(examples, 2))
    assert found.num_supervised == count
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.bits == pytest.approx(total / math.log(2), rel=1e-5)


def test_the_batch_size_changes_nothing(model, generator):
    examples = random_examples(generator)
    losses = [evaluate(model, eval_batches(examples, size)).loss for size in (1, 3, 7)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("capacity", [24, 100])
def test_packing_changes_nothing(model, generator, capacity):
    examples = random_examples(generator, 12)
    apart = evaluate(model, eval_batches(examples, 2))
    packed = evaluate(model, eval_batches(examples, 2, capacity))
    assert packed.num_supervised == apart.num_supervised
    assert packed.loss == pytest.approx(apart.loss, rel=1e-5)


def test_weights_count_in_the_mean_and_in_the_bits(model, generator):
    examples = random_examples(generator, 6)
    weighted = [
        make_example(each.input_ids, each.weights * weight)
        for each, weight in zip(examples, [0.5, 1, 2] * 2, strict=True)
    ]
    alone = [evaluate(model, eval_batches([each], 1)) for each in examples]
    total = sum(weight * one.num_supervised for one, weight in zip(alone, [0.5, 1, 2] * 2, strict=True))
    loss = sum(one.loss * one.num_supervised * weight for one, weight in zip(alone, [0.5, 1, 2] * 2, strict=True))
    found = evaluate(model, eval_batches(weighted, 2))
    assert found.num_supervised == sum(one.num_supervised for one in alone)
    assert found.total_weight == total
    assert found.loss == pytest.approx(loss / total, rel=1e-5)
    assert found.bits == pytest.approx(loss / math.log(2), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(model, training, generator):
    model.train(training)
    evaluate(model, eval_batches(random_examples(generator, 2), 2))
    assert {module.training for module in model.modules()} == {training}


def test_dropout_does_not_act(model, generator):
    add_lora(model, rank=4, dropout=0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    model.train()
    batches = list(eval_batches(random_examples(generator), 3))
    assert evaluate(model, batches) == evaluate(model, batches)


def test_shares_of_processes_are_added_up(model, generator):
    batches = list(eval_batches(random_examples(generator), 1))
    shares = [evaluate(model, batches[rank::2]) for rank in (0, 1)]
    share = shares[1]
    other = torch.tensor([share.loss * share.total_weight, share.num_supervised, share.total_weight])
    together = evaluate(model, batches[0::2], reduce=lambda totals: totals + other)
    whole = evaluate(model, batches)
    assert together.num_supervised == whole.num_supervised
    assert together.loss == pytest.approx(whole.loss, rel=1e-6)


def by_documents(model, batch):
    """Return the supervised loss, with the number of documents as a metric."""
    total = supervised_loss(model, batch)
    return StepLoss(total, {"documents": torch.full_like(total, len(batch.lengths))})


def test_another_loss_and_its_metrics_are_means_over_its_own_units(model, generator):
    examples = random_examples(generator)
    loss = Loss(by_documents, units=lambda part: 2.0 * len(part.lengths), metrics=("documents",))
    batches = list(eval_batches(examples, 3))
    plain, found = evaluate(model, batches), evaluate(model, batches, loss=loss)
    assert found.metrics == {"documents": 0.5}
    assert found.loss == pytest.approx(plain.loss * plain.total_weight / (2 * len(examples)), rel=1e-6)
    shares = []
    evaluate(model, batches[1::2], lambda totals: shares.append(totals) or totals, loss)
    assert evaluate(model, batches[0::2], lambda totals: totals + shares[0], loss).metrics == {"documents": 0.5}


def test_nothing_to_evaluate_is_no_division_by_zero(model):
    assert evaluate(model, []) == Evaluation(0.0, 0, 0.0)
    loss = Loss(by_documents, units=lambda part: 1.0, metrics=("documents",))
    assert evaluate(model, [], loss=loss) == Evaluation(0.0, 0, 0.0, {"documents": 0.0}, is_per_token=False)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_training_after_an_evaluation_is_training_without_one(compute_dtype, tiny_base, generator):
    """On CPUs with avx512_bf16, bitsandbytes' own layer repacks its weight in the first evaluation."""
    examples = random_examples(generator)
    batch = collate(examples)
    results = []
    for with_evaluation in (True, False):
        model, _ = load_base(str(tiny_base), compute_dtype=compute_dtype)
        add_lora(model, rank=4, dropout=0.2)
        apply_recompute(model, "full")
        model.train()
        flat = FlatParameters((name, value) for name, value in model.named_parameters() if value.requires_grad)
        optimizer = make_optimizer("adamw_8bit", flat)
        frozen = copy.deepcopy([value.detach() for value in model.parameters() if not value.requires_grad])
        for step in range(4):
            torch.manual_seed(step)
            flat.zero_grad()
            supervised_loss(model, batch).backward()
            optimizer.step(1e-2)
            if with_evaluation:
                evaluate(model, eval_batches(examples, 3))
        after = [value.detach() for value in model.parameters() if not value.requires_grad]
        assert all(torch.equal(one, other) for one, other in zip(frozen, after, strict=True))
        results.append(flat.data.clone())
    assert results[0].isfinite().all()
    assert torch.equal(*results)
