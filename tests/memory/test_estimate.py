"""The estimate of a run's memory against the measured memory of its step, and the choice of a level."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3MoeConfig

from qlora.config import load_config
from qlora.data import add_new_tokens, collate, make_example
from qlora.errors import ModelError
from qlora.layers import apply_recompute
from qlora.layers.recompute import recompute_levels
from qlora.memory.estimate import MARGIN, available_bytes, choose_level, estimate
from qlora.memory.footprint import nf4_bytes
from qlora.memory.probe import measure_peak, measure_step, prepare
from qlora.model import (
    SUPERVISED,
    adapt,
    base_from_section,
    load_processor,
    on_meta,
    supervised_loss,
    take_inventory,
)
from qlora.nf4 import NF4Linear, quantize
from qlora.nf4.quantize import nf4_num_bytes
from qlora.objectives import training_loss
from qlora.optim import FlatParameters, make_optimizer
from tests.multimodal import make_multimodal
from tests.tiny import make_base, run_config

CPU = torch.device("cpu")
TOLERANCE = 0.05
LIMITS = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LLAMA_8B = "executorch_llama3-8B-instruct"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "llama", seed=random.randrange(2**31), **LIMITS)


def settings(base, tmp_path, *overrides, **keys):
    path = run_config(base, tmp_path / "none.jsonl", tmp_path / "run", **{"lora__rank": 16} | keys)
    return load_config(path, overrides)


def estimate_real(realdata, tmp_path, name, *overrides):
    keys = {"data__max_seq_len": 2048, "train__micro_batch_size": 2, "model__allow_unquantized": True}
    return estimate(settings(realdata / "configs" / name, tmp_path, *overrides, **keys), SUPERVISED, "cuda")


@pytest.fixture(scope="module")
def llama_8b(realdata, tmp_path_factory):
    """The estimate of a run of an 8B model."""
    return estimate_real(realdata, tmp_path_factory.mktemp("8b"), LLAMA_8B)


def relative_errors(base, tmp_path, overrides, levels=slice(None)):
    """Return the relative error of the estimate by level, against the measured step."""
    config = settings(base, tmp_path, *overrides)
    loss = training_loss(config.train)
    predicted = estimate(config, loss, CPU)
    model, config, loss = prepare(config, CPU, loss)
    assert predicted.levels == recompute_levels(model)
    return {
        level: predicted.total_bytes(level, predicted.tokens) / measure_step(model, config, level, loss) - 1
        for level in predicted.levels[levels]
    }


@pytest.mark.slow
def test_the_estimate_of_every_level_matches_its_step(base, tmp_path):
    errors = relative_errors(base, tmp_path, ["data.max_seq_len=320"])
    assert set(errors) == {"none", "mlp", "attention", "full"}
    assert max(map(abs, errors.values())) <= TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["data.max_seq_len=192", "data.packing=false"],
        ["data.max_seq_len=64", "lora.rank=64"],  # the optimizer's step takes more than the layers'
        ["data.max_seq_len=192", "lora.dropout=0.1"],
        ["data.max_seq_len=192", "lora.rank_pattern={up_proj: 128, 'layers.[23].self_attn.*': 200}"],
        ["data.max_seq_len=192", "model.attention=eager"],
        ["data.max_seq_len=192", "model.quantization=none", "lora.targets=[q_proj, down_proj]"],
        ["data.max_seq_len=192", "data.new_tokens=[<tool>, </tool>]"],
        ["lora.modules_to_save=[embed_tokens, lm_head]", "lora.dtype=float32"],
        ["data.max_seq_len=192", "train.neftune_alpha=5"],
        ["data.max_seq_len=192", "train.adversarial.epsilon=0.1"],
        ["data.max_seq_len=192", "train.keep.kl=0.1", "train.token_loss=dft", "train.label_smoothing=0.1"],
        ["data.max_seq_len=192", "train.objective=classify"],
        ["data.max_seq_len=192", "train.objective=classify", "train.classify_by=head"],
        ["data.max_seq_len=96", "train.objective=dpo"],
        ["data.max_seq_len=96", "train.objective=kto"],
        ["data.max_seq_len=96", "train.objective=orpo", "data.packing=false"],
        ["data.max_seq_len=192", "lora.kind=dora"],
        ["data.max_seq_len=96", "train.objective=reward"],
        ["data.max_seq_len=192", "train.objective=reward", "data.packing=false"],
        ["data.max_seq_len=192", "lora.kind=rows", "lora.rank=24", "lora.alpha=32"],
        ["data.max_seq_len=192", "lora.init=pissa", "lora.train=B", "lora.rank=32"],
    ],
    ids=" ".join,
)
def test_the_estimate_with_every_setting_matches_its_step(base, tmp_path, overrides):
    errors = relative_errors(base, tmp_path, overrides, slice(None, None, 3))
    assert max(map(abs, errors.values())) <= TOLERANCE, errors


@pytest.mark.slow
def test_experts_are_counted(tmp_path, seed):
    sizes = {"moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 4_000}
    base = make_base(tmp_path / "base", seed, Qwen3MoeConfig, **LIMITS | sizes)
    errors = relative_errors(base, tmp_path, ["data.max_seq_len=96", "lora.rank=64"])
    assert set(errors) == {"none", "attention", "full"}
    assert max(map(abs, errors.values())) <= TOLERANCE, errors


@pytest.mark.slow
def test_a_mixture_of_thirty_billion_parameters_fits_24_gb(tmp_path):
    sizes = {"vocab_size": 151_936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=8, decoder_sparse_step=1)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    keys = {"data__max_seq_len": 2048, "train__micro_batch_size": 1, "train__optimizer": "paged_adamw_8bit"}
    found = estimate(settings(tmp_path / "base", tmp_path, "model.compute_dtype=bfloat16", **keys), SUPERVISED, "cuda")
    assert found.footprint.weights == pytest.approx(15.55 * 2**30, rel=0.001)
    assert found.total_bytes("full", 2048) < 18.5 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_of_embedding_and_head_are_counted(tied, base, tmp_path, seed):
    """Only forward and backward are measured, because the optimizer's step takes more."""
    if tied:
        base = make_base(tmp_path / "base", seed, **LIMITS | {"tie_word_embeddings": True})
    overrides = ["lora.modules_to_save=[embed_tokens, lm_head]", "lora.dtype=float32", "model.compute_dtype=bfloat16"]
    config = settings(base, tmp_path, "data.max_seq_len=160", *overrides)
    predicted, (model, *_) = estimate(config, SUPERVISED, CPU), prepare(config, CPU, SUPERVISED)
    predicted = replace(predicted, footprint=replace(predicted.footprint, update=0, optimizer=0))
    flat = FlatParameters((name, each) for name, each in model.named_parameters() if each.requires_grad)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(32_000, (2, 160), generator=generator).numpy()
    batch = collate([make_example(row, [True] * len(row)) for row in rows], packed=True)
    held = [*model.parameters(), *model.buffers(), flat.data, flat.grad]
    for module in model.modules():
        if isinstance(module, NF4Linear):
            held += [module.quant_state.absmax, module.quant_state.state2.absmax]
    for level in predicted.levels:
        apply_recompute(model, level)
        measured = measure_peak(lambda: supervised_loss(model, batch).backward(), CPU, held)
        assert predicted.total_bytes(level, 320) == pytest.approx(measured, rel=0.01), level


@pytest.mark.parametrize("patterns", ["{}", "{up_proj: 9, 'layers.0.*': 1}"])
@pytest.mark.parametrize("modules", ["[]", "[lm_head]"])
def test_permanent_memory_is_counted_to_the_byte(modules, patterns, tmp_path, tiny_base):
    overrides = ["train.optimizer=adamw_32bit", "train.rounding=master", "lora.rank=3"]
    overrides += [f"lora.rank_pattern={patterns}"]
    overrides += [f"lora.modules_to_save={modules}", "data.new_tokens=[<tool>]"]
    config = settings(tiny_base, tmp_path, *overrides)
    footprint = estimate(config, SUPERVISED, CPU).footprint
    model, tokenizer = base_from_section(config.model, CPU), load_processor(tiny_base)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    adapt(model, config.lora, 0, add_new_tokens(tokenizer, config.data.new_tokens))
    assert footprint.weights == take_inventory(model).base_bytes + buffers
    flat = FlatParameters((name, each) for name, each in model.named_parameters() if each.requires_grad)
    assert footprint.adapters == flat.data.nbytes + flat.grad.nbytes
    state = make_optimizer(config.train.optimizer, flat, rounding=config.train.rounding).state_dict()
    assert footprint.optimizer == sum(value.nbytes for key, value in state.items() if key not in ("generator", "step"))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma4"])
def test_only_the_text_part_of_a_multimodal_base_is_counted_and_its_config_is_enough(family, tmp_path, seed):
    base = make_multimodal(tmp_path / "base", family, seed)
    config = settings(base, tmp_path)
    model = base_from_section(config.model, CPU)
    (base / "model.safetensors").unlink()
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert estimate(config, SUPERVISED, CPU).footprint.weights == take_inventory(model).base_bytes + buffers


@pytest.mark.parametrize("double_quant", [True, False])
def test_bytes_of_4_bit_weights(generator, double_quant):
    rows, columns = torch.randint(1, 400, (2,), generator=generator).tolist()
    packed, state = quantize(torch.randn(rows, columns, generator=generator), double_quant)
    assert nf4_bytes(rows * columns, double_quant) == nf4_num_bytes(packed, state)


def test_known_sizes_of_8b(llama_8b):
    assert llama_8b.footprint.weights / 2**30 == pytest.approx(5.31, abs=0.01)
    slopes = {
        level: max(one.held.total.linear for one in llama_8b.footprint.held[level]) / 32 for level in llama_8b.levels
    }
    assert slopes["none"] == pytest.approx(94_300, rel=0.05)
    assert slopes["full"] - slopes["offload"] == pytest.approx(2 * 4096, rel=0.1)
    assert list(slopes) == ["none", "mlp", "attention", "full", "offload", "offload+tiled"]
    assert sorted(slopes.values(), reverse=True) == list(slopes.values())


@pytest.mark.parametrize(("trained", "bytes_per_logit"), [("[]", 2), ("[lm_head]", 6)])
def test_logits_in_fp32_are_counted_on_a_gpu_only_if_the_head_is_trained(trained, bytes_per_logit, realdata, tmp_path):
    predicted = estimate_real(realdata, tmp_path, LLAMA_8B, f"lora.modules_to_save={trained}")
    logits = predicted.chunk_tokens * predicted.footprint.vocabulary
    held = max(moment.held.loss.constant for moment in predicted.footprint.held["full"])
    assert held / logits == pytest.approx(bytes_per_logit, abs=0.5)  # with rows of the chunk before the head


def test_one_trace_predicts_any_number_of_tokens(realdata, tmp_path):
    one = estimate_real(realdata, tmp_path, LLAMA_8B, "data.max_seq_len=4096")
    other = estimate_real(realdata, tmp_path, LLAMA_8B, "data.max_seq_len=12288")
    for level in one.levels:
        assert one.total_bytes(level, 24_576) == other.total_bytes(level, 24_576)


def test_the_largest_sizes_fit_and_one_more_does_not(llama_8b, seed):
    free = random.Random(seed).randrange(9 << 30, 80 << 30)
    for level in llama_8b.levels:
        rows, tokens = llama_8b.largest_micro_batch(level, free), llama_8b.longest_context(level, free)
        for fits, count in (
            (lambda n, level=level: llama_8b.total_bytes(level, 2048 * n), rows),
            (lambda n, level=level: llama_8b.total_bytes(level, n, n), tokens),
        ):
            assert count == 0 or fits(count) <= (1 - MARGIN) * free
            assert count == llama_8b.footprint.positions or fits(count + 1) > (1 - MARGIN) * free


def test_the_fastest_level_that_fits_is_chosen(llama_8b):
    totals = {level: llama_8b.total_bytes(level, llama_8b.tokens) for level in llama_8b.levels}
    for level, total in totals.items():
        chosen, why = choose_level(llama_8b, int(total / (1 - MARGIN)) + 1, llama_8b.tokens)
        assert totals[chosen] <= total
        assert llama_8b.levels.index(chosen) <= llama_8b.levels.index(level)
        assert f"it takes {llama_8b.total_bytes(chosen, llama_8b.tokens) / 2**30:.2f} GiB" in why
    with pytest.raises(ModelError, match=r"micro_batch_size"):
        choose_level(llama_8b, min(totals.values()), llama_8b.tokens)


def test_layers_are_cached_as_far_as_memory_allows(llama_8b):
    needed, layer = llama_8b.total_bytes("full", llama_8b.tokens), llama_8b.footprint.layers_dequantized[0]
    assert layer == 2 * (6_979_321_856 // 32)
    for count in (0, 1, 7, 32, 40):
        free = int((needed + (count + 0.5) * layer) / (1 - MARGIN))
        assert llama_8b.weight_cache_layers(free, "full", llama_8b.tokens) == min(count, 32)


def test_long_documents_with_sliding_windows_need_masks_only_on_a_cpu(realdata, tmp_path):
    config = settings(realdata / "configs" / "Mistral-7B-v0.1", tmp_path, data__max_seq_len=8192)
    quadratic = {
        device: max(one.held.total.quadratic for one in estimate(config, SUPERVISED, device).footprint.held["full"])
        for device in ("cpu", "cuda")
    }
    assert quadratic["cuda"] == 0 < quadratic["cpu"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Llama-3.1-8B-Instruct_int8", "stored in bitsandbytes 8-bit, which is not supported"),
        ("Molmo-7B-D_nf4", "code of its own"),
        ("pythia-410m_seqcls", "not a causal language model"),
    ],
)
def test_bases_that_cannot_be_trained_are_refused(realdata, tmp_path, name, problem):
    with pytest.raises(ModelError, match=problem):
        estimate_real(realdata, tmp_path, name)


@pytest.mark.slow
def test_every_other_real_config_is_estimated(realdata, tmp_path):
    refused = []
    for folder in sorted((realdata / "configs").iterdir()):
        try:
            predicted = estimate_real(realdata, tmp_path, folder.name)
        except ModelError:
            refused.append(folder.name)
            continue
        totals = [predicted.total_bytes(level, predicted.tokens) for level in predicted.levels]
        assert totals == sorted(totals, reverse=True), folder.name
        assert min(totals) > predicted.footprint.weights > 0, folder.name
    assert refused == [
        "Llama-3.1-8B-Instruct_int8",
        "Llama-3.1-8B_int8_linear_rope",
        "Molmo-7B-D_nf4",
        "executorch_phi-4-mini-reasoning",
        "pythia-410m_seqcls",
    ]


def test_a_base_without_a_config_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config.json"):
        estimate(settings(tmp_path / "empty", tmp_path), SUPERVISED, CPU)


def test_the_measured_peak_counts_tensors_that_are_alive_at_once():
    held = torch.ones(1000)

    def work():
        for _ in range(3):
            torch.zeros(2000).add(1)
        torch.zeros(500)

    assert measure_peak(work, CPU, [held]) == 4 * (1000 + 2000 + 2000)


def test_loaded_bytes_count_as_available():
    assert available_bytes(CPU, 1 << 50) - available_bytes(CPU) == pytest.approx(1 << 50, rel=0.01)


@pytest.mark.parametrize("traced", [0, 3 * on_meta.PER_TOKENS])
def test_a_longer_step_may_have_more_operations(traced, monkeypatch):
    monkeypatch.setattr(on_meta, "MAX_OPERATIONS", 10)
    steps = 30 if traced else 10
    with on_meta.OnMeta(traced):
        for _ in range(steps):
            torch.empty(3, device="meta")
        with pytest.raises(NotImplementedError, match="one token at a time"):
            torch.empty(3, device="meta")


def test_layers_that_compute_one_token_at_a_time_are_not_traced_to_the_end(tiny_base, monkeypatch):
    monkeypatch.setattr(on_meta, "MAX_OPERATIONS", 5)  # such layers have a million
    config = load_config(
        {"model": {"base": str(tiny_base)}, "data": {"train": "a.jsonl"}, "train": {"output_dir": "r"}}
    )
    with pytest.raises(ModelError, match="memory can't be estimated: its layers compute one token at a time"):
        estimate(config, training_loss(config.train), CPU)
