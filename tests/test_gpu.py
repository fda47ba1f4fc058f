"""The main job on CUDA, and the parts that differ from a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora
from qlora.data import collate, make_example
from qlora.layers import apply_recompute, rebuild_activations, recompute_levels, use_document_attention
from qlora.lora import AdapterSpec, LoraLinear, add_lora, lora_layers
from qlora.memory.probe import measure_peak
from qlora.model import load_base, supervised_loss
from qlora.nf4 import NF4Linear, dequantize, quantize
from qlora.training.relief import MemoryRelief
from tests import tiny
from tests.tiny import make_base
from tests.training.test_loop import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def run_config(base: Path, data: Path, output_dir: Path, optimizer: str = "adamw_8bit", **overrides: Any) -> Path:
    """Write a config whose optimizer takes no managed memory unless it is one that pages."""
    return tiny.run_config(base, data, output_dir, train__optimizer=optimizer, **overrides)


def test_dequantized_weights_are_those_of_the_cpu(generator: torch.Generator):
    weight = torch.randn(96, 172, generator=generator)
    packed, state = quantize(weight)
    on_cpu = dequantize(packed, state, torch.float32)
    state.to(torch.device("cuda"))
    assert torch.equal(dequantize(packed.cuda(), state, torch.float32).cpu(), on_cpu)


def test_gradients_match_a_plain_fp32_layer(generator: torch.Generator):
    linear = torch.nn.Linear(172, 96).cuda()
    layer = LoraLinear(NF4Linear.from_linear(linear), AdapterSpec(8, 16, dtype=torch.float32))
    layer.cuda().reset(generator)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 172, generator=generator).cuda().requires_grad_()
    layer(x).square().sum().backward()
    got = [tensor.grad.clone() for tensor in (x, layer.lora_A, layer.lora_B)]
    for tensor in (x, layer.lora_A, layer.lora_B):
        tensor.grad = None
    weight = layer.base.dequantize(torch.float32)
    (x @ (weight + layer.spec.scaling * layer.lora_B @ layer.lora_A).T + layer.base.bias).square().sum().backward()
    for found, tensor in zip(got, (x, layer.lora_A, layer.lora_B), strict=True):
        torch.testing.assert_close(found, tensor.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16"])
def test_a_run_learns_merges_and_verifies(tmp_path: Path, tiny_base: Path, alpaca_file: Path, compute_dtype: str):
    config = run_config(tiny_base, alpaca_file, tmp_path / "run", model__compute_dtype=compute_dtype)
    result = qlora.train(qlora.load_config(config))
    assert result.eval_losses[6] < result.eval_losses[0]
    qlora.merge(result.run_dir, tmp_path / "merged")
    assert qlora.verify(result.run_dir, tmp_path / "merged").matches


@pytest.mark.paged
@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_run_with_paged_state_learns_and_says_whether_it_pages(
    tmp_path: Path, tiny_base: Path, alpaca_file: Path, optimizer: str
):
    config = run_config(tiny_base, alpaca_file, tmp_path / "run", optimizer)
    result = qlora.train(qlora.load_config(config))
    assert result.eval_losses[6] < result.eval_losses[0]
    in_use = json.loads((tmp_path / "run" / "run.json").read_text())["in_use"]
    assert in_use["optimizer_state_paged"] == (in_use["optimizer_state_why"] is None)


@pytest.mark.parametrize("form", ["separate", "folded"])
def test_every_level_of_recomputation_gives_the_same_gradients(tiny_base: Path, generator: torch.Generator, form: str):
    model, _ = load_base(str(tiny_base), compute_dtype="bfloat16")
    add_lora(model, rank=4, form=form)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.05)
    use_document_attention(model)
    rebuild_activations(model)
    model.train()
    ids = [torch.randint(256, (length,), generator=generator).numpy() for length in (40, 200, 90)]
    batch = collate([make_example(one, [True] * len(one)) for one in ids], packed=True).to(model.device)
    assert recompute_levels(model) == ["none", "mlp", "attention", "full", "offload", "offload+tiled"]
    found = {}
    for level in recompute_levels(model):
        apply_recompute(model, level)
        for _ in range(3):  # memory of the host and of the allocator is used again
            model.zero_grad()
            supervised_loss(model, batch).backward()
        grads = [p.grad.float() for _, layer in lora_layers(model) for p in (layer.lora_A, layer.lora_B)]
        found[level] = torch.cat([grad.flatten() for grad in grads])
    for level, grad in found.items():
        # Attention's backward may add up in any order there.
        assert (grad - found["none"]).norm() <= 1e-2 * found["none"].norm(), level


def test_the_largest_micro_batch_is_tried_before_the_first_step(tmp_path: Path, tiny_base: Path, alpaca_file: Path):
    config = qlora.load_config(run_config(tiny_base, alpaca_file, tmp_path / "run"))
    qlora.train(config)
    in_use = json.loads((tmp_path / "run" / "run.json").read_text())["in_use"]
    assert 0 < in_use["memory"]["measured"] < in_use["memory"]["available"]
    assert in_use["memory"]["estimated"] == pytest.approx(in_use["memory"]["measured"], rel=0.5)


@pytest.mark.parametrize("level", ["offload", "offload+tiled"])
def test_a_run_with_its_layers_inputs_on_the_host_learns(
    tmp_path: Path, tiny_base: Path, alpaca_file: Path, level: str
):
    result = qlora.train(
        qlora.load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", model__recompute=level))
    )
    assert result.eval_losses[6] < result.eval_losses[0]


def test_a_step_that_runs_out_of_memory_is_retried_with_less(tmp_path: Path, seed: int, generator: torch.Generator):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "max_position_embeddings": 2048}
    base = make_base(tmp_path / "base", seed, **sizes)
    ids = torch.randint(256, (8, 2048), generator=generator).numpy()
    examples = [make_example(row, [True] * len(row)) for row in ids]

    def prepare() -> Trainer:
        trainer = Trainer(base, examples, 8, 1, compute_dtype="bfloat16")
        apply_recompute(trainer.model, "none")
        return trainer.run(1)

    free = prepare()
    needed = measure_peak(lambda: free.run(2), free.model.device)
    apply_recompute(free.model, "full")
    least = measure_peak(lambda: free.run(3), free.model.device)
    assert least < 0.7 * needed
    trainer, changes = prepare(), []
    relief = MemoryRelief(trainer.model, trainer.plan, trainer.progress, "none", recompute_levels(trainer.model))
    others = torch.cuda.memory_allocated() - trainer.flat.data.nbytes  # of the first trainer, still there
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((others + (needed + least) / 2) / total)
    try:
        trainer.run(3, on_out_of_memory=lambda step: changes.append(relief.reduce_memory(step)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert changes
    assert relief.level != "none"
    # Not equal: attention's backward adds up in any order there, unless a run is deterministic.
    assert trainer.losses == pytest.approx(free.losses, rel=1e-2)


@pytest.mark.parametrize("packing", [True, False])
def test_two_deterministic_runs_give_the_same_bytes(tmp_path: Path, tiny_base: Path, alpaca_file: Path, packing: bool):
    found = []
    for name in ("one", "other"):
        settings = {"train__deterministic": True, "data__packing": packing, "lora__dropout": 0.1}
        result = qlora.train(qlora.load_config(run_config(tiny_base, alpaca_file, tmp_path / name, **settings)))
        found.append((result.losses, (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()))
    assert found[0] == found[1]
