"""Adapters that the loss does not depend on are refused before a base is loaded, and no others."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

import qlora
from qlora.config import LoraSection, load_config
from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.layers.recompute import checkpointed_layers
from qlora.lora import ScoreHead, add_lora, is_linear, lora_layers, match_targets
from qlora.model import SUPERVISED, build_skeleton, load_processor, on_meta
from qlora.model.quantization import with_linears
from qlora.model.reached import check_reached, refuse_unreached
from qlora.training import assemble, estimate, plan_run, train
from qlora.training.loop import check_gradients
from scripts.dev.support.run import architectures
from scripts.dev.support.sizes import tiny_config
from tests.tiny import make_tokenizer, run_config
from tests.tiny_images import make_image_base

TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 0}
LENGTH = 48


def make(name, folder, seed):
    """Save a random model of an architecture with a tokenizer, and return its folder."""
    torch.manual_seed(seed)
    auto_class = getattr(transformers, architectures()[name])
    model = auto_class.from_config(tiny_config(transformers.CONFIG_MAPPING[name], 259, TOKENS))
    model.bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def skeleton_of(folder):
    return with_linears(build_skeleton(BaseFiles.resolve(str(folder), with_weights=False)))


def without_gradient(folder, name, generator):
    """Return the names of the layers that get no gradient in a real backward pass of the saved model."""
    model = getattr(transformers, architectures()[name]).from_pretrained(folder, dtype=torch.float32).train()
    ids = torch.randint(8, 200, (1, LENGTH), generator=generator)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    adapted = match_targets(skeleton_of(folder), "all-linear")
    return [name for name in adapted if model.get_submodule(name).weight.grad is None]


@pytest.mark.parametrize(
    ("name", "dead", "end"),
    [
        ("llama", 0, None),
        ("gpt2", 0, None),
        ("mixtral", 0, None),
        ("qwen3_next", 0, None),
        ("gemma3n_text", 0, None),  # initial values of zero stop the gradient of some, which are not refused here
        ("trocr", 8, "encoder_attn.k_proj"),  # its self attention has a k_proj too
        ("deepseek_v32", 8, "wq_b"),
        ("phi4_multimodal", 37, "fc1"),
    ],
)
def test_layers_are_refused_that_get_no_gradient_in_a_real_step(name, dead, end, tmp_path, seed, generator):
    folder = make(name, tmp_path / "base", seed)
    expected = without_gradient(folder, name, generator)
    assert len(expected) == dead
    skeleton = skeleton_of(folder)
    before = {name: module.training for name, module in skeleton.named_modules()}
    if not dead:
        check_reached(skeleton, LoraSection(), SUPERVISED, LENGTH)
    else:
        with pytest.raises(ModelError) as refused:
            check_reached(skeleton, LoraSection(), SUPERVISED, LENGTH)
        text = str(refused.value)
        assert f"No gradient of the loss reaches {dead} of " in text
        assert all(each in text for each in expected[:4])
        exclude = text[text.index("[") + 1 : text.index("]")].split(", ")
        assert end in exclude
        check_reached(skeleton, LoraSection(exclude=exclude), SUPERVISED, LENGTH)  # the remedy is one
    assert {name: module.training for name, module in skeleton.named_modules()} == before
    assert not any(module._forward_hooks for module in skeleton.modules())


def test_layers_that_only_long_documents_use_are_not_refused(tmp_path, seed):
    folder = make("llama", tmp_path / "base", seed)
    skeleton = skeleton_of(folder)

    class OfLongDocuments(nn.Linear):
        def forward(self, states):
            return super().forward(states) if states.shape[-2] > 40 else torch.zeros_like(states)

    size = skeleton.config.hidden_size
    skeleton.model.layers[0].self_attn.o_proj = OfLongDocuments(size, size, bias=False, device="meta")
    section = LoraSection(targets=["q_proj", "v_proj"])
    check_reached(skeleton, section, SUPERVISED, 41)
    with pytest.raises(ModelError, match=r"2 of 4 adapters.*layers\.0\.self_attn\.q_proj"):
        check_reached(skeleton, section, SUPERVISED, 40)


@pytest.mark.parametrize("read", [lambda count: count.item(), lambda count: count.tolist(), lambda count: count.cpu()])
def test_experts_that_a_layer_skips_by_its_values_are_left_to_the_first_step(read, tmp_path, seed):
    skeleton = skeleton_of(make("llama", tmp_path / "base", seed))
    size = skeleton.config.hidden_size

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(size, 2, bias=False, device="meta")
            self.experts = nn.ModuleList(nn.Linear(size, size, bias=False, device="meta") for _ in range(2))

        def forward(self, states):
            choice = self.gate(states).argmax(-1, keepdim=True)
            for index, expert in enumerate(self.experts):
                if read((choice == index).sum()) > 0:
                    states = states + (choice == index) * expert(states)
            return states

    first, second = skeleton.model.layers
    first.mlp = Mixture()
    section = LoraSection(targets=["experts.0", "experts.1", "q_proj"])
    check_reached(skeleton, section, SUPERVISED, LENGTH)
    second.register_forward_hook(lambda _layer, inputs, _output: inputs[0])  # it reads nothing, and is dead
    with pytest.raises(ModelError, match=r"reaches 1 of 4 adapters.*: model\.layers\.1\.self_attn\.q_proj\. "):
        check_reached(skeleton, section, SUPERVISED, LENGTH)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_models_with_a_head_of_scores_are_run_too(family, tmp_path, tiny_base):
    head = ScoreHead(3, ("a", "b", "c"), "single_label_classification", of_images=family != "llama")
    base = make_image_base(tmp_path / "base", family) if head.of_images else tiny_base
    skeleton = build_skeleton(BaseFiles.resolve(str(base), with_weights=False), head=head)
    columns = load_processor(base).made_up() if head.of_images else {}
    loss = replace(SUPERVISED, head=head, columns=columns)
    tokens = 1 if head.of_images else LENGTH
    check_reached(skeleton, LoraSection(), loss, tokens)
    first = checkpointed_layers(skeleton)[0]
    first.register_forward_hook(lambda _layer, _inputs, output: output.detach())
    count = sum(is_linear(module) for module in first.modules())
    with pytest.raises(ModelError, match=f"No gradient of the loss reaches {count} of "):
        check_reached(skeleton, LoraSection(), loss, tokens)


def test_a_model_that_needs_values_is_left_to_the_first_step(tmp_path, seed, monkeypatch):
    skeleton = skeleton_of(make("trocr", tmp_path / "base", seed))
    monkeypatch.setattr(on_meta, "MAX_OPERATIONS", 5)
    check_reached(skeleton, LoraSection(), SUPERVISED, LENGTH)


def test_every_command_refuses_before_anything_is_loaded_and_with_the_words_of_the_first_step(
    tmp_path, seed, alpaca_file, monkeypatch
):
    folder = make("trocr", tmp_path / "base", seed)
    config = load_config(run_config(folder, alpaca_file, tmp_path / "run"))
    model, _ = qlora.load_base(str(folder))
    add_lora(model)
    dead = "encoder_attn."
    for name, layer in lora_layers(model):
        layer.first_trained.grad = torch.full_like(layer.first_trained, float(dead not in name))
    with pytest.raises(ModelError) as in_first_step:
        check_gradients(model)
    monkeypatch.setattr(assemble, "load_for_training", lambda *_args, **_kwargs: pytest.fail("it is loaded"))
    for command in (train, plan_run, estimate):
        with pytest.raises(ModelError) as early:
            command(config)
        assert str(early.value) == str(in_first_step.value)
    assert not (tmp_path / "run" / "run.json").exists()


def test_of_layers_that_share_their_last_parts_the_remedy_names_each():
    adapted = [f"layers.{index}.{part}" for index in range(3) for part in ("q", "gate")]
    refuse_unreached([], adapted)
    with pytest.raises(ModelError, match=r"1 of 6 .*: layers\.1\.gate\..*lora\.exclude: \[1\.gate\]\.$"):
        refuse_unreached(["layers.1.gate"], adapted)
    with pytest.raises(ModelError, match=r"and 2 more\. Choose other lora\.targets\.$"):
        refuse_unreached(adapted, adapted)
