"""How packed documents are kept apart is chosen, undone where that fails, and recorded without what may change."""

import pytest
import torch
from torch import nn
from transformers import Lfm2Config, Llama4TextConfig, LlamaConfig

from qlora.config import load_config
from qlora.layers.states import longest_chunk, state_layers, takes_lengths
from qlora.memory.estimate import estimate
from qlora.memory.probe import prepare
from qlora.model import keep_apart, load_base, unpackable_reason
from qlora.objectives import training_loss
from qlora.training.origin import compare_origins
from tests.layers.test_packed import random_documents
from tests.tiny import make_base, run_config

MIXED = {"layer_types": ["conv", "full_attention"]}


class Fails(nn.Module):
    """A layer that can't be run on several documents at a time."""

    def __init__(self, inner, error):
        super().__init__()
        self.inner, self.error = inner, error

    def forward(self, hidden_states, *inputs, position_ids=None, **arguments):
        if position_ids is not None and (position_ids == 0).sum() > 1:
            raise self.error
        return self.inner(hidden_states, *inputs, position_ids=position_ids, **arguments)


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nat ..."), TypeError(), NotImplementedError("no kernel")])
def test_a_model_that_fails_on_packed_documents_is_left_as_an_unpacked_run_has_it(error, tmp_path, seed, generator):
    model, _ = load_base(str(make_base(tmp_path / "base", seed, Lfm2Config, **MIXED)), compute_dtype="float32")
    own = model.config._attn_implementation
    attention = model.model.layers[1].self_attn
    model.model.layers[1].self_attn = Fails(attention, error)
    isolation = keep_apart(model, *random_documents(generator, (9, 7)), any_attention=True, packed=True)
    reason = str(error).partition("\n")[0] or type(error).__name__
    assert isolation.mixed_reason == f"Lfm2ForCausalLM can't be run on packed documents ({reason})"
    assert (isolation.states, isolation.states_why) == (None, None)
    assert all("forward" not in vars(layer) for layer in state_layers(model).values())
    assert not takes_lengths(model)
    assert not model.model._forward_hooks
    assert (own in isolation.attention, isolation.attention_why) == (True, None)


def test_the_proof_crosses_a_chunk_of_layers_with_a_state(tmp_path, seed, generator, monkeypatch):
    """A state that leaks only at the end of a chunk is found, though both documents are shorter than one."""
    model, _ = load_base(str(make_base(tmp_path / "base", seed, Lfm2Config, **MIXED)), compute_dtype="float32")
    layer = model.model.layers[0].conv
    layer.chunk_size = 20
    assert longest_chunk(model) == 20
    documents = random_documents(generator, (9, 7))
    assert keep_apart(model, *documents, any_attention=True, packed=True).mixed_reason is None

    def leak(_module, _inputs, output):
        later = output[:, 20:] + (output[:, :1] if output.shape[1] > 20 else 0)
        return torch.cat((output[:, :20], later), dim=1)

    model.model.layers[0].register_forward_hook(leak)
    assert keep_apart(model, *documents, any_attention=True, packed=True).mixed_reason is not None


@pytest.mark.parametrize(("row", "is_packed"), [(64, True), (65, False)])
def test_chunks_of_attention_are_packed_only_if_a_sequence_has_one(row, is_packed, tmp_path, seed):
    sizes = {"attention_chunk_size": 64, "num_local_experts": 2, "intermediate_size_mlp": 96}
    model, _ = load_base(
        str(make_base(tmp_path / "base", seed, Llama4TextConfig, **sizes)), allow_unquantized=True, quantization="none"
    )
    reason = unpackable_reason(model, row)
    assert (reason is None) == is_packed
    assert is_packed or "in chunks of 64 tokens" in reason


def test_measured_and_estimated_runs_are_packed_as_training_would(tmp_path, seed, alpaca_file):
    """The base keeps its own attention, whose chunks are shorter than a sequence."""
    base = make_base(tmp_path / "base", seed, LlamaConfig, attention_chunk_size=16)
    config = load_config(run_config(base, alpaca_file, tmp_path / "run", data__max_seq_len=64))
    loss, device = training_loss(config.train), torch.device("cpu")
    _, prepared, _ = prepare(config, device, loss)
    assert (config.data.packs, prepared.data.packs, estimate(config, loss, device).packing) == (True, False, False)


def test_another_reason_for_what_is_in_use_is_no_change():
    """Reasons may have sizes or free memory in them; qlora 0.1.0 wrote that of attention behind its name."""
    origin = {"base": {}, "data": [], "examples": {}}
    before = {"attention": "eager, with a mask: it was asked for", "states": {"Conv": "documents"}}
    before |= {"unpacked_why": "2 GiB are free", "activations": "plain torch: it fails (Error: /tmp/tmp1234/main.c)"}
    now = before | {"attention": "eager, with a mask", "unpacked_why": "3 GiB are free"}
    now |= {"activations": "plain torch: the fused kernels are for CUDA", "loss": "plain torch"}
    assert compare_origins(origin | {"in_use": before}, origin | {"in_use": now}) == []
    for change, line in (
        ({"attention": "sdpa"}, "attention: eager, with a mask → sdpa"),
        ({"states": {"Conv": "borders"}}, 'states: {"Conv": "documents"} → {"Conv": "borders"}'),
        ({"unpacked_why": None}, "documents are packed: false → true"),
        (
            {"activations": "fused kernels; plain torch for X: why"},
            "activations: plain torch → fused kernels; plain torch for X",
        ),
        ({"loss": "fused kernel"}, "loss: plain torch → fused kernel"),
    ):
        assert compare_origins(origin | {"in_use": before}, origin | {"in_use": now | change}) == [line]
