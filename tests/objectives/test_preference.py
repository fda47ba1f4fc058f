"""Losses of preferences and ratings: those of their papers, with their gradients, and log 2 at the start."""

import math

import pytest
import torch

from qlora.config import TrainSection, load_config
from qlora.data import collate
from qlora.errors import ConfigError
from qlora.lora import adapters_off, lora_layers, trained_rows
from qlora.model import evaluate, load_for_training, load_run
from qlora.model.log_probs import document_log_probs, reference_log_probs
from qlora.objectives import objective_from_section
from qlora.training import train
from tests.objectives.kinds import examples_of, loss_of, section_of
from tests.reference.preference import kto_loss, log_probs, pair_loss
from tests.tiny import run_config, write_jsonl
from tests.training.test_loop import Trainer

PAIRS = [
    {"prompt": f"Question {number}", "chosen": "yes, " * (number % 5 + 1), "rejected": "no " * (number % 7 + 1)}
    for number in range(8)
]


def trained_model(base, generator, name):
    """Return a model whose adapters are not zero, in training mode, and the objective's examples."""
    trainer = Trainer(base, examples_of(name, generator, 4), loss=loss_of(name))
    for _, layer in lora_layers(trainer.model):
        layer.lora_B.data.normal_(std=0.05, generator=generator)
    return trainer.model, trainer.examples


def references_of(model, examples):
    with torch.no_grad(), adapters_off(model):
        return [log_probs(model, example)[0] for example in examples]


def options_of(name):
    return section_of(name).preference.model_dump(exclude_none=True)


def assert_same_gradients(model, found, expected):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    one, other = torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained)
    for grad, wanted in zip(one, other, strict=True):
        assert (grad - wanted).norm() < 1e-3 * wanted.norm() + 1e-7


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "simpo", "cpo"])
def test_the_loss_of_pairs_and_its_gradient_are_those_of_whole_logits(name, tiny_base, generator):
    model, examples = trained_model(tiny_base, generator, name)
    found = loss_of(name).compute(model, collate(examples, packed=True))
    references = references_of(model, examples)
    answers = [log_probs(model, example) for example in examples]
    losses = [
        pair_loss(name, answers[at], answers[at + 1], (references[at], references[at + 1]), **options_of(name))
        for at in range(0, len(examples), 2)
    ]
    expected = torch.stack(losses).sum()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.metrics["log_prob_chosen"].item() == pytest.approx(sum(a.item() for a, _ in answers[::2]), rel=1e-4)
    assert_same_gradients(model, found.total, expected)


def test_the_loss_of_ratings_takes_its_divergence_from_the_mismatched_answers(tiny_base, generator):
    model, examples = trained_model(tiny_base, generator, "kto")
    loss, batch = loss_of("kto"), collate(examples)
    (found,) = loss.training_passes(model, batch)
    references = references_of(model, examples)
    ratios = [log_probs(model, each)[0] - reference for each, reference in zip(examples, references, strict=True)]
    kl = max(0.0, sum(ratio.item() for ratio in ratios[1::2]) / 4)
    options = options_of("kto")
    losses = [
        kto_loss(
            ratios[at], examples[at].values["rating"] > 0, kl,
            beta=options["beta"], good=options["desirable_weight"], bad=options["undesirable_weight"],
        )
        for at in range(0, len(examples), 2)
    ]  # fmt: skip
    expected = torch.stack(losses).sum()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-3)
    assert found.metrics["reference_kl"].item() / 4 == pytest.approx(kl, rel=1e-3, abs=1e-4)
    assert_same_gradients(model, found.total, expected)


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_merges_are_compared_by_the_cross_entropy_of_the_preferred_answers(name, tiny_base, generator):
    model, examples = trained_model(tiny_base, generator, name)
    judge = objective_from_section(section_of(name)).judge
    groups = [examples[start : start + 2] for start in range(0, len(examples), 2)]
    found = evaluate(model, [collate(group) for group in groups], loss=judge)
    preferred = [first for first, _ in groups if name != "kto" or first.values["rating"] > 0]
    if preferred:
        expected = evaluate(model, [collate(preferred)])
        assert (found.loss, found.total_weight) == (pytest.approx(expected.loss, rel=1e-4), expected.total_weight)
    else:
        assert found.total_weight == 0


@pytest.fixture
def sft_run(tiny_base, alpaca_file, tmp_path):
    """Return a function that trains a run of the given settings."""

    def run(**settings):
        train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "sft", train__max_steps=3, **settings)))
        return tmp_path / "sft"

    return run


STARTS = {
    "zero": {},
    "pissa": {"lora__init": "pissa"},
    "reconstruct": {"lora__init": "reconstruct"},
    "dora": {"lora__kind": "dora"},
    "rows": {"lora__kind": "rows", "lora__alpha": 32},
    "new tokens": {"data__new_tokens": ["<a>", "<b>"]},
    "head in full": {"lora__modules_to_save": ["lm_head", "embed_tokens"]},
}


# Settings of a run, and whether it starts from one of the same settings: not, continuing it, or stacked on it.
CASES = [
    ("zero", None), ("zero", "continued"), ("zero", "stacked"), ("pissa", None), ("reconstruct", None),
    ("reconstruct", "continued"), ("dora", "continued"), ("rows", "continued"), ("new tokens", "continued"),
    ("head in full", None), ("head in full", "continued"),
]  # fmt: skip


@pytest.mark.parametrize(("start", "earlier"), CASES)
@pytest.mark.slow
def test_at_step_0_the_loss_is_log_2_and_later_the_reference_is_still_the_model_at_step_0(
    start, earlier, tiny_base, sft_run, tmp_path
):
    settings = dict(STARTS[start])
    if earlier is not None:
        settings |= {"lora__start_from": str(sft_run(**settings)), "lora__stack": earlier == "stacked"}
        settings.pop("lora__init", None)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    config = load_config(
        run_config(tiny_base, pairs, tmp_path / "dpo", train__objective="dpo", train__learning_rate=2e-3, **settings)
    )
    result = train(config)
    assert result.losses[0] == pytest.approx(math.log(2), rel=1e-7)
    assert result.losses[-1] < result.losses[0]
    model, _ = load_run(tmp_path / "dpo", is_reference=True)
    batch = collate(examples_of("dpo", torch.Generator().manual_seed(1), 3))
    with torch.no_grad():
        trained, reference = document_log_probs(model, batch), reference_log_probs(model, batch)
    started, _ = load_for_training(config, "cpu", new_ids_of(config), is_reference=True)
    with torch.no_grad():
        wanted = document_log_probs(started.eval(), batch)
    assert (reference - wanted).abs().max() < 0.1 * (trained - wanted).abs().max()


def new_ids_of(config):
    return range(259, 259 + len(config.data.new_tokens))


def test_the_reference_needs_no_second_copy_where_adapters_start_at_zero(tiny_base, tmp_path):
    config = load_config(run_config(tiny_base, tmp_path / "none.jsonl", tmp_path / "run", train__objective="dpo"))
    model, _ = load_for_training(config, "cpu", is_reference=True)
    assert all(layer.kept is None for _, layer in lora_layers(model))
    assert not list(trained_rows(model))


@pytest.mark.parametrize(("settings", "words"), [
    ({"preference": {"beta": 0.1}}, ["train.objective is sft", "dpo, ipo"]),
    ({"objective": "dpo", "preference": {"gamma": 1.0}}, ["gamma has no effect on dpo", "beta, label_smoothing"]),
    ({"objective": "kto", "preference": {"sft_weight": 1.0}}, ["sft_weight has no effect on kto"]),
    ({"objective": "dpo", "preference": {"label_smoothing": 0.5}}, ["label_smoothing"]),
    ({"objective": "kto", "learning_rate": "auto"}, ["train.learning_rate", "far too high for kto", "5e-06"]),
])  # fmt: skip
def test_options_without_effect_are_refused(settings, words, tiny_base, tmp_path):
    keys = {f"train__{key}": value for key, value in settings.items()}
    with pytest.raises(ConfigError) as caught:
        load_config(run_config(tiny_base, tmp_path / "none.jsonl", tmp_path / "run", **keys))
    assert [word for word in words if word not in str(caught.value)] == []


def test_the_default_learning_rate_is_that_of_the_objective():
    assert TrainSection(objective="dpo", output_dir="run").learning_rate == 5e-6
    assert TrainSection(objective="dpo", output_dir="run", learning_rate=1e-5).learning_rate == 1e-5
    assert TrainSection(output_dir="run").learning_rate == 2e-4
