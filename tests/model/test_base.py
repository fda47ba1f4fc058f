"""Bases of several architectures: every linear in NF4, the rest as in the files, and broken files named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from qlora.errors import ModelError
from qlora.model import load_base, load_model, resolve_compute_dtype
from qlora.model.base import _check_finite
from qlora.nf4 import NF4Linear, is_bitsandbytes_linear, quantize
from tests.tiny import make_base, make_tokenizer

ARCHITECTURES = {
    "llama": {},
    "llama tied, with biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen3": {"config_class": Qwen3Config},
    "mistral": {"config_class": MistralConfig},
    "gemma2": {"config_class": Gemma2Config},
    "gpt2": {"config_class": GPT2Config, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES)
def base(request, tmp_path, seed):
    return make_base(tmp_path / "base", seed, **request.param)


def plain_model(base, dtype):
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def copy_base(base: Path, target: Path) -> Path:
    target.mkdir()
    for path in base.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def inputs(generator):
    return torch.randint(256, (2, 9), generator=generator)


def test_every_linear_but_the_head_is_ours_and_holds_the_checkpoints_weight_in_nf4(base):
    model, _ = load_base(str(base), compute_dtype="bfloat16")
    plain = plain_model(base, torch.bfloat16)
    expected = {
        name: module.weight.T if isinstance(module, Conv1D) else module.weight
        for name, module in plain.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not plain.get_output_embeddings()
    }
    found = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert found.keys() == expected.keys()
    assert not any(is_bitsandbytes_linear(module) for module in model.modules())
    for name, weight in expected.items():
        packed, state = quantize(weight.detach())
        assert torch.equal(found[name].weight, packed), name
        assert torch.equal(found[name].quant_state.absmax, state.absmax), name
        assert found[name].dequantize(torch.bfloat16).shape == weight.shape


def test_all_but_the_quantized_weights_keeps_the_bits_of_the_checkpoint(base):
    model, _ = load_base(str(base), compute_dtype="bfloat16")
    plain = dict(plain_model(base, torch.bfloat16).named_parameters())
    quantized = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    unquantized = {name: value for name, value in model.named_parameters() if name not in quantized}
    assert unquantized.keys() == plain.keys() - quantized
    for name, parameter in unquantized.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, plain[name]), name


def test_a_loaded_base_predicts_what_the_dequantized_weights_predict(base, generator):
    model, _ = load_base(str(base), compute_dtype="float32")
    plain = plain_model(base, torch.float32).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, NF4Linear):
                target = plain.get_submodule(name)
                weight = module.dequantize(torch.float32)
                target.weight.copy_(weight.T if isinstance(target, Conv1D) else weight)
    ids = inputs(generator)
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, plain(input_ids=ids).logits
    # The same fp32 products; GPT-2's run in another order.
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_a_base_is_frozen_and_in_evaluation_mode(tiny_base):
    model, _ = load_base(str(tiny_base))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_to_the_embeddings_as_the_config_says(tied, tmp_path, seed):
    model, _ = load_base(str(make_base(tmp_path / "base", seed, tie_word_embeddings=tied)))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_all_that_is_not_quantized_has_the_compute_dtype(dtype, tiny_base, generator):
    model, _ = load_base(str(tiny_base), compute_dtype=dtype)
    plain = {parameter.dtype for parameter in model.parameters() if parameter.dtype != torch.uint8}
    assert plain == {getattr(torch, dtype)}
    with torch.no_grad():
        assert model(input_ids=inputs(generator)).logits.dtype == getattr(torch, dtype)


def test_the_automatic_compute_dtype_of_a_cpu_is_one_that_it_multiplies(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolve_compute_dtype("auto", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert resolve_compute_dtype("auto", cpu) == torch.float32
    assert resolve_compute_dtype("float16", cpu) == torch.float16


def test_statistics_are_quantized_only_with_double_quantization(tiny_base):
    for double_quant in (True, False):
        model, _ = load_base(str(tiny_base), double_quant=double_quant)
        state = model.model.layers[0].mlp.up_proj.quant_state
        assert state.nested == double_quant
        assert state.absmax.dtype == (torch.uint8 if double_quant else torch.float32)


def test_the_asked_for_attention_is_used(tiny_base):
    model, _ = load_base(str(tiny_base), attention="eager")
    assert model.config._attn_implementation == "eager"


def test_without_quantization_the_model_is_that_of_transformers(tiny_base, generator):
    model, _ = load_base(str(tiny_base), quantization="none", compute_dtype="bfloat16")
    plain = plain_model(tiny_base, torch.bfloat16).eval()
    ids = inputs(generator)
    assert not any(isinstance(module, NF4Linear) for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_shards_are_loaded_as_one_file_is(tiny_base, tmp_path):
    plain_model(tiny_base, torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    make_tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    one, several = (load_base(str(folder))[0].state_dict() for folder in (tiny_base, tmp_path / "sharded"))
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)


@pytest.fixture
def base_in_4bit(tmp_path, seed):
    source = make_base(tmp_path / "16bit", seed)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=settings)
    model.save_pretrained(tmp_path / "4bit")
    make_tokenizer().save_pretrained(tmp_path / "4bit")
    return source, tmp_path / "4bit"


def test_a_checkpoint_in_bitsandbytes_4bit_gives_the_layers_that_its_source_gives(base_in_4bit):
    source, packed = base_in_4bit
    from_source, _ = load_base(str(source), compute_dtype="bfloat16")
    model, _ = load_base(str(packed), compute_dtype="bfloat16")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert len(layers) == 14
    assert not any(is_bitsandbytes_linear(module) for module in model.modules())
    for name, layer in layers.items():
        expected = from_source.get_submodule(name).dequantize(torch.bfloat16)
        assert torch.equal(layer.dequantize(torch.bfloat16), expected), name


def test_a_checkpoint_in_bitsandbytes_4bit_is_loaded_to_chat_with(base_in_4bit, generator):
    model, tokenizer = load_model(str(base_in_4bit[1]))
    expected, _ = load_base(str(base_in_4bit[1]))
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 14
    assert tokenizer.chat_template
    ids = inputs(generator)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_a_checkpoint_in_4bit_is_not_loaded_without_quantization(base_in_4bit):
    with pytest.raises(
        ModelError, match=r"quantization: none is not possible for .*4bit, which is stored in 4 bits; use nf4\."
    ):
        load_base(str(base_in_4bit[1]), quantization="none")


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_the_files_lack_are_named(lost, tiny_base, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors[lost]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=lost.replace(".", r"\.")):
        load_base(str(base))


def test_weights_of_another_shape_are_named(tiny_base, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(ModelError, match="embed_tokens"):
        load_base(str(base))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_found_without_a_copy_of_the_weights(value):
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            new = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor) and not each._is_view()]
            sizes.extend(each.numel() for each in new)
            return found

    sizes, model = [], torch.nn.Embedding(50, 20, dtype=torch.bfloat16)
    model.dtype = torch.bfloat16
    with Sizes():
        _check_finite("a base", model)
    assert sizes
    assert max(sizes) <= 2
    model.weight.data[31, 7] = value
    with pytest.raises(ModelError, match=r"a base: values are not finite in torch\.bfloat16: weight; set model"):
        _check_finite("a base", model)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_value_that_overflows_in_the_compute_dtype_is_named(name, tiny_base, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors[name][3] = 70_000
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"not finite in torch\.float16: {name}; set model\.compute_dtype"):
        load_base(str(base), compute_dtype="float16")
    load_base(str(base), compute_dtype="bfloat16")


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_a_device_that_is_not_there_is_reported(device, tiny_base):
    with pytest.raises(ModelError, match=f"Device '{device}' can't be used here: "):
        load_base(str(tiny_base), device=device)


def test_pickled_weights_are_refused(tiny_base, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled weights are not read"):
        load_base(str(base))


@pytest.mark.parametrize("size", [4, 100, -1])
def test_a_file_that_is_cut_short_is_refused(size, tiny_base, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_base(str(base))


def test_a_folder_that_is_not_there_is_reported_and_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(ModelError, match="The model folder .* does not exist"):
        load_base(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_base(str(tmp_path))


def test_a_file_or_a_run_in_place_of_a_base_is_named_as_such(tmp_path):
    path = tmp_path / "run.json"
    path.touch()
    with pytest.raises(ModelError, match="is a file; name a model folder"):
        load_base(str(path))
    with pytest.raises(ModelError, match=r"it is a run: merge it with qlora merge, or name it as lora\.start_from"):
        load_base(str(tmp_path))


def test_an_architecture_that_transformers_does_not_know_is_reported(tiny_base, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of", "architectures": ["Unheard"]}))
    with pytest.raises(ModelError, match="unheard_of"):
        load_base(str(base))


MEASURE = """
import json, sys
import qlora, bitsandbytes, torch
from qlora.model import load_base, take_inventory

torch.set_num_threads(1)
def megabytes(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) / 1024

load_base(sys.argv[1])  # imports what is only imported at first use
open("/proc/self/clear_refs", "w").write("5")  # the highest so far was during the imports: forget it
before = megabytes("VmRSS")
model, _ = load_base(sys.argv[2], compute_dtype="bfloat16")
inventory = take_inventory(model)
peak = megabytes("VmHWM") - before
print(json.dumps({"peak": peak, "base": inventory.base_bytes / 2**20, "layers": len(inventory.quantized)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_holds_the_4bit_model_and_little_more(tiny_base, tmp_path, generator):
    base, num_layers = tmp_path / "large", 10
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=259, num_hidden_layers=num_layers, architectures=["LlamaForCausalLM"], **sizes)
    config.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).named_parameters()}
    values = torch.randn(1024 * 4096, generator=generator).bfloat16()
    tensors = {name: values[: shape.numel()].view(shape).clone() for name, shape in shapes.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    checkpoint, largest = (base / "model.safetensors").stat().st_size / 2**20, values.nbytes / 2**20
    del tensors

    command = [sys.executable, "-c", MEASURE, str(tiny_base), str(base)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    measured = json.loads(output.splitlines()[-1])
    print(f"MB: checkpoint {checkpoint:.0f}, {measured}")
    # bitsandbytes quantizes on a CPU through fp32 copies and int64 indices of one weight.
    bound = measured["base"] + 2 * largest + 40 * values.numel() / 2**20
    assert bound < checkpoint
    assert measured["peak"] < bound
    assert measured["layers"] == 7 * num_layers


@pytest.mark.slow
def test_a_real_model_loads_with_the_loss_in_its_notes(realdata):
    folder = realdata / "models" / "stories260K-hf"
    model, tokenizer = load_base(str(folder), compute_dtype="float32")
    text = (realdata / "tokenizers/cs336_tinystories/tinystories_sample.txt").read_text(encoding="utf-8")
    story = text.split("<|endoftext|>")[1].strip()
    ids = tokenizer(story, return_tensors="pt").input_ids[:, :256]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        embeddings = file.get_tensor("model.embed_tokens.weight")
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # Over the sample it is 1.379; a single story may differ by half a nat; a broken model has ln 512 = 6.2.
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(1.379, abs=0.5)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"quantization": "nf3"}, "quantization: 'nf3' should be one of nf4, none"),
    ({"quantization": "NF4"}, "quantization: 'NF4' should be one of nf4, none"),
    ({"compute_dtype": "bf17"}, "dtype: 'bf17' should be one of bfloat16"),
])  # fmt: skip
def test_an_unknown_argument_is_refused(arguments, message, tiny_base):
    with pytest.raises(ModelError, match=message):
        load_base(str(tiny_base), **arguments)


def test_a_compute_dtype_may_have_its_short_name(tiny_base):
    assert load_base(str(tiny_base), compute_dtype="fp32")[0].dtype == torch.float32


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_atention"])
def test_an_attention_that_is_not_available_is_named_by_its_key(attention, tiny_base):
    with pytest.raises(ModelError, match=rf"attention: '{attention}' \(model\.attention\) is not available"):
        load_base(str(tiny_base), attention=attention)
