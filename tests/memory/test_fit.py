"""A run uses the fastest level that fits, corrected by measurement, and caches weights in the memory that is left."""

import pytest
import torch

from qlora.config import load_config
from qlora.data import collate, make_example
from qlora.errors import ModelError
from qlora.layers import rebuild_activations, use_document_attention
from qlora.memory import fit
from qlora.model import SUPERVISED, adapt, base_from_section
from qlora.nf4 import NF4Linear
from qlora.processes import Processes
from tests.test_out_of_memory import OTHERS, RAN_OUT
from tests.tiny import run_config

ALONE = Processes()
LEVELS = ["none", "mlp", "attention", "full"]


class Expected:
    """An estimate with given bytes by level."""

    def __init__(self, *num_bytes):
        self.num_bytes = dict(zip(LEVELS, num_bytes, strict=True))

    def total_bytes(self, level, tokens):
        return self.num_bytes[level]


def settle(level, limit, real, expected):
    """Return the chosen level and the levels tried; one far above the limit runs out of memory."""
    tried = []

    def measure(level):
        tried.append(level)
        taken = dict(zip(LEVELS, real, strict=True))[level]
        return taken if taken <= 1.1 * limit else float("inf")

    settled = fit.settle_level(LEVELS, level, "it fits", limit=limit, expected=expected, tokens=64, measure=measure)
    return *settled, tried


def test_a_level_that_takes_what_was_expected_is_kept():
    real = (100, 60, 30, 20)
    assert settle("mlp", 70, real, Expected(*real)) == ("mlp", 60, "it fits", ["mlp"])


@pytest.mark.parametrize(("limit", "reason"), [(40, "mlp ran out of memory"), (58, "mlp took")])
def test_a_level_that_takes_too_much_is_replaced_by_the_next(limit, reason):
    level, taken, why, tried = settle("mlp", limit, (100, 60, 30, 20), Expected(50, 30, 15, 10))
    assert (level, taken, tried) == ("attention", 30, ["mlp", "attention"])
    assert reason in why


def test_a_level_that_takes_less_than_expected_is_replaced_by_a_faster_one_that_fits():
    level, taken, why, tried = settle("full", 65, (100, 60, 30, 20), Expected(200, 120, 60, 40))
    assert (level, taken, tried) == ("mlp", 60, ["full", "mlp"])
    assert "less than expected" in why


def test_a_faster_level_that_turns_out_not_to_fit_is_not_used():
    assert settle("full", 65, (100, 90, 30, 20), Expected(200, 120, 60, 40))[::3] == ("full", ["full", "mlp"])


def test_without_an_estimate_the_level_that_fits_is_kept():
    assert settle("full", 65, (100, 60, 30, 20), None)[::3] == ("full", ["full"])


def test_a_batch_that_fits_at_no_level_is_refused_with_all_levels_tried():
    with pytest.raises(ModelError, match=r"64 tokens .*attention ran out.*full ran out.*Lower train\.micro_batch_size"):
        settle("attention", 5, (100, 60, 30, 20), Expected(5, 4, 3, 2))


@pytest.fixture
def prepared(tiny_base, alpaca_file, tmp_path, generator):
    """Return a config, its model as it is trained, and a batch."""

    def prepare(**settings):
        config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings))
        model = base_from_section(config.model, "cpu")
        adapt(model, config.lora, 0)
        use_document_attention(model)
        rebuild_activations(model)
        ids = torch.randint(256, (64,), generator=generator).numpy()
        return config, model.train(), collate([make_example(ids, [True] * 64)], packed=True)

    return prepare


def num_cached(model):
    return sum(module._cached is not None for module in model.modules() if isinstance(module, NF4Linear))


def test_with_enough_memory_nothing_is_recomputed_and_every_weight_is_cached(prepared, monkeypatch):
    config, model, batch = prepared()
    chosen_by, choose_level = [], fit.choose_level
    monkeypatch.setattr(fit, "choose_level", lambda *given: chosen_by.append(given[0]) or choose_level(*given))
    found = fit.fit_memory(config, model, SUPERVISED, batch, ALONE)
    assert chosen_by[0].is_loaded  # the peak of loading is over
    linears = sum(isinstance(module, NF4Linear) for module in model.modules())
    assert (found.level, found.num_cached, num_cached(model)) == ("none", linears, linears)
    assert not model.model.layers[0].gradient_checkpointing
    assert found.levels == fit.recompute_levels(model)  # which the run may change to, though one was predicted


def test_with_less_memory_more_is_recomputed(prepared, monkeypatch):
    config, model, batch = prepared()
    total = fit.estimate(config, SUPERVISED, "cpu").total_bytes
    chosen = []
    for level in LEVELS:
        monkeypatch.setattr(fit, "available_bytes", lambda *_, level=level: total(level, 64) / (1 - fit.MARGIN) + 1)
        found = fit.fit_memory(config, model, SUPERVISED, batch, ALONE)
        chosen.append(found.level)
        assert (found.num_cached, found.estimated) == (0, total(level, 64))
    assert chosen == LEVELS
    assert model.model.layers[0].gradient_checkpointing
    monkeypatch.setattr(fit, "available_bytes", lambda *_: total("full", 64))
    with pytest.raises(ModelError, match=r"64 tokens needs at least"):
        fit.fit_memory(config, model, SUPERVISED, batch, ALONE)


def test_a_trial_takes_what_the_allocator_reserves_and_everything_if_memory_runs_out(prepared, monkeypatch):
    _, model, batch = prepared()
    order = []
    stubs = {"empty_cache": None, "reset_peak_memory_stats": None, "max_memory_reserved": 3 << 30}
    for name, value in stubs.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, value=value: order.append(name) or value)
    computed = fit.run_passes
    monkeypatch.setattr(fit, "run_passes", lambda *given: order.append("passes") or computed(*given))
    assert fit._try(model, SUPERVISED, batch, "none") == (3 << 30) + fit.CUDA_CONTEXT_BYTES
    assert order[:3] == ["empty_cache", "passes", "max_memory_reserved"]
    for error in RAN_OUT.values():
        monkeypatch.setattr(fit, "run_passes", failing(error))
        assert fit._try(model, SUPERVISED, batch, "none") == float("inf")
    monkeypatch.setattr(fit, "run_passes", failing(OTHERS["an illegal access"]))
    with pytest.raises(torch.AcceleratorError):
        fit._try(model, SUPERVISED, batch, "none")


def failing(error):
    def fail(*_):
        raise error

    return fail


def test_weights_are_cached_in_the_memory_left_unless_the_cache_is_off(prepared, monkeypatch):
    for cache, expected in (("auto", 2), ("none", 0)):
        config, model, batch = prepared(model__weight_cache=cache)
        linears = [module for module in model.modules() if isinstance(module, NF4Linear)]
        two = sum(model.dtype.itemsize * linear.in_features * linear.out_features for linear in linears[:2])
        needed = fit.estimate(config, SUPERVISED, "cpu").total_bytes("none", 64) + two / fit.HOST_SHARE
        monkeypatch.setattr(fit, "available_bytes", lambda *_, needed=needed: needed / (1 - fit.MARGIN) + 4)
        assert fit.fit_memory(config, model, SUPERVISED, batch, ALONE).num_cached == num_cached(model) == expected


def test_the_level_of_the_config_is_used(prepared):
    config, model, batch = prepared(model__recompute="full")
    found = fit.fit_memory(config, model, SUPERVISED, batch, ALONE)
    assert (found.level, found.why) == ("full", "set by model.recompute")


def test_a_model_whose_memory_is_unknown_is_recomputed_fully(prepared, monkeypatch):
    def unknown(*_):
        raise ModelError("Odd has no layers")

    config, model, batch = prepared()
    monkeypatch.setattr(fit, "estimate", unknown)
    found = fit.fit_memory(config, model, SUPERVISED, batch, ALONE)
    assert (found.level, found.num_cached, found.estimated) == ("full", 0, None)
    assert "Odd has no layers" in found.why
