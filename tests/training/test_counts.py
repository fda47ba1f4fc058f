"""Counts of an optimizer step: lost memory savings or one more wait of the host fail here, on any machine."""

import math

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Qwen3Config

from qlora.data import BatchPlan, make_example
from qlora.layers import apply_recompute, cache_weights, rebuild_activations, recompute_levels, use_document_attention
from qlora.lora import add_lora
from qlora.model import SUPERVISED, load_base
from qlora.optim import FlatParameters, make_optimizer
from qlora.processes import Processes
from qlora.training.loop import LoopCallbacks, LoopParts, LoopSchedule, run_loop
from qlora.training.progress import Progress
from scripts.dev.bench import counts
from tests.tiny import make_base
from tests.training.test_loop import counting

pytestmark = pytest.mark.slow

LAYERS, LENGTH, MICRO_BATCHES = 4, 48, 3


@pytest.fixture
def step(tmp_path, seed, generator):
    """Return a model, and a counter of the work of its second optimizer step; the first one checks gradients."""

    def build(config_class, optimizer="paged_adamw_8bit", capacity=None, loss=SUPERVISED):
        base = make_base(tmp_path / "base", seed, config_class, num_hidden_layers=LAYERS)
        model, _ = load_base(str(base), compute_dtype="bfloat16")
        add_lora(model, rank=4)
        use_document_attention(model)
        rebuild_activations(model)
        lengths = [LENGTH] * 8 if capacity is None else torch.randint(8, LENGTH, (24,), generator=generator).tolist()
        ids = [torch.randint(256, (length,), generator=generator).numpy() for length in lengths]
        examples = [make_example(one, [True] * len(one)) for one in ids]

        def count():
            flat = FlatParameters((name, p) for name, p in model.named_parameters() if p.requires_grad)
            plan = BatchPlan(np.array(lengths), 1, MICRO_BATCHES, capacity)
            done = [counts.Work()]
            with counts.Watch() as work:

                def after_step(report):
                    assert math.isfinite(report.loss)
                    done.append(counts.Work(syncs=work.syncs.copy(), dequantized=work.dequantized))
                    return True

                processes = Processes(device=model.device)
                run_loop(
                    LoopParts(model.train(), make_optimizer(optimizer, flat), loss, examples, plan, processes),
                    Progress(),
                    LoopSchedule(2, lambda _: 1e-4, 1.0),
                    LoopCallbacks(after_step),
                )
            return done[2].syncs - done[1].syncs, done[2].dequantized - done[1].dequantized

        return model, count

    return build


APART, PACKED = (None, "paged_adamw_8bit"), (2 * LENGTH, "adamw_32bit")


@pytest.mark.parametrize(
    ("config_class", "capacity", "optimizer"),
    [(LlamaConfig, *APART), (LlamaConfig, *PACKED), (Qwen3Config, *PACKED), (Gemma2Config, *APART)],
)
def test_the_host_waits_once_a_step(config_class, optimizer, capacity, step):
    model, count = step(config_class, optimizer, capacity, counting(SUPERVISED))
    for level in recompute_levels(model):
        apply_recompute(model, level)
        syncs, _ = count()
        if config_class is Gemma2Config:  # its attention is transformers', whose mask is made from the positions
            syncs.pop("_local_scalar_dense", None)
        assert syncs == {"tolist": 1}, level


def test_weights_are_dequantized_no_more_often_than_their_products_need(step):
    model, count = step(LlamaConfig)
    # The first layer's q, k and v get no gradient of their input. What is recomputed is kept for the backward.
    once = LAYERS * 7 + LAYERS * 7 - 3
    wanted = {"none": once, "mlp": once, "attention": once + 3, "full": once + 3}
    for level in recompute_levels(model):
        apply_recompute(model, level)
        assert count()[1] == MICRO_BATCHES * wanted[level], level
    num_weights, num_bytes = LAYERS * 7, sum(
        2 * module.in_features * module.out_features for module in model.modules() if hasattr(module, "quant_state")
    )  # fmt: skip
    assert cache_weights(model, num_bytes) == num_weights
    assert count()[1] == 0


def test_as_many_weights_are_held_as_fit(step):
    model, count = step(LlamaConfig)
    apply_recompute(model, "none")
    _, all_dequantized = count()
    first, *_ = sizes = [2 * module.numel for module in model.modules() if hasattr(module, "quant_state")]
    assert cache_weights(model, min(sizes) - 1) == 0
    assert cache_weights(model, first) == 1
    assert count()[1] == all_dequantized - MICRO_BATCHES  # the first layer's q, which has a forward only
