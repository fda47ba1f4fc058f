"""The divergence from the base: its value and gradient, zero at the start, and what it is computed on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import CohereConfig, Gemma2Config, LlamaConfig

from qlora.config import load_config
from qlora.data import collate
from qlora.data.tokens import make_example
from qlora.errors import ConfigError
from qlora.layers import rebuild_activations
from qlora.lora import adapters_off, add_lora, lora_layers, train_rows
from qlora.model import SUPERVISED, load_base
from qlora.objectives.keep import with_base_kl
from tests.objectives.kinds import examples_of, loss_of
from tests.tiny import make_base, run_config
from tests.training.test_loop import random_examples

WEIGHT = 0.7
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "softcap": (Gemma2Config, {"final_logit_softcapping": 3.0}),
    "scaled logits": (CohereConfig, {"logit_scale": 0.25}),
    "dropout": (LlamaConfig, {"attention_dropout": 0.3}),
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    config_class, sizes = FAMILIES[request.param]
    return request.param, make_base(tmp_path / "base", 5, config_class, **sizes)


def load(base, generator=None, new_ids=range(0), rebuild=True):
    model, _ = load_base(str(base), compute_dtype="float32")
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    train_rows(model, new_ids=new_ids, dtype=torch.float32)
    if rebuild:
        rebuild_activations(model)
    if generator is not None:
        for _, layer in lora_layers(model):
            layer.lora_B.data.normal_(std=0.05, generator=generator)
    return model.train()


def plain_divergence(model, batch):
    """Return the weighted sum of KL(base ‖ model) over supervised tokens from whole logits, and its gradient."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad(), adapters_off(model):
        base = F.log_softmax(model(**inputs).logits.float().flatten(0, 1)[batch.supervised], dim=-1)
    own = F.log_softmax(model(**inputs).logits.float().flatten(0, 1)[batch.supervised], dim=-1)
    rows = F.kl_div(own, base, reduction="none", log_target=True).sum(-1)
    total = rows.sum() if batch.weights is None else rows @ batch.weights
    return total, torch.autograd.grad(total, [each for each in model.parameters() if each.requires_grad])


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_that_of_whole_logits_and_adds_its_gradient(weighted, family, generator):
    name, base = family
    if name == "dropout":
        pytest.skip("random")
    examples = random_examples(generator, 5)
    if weighted:
        examples = [make_example(each.input_ids, each.weights * 0.5 * (1 + n)) for n, each in enumerate(examples)]
    batch, model = collate(examples), load(base, generator)
    expected, gradients = plain_divergence(copy.deepcopy(model), batch)
    plain, kept = SUPERVISED.compute(model, batch), with_base_kl(SUPERVISED, WEIGHT).compute(model, batch)
    assert expected > 0.01  # it is no empty comparison
    assert kept.metrics["kl"].item() == pytest.approx(expected.item(), rel=2e-3)
    assert kept.total.item() == pytest.approx((plain.total + WEIGHT * expected).item(), rel=1e-4)
    trained = [each for each in model.parameters() if each.requires_grad]
    one, other = (torch.autograd.grad(step.total, trained) for step in (kept, plain))
    for with_it, without, gradient in zip(one, other, gradients, strict=True):
        assert (with_it - without - WEIGHT * gradient).norm() < 5e-3 * WEIGHT * gradient.norm() + 1e-4 * without.norm()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [range(0), range(259, 261), range(255, 257)], ids=["none", "new", "spare"])
def test_it_is_exactly_zero_before_the_first_step(rows, packed, family, generator):
    name, base = family
    model = load(base, new_ids=rows)
    if name == "dropout":  # the model has it, the base has not
        model.eval()
    batch = collate(random_examples(generator, 6), packed)
    plain, kept = (loss.compute(model, batch) for loss in (SUPERVISED, with_base_kl(SUPERVISED, WEIGHT)))
    if rows == range(255, 257):  # set to the mean of the rows before them: other predictions than the base's
        assert kept.metrics["kl"] > 0
        return
    assert kept.metrics["kl"].item() == 0
    assert kept.total.item() == plain.total.item()


def test_the_base_has_no_dropout_and_draws_nothing(tmp_path, generator):
    model = load(make_base(tmp_path / "base", 5, LlamaConfig, attention_dropout=0.3), generator)
    batch = collate(random_examples(generator, 3))
    totals = []
    for loss in (SUPERVISED, with_base_kl(SUPERVISED, 0.0)):
        torch.manual_seed(3)
        totals.append((loss.compute(model, batch).total.item(), torch.rand(()).item()))
    assert totals[0] == totals[1]
    assert model.training
    assert not any(layer.is_off for _, layer in lora_layers(model))


def test_rows_of_new_tokens_get_its_gradient(tiny_base, generator):
    model = load(tiny_base, generator, new_ids=range(259, 261))
    examples = random_examples(generator, 3)
    batch = collate(examples)
    gradients = []
    rows = [each for name, each in model.named_parameters() if each.requires_grad and "lora_" not in name]
    for weight in (0.0, WEIGHT):
        gradients.append(torch.autograd.grad(with_base_kl(SUPERVISED, weight).compute(model, batch).total, rows))
    assert any(not torch.allclose(one, other) for one, other in zip(*gradients, strict=True))


def test_embedding_or_head_trained_in_full_are_refused(tiny_base, alpaca_file, tmp_path):
    settings = {"train__keep": {"kl": 0.1}, "lora__modules_to_save": ["lm_head"]}
    with pytest.raises(ConfigError, match=r"keep\.kl compares .* lora\.modules_to_save \['lm_head'\]"):
        load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings))
    with pytest.raises(ConfigError, match="keeps nothing; set kl or null_space, or remove keep"):
        load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__keep={"kl": 0}))


def test_outside_of_fine_tuning_it_is_the_mean_over_each_answers_tokens(tiny_base, generator):
    model, examples = load(tiny_base, generator), examples_of("dpo", generator, 3)
    plain, kept = loss_of("dpo"), with_base_kl(loss_of("dpo"), WEIGHT)
    batch = collate(examples, packed=True)
    (one,), (other,) = plain.training_passes(model, batch), kept.training_passes(model, batch)
    means = [plain_divergence(model, collate([example]))[0].item() / example.num_supervised for example in examples]
    expected = sum(means) / len(means)
    assert other.metrics["kl"].item() / plain.units(batch) == pytest.approx(expected, rel=5e-3)
    assert (other.total - one.total).item() / plain.units(batch) == pytest.approx(WEIGHT * expected, rel=5e-3)
