"""Verification of GGUF files: merged files pass, and every mismatch of tensors, sizes and tokens is reported."""

import shutil

import pytest
import torch
from transformers import MistralConfig, Qwen3Config

from qlora.config import load_config
from qlora.export import merge
from qlora.proof import verify
from qlora.training import train
from tests.cli import run as run_command
from tests.tiny import make_base, only, run_config

pytestmark = pytest.mark.slow

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "mscale": 1.5, "mscale_all_dim": 0.5,
}  # fmt: skip
BASES = {
    "llama": {"rope_parameters": ROPE},
    "mistral, tied": {"config_class": MistralConfig, "sliding_window": None, "tie_word_embeddings": True},
    "qwen3": {"config_class": Qwen3Config, "vocab_size": 264, "head_dim": 32, "rope_parameters": YARN},
}
UP, QUERY = "blk.{}.ffn_up.weight", "blk.0.attn_q.weight"


@pytest.fixture(scope="module", params=BASES)
def run(request, alpaca_file, tmp_path_factory):
    """A trained run of each family; not to be changed."""
    folder = tmp_path_factory.mktemp("gguf")
    base = make_base(folder / "base", seed=3, **BASES[request.param])
    train(load_config(run_config(base, alpaca_file, folder / "run", train__max_steps=3)))
    return folder / "run"


@pytest.fixture(scope="module")
def released(merged, tmp_path_factory):
    """A merged GGUF file; not to be changed."""
    folder = tmp_path_factory.mktemp("released") / "out"
    merge(merged / "run", folder, format="gguf")
    return folder


@pytest.fixture
def out(released, tmp_path):
    """A copy of `released` that a test may change."""
    return shutil.copytree(released, tmp_path / "out")


def opened(out):
    """Return a reader of the file and its tensors, both of which change the file in place."""
    reader = gguf.GGUFReader(only(list(out.glob("*.gguf"))), "r+")
    return reader, {tensor.name: tensor.data for tensor in reader.tensors}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0", "q5_0", "q4_0"])
@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_a_merged_model_is_verified(dtype, onto, run, tmp_path):
    merge(run, tmp_path / "out", dtype, onto, format="gguf")
    report = verify(run, tmp_path / "out")
    assert report.problems == []
    assert report.tensors_checked >= 20
    bounds = {"float16": 1e-3, "bfloat16": 1e-2, "q8_0": 1e-2, "q5_0": 5e-2, "q4_0": 1e-1}
    assert 0 < report.max_weight_difference < bounds[dtype]
    assert report.merged_loss is None


def test_the_command_exits_with_1_on_a_changed_file(merged, out):
    assert run_command("verify", merged / "run", out, "--json").json()["tensors_checked"] == 21
    reader, tensors = opened(out)
    tensors[UP.format(0)][:], tensors[UP.format(1)][:] = tensors[UP.format(1)].copy(), tensors[UP.format(0)].copy()
    del reader, tensors
    done = run_command("verify", merged / "run", out)
    assert done.code == 1
    for layer in (0, 1):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert f"{name.format(layer)} is not base + scaling·B·A: it contains {name.format(1 - layer)}" in done.out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0", "q5_0", "q4_0"])
def test_a_value_off_by_two_units_in_the_last_place_is_reported(dtype, merged, tmp_path, seed):
    merge(merged / "run", tmp_path / "out", dtype, format="gguf")
    reader, tensors = opened(tmp_path / "out")
    row = seed % len(tensors[UP.format(0)])
    values = tensors[UP.format(0)][row]
    if dtype == "q8_0":
        values[2] ^= 2  # a block is a step in fp16 and 32 bytes
    elif dtype in ("q5_0", "q4_0"):
        values[-1] ^= 2  # a block ends with 16 bytes of two values each
    else:
        values.view("uint16")[seed % 64] ^= 2
    del reader, tensors, values
    problem = only(verify(merged / "run", tmp_path / "out").problems)
    assert problem.startswith(
        "tensor model.layers.0.mlp.up_proj.weight is not base + scaling·B·A: values differ by up to "
    )


def test_query_rows_that_were_not_interleaved_are_reported(merged, out):
    reader, tensors = opened(out)
    size = 16
    halves = tensors[QUERY].copy().reshape(-1, size // 2, 2, tensors[QUERY].shape[1]).swapaxes(1, 2)
    tensors[QUERY][:] = halves.reshape(tensors[QUERY].shape)
    del reader, tensors
    problem = only(verify(merged / "run", out).problems)
    assert problem.startswith("tensor model.layers.0.self_attn.q_proj.weight is not base + scaling·B·A")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.head_count_kv", 1),
        ("llama.rope.freq_base", 500_000.0),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5),
        ("tokenizer.ggml.eos_token_id", 65),
        ("tokenizer.ggml.add_bos_token", False),
    ],
)
def test_a_wrong_hyperparameter_is_reported(key, value, merged, out):
    reader, _ = opened(out)
    assert reader.fields[key].contents() != value
    reader.fields[key].parts[-1][0] = value
    del reader
    assert f": {key} is " in only(verify(merged / "run", out).problems)


def test_a_changed_token_is_reported(merged, out):
    reader, _ = opened(out)
    field = reader.fields["tokenizer.ggml.tokens"]
    field.parts[field.data[40]][0] ^= 1
    del reader, field
    assert ": tokenizer.ggml.tokens is " in only(verify(merged / "run", out).problems)


def test_another_chat_template_is_reported(merged, out):
    reader, _ = opened(out)
    reader.fields["tokenizer.chat_template"].parts[-1][3] ^= 1
    del reader
    assert ": tokenizer.chat_template is " in only(verify(merged / "run", out).problems)


def test_changed_factors_of_llama_3s_rotations_are_reported(alpaca_file, tmp_path):
    base = make_base(tmp_path / "base", seed=3, rope_parameters=ROPE)
    train(load_config(run_config(base, alpaca_file, tmp_path / "run", train__max_steps=1)))
    merge(tmp_path / "run", tmp_path / "out", format="gguf")
    reader, tensors = opened(tmp_path / "out")
    factors = torch.from_numpy(tensors["rope_freqs.weight"].copy())
    assert factors.min() < factors.max()
    tensors["rope_freqs.weight"][-1] *= 1.01
    del reader, tensors
    assert "rope_freqs.weight does not match the config's" in only(verify(tmp_path / "run", tmp_path / "out").problems)


def test_a_dtype_that_contradicts_the_report_is_reported(merged, out):
    path = out / "merge_report.json"
    path.write_text(path.read_text().replace('"float16"', '"bfloat16"'))
    assert "tensor lm_head.weight is in float16, not bfloat16" in verify(merged / "run", out).problems


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_reported(share, merged, out):
    path = only(list(out.glob("*.gguf")))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    problem = only(verify(merged / "run", out).problems)
    assert problem.startswith(f"{path.name} is truncated or damaged (")
