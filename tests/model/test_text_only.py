"""Multimodal bases: the text part is found, loaded alone, and computes what the whole model computes for text."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import save_file

from qlora.checkpoint import read_adapter, wrap_adapter
from qlora.data import collate, make_example
from qlora.errors import CheckpointError, ModelError
from qlora.files import BaseFiles
from qlora.files.stored import StoredTensors
from qlora.lora import ScoreHead, Targets, add_lora, linear_layers, match_targets, text_model, text_part, train_rows
from qlora.model import build_skeleton, load_base
from qlora.model.isolation import keep_apart
from qlora.model.loss import check_loss, model_inputs
from qlora.model.quantization import layers_in_16bit, nf4_settings, quantized_names
from qlora.model.shares import linear_weights
from qlora.model.text_only import text_only
from tests.multimodal import FAMILIES, make_multimodal


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=[True, False], ids=["published", "current"])
def base(request, family, tmp_path_factory):
    return make_multimodal(tmp_path_factory.mktemp(family) / "base", family, seed=3, is_published=request.param)


def ids_of_text(generator, length=12):
    return torch.randint(4, 256, (1, length), generator=generator)


def test_the_text_part_computes_what_the_whole_model_computes(base, generator, monkeypatch):
    read = set()
    own_read = StoredTensors.read

    def watch(self, name, rows=slice(None)):
        read.add(name)
        return own_read(self, name, rows)

    monkeypatch.setattr(StoredTensors, "read", watch)
    model, _ = load_base(str(base), "none", compute_dtype="float32", device="cpu")
    whole = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    ids = ids_of_text(generator)
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        hidden = text_model(model)(input_ids=ids).last_hidden_state
        assert torch.equal(model.get_output_embeddings()(hidden), expected)
    assert torch.equal(
        *(each.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None) for each in (model, whole))
    )
    # Nothing of the other parts is there, was read, or is a target.
    part = text_part(model)
    assert part.others
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in whole.named_parameters() if not part.is_outside(name)
    }
    assert len(read) == len(model.state_dict())
    assert not [name for name in read if any(other in name for other in ("vision", "visual", "multi_modal"))]
    targets = match_targets(model, "all-linear")
    assert targets
    assert all(name.startswith(f"{part.text_model}.layers.") or "per_layer" in name for name in targets)
    assert {*targets} == {*linear_layers(model)} - {"lm_head"}


def test_packed_documents_compute_what_they_compute_alone(family, tmp_path, generator):
    base = make_multimodal(tmp_path / "base", family, seed=3)
    documents = [ids_of_text(generator, length)[0].numpy() for length in (7, 11, 5)]
    examples = [make_example(ids, [True] * len(ids)) for ids in documents]
    for attention in ("auto", "eager"):
        model, _ = load_base(str(base), "none", compute_dtype="float32", device="cpu", attention=attention)
        isolation = keep_apart(model, examples[0], examples[1], any_attention=attention == "auto", packed=True)
        assert isolation.mixed_reason is None
        assert ("by documents" in isolation.attention) == (attention == "auto")
        batch = collate(examples, packed=True)
        with torch.no_grad():
            packed = model(**model_inputs(model, batch)).logits[0]
            alone = [model(input_ids=torch.from_numpy(ids).long()[None]).logits[0] for ids in documents]
        torch.testing.assert_close(packed, torch.cat(alone), atol=2e-5, rtol=0)


def test_adapters_in_4_bits_compute_the_loss_of_their_own_class(family, tmp_path, generator):
    base = make_multimodal(tmp_path / "base", family, seed=3)
    model, _ = load_base(str(base), compute_dtype="float32", device="cpu")
    add_lora(model, rank=4)
    ids = ids_of_text(generator)[0].numpy()
    check_loss(model, collate([make_example(ids, [True] * len(ids))]))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    model, _ = load_base(str(make_multimodal(tmp_path_factory.mktemp("llava") / "base", "llava", seed=3)), "none")
    return model


@pytest.mark.parametrize("target", ["fc1", "vision_tower", "model.multi_modal_projector.linear_1", r".*vision.*\.fc2"])
def test_a_target_in_another_part_is_refused_with_the_names_of_text(llava, target):
    with pytest.raises(ModelError) as error:
        match_targets(llava, ["q_proj", target])
    part = "multi_modal_projector" if "projector" in target else "vision_tower"
    assert str(error.value) == (
        f"lora.targets: '{target}' is in model.{part}, which is not trained: only model.language_model is. Its linear "
        "layers are: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj."
    )


def test_a_name_that_text_shares_with_another_part_is_that_of_text(llava):
    names = match_targets(llava, ["q_proj"])
    assert names == [f"model.language_model.layers.{index}.self_attn.q_proj" for index in range(2)]


def test_other_names_in_another_part_are_refused(llava):
    with pytest.raises(ModelError, match=r"lora.exclude: 'fc1' is in model.vision_tower, which is not trained"):
        match_targets(llava, Targets("all-linear", exclude=["fc1"]))
    with pytest.raises(ModelError, match=r"lora.modules_to_save: 'vision_tower' is in model.vision_tower"):
        train_rows(llava, ["vision_tower"])


def test_an_adapter_for_another_part_is_refused(llava, tmp_path):
    layer = "model.vision_tower.encoder.layers.0.mlp.fc1"
    key = f"base_model.model.{layer}.lora_"
    save_file(
        {f"{key}A.weight": torch.zeros(2, 32), f"{key}B.weight": torch.zeros(64, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [layer]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"1 of its layers \({layer} …\) are not in model.language_model"):
        wrap_adapter(llava, read_adapter(tmp_path))


class Passing(transformers.LlavaForConditionalGeneration):
    """Text passes a module next to the text model, as in Gemma 3n."""

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_vision = torch.nn.Sequential(torch.nn.Linear(64, 64))

    def forward(self, input_ids=None, **kwargs):
        embedded = self.model.embed_vision(self.get_input_embeddings()(input_ids))
        return super().forward(inputs_embeds=embedded, **kwargs)


class Touching(Passing):
    """Text needs a module that is not called, as in Qwen2-Audio."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids.to(self.model.vision_tower.device), **kwargs)


class Reading(transformers.LlavaForConditionalGeneration):
    """A class that reads an output that its text model does not have, as Llama 4's in transformers 5.24."""

    def forward(self, **kwargs):
        return super().forward(**kwargs).image_outputs_of_text


def test_a_part_that_text_passes_is_kept_but_not_trained(llava):
    with torch.device("meta"):
        model = text_only(Passing)(llava.config)
    assert model.model.vision_tower is None
    assert model.model.embed_vision is not None
    assert match_targets(model, "all-linear") == match_targets(llava, "all-linear")
    with pytest.raises(ModelError, match=r"'model.embed_vision.0' is in model.embed_vision, which is not trained"):
        match_targets(model, ["model.embed_vision.0"])
    settings = nf4_settings(True, torch.float32, layers_in_16bit(model))
    assert quantized_names(model, settings) == match_targets(llava, "all-linear")
    assert [*linear_weights(model)] == [*linear_weights(llava)]


def test_a_class_that_takes_no_text_without_its_other_parts_is_refused(llava):
    with pytest.raises(ModelError, match="Touching takes no text without its other parts"), torch.device("meta"):
        text_only(Touching)(llava.config)


def test_a_class_that_can_not_be_run_is_refused_before_it_is_loaded(llava):
    with (
        pytest.raises(ModelError, match=r"^Reading reads image_outputs_of_text of its text model's outputs"),
        torch.device("meta"),
    ):
        text_only(Reading)(llava.config)


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(("config_class", "arguments", "head", "kind", "others"), [
    ("ModernBertDecoderConfig", {}, None, "ModernBertDecoderForCausalLM", "lm_head.dense.weight, lm_head.norm.weight"),
    ("ModernBertDecoderConfig", {}, ScoreHead(2), "ModernBertDecoderForSequenceClassification",
     "head.dense.weight, head.norm.weight"),
    ("RobertaConfig", {"is_decoder": True}, None, "RobertaForCausalLM",
     "lm_head.dense.weight, lm_head.dense.bias, lm_head.layer_norm.weight, lm_head.layer_norm.bias"),
])  # fmt: skip
def test_a_head_of_several_layers_is_refused(tmp_path, config_class, arguments, head, kind, others):
    """With random weights the two losses are close, so a loss check would not notice."""
    getattr(transformers, config_class)(**SIZES, **arguments).save_pretrained(tmp_path)
    problem = re.escape(f"{kind} has parameters outside its base and output head ({others}), which the loss would")
    with pytest.raises(ModelError, match=problem):
        build_skeleton(BaseFiles.resolve(str(tmp_path), with_weights=False), head=head)


def test_at_most_four_parameters_are_named_and_those_of_the_model_itself_too(tiny_base, monkeypatch):
    def scaled(config, **_others):
        model = transformers.LlamaForCausalLM(config)
        for index in range(6):
            model.register_parameter(f"scale{index}", torch.nn.Parameter(torch.ones(1)))
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", scaled)
    with pytest.raises(ModelError, match=r"\(scale0, scale1, scale2, scale3 and 2 more\)"):
        build_skeleton(BaseFiles.resolve(str(tiny_base), with_weights=False))


def test_a_head_with_a_bias_is_accepted(tmp_path):
    transformers.PhiConfig(**SIZES).save_pretrained(tmp_path)
    model = build_skeleton(BaseFiles.resolve(str(tmp_path), with_weights=False))
    assert model.lm_head.bias is not None


@pytest.mark.parametrize(
    ("config_class", "arguments", "kind"),
    [
        ("T5Config", {}, "an encoder-decoder model (t5)"),
        ("BartConfig", {}, "an encoder-decoder model (bart)"),
        ("BertConfig", {}, "an encoder-only model (bert)"),
        ("ModernBertConfig", {}, "an encoder-only model (modernbert)"),
        ("ViTConfig", {}, "not a language model (vit)"),
    ],
)
def test_models_of_other_kinds_are_refused_by_their_config(tmp_path, config_class, arguments, kind):
    getattr(transformers, config_class)(**arguments).save_pretrained(tmp_path)
    files = BaseFiles.resolve(str(tmp_path), with_weights=False)
    with pytest.raises(ModelError) as error:
        build_skeleton(files)
    assert str(error.value) == (
        f"{tmp_path} is {kind}, but only decoder-only models are supported; set model.base to one, such as Llama, "
        "Mistral, Qwen or Gemma."
    )
