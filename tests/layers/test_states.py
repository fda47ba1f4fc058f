"""Layers that carry a state: a packed sequence trains what its documents do separately, and the layers are found."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    NemotronHConfig,
    Qwen3_5TextConfig,
    RecurrentGemmaConfig,
)
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from qlora.data import collate
from qlora.layers import apply_recompute, use_document_states
from qlora.layers.states import _by_documents, _with_borders, state_layers, takes_lengths
from qlora.lora import add_lora, lora_layers, read_directly
from qlora.model import keep_apart, load_base, mixed_reason
from qlora.model.answers import answer_all
from tests.combinations import pairs
from tests.layers.test_packed import assert_same, loss_and_gradients, random_documents
from tests.tiny import make_base

MIXED = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
OWN = {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 16}
NEMOTRON = {
    "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16,
    "layers_block_type": ["mamba", "attention"],
}  # fmt: skip
JAMBA = {
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4, "expert_layer_offset": 3,
    "mamba_d_state": 8, "mamba_dt_rank": 8,
}  # fmt: skip
# The layers whose weights are read by name, per layer with a state.
FAMILIES = {
    "qwen3.5, gated delta net": (Qwen3_5TextConfig, MIXED | DELTA, set()),
    "lfm2, a short convolution": (Lfm2Config, {"layer_types": ["conv", "full_attention"]}, set()),
    "falcon h1, a state and attention in every layer": (
        FalconH1Config, MAMBA2 | {"mamba_d_ssm": 128}, {"out_proj"},
    ),
    "granite": (
        GraniteMoeHybridConfig,
        MAMBA2 | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 64},
        {"out_proj"},
    ),
    "bamba": (BambaConfig, MAMBA2 | {"attn_layer_indices": [1]}, {"out_proj"}),
    "jamba": (JambaConfig, JAMBA, {"dt_proj"}),
    "nemotron h": (NemotronHConfig, NEMOTRON, {"out_proj"}),
    "mamba 2": (Mamba2Config, OWN, {"out_proj"}),
    "mamba": (MambaConfig, {"state_size": 8}, {"x_proj", "dt_proj", "out_proj"}),
    "recurrent gemma": (
        RecurrentGemmaConfig, {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8}, set(),
    ),
}  # fmt: skip


def load(folder, seed, family, quantization="none"):
    config_class, sizes, _ = FAMILIES[family]
    base = make_base(folder / "base", seed, config_class, **sizes)
    allowed = {"allow_unquantized": True} if quantization == "nf4" else {}
    return load_base(str(base), compute_dtype="float32", quantization=quantization, **allowed)[0]


@pytest.mark.parametrize(
    ("family", "recompute", "quantization"), pairs(tuple(FAMILIES), ("none", "full"), ("none", "nf4"))
)
def test_a_packed_sequence_trains_what_its_documents_do_separately(
    family, recompute, quantization, tmp_path, seed, generator
):
    model = load(tmp_path, seed, family, quantization)
    add_lora(model, rank=4, dtype=torch.float32)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    model.train()
    documents = random_documents(generator)
    separate = loss_and_gradients(model, [collate([document]) for document in documents])
    assert mixed_reason(model, *documents[-2:]) is not None
    isolation = keep_apart(model, *documents[-2:], any_attention=True, packed=True)
    assert isolation.mixed_reason is None
    assert {*isolation.states.values()} == {"documents"}
    assert isolation.states_why
    model.train()
    apply_recompute(model, recompute)
    assert_same(*loss_and_gradients(model, [collate(documents, packed=True)]), *separate)
    assert_same(*loss_and_gradients(model, [collate(documents)]), *separate)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_read_directly_are_neither_quantized_nor_adapted(family, tmp_path, seed):
    model = load(tmp_path, seed, family, "nf4")
    direct = [name for name in read_directly(model) if isinstance(model.get_submodule(name), nn.Linear)]
    direct = [name for name in direct if name != "lm_head"]
    assert {name.rpartition(".")[2] for name in direct} == FAMILIES[family][2]
    adapted = add_lora(model)
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]
    assert linears == direct
    assert adapted
    assert not {*adapted} & {*direct}


class Inherits(Mamba2Mixer):
    """A layer of another module's class, as code that comes with a model has them."""


def test_a_weight_that_an_inherited_method_reads_is_found():
    with torch.device("meta"):
        layer = Inherits(Mamba2Config(hidden_size=64, **OWN), layer_idx=0)
    assert "0.out_proj" in read_directly(nn.Sequential(layer))


def test_a_backward_that_is_recomputed_later_has_its_own_documents(tmp_path, seed, generator):
    """Two forwards before their backward, as in a loss of several passes."""
    model = load(tmp_path, seed, "lfm2, a short convolution")
    add_lora(model, rank=4, dtype=torch.float32)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    use_document_states(model)
    apply_recompute(model, "full")
    model.train()
    one, other = (collate(random_documents(generator, lengths), packed=True) for lengths in ((9, 7, 12), (20, 8)))
    together = loss_and_gradients(model, [one, other])
    losses, gradients = zip(*(loss_and_gradients(model, [batch]) for batch in (one, other)), strict=True)
    assert_same(*together, sum(losses), [first + second for first, second in zip(*gradients, strict=True)])


class Kernel(nn.Module):
    """A short convolution that takes borders as a kernel does, or ignores them."""

    def __init__(self, size, takes_borders):
        super().__init__()
        self.conv = nn.Conv1d(size, size, 3, groups=size, padding=2)
        self.takes_borders = takes_borders

    def forward(self, hidden_states, seq_idx=None, cu_seq_lens_q=None):
        starts = [0, hidden_states.shape[1]]
        if self.takes_borders and seq_idx is not None:
            starts = cu_seq_lens_q.tolist()
            assert seq_idx[0].bincount().tolist() == cu_seq_lens_q.diff().tolist()
        parts = [hidden_states[:, begin:end].transpose(1, 2) for begin, end in zip(starts, starts[1:], strict=False)]
        return torch.cat([self.conv(part)[..., : part.shape[-1]].transpose(1, 2) for part in parts], dim=1)


@pytest.mark.parametrize(("takes_borders", "way"), [(True, _with_borders), (False, _by_documents)])
def test_a_kernel_gets_the_borders_only_if_it_keeps_documents_apart_with_them(takes_borders, way, tiny_base, generator):
    model, _ = load_base(str(tiny_base), compute_dtype="float32", quantization="none")
    layer = Kernel(model.config.hidden_size, takes_borders)
    layer.conv.weight.data.normal_(generator=generator)
    mlp = model.model.layers[0].mlp
    model.model.layers[0].mlp = nn.Sequential(layer, mlp)
    documents = random_documents(generator)
    expected = loss_of(model, [collate([document]) for document in documents])
    states = use_document_states(model)
    assert isinstance(layer.forward, partial)
    assert layer.forward.func is way
    assert states.ways == {"Kernel": "borders" if takes_borders else "documents"}
    assert (states.why is None) == takes_borders
    assert loss_of(model, [collate(documents, packed=True)]) == pytest.approx(expected, rel=1e-5)
    states.remove()
    assert "forward" not in vars(layer)
    assert not takes_lengths(model)


def loss_of(model, batches):
    from qlora.model import supervised_loss

    with torch.no_grad():
        return sum(supervised_loss(model, batch).item() for batch in batches)


def test_models_without_a_state_are_left_as_they_are(tiny_base):
    model, _ = load_base(str(tiny_base), compute_dtype="float32")
    assert isinstance(model.config, LlamaConfig)
    assert not state_layers(model)
    assert use_document_states(model) is None
    assert not model.base_model._forward_pre_hooks


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "recurrent gemma"])
def test_answers_of_a_padded_batch_are_those_of_single_prompts(family, tmp_path, seed, generator):
    from transformers import AutoTokenizer

    model = load(tmp_path, seed, family)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    prompts = [torch.randint(32, 120, (length,), generator=generator).tolist() for length in (5, 19, 11)]
    together = answer_all(model, tokenizer, prompts, 6, 1000)
    alone = [answer_all(model, tokenizer, [prompt], 6, 1000)[0] for prompt in prompts]
    assert together == alone
