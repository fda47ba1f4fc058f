"""GGUF files: transformers and llama.cpp read them back as the same model with the same tokens."""

import hashlib
import math
import struct
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

from qlora.errors import ExportError
from qlora.export.gguf.model import write_gguf
from qlora.export.gguf.vocabulary import PRE_TOKENIZERS, read_vocabulary
from qlora.files import BaseFiles
from qlora.files.shards import TensorLayout
from qlora.model import BaseWeights
from tests.tiny import make_base, make_tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
BASES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"config_class": MistralConfig, "sliding_window": None},
    "qwen2": {"config_class": Qwen2Config, "vocab_size": 264},  # its tokenizer class adds a token
    "qwen2, tied": {"config_class": Qwen2Config, "vocab_size": 264, "tie_word_embeddings": True},
    "qwen3": {"config_class": Qwen3Config, "head_dim": 128},  # transformers reads no other back
}
# A text of llama.cpp's convert_hf_to_gguf.py; the SHA-256 of its ids names the way that a tokenizer splits text.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, "
    "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)


def layout_of(folder):
    files = BaseFiles.resolve(str(folder))
    weights = BaseWeights(files)
    return [TensorLayout(name, shape, torch.float32) for name, shape in weights.shapes.items()], weights


def write(folder, out_file, dtype="f16"):
    layout, weights = layout_of(folder)
    return write_gguf(folder, layout, lambda name: weights.read(name).float(), out_file, dtype)


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def train_tokenizer(splitting, ignore_merges, text):
    """Return a byte-level BPE tokenizer with its own merges and the given splitting."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = {
        "a regex of its own": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "single digits": [pre_tokenizers.Digits(individual_digits=True)],
    }
    parts = [
        step
        for part in splitting
        for step in steps.get(
            part,
            [
                pre_tokenizers.Split(Regex(part), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
        )
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("family", BASES)
def test_transformers_reads_the_same_model_back(family, tmp_path, seed, generator):
    base = make_base(tmp_path / "base", seed, dtype=torch.float16, **BASES[family])
    report = write(base, tmp_path / "model.gguf")
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.randint(256, (2, 40), generator=generator)
    assert torch.equal(logits_of(found, ids), logits_of(expected, ids))
    assert report.tensors == len(load_file(base / "model.safetensors"))
    assert report.num_bytes == (tmp_path / "model.gguf").stat().st_size
    assert found.config.tie_word_embeddings == expected.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_matrices_are_rounded_once_and_vectors_are_exact(dtype, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, Qwen2Config, dtype=torch.float32, vocab_size=264)
    report = write(base, tmp_path / "model.gguf", dtype)
    _, tensors = read(tmp_path / "model.gguf")
    source = load_file(base / "model.safetensors")
    embedding, down = source["model.embed_tokens.weight"], source["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(tensors["blk.1.attn_q.bias"].data, source["model.layers.1.self_attn.q_proj.bias"].numpy())
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    values = torch.from_numpy(
        gguf.dequantize(tensors["token_embd.weight"].data, tensors["token_embd.weight"].tensor_type)
    )
    if dtype == "q8_0":
        steps = embedding.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1) / 127
        # Half a step, and the fp16 rounding of the step itself, 127 times 2^-11.
        assert ((values - embedding).abs() <= steps * (0.5 + 127 / 2048)).all()
        assert (values != embedding).any()
        # 172 values are not a multiple of 32.
        assert tensors["blk.1.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
        assert np.array_equal(tensors["blk.1.ffn_down.weight"].data, down.half().numpy())
        assert "2 of 16 matrices are in f16, since their rows are not a multiple of 32" in report.notes
    else:
        cast = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        assert torch.equal(values, embedding.to(cast).float())
        assert "f16" not in "".join(report.notes)


@pytest.mark.parametrize(("dtype", "levels"), [("q5_0", 16), ("q4_0", 8)])
def test_few_bits_are_for_layers_and_eight_for_embedding_and_head(dtype, levels, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, Qwen2Config, dtype=torch.float32, vocab_size=264)
    report = write(base, tmp_path / "model.gguf", dtype)
    _, tensors = read(tmp_path / "model.gguf")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("Q8_0", "Q8_0")
    assert (kinds["blk.0.attn_k.weight"], kinds["blk.1.ffn_down.weight"]) == (dtype.upper(), "F16")
    assert "2 of 16 matrices are in f16, since their rows are not a multiple of 32" in report.notes
    exact = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    tensor = tensors["blk.0.ffn_up.weight"]
    values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
    steps = exact.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1) / levels
    assert ((values - exact).abs() <= 1.01 * steps).all()
    assert ((values - exact).abs() <= 0.51 * steps).float().mean() > 0.9


@pytest.mark.parametrize("repeats", [True, False])
def test_the_head_in_a_tied_models_file_is_written_only_if_it_differs(repeats, tmp_path, seed, generator):
    base = make_base(tmp_path / "base", seed, dtype=torch.float16, tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    other = torch.randn(259, 64, generator=generator).half()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() if repeats else other
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    write(base, tmp_path / "model.gguf")
    assert ("output.weight" in read(tmp_path / "model.gguf")[1]) != repeats
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.randint(256, (1, 20), generator=generator)
    assert torch.equal(logits_of(found, ids), logits_of(expected, ids))


def test_each_tensor_is_read_once_in_the_order_of_the_file(tiny_base, tmp_path):
    layout, weights = layout_of(tiny_base)
    asked = []
    write_gguf(
        tiny_base, layout, lambda name: asked.append(name) or weights.read(name).float(), tmp_path / "m.gguf", "bf16"
    )
    assert asked == [entry.name for entry in layout]


def test_template_and_end_tokens_are_in_the_file(tmp_path, seed):
    base = make_base(tmp_path / "base", seed)
    template = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
    make_tokenizer(chat_template=template).save_pretrained(base)
    GenerationConfig(eos_token_id=[257, 7]).save_pretrained(base)
    write(base, tmp_path / "model.gguf")
    fields, _ = read(tmp_path / "model.gguf")
    said = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    assert (said["bos_token_id"], said["eos_token_id"]) == (256, 257)
    assert {said["eot_token_id"], said["eom_token_id"]} == {7, 258}
    assert (said["add_bos_token"], said["add_eos_token"], said["add_space_prefix"]) == (True, False, False)
    assert fields["tokenizer.chat_template"] == template
    assert (said["model"], said["pre"]) == ("gpt2", "gpt-2")
    assert said["tokens"][256:] == ["<s>", "</s>", "<|im_end|>"]
    assert said["token_type"] == [int(gguf.TokenType.NORMAL)] * 256 + [int(gguf.TokenType.CONTROL)] * 3


def test_of_too_many_end_tokens_the_trained_one_is_kept(tmp_path, seed):
    base = make_base(tmp_path / "base", seed)
    template = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
    make_tokenizer(chat_template=template).save_pretrained(base)
    GenerationConfig(eos_token_id=[5, 6, 7, 257]).save_pretrained(base)
    report = write(base, tmp_path / "model.gguf")
    fields, _ = read(tmp_path / "model.gguf")
    named = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert named == [257, 258, 5]
    assert "3 of the 5 tokens that end an answer are written; GGUF has no room for more" in report.notes


def test_rows_of_the_embedding_without_a_token_get_placeholders(tmp_path, seed):
    base = make_base(tmp_path / "base", seed, vocab_size=264)
    write(base, tmp_path / "model.gguf")
    fields, _ = read(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.tokens"][259:] == [f"[PAD{token_id}]" for token_id in range(259, 264)]
    assert fields["tokenizer.ggml.token_type"][259:] == [int(gguf.TokenType.UNUSED)] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config_class": GPT2Config, "n_embd": 64, "n_layer": 2, "n_head": 4}, "not gpt2.*convert_hf_to_gguf.py"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type: dynamic"),
        ({"config_class": Qwen2Config, "rope_parameters": LLAMA3_ROPE}, "rope_type in Qwen: llama3"),
        ({"config_class": Qwen2Config, "use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast: 16"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate: False"),
        ({"vocab_size": 258, "eos_token_id": 257}, "ids up to 258, the embedding 258 rows"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_differently_is_refused(changes, message, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, **changes)
    with pytest.raises(ExportError, match=message):
        write(base, tmp_path / "model.gguf")


def test_splitting_text_in_a_way_unknown_to_llama_cpp_is_refused(tmp_path, seed):
    base = make_base(tmp_path / "base", seed)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("q+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.save_pretrained(base)
    with pytest.raises(ExportError, match=r"llama.cpp has no known name .*q\+.*docs/release.md"):
        write(base, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Lowercase()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Digits()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Metaspace(split=True)),
    ],
)
def test_a_sentencepiece_that_llama_cpp_lacks_is_refused(change, realdata):
    backend = Tokenizer.from_file(str(realdata / "tokenizers/tinyllama_chat_hf/tokenizer.json"))
    change(backend)
    with pytest.raises(ExportError, match="changes or splits text"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), 32000, [], None)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [({}, 1.0), ({"attention_factor": 1.0}, 1 / (1 + 0.1 * math.log(4)))],
    ids=["the usual", "another"],
)
def test_yarns_attention_factor_is_in_the_key_that_llama_cpp_reads(settings, factor, tmp_path, seed):
    base = make_base(tmp_path / "base", seed, rope_parameters=YARN | settings)
    write(base, tmp_path / "model.gguf")
    fields, _ = read(tmp_path / "model.gguf")
    assert fields["llama.rope.scaling.attn_factor"] == pytest.approx(factor)


def test_values_that_do_not_fit_are_refused_by_name(tmp_path, seed):
    base = make_base(tmp_path / "base", seed, dtype=torch.float32)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 70000
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj\.weight: a value does not fit F16; write bf16"):
        write(base, tmp_path / "model.gguf")
    write(base, tmp_path / "model.gguf", "bf16")


def test_tensors_without_a_name_in_gguf_are_refused(tiny_base, tmp_path):
    layout, _ = layout_of(tiny_base)
    odd = TensorLayout("model.layers.0.self_attn.gate.weight", (4, 64), torch.float32)
    with pytest.raises(ExportError, match=r"1 tensors have no name .*self_attn\.gate\.weight"):
        write_gguf(tiny_base, [*layout, odd], lambda name: torch.zeros(1), tmp_path / "m.gguf")


def test_without_the_package_the_remedy_is_reported(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match="pip install gguf"):
        write(tiny_base, tmp_path / "model.gguf")


# By llama.cpp's own table, convert_hf_to_gguf.py.
HASHES = {
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
}


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_real_tokenizers_get_llama_cpps_names(name, realdata):
    folder = realdata / "tokenizers" / name
    if name == "gpt2":
        tokenizer = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    else:
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode(CHECK_TEXT)
    found = read_vocabulary(tokenizer, len(tokenizer), [], None)
    assert HASHES[hashlib.sha256(str(ids).encode()).hexdigest()] == found.pre


def sentencepiece_scores(path):
    """Return the scores by piece of a tokenizer.model, a sequence of messages with a piece, its score and its type."""
    data, at, scores = path.read_bytes(), 0, {}
    while data[at] == 0x0A:
        length, at, shift = 0, at + 1, 0
        while True:
            length |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if not data[at - 1] & 0x80:
                break
        message, at = data[at : at + length], at + length
        size = message[1]
        piece, rest = message[2 : 2 + size].decode(), message[2 + size :]
        if rest[:1] == b"\x15":
            scores[piece] = struct.unpack("<f", rest[1:5])[0]
    return scores


@pytest.mark.parametrize(
    "name", ["models/stories260K-hf", "tokenizers/tinyllama_chat_hf", "tokenizers/mistral7b_v01_hf"]
)
def test_scores_order_the_pieces_as_sentencepiece_does(name, realdata):
    folder = realdata / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = read_vocabulary(tokenizer, len(tokenizer), [], None)
    scores = sentencepiece_scores(folder / "tokenizer.model")
    merged = [
        (score, token) for token, score in zip(found.tokens, found.scores, strict=True) if score > -1000 or token == ""
    ]
    ours = [token for _, token in sorted(merged, reverse=True)]
    assert len(ours) > 100
    assert ours == sorted(ours, key=lambda token: -scores[token])
    assert found.adds["space"]


def test_differences_of_llama_cpps_input_are_noted(tmp_path, seed, realdata):
    base = make_base(tmp_path / "base", seed, MistralConfig, vocab_size=32000, sliding_window=64)
    tokenizer = AutoTokenizer.from_pretrained(realdata / "tokenizers/tinyllama_chat_hf")
    tokenizer.save_pretrained(base)
    GenerationConfig(eos_token_id=[2, 5, 6, 7]).save_pretrained(base)
    attention, space, ends = write(base, tmp_path / "model.gguf").notes
    assert "the model to the last 64" in attention
    assert "a space after a special token" in space
    assert "3 of the 4 tokens that end an answer are written; GGUF has no room for more" in ends
    base = make_base(tmp_path / "qwen", seed, Qwen2Config, vocab_size=152000)
    Qwen2Tokenizer.from_pretrained(realdata / "tokenizers/qwen3").save_pretrained(base)
    assert "does not normalize text to NFC" in "".join(write(base, tmp_path / "model.gguf").notes)


@pytest.fixture
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def check_by_llama_cpp(llama_cpp, base, file, text):
    """Check that llama.cpp uses the same tokens and predicts the same from them."""
    model = llama_cpp.Llama(str(file), logits_all=True, verbose=False, n_ctx=512)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(text).input_ids
    assert model.tokenize(text.encode(), add_bos=True, special=True) == ids
    ids = ids[:200]
    model.eval(ids)
    found = torch.from_numpy(np.array(model.scores[: len(ids)]))
    model.close()
    expected = logits_of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), torch.tensor([ids]))[0]
    return found, expected


@pytest.mark.slow
@pytest.mark.parametrize("family", [*BASES, "llama with biases", "llama 3.1", "yarn", "yarn, own scale"])
def test_llama_cpp_computes_the_same(family, llama_cpp, tmp_path, seed, realdata):
    text = (realdata / "data/tinyshakespeare/input.txt").read_text()[:20000]
    own = {  # settings that transformers does not read back from GGUF
        "llama with biases": {"attention_bias": True, "mlp_bias": True},
        "llama 3.1": {"rope_parameters": LLAMA3_ROPE},
        "yarn": {"config_class": Qwen2Config, "rope_parameters": YARN},
        "yarn, own scale": {"rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5}},
    }
    base = make_base(tmp_path / "base", seed, dtype=torch.float16, **{**(BASES | own)[family], "vocab_size": 608})
    train_tokenizer(("a regex of its own",), False, text).save_pretrained(base)
    write(base, tmp_path / "model.gguf")
    found, expected = check_by_llama_cpp(llama_cpp, base, tmp_path / "model.gguf", text[:700])
    # llama.cpp multiplies with activations in fp16.
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.slow
def test_llama_cpp_predicts_like_a_real_model(llama_cpp, tmp_path, realdata):
    base = realdata / "models/stories260K-hf"
    write(base, tmp_path / "model.gguf")
    text = "Once upon a time, there was a little girl. She said: “Où est-il?” 12 3 \n\n and more\tof it."
    found, expected = check_by_llama_cpp(llama_cpp, base, tmp_path / "model.gguf", text)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (found - expected).abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("splitting", "ignore_merges"), PRE_TOKENIZERS, ids=PRE_TOKENIZERS.values())
def test_llama_cpp_splits_text_under_the_name_as_the_tokenizer_does(
    splitting, ignore_merges, llama_cpp, tmp_path, seed, realdata
):
    text = (realdata / "data/tinyshakespeare/input.txt").read_text()[:100000]
    base = make_base(tmp_path / "base", seed, LlamaConfig, vocab_size=600, num_hidden_layers=1)
    tokenizer = train_tokenizer(splitting, ignore_merges, text + CHECK_TEXT)
    tokenizer.save_pretrained(base)
    write(base, tmp_path / "model.gguf")
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    for part in (text, CHECK_TEXT):
        assert model.tokenize(part.encode(), add_bos=False) == tokenizer(part).input_ids
    model.close()
