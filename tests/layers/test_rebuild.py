"""A model whose norms and gated products are rebuilt: the same except for last bits, with less memory."""

import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qlora.data import collate, make_example
from qlora.kernels import HAS_TRITON, GatedProduct, RMSNorm
from qlora.layers import apply_recompute, rebuild_activations, use_document_attention
from qlora.layers.attention import NAME
from qlora.layers.rebuild import GatedMLP, RebuiltNorm
from qlora.layers.self_attention import SelfAttention, fit_self_attention
from qlora.layers.trial import Chooser
from qlora.lora import add_lora, lora_layers
from qlora.model import load_base, supervised_loss
from tests.interpreted import interpret
from tests.layers.test_packed import loss_and_gradients
from tests.tiny import SIZES, make_base

# Norms, gated MLPs and self-attentions that are replaced in two layers. Windows are shorter than the documents.
FAMILIES = {
    "llama": (LlamaConfig, {}, (5, 2, 2)),
    "qwen2, with biases": (Qwen2Config, {}, (5, 2, 2)),
    "qwen3": (Qwen3Config, {}, (9, 2, 2)),
    "mistral with a window": (MistralConfig, {"sliding_window": 5}, (5, 2, 2)),
    "gemma2, whose scores are capped": (Gemma2Config, {}, (9, 2, 0)),
    "gemma3 with a window": (Gemma3TextConfig, {"sliding_window": 5}, (13, 2, 2)),
    "olmo2, which norms all heads at once": (Olmo2Config, {}, (9, 2, 0)),
    "phi3, gate and up in one": (Phi3Config, {}, (5, 0, 0)),
    "mixtral, with experts": (MixtralConfig, {"num_local_experts": 4}, (5, 0, 2)),
    "glm4_moe, which rotates half of the features": (
        Glm4MoeConfig,
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
        (5, 2, 2),
    ),
    "nemotron, which rotates half of the features": (NemotronConfig, {"partial_rotary_factor": 0.5}, (0, 0, 2)),
    "olmo, with angles in fp32": (OlmoConfig, {}, (5, 2, 2)),
    "olmo, which clips its projections": (OlmoConfig, {"clip_qkv": 1.0}, (5, 2, 0)),
    "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, (5, 0, 0)),
}


def batch(generator, packed):
    documents = [
        make_example(torch.randint(256, (length,), generator=generator).numpy(), [True] * length) for length in (9, 30)
    ]
    return collate(documents, packed)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("config_class", "sizes", "expected"), FAMILIES.values(), ids=FAMILIES)
def test_it_computes_the_same(config_class, sizes, expected, recompute, tmp_path, seed, generator):
    base = make_base(tmp_path / "base", seed, config_class, **sizes)
    model = load_base(str(base), compute_dtype="float32", allow_unquantized=True)[0]
    add_lora(model, rank=4, dtype=torch.float32)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    use_document_attention(model)
    apply_recompute(model, recompute)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    one = batch(generator, packed=True)
    names = [name for name, _ in model.named_parameters()]
    loss, gradients = loss_and_gradients(model, [one])
    rebuild_activations(model)
    kinds = (RebuiltNorm, GatedMLP, SelfAttention)
    assert tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in kinds) == expected
    assert [name for name, _ in model.named_parameters()] == names
    again, found = loss_and_gradients(model, [one])
    assert again == pytest.approx(loss, rel=1e-6)
    assert all((one - other).norm() <= 1e-5 * other.norm() for one, other in zip(found, gradients, strict=True))
    with torch.no_grad():
        assert supervised_loss(model.eval(), one).item() == pytest.approx(loss, rel=1e-6)


class OtherMLP(LlamaMLP):
    """Computes something else than its class does."""

    change = ""

    def forward(self, x):
        if self.change == "error":
            raise AssertionError("a kernel of its own")
        if self.change == "memory":
            raise torch.OutOfMemoryError("no memory is left")
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.change == "limited gate":
            gate = gate.clamp(max=300)
        if self.change == "limited up":
            up = up.clamp(-300, 300)
        act_fn = F.silu if self.change == "another activation" else self.act_fn
        out = self.down_proj(act_fn(gate) * up)
        return 2 * out if self.change == "doubled" and self.training else out


def model_with_other_mlp(change):
    """Return a model whose first MLP computes something else, in fp16, which overflows first."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.float16).eval().requires_grad_(False)
    model.model.layers[0].mlp.__class__ = OtherMLP
    model.model.layers[0].mlp.change = change
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "is_replaced"),
    [
        ("", True),
        ("doubled", False),
        ("limited gate", False),
        ("limited up", False),
        ("another activation", False),
        ("error", False),
    ],
)
def test_an_mlp_of_the_same_names_that_does_more_is_left_alone(change, is_replaced, device):
    model = model_with_other_mlp(change).to(device)
    rebuild_activations(model)
    assert [isinstance(layer.mlp, GatedMLP) for layer in model.model.layers] == [is_replaced, True]


def test_memory_that_runs_out_in_an_mlps_trial_is_no_reason_against_it():
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        rebuild_activations(model_with_other_mlp("memory"))


class ScaledSiLU(torch.nn.Module):
    """An activation with a value of its own."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        return F.silu(x) * self.scale


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_mlp_whose_activation_has_values_is_replaced_with_and_without_them(device):
    model = model_with_other_mlp("")
    model.model.layers[0].mlp.act_fn = ScaledSiLU()
    rebuild_activations(model.to(device))
    assert [isinstance(layer.mlp, GatedMLP) for layer in model.model.layers] == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("activation", "form"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_10", None), ("relu2", None)],
)
def test_a_product_is_recognized_by_small_and_large_gates(activation, form, dtype):
    product = Chooser(torch.device("cpu"), dtype).product(ACT2FN[activation], 48)
    assert getattr(product, "activation", None) == form


def chosen(model):
    """Return the functions of a model's norms and products."""
    modules = list(model.modules())
    norms = [module._function[0] for module in modules if isinstance(module, RebuiltNorm)]
    return norms, [module._product for module in modules if isinstance(module, GatedMLP)]


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("config_class", "form", "activation"),
    [
        (LlamaConfig, (0.0, True), "silu"),
        (Olmo2Config, (0.0, False), "silu"),
        (Gemma2Config, (1.0, False), "gelu_tanh"),
    ],
)
def test_norms_and_products_are_recognized(config_class, form, activation, compute_dtype, tmp_path, seed):
    model = load_base(str(make_base(tmp_path / "base", seed, config_class)), compute_dtype=compute_dtype)[0]
    rebuild_activations(model)
    norms, products = chosen(model)
    assert {(norm.offset, norm.rounds_first) for norm in norms} == {form}
    assert set(products) == {GatedProduct(activation, overwrites=True)}


def test_an_unknown_norm_runs_as_it_is(tmp_path, seed, generator):
    base = make_base(tmp_path / "base", seed, LlamaConfig, hidden_act="quick_gelu")
    model = load_base(str(base), compute_dtype="float32")[0]
    own = model.model.norm

    class DoubledRMSNorm(type(own)):
        def forward(self, x):
            return 2 * super().forward(x)

    own.__class__ = DoubledRMSNorm
    one = batch(generator, packed=True)
    expected = supervised_loss(model, one).item()
    rebuild_activations(model)
    norms, products = chosen(model)
    assert [norm for norm in norms if not isinstance(norm, RMSNorm)] == [own]
    assert not any(isinstance(product, GatedProduct) for product in products)
    assert supervised_loss(model, one).item() == pytest.approx(expected, rel=1e-6)


def test_a_norm_of_split_rows_runs_as_it_is(tiny_base, generator):
    """xLSTM's takes (batch, tokens, heads, features of a head), and fails on other shapes."""

    class HeadsLayerNorm(torch.nn.LayerNorm):
        def forward(self, x):
            batch, tokens, _heads, _features = x.shape
            return super().forward(x.reshape(batch, tokens, -1))

    model, _ = load_base(str(tiny_base), compute_dtype="float32")
    norm = model.model.norm = HeadsLayerNorm(64, bias=False).requires_grad_(False)
    x = torch.randn(2, 3, 4, 16, generator=generator)
    rebuild_activations(model)
    assert torch.equal(model.model.norm(x), norm(x))


def test_a_model_without_values_is_replaced_too(tiny_base):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_base)).requires_grad_(False)
    rebuild_activations(model)
    assert [len(each) for each in chosen(model)] == [5, 2]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_plain_rotations_change_no_bit(recompute, tiny_base, generator):
    """Layers of bf16 round wherever an operation ends, so an operation that is left out shows."""
    model, _ = load_base(str(tiny_base), compute_dtype="bfloat16")
    use_document_attention(model)
    apply_recompute(model, recompute)
    one = batch(generator, packed=True)
    embeddings = model.train().get_input_embeddings().weight.requires_grad_()
    loss = supervised_loss(model, one)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    for layer in model.model.layers:
        layer.self_attn = fit_self_attention(layer.self_attn, Chooser(model.device, model.dtype))
    assert [type(layer.self_attn) for layer in model.model.layers] == [SelfAttention] * 2
    again = supervised_loss(model, one)
    assert torch.equal(again, loss)
    assert torch.equal(torch.autograd.grad(again, embeddings)[0], gradient)


def test_generation_and_padded_batches_are_what_they_were(tmp_path, seed, generator):
    base = make_base(tmp_path / "base", seed, Qwen3Config)
    model, _ = load_base(str(base), compute_dtype="float32")
    use_document_attention(model)
    prompt, one = torch.randint(256, (1, 7), generator=generator), batch(generator, packed=False)
    answers, losses = [], []
    for _ in range(2):
        answers.append(model.generate(prompt, max_new_tokens=8, do_sample=False))
        losses.append(supervised_loss(model, one).item())
        rebuild_activations(model)
    assert torch.equal(*answers)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert isinstance(model.model.layers[0].self_attn, SelfAttention)


def test_self_attention_that_does_more_is_left_alone(tiny_base):
    model, _ = load_base(str(tiny_base))
    use_document_attention(model)
    own = model.model.layers[0].self_attn

    class Gated(type(own)):
        def forward(self, *args, **kwargs):
            attended, weights = super().forward(*args, **kwargs)
            return 2 * attended, weights

    own.__class__ = Gated
    rebuild_activations(model)
    assert model.model.layers[0].self_attn is own
    assert isinstance(model.model.layers[1].self_attn, SelfAttention)
    assert model.config._attn_implementation == NAME


def test_layers_with_hooks_are_called_by_themselves(tiny_base, generator):
    model, _ = load_base(str(tiny_base))
    add_lora(model, rank=4)
    use_document_attention(model)
    rebuild_activations(model)
    one, seen = batch(generator, packed=True), []
    layer = model.model.layers[1]
    for name, module in (("k", layer.self_attn.k_proj), ("up", layer.mlp.up_proj)):
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: seen.append(name))
    loss_and_gradients(model, [one])
    assert seen == ["k", "up"]


def test_on_a_cpu_plain_torch_is_used_and_reported(tiny_base):
    assert rebuild_activations(load_base(str(tiny_base))[0]) == "plain torch: the fused kernels are for CUDA"


KERNELS = ("norm_triton", "gated_triton", "rotary_triton")


@pytest.fixture
def fused_on_cpu(monkeypatch):
    """Have kernels tried on a CPU, in Triton's interpreter."""
    for name in KERNELS:
        interpret(monkeypatch, name)
    monkeypatch.setattr("qlora.layers.trial.unfused_reason", lambda device: None)


def test_fused_kernels_train_as_plain_torch_does(fused_on_cpu, tmp_path, seed, generator):
    base = make_base(tmp_path / "base", seed, Qwen3Config, num_hidden_layers=1)
    model = load_base(str(base), compute_dtype="float32")[0]
    add_lora(model, rank=4, dtype=torch.float32)
    use_document_attention(model)
    one = batch(generator, packed=True)
    loss, gradients = loss_and_gradients(model.train(), [one])
    assert rebuild_activations(model) == "fused kernels"
    norms, products = chosen(model)
    assert all(function.fused for function in (*norms, *products))
    again, found = loss_and_gradients(model, [one])
    assert again == pytest.approx(loss, rel=1e-6)
    assert all((one - other).norm() <= 1e-5 * other.norm() for one, other in zip(found, gradients, strict=True))


def test_kernels_and_modules_with_hooks_are_reported_together(fused_on_cpu):
    chooser, hooked = Chooser(torch.device("cpu"), torch.float16), torch.nn.SiLU()
    assert chooser.product(torch.nn.SiLU(), 48).fused
    hooked.register_forward_hook(lambda *_: None)
    assert not chooser.may_replace(hooked)
    assert chooser.may_replace(torch.nn.GELU())
    assert chooser.report() == "fused kernels; SiLU with hooks not replaced"


def last_column_of(values):
    values[..., -1] = 0
    return values


def last_row_of(values):
    if len(values) % 2:  # a mask of the last tile
        values[-1] = 0
    return values


def reduced(values):
    return (values.float() * 0.995).to(values.dtype)


FAULTS = {"last column": last_column_of, "last row": last_row_of, "scale": reduced}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("kernels", "name", "what"),
    [
        ("norm_triton", "rms_norm_triton", "LlamaRMSNorm"),
        ("norm_triton", "rms_norm_gradient_triton", "LlamaRMSNorm"),
        ("gated_triton", "gated_product_triton", "SiLU"),
        ("gated_triton", "gated_gradients_triton", "SiLU"),
    ],
)
def test_a_fused_kernel_that_is_slightly_wrong_is_not_used(
    kernels, name, what, fault, dtype, fused_on_cpu, monkeypatch, generator
):
    """Plain torch stands for the kernels, and a fault is put into its values."""
    norm = LlamaRMSNorm(48).to(getattr(torch, dtype)).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    product, plain_norm = GatedProduct("silu"), RMSNorm(norm.weight, 1e-6, rounds_first=True)
    stand_ins = {
        "rms_norm_triton": lambda x, *_: plain_norm(x),
        "rms_norm_gradient_triton": lambda grad, x, *_: plain_norm.gradients(grad, x)[0],
        "gated_product_triton": lambda _, gate, up: product(gate, up),
        "gated_gradients_triton": lambda _, grad, gate, up, __: product.gradients(grad, gate, up),
    }
    for stand_in, function in stand_ins.items():
        module = sys.modules[f"qlora.kernels.{'norm' if 'norm' in stand_in else 'gated'}_triton"]
        monkeypatch.setattr(module, stand_in, function)

    def choose():
        chooser = Chooser(torch.device("cpu"), norm.weight.dtype)
        chosen = {"LlamaRMSNorm": chooser.norm(norm), "SiLU": chooser.product(torch.nn.SiLU(), 48)}
        return [each for each, function in chosen.items() if not function.fused], chooser.report()

    def wrong(*args):
        results = stand_ins[name](*args)
        if isinstance(results, tuple):
            return results[0], FAULTS[fault](results[1].clone())
        return FAULTS[fault](results.clone())

    assert choose() == ([], "fused kernels")
    monkeypatch.setattr(sys.modules[f"qlora.kernels.{kernels}"], name, wrong)
    plain, report = choose()
    assert plain == [what]
    assert report.startswith(f"fused kernels; plain torch for {what}: ")


@pytest.mark.parametrize("fault", ["one key head", "shared angles", "last row"])
def test_a_kernel_that_rotates_some_heads_or_rows_wrong_is_not_used(fault, fused_on_cpu, monkeypatch):
    own = sys.modules["qlora.kernels.rotary_triton"].rotate_triton

    def wrong(query, key, cos, sin, is_backward):
        if fault == "shared angles":  # those of the second row of the batch
            cos = torch.cat([cos, cos.flip(1)])[torch.arange(len(query)).clamp(max=1)]
            sin = sin.expand(cos.shape)
        rotated_query, rotated_key = own(query, key, cos, sin, is_backward)
        if fault == "one key head" and key.shape[2] != query.shape[2]:
            rotated_key = key
        if fault == "last row" and query.shape[:2].numel() % 2:
            rotated_query[-1, -1] = 0
        return rotated_query, rotated_key

    def chooses():
        return Chooser(torch.device("cpu"), torch.float16).fuses_rotation(16)

    assert chooses()
    monkeypatch.setattr(sys.modules["qlora.kernels.rotary_triton"], "rotate_triton", wrong)
    assert not chooses()


MESSAGE = "Failed to find C compiler.\n  Please specify via CC, see /tmp/tmpd1k2 " + "x" * 1000


@pytest.mark.parametrize("wrong", ["values", "gradients", "dtype", "error"])
def test_a_fused_kernel_that_gives_something_else_or_fails_is_not_used(wrong, fused_on_cpu, monkeypatch, tiny_base):
    kernels = sys.modules["qlora.kernels.norm_triton"]
    own, own_gradient = kernels.rms_norm_triton, kernels.rms_norm_gradient_triton

    def norm(*args):
        if wrong == "error":
            raise RuntimeError(MESSAGE)
        result = own(*args)
        return result * 1.01 if wrong == "values" else result.double() if wrong == "dtype" else result

    def gradient(*args):
        return own_gradient(*args) * (1.1 if wrong == "gradients" else 1)

    monkeypatch.setattr(kernels, "rms_norm_triton", norm)
    monkeypatch.setattr(kernels, "rms_norm_gradient_triton", gradient)
    model, _ = load_base(str(tiny_base), compute_dtype="float16")
    chosen_here, _, reason = rebuild_activations(model).partition(": ")
    assert chosen_here == "fused kernels; plain torch for LlamaRMSNorm"  # this is compared when a run continues
    problem = {"error": "fails (RuntimeError: Failed to find C compiler. Please "}.get(wrong, "gives something else")
    assert reason.startswith(f"the fused kernel for LlamaRMSNorm {problem}")
    assert "\n" not in reason
    assert len(reason) < 300
    norms, products = chosen(model)
    assert not any(norm.fused for norm in norms)
    assert all(product.fused for product in products)


def test_memory_that_runs_out_in_a_trial_is_no_reason_against_a_kernel(fused_on_cpu, monkeypatch, tiny_base):
    def norm(*_):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(sys.modules["qlora.kernels.norm_triton"], "rms_norm_triton", norm)
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        rebuild_activations(load_base(str(tiny_base), compute_dtype="float16")[0])


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and HAS_TRITON), reason="needs CUDA and Triton")
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config, Gemma2Config])
def test_on_cuda_fused_kernels_give_the_loss_of_plain_torch(config_class, tmp_path, seed, generator):
    model = load_base(str(make_base(tmp_path / "base", seed, config_class)))[0]
    add_lora(model, rank=4)
    use_document_attention(model)
    one = batch(generator, packed=False).to(model.device)
    expected, plain = loss_and_gradients(model, [one])
    assert rebuild_activations(model) == "fused kernels"
    found, gradients = loss_and_gradients(model, [one])
    assert found == pytest.approx(expected, rel=1e-2)
    assert all((one - other).norm() <= 0.1 * other.norm() for one, other in zip(gradients, plain, strict=True))


def test_a_norm_that_is_trained_is_left_alone(tiny_base):
    model, _ = load_base(str(tiny_base))
    model.model.norm.weight.requires_grad_(True)
    rebuild_activations(model)
    assert not isinstance(model.model.norm, RebuiltNorm)


def test_an_mlp_is_replaced_if_its_adapters_alone_are_trained(tiny_base):
    model, _ = load_base(str(tiny_base))
    add_lora(model, rank=4)
    other = model.model.layers[1].mlp
    other.down_proj.lora_gate = torch.nn.Parameter(torch.zeros(1))  # of the adapter, and so trained like its factors
    other.up_proj.base.lora_norm = torch.nn.Parameter(torch.zeros(1))  # named like a factor, but not one
    rebuild_activations(model)
    assert isinstance(model.model.layers[0].mlp, GatedMLP)
    assert model.model.layers[1].mlp is other
    del other.up_proj.base.lora_norm
    rebuild_activations(model)
    assert isinstance(model.model.layers[1].mlp, GatedMLP)


def held_bytes_per_token(model, one):
    """Return the bytes per token that live between forward and backward, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = (storage.nbytes(), torch.multiprocessing.reductions.StorageWeakRef(storage))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = supervised_loss(model, one)
    alive = sum(nbytes for nbytes, reference in held.values() if not reference.expired())
    assert loss.requires_grad
    return alive / one.input_ids.numel()


@pytest.mark.parametrize(("recompute", "limit"), [("none", 100_000), ("full", 9_500)])
def test_little_is_held_between_forward_and_backward(recompute, limit, tmp_path, generator):
    sizes = {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    base = make_base(tmp_path / "base", 0, LlamaConfig, **sizes)
    model = load_base(str(base), compute_dtype="bfloat16")[0]
    add_lora(model, rank=16)
    use_document_attention(model)
    rebuild_activations(model)
    apply_recompute(model, recompute)
    model.train()
    documents = [make_example(torch.randint(256, (128,), generator=generator).numpy(), [True] * 128) for _ in range(2)]
    assert held_bytes_per_token(model, collate(documents, packed=True)) <= limit
