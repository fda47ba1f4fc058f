"""Linear layers packed for answers compute what they do otherwise, and are put back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config

import qlora
from qlora.kernels import LowRank, can_pack
from qlora.layers.pack_linears import PackedLinear, pack_linears
from qlora.layers.weight_cache import temporarily_cached_linears
from qlora.lora import adapters_off, lora_layers
from qlora.nf4 import NF4Linear
from tests.tiny import make_base, make_tokenizer

HAS_PACKING = can_pack(torch.device("cpu"), torch.bfloat16)


def build(tmp_path: Any, seed: int, kind: str = "lora", form: str = "auto", **sizes: Any) -> Any:
    base = make_base(tmp_path / "base", seed, **sizes)
    model, _ = qlora.load_base(str(base), compute_dtype="bfloat16", device="cpu")
    qlora.add_lora(model, rank=5, alpha=7, kind=kind, form=form)
    for _, layer in lora_layers(model):
        layer.first_trained.data.normal_(std=0.1)
    return model.eval()


def stack(model: Any) -> None:
    """Give each layer an earlier adapter as a second term."""
    for _, layer in lora_layers(model):
        A, B = torch.randn(3, layer.in_features), torch.randn(layer.out_features, 3) * 0.1
        layer.frozen = LowRank(A.bfloat16(), B.bfloat16(), 0.7)


def nothing(model: Any) -> None:
    del model


@torch.no_grad()
def outputs(model: Any, seed: int) -> list[torch.Tensor]:
    """Return logits of one token, of a few rows and of more, and an answer."""
    generator = torch.Generator().manual_seed(seed)
    one, rows, more = (torch.randint(3, 250, shape, generator=generator) for shape in ((1, 1), (3, 9), (1, 45)))
    answer = model.generate(rows[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
    return [model(one).logits, model(rows).logits, model(more).logits, answer]


@pytest.mark.parametrize(
    ("kind", "change", "sizes"),
    [
        ("lora", nothing, {}),
        ("lora", stack, {}),
        ("lora", nothing, {"tie_word_embeddings": True}),
        ("dora", nothing, {}),
        ("rows", nothing, {}),
    ],
)
def test_a_packed_model_has_the_same_outputs_and_gets_its_layers_back(
    kind: str, change: Callable[[Any], None], sizes: dict[str, Any], tmp_path: Any, seed: int
) -> None:
    model = build(tmp_path, seed, kind, **sizes)
    change(model)
    modules, expected = list(model.named_modules()), outputs(model, seed)
    with pack_linears(model, float("inf")):
        # All seven of both layers and the head; other kinds of adapters are left as they are.
        number = sum(isinstance(module, PackedLinear) for module in model.modules())
        assert number == (15 if kind == "lora" else 1) * HAS_PACKING
        found = outputs(model, seed)
    assert all(map(torch.equal, expected, found))
    assert list(model.named_modules()) == modules


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 9, 45])
def test_a_layer_with_a_bias_is_packed_to_a_rounding(rows: int, generator: torch.Generator) -> None:
    """oneDNN may add the bias before the last products or after them; the result is not always the same bit for bit."""
    linear = torch.nn.Linear(64, 96).bfloat16()
    layer = qlora.lora.LoraLinear(
        NF4Linear.from_linear(linear), qlora.lora.AdapterSpec(rank=8, alpha=8, dtype=torch.bfloat16)
    )
    layer.reset(generator)
    layer.first_trained.data.normal_(std=0.1, generator=generator)
    layer.eval()
    model: Any = torch.nn.Module()
    model.layer, model.device, model.dtype = layer, torch.device("cpu"), torch.bfloat16
    model.get_output_embeddings = lambda: None
    x = torch.randn(rows, 64, generator=generator).bfloat16()
    expected = layer(x)
    with pack_linears(model, float("inf")):
        assert isinstance(model.layer, PackedLinear) == HAS_PACKING
        torch.testing.assert_close(model.layer(x), expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-2)


def test_a_model_that_reads_its_head_answers_as_before(tmp_path: Any, seed: int) -> None:
    torch.manual_seed(seed)
    config = Mamba2Config(
        vocab_size=264, hidden_size=32, num_hidden_layers=1, state_size=8, num_heads=4, head_dim=16, n_groups=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, _ = qlora.load_base(str(tmp_path), compute_dtype="bfloat16", device="cpu")
    head, expected = model.lm_head, outputs(model, seed)
    with pack_linears(model, float("inf")):
        assert isinstance(model.lm_head, PackedLinear) == HAS_PACKING
        for name in ("weight", "bias", "in_features", "out_features"):
            assert getattr(model.lm_head, name) is getattr(head, name)
        assert all(map(torch.equal, expected, outputs(model, seed)))
        with pytest.raises(AttributeError, match="no_such_name"):
            model.lm_head.no_such_name  # noqa: B018


def test_adapters_that_are_off_stay_off(tmp_path: Any, seed: int) -> None:
    model = build(tmp_path, seed)
    with adapters_off(model):
        expected = outputs(model, seed)
        with pack_linears(model, float("inf")):
            inside = outputs(model, seed)
    with pack_linears(model, float("inf")), adapters_off(model):
        switched = outputs(model, seed)
    assert all(map(torch.equal, expected, inside))
    assert all(map(torch.equal, expected, switched))


def test_gradients_are_computed_by_the_layer_itself(tmp_path: Any, seed: int) -> None:
    model = build(tmp_path, seed)
    ids = torch.arange(9)[None]
    gradients = []
    for num_bytes in (0, float("inf")):
        with pack_linears(model, num_bytes):
            model(ids).logits.float().square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        model.zero_grad(set_to_none=True)
    assert any(gradient.any() for gradient in gradients[0])
    assert all(map(torch.equal, *gradients))


def test_no_more_memory_is_taken_than_given(tmp_path: Any, seed: int) -> None:
    model = build(tmp_path, seed)
    expected = outputs(model, seed)
    with pack_linears(model, 50_000) as left:
        number = sum(isinstance(module, PackedLinear) for module in model.modules())
        assert 0 <= left <= 50_000
        assert (0 < number < 15) == HAS_PACKING
        assert all(map(torch.equal, expected, outputs(model, seed)))


def test_a_weight_is_either_packed_or_cached(tmp_path: Any, seed: int) -> None:
    model = build(tmp_path, seed)
    linears = [module for module in model.modules() if isinstance(module, NF4Linear)]
    with temporarily_cached_linears(model, float("inf")):
        packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert [linear.is_cached for linear in linears] == [not packed] * len(linears)
    assert not any(linear.is_cached for linear in linears)


def test_weights_that_the_update_is_folded_into_are_cached(tmp_path: Any, seed: int) -> None:
    model = build(tmp_path, seed, form="folded")
    expected = outputs(model, seed)
    linears = [module for module in model.modules() if isinstance(module, NF4Linear)]
    with temporarily_cached_linears(model, float("inf")):
        packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert len(packed) == HAS_PACKING  # the head
        assert linears
        assert all(linear.is_cached for linear in linears)
        assert all(map(torch.equal, expected, outputs(model, seed)))


@pytest.mark.skipif(not HAS_PACKING, reason="nothing is packed on this processor")
@pytest.mark.parametrize("kind", ["lora", "nf4", "head"])
def test_memory_has_room_for_what_packing_takes_meanwhile(kind: str, generator: torch.Generator) -> None:
    layer: Any = torch.nn.Linear(64, 96, bias=False).bfloat16()
    weight, added = 2 * 64 * 96, 0
    peak = weight
    if kind != "head":
        layer = NF4Linear.from_linear(layer)
        peak += weight  # dequantized
    if kind == "lora":
        layer = qlora.lora.LoraLinear(layer, qlora.lora.AdapterSpec(rank=8, alpha=8, dtype=torch.bfloat16))
        layer.reset(generator)
        added = 2 * 64 * 8
        peak = weight + 2 * (weight + added)  # dequantized, with the rows of A below it, and packed
    model: Any = torch.nn.Module()
    model.layer, model.device, model.dtype = layer, torch.device("cpu"), torch.bfloat16
    model.get_output_embeddings = lambda: layer if kind == "head" else None
    for num_bytes, expected in ((peak - 1, (layer, peak - 1)), (peak, (None, peak - weight - added))):
        with pack_linears(model, num_bytes) as left:
            assert (model.layer if model.layer is layer else None, left) == expected
