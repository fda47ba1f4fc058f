"""Mistakes of users: each is one message with the thing, its value and the remedy, and leaves no files behind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from qlora.errors import ModelError
from qlora.lora import match_targets
from tests.cli import run
from tests.tiny import make_tokenizer, run_config, write_jsonl

GOOD = {"instruction": "Say it", "output": "it"}


@pytest.fixture
def try_training(tmp_path, tiny_base, alpaca_file):
    """Train a config with one thing wrong; return exit code and message, after checking that no file was left."""

    def try_training(*overrides, base=tiny_base, data=alpaca_file, **changes):
        config = run_config(base, data, tmp_path / "run", **changes)
        before = sorted(tmp_path.rglob("*"))
        done = run("train", config, *overrides)
        assert sorted(tmp_path.rglob("*")) == before
        return done.code, done.error()

    return try_training


@pytest.fixture(scope="module")
def own_base(tmp_path_factory, tiny_base):
    """Return a separate base, which tests of this file may change."""
    return shutil.copytree(tiny_base, tmp_path_factory.mktemp("bad") / "base")


@pytest.fixture(scope="module")
def config(own_base, alpaca_file):
    return run_config(own_base, alpaca_file, own_base.with_name("run"), train__max_steps=2, train__save_every=None)


@pytest.fixture(scope="module")
def run_dir(config):
    """A finished run."""
    assert run("train", config).code == 0
    return config.with_suffix("")


@pytest.fixture
def base(tmp_path, tiny_base):
    """A copy of the base, to damage."""
    return shutil.copytree(tiny_base, tmp_path / "base")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora__rnak": 8}, "lora.rnak: unknown key. Did you mean lora.rank?"),
        ({"data__banana": 8}, "data.banana: unknown key."),
        ({"train__per_device_train_batch_size": 8}, "In qlora, it is train.micro_batch_size."),
        ({"train__rank": 8}, "train.rank: unknown key. Did you mean lora.rank?"),
        ({"train__learning_rate": -3}, "train.learning_rate: -3 should be greater than 0"),
        ({"lora__rank": 0}, "lora.rank: 0 should be greater than or equal to 1"),
        ({"lora__targets": []}, "lora.targets: [] should name a layer"),
        ({"model__quantization": "int8"}, "model.quantization: 'int8' should be 'nf4' or 'none'"),
    ],
    ids=str,
)
def test_a_wrong_config(try_training, changes, expected):
    code, message = try_training(**changes)
    assert code == 2
    assert "run.yaml has a problem:" in message
    assert expected in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_stepz=3", "train.max_stepz: unknown key. Did you mean train.max_steps?"),
        ("train.epochs=.inf", "train.epochs: inf should be a finite number"),
        ("train.max_steps", "'train.max_steps' should read section.key=value"),
    ],
)
def test_a_wrong_override(try_training, override, expected):
    code, message = try_training(override)
    assert code == 2
    assert expected in message


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_missing_config(tmp_path, verb):
    done = run(verb, tmp_path / "none.yaml")
    assert done.code == 2
    assert f"{tmp_path / 'none.yaml'}" in done.error()
    assert "qlora init" in done.error()


@pytest.mark.parametrize("name", ["none.jsonl", "none", "none.csv"])
def test_a_missing_data_file(try_training, tmp_path, name):
    code, message = try_training(data=tmp_path / name)
    assert code == 2
    assert f"not found: {tmp_path / name}" in message


def test_a_missing_eval_file(try_training, tmp_path):
    code, message = try_training(data__eval=str(tmp_path / "none.jsonl"))
    assert code == 2
    assert f"not found: {tmp_path / 'none.jsonl'}" in message


def test_an_empty_data_file(try_training, tmp_path):
    code, message = try_training(data=write_jsonl(tmp_path / "empty.jsonl", []))
    assert code == 1
    assert message == f"{tmp_path / 'empty.jsonl'} has no rows."


def test_a_half_broken_data_file(try_training, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [GOOD] * 9)
    data.write_text(data.read_text() + '{"instruction": "cut off he')
    code, message = try_training(data=data)
    assert code == 1
    assert "1 row: broken JSON: " in message
    assert f"  {data}:10\n" in message


def test_rows_with_nothing_to_learn(try_training, tmp_path):
    silent = {"messages": [{"role": "user", "content": "Hi"}]}
    spoken = {"messages": [*silent["messages"], {"role": "assistant", "content": "Ho"}]}
    data = write_jsonl(tmp_path / "rows.jsonl", [spoken, silent, spoken, *[silent] * 30])
    code, message = try_training(data=data)
    assert code == 1
    assert message.startswith(f"31 of 33 rows of {data} can't be used:")
    assert message.count("31 rows: no token of this row is supervised") == 1
    assert f"  {data}:2: {silent}\n" in message
    assert message.endswith("To drop such rows, set data.on_bad_row: drop.")


def test_columns_of_no_format(try_training, tmp_path):
    code, message = try_training(data=write_jsonl(tmp_path / "rows.jsonl", [{"question": "?", "answer": "!"}]))
    assert code == 1
    assert "['answer', 'question']" in message
    assert "instruction, [input], output or response" in message


def test_rows_that_are_all_too_long(try_training):
    code, message = try_training(data__max_seq_len=8)
    assert code == 1
    assert "data.max_seq_len is 8" in message
    assert "data.overlong is drop" in message


def test_an_unknown_chat_template(try_training):
    code, message = try_training(data__chat_template="chatlm")
    assert code == 1
    assert "data.chat_template: 'chatlm'" in message
    assert "chatml" in message


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_porj", "'q_porj' matches no linear layer. Did you mean 'q_proj'?"),
        (["q_proj", "banana"], "'banana' matches no linear layer."),
        (["embed_tokens"], "only linear layers can be adapted"),
    ],
    ids=str,
)
def test_a_target_that_is_no_linear(try_training, targets, expected):
    code, message = try_training(lora__targets=targets)
    assert code == 1
    assert f"lora.targets: {expected}" in message or (message.startswith("lora.targets:") and expected in message)


def test_a_base_without_linear_layers():
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.LayerNorm(4))
    with pytest.raises(ModelError, match="Sequential has no linear layer"):
        match_targets(model, "all-linear")


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_a_missing_base(try_training, tmp_path, verb):
    missing = tmp_path / "no" / "base"
    if verb == "train":
        code, message = try_training(base=missing)
    else:
        done = run("generate", missing, "--prompt", "Hi")
        code, message = done.code, done.error()
    assert code == 1
    assert message == f"The model folder {missing} does not exist."


def test_a_base_without_a_config(try_training, base):
    (base / "config.json").unlink()
    code, message = try_training(base=base)
    assert code == 1
    assert f"{base} has no config.json" in message


def test_a_base_without_safetensors(try_training, base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    code, message = try_training(base=base)
    assert code == 1
    assert f"{base} has no *.safetensors" in message


@pytest.mark.parametrize("share", [0, 0.0001, 0.3, 0.999])
def test_a_base_file_that_is_cut_short(try_training, base, share):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    code, message = try_training(base=base)
    assert code == 1
    assert str(path) in message
    assert str(path.stat().st_size) in message
    assert "download it again" in message


def test_a_base_file_that_is_no_safetensors(try_training, base):
    path = base / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    code, message = try_training(base=base)
    assert code == 1
    assert f"{path} is not a safetensors file" in message


def test_a_base_that_lacks_a_shard(try_training, base):
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    code, message = try_training(base=base)
    assert code == 1
    assert "lacks model-1.safetensors" in message


def test_a_base_that_lacks_weights(try_training, base):
    path = base / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    code, message = try_training(base=base)
    assert code == 1
    assert str(base) in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_the_output_directory_of_another_run(config, run_dir, tmp_path):
    before = contents(run_dir)
    data = write_jsonl(tmp_path / "other.jsonl", [GOOD] * 9)
    done = run("train", config, "lora.rank=7", "train.seed=3", "train.max_steps=4", f"data.train={data}")
    assert done.code == 2
    expected = done.error()
    assert str(run_dir) in expected
    assert "train.output_dir" in expected
    assert "lora.rank: 4 → 7" in expected
    assert "train.seed: 0 → 3" in expected
    assert "--fresh" in expected
    assert data.name in expected
    assert "max_steps" not in expected  # a run may be extended
    assert contents(run_dir) == before


def test_a_dry_run_into_the_output_directory_of_another_run(config, run_dir):
    before = contents(run_dir)
    done = run("train", config, "lora.rank=7", "--dry-run")
    assert done.code == 2
    assert "lora.rank: 4 → 7" in done.error()
    assert contents(run_dir) == before


def test_resume_never_on_a_run_that_is_there(config, run_dir):
    before = contents(run_dir)
    done = run("train", config, "--resume", "never")
    assert done.code == 2
    assert "--resume never was replaced by --fresh" in done.error()
    assert contents(run_dir) == before


def test_a_checkpoint_to_resume_from_that_is_not_there(config, run_dir, tmp_path):
    done = run("train", config, "--resume", tmp_path / "step-000007")
    assert done.code == 1
    assert f"--resume {tmp_path / 'step-000007'}" in done.error()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_merge_onto_what_is_there(run_dir, tmp_path, kind):
    folder = tmp_path / "out"
    if kind == "folder":
        folder.mkdir()
    (folder / "mine.txt" if kind == "folder" else folder).write_text("mine")
    before = contents(tmp_path)
    done = run("merge", run_dir, "-o", folder)
    assert done.code == 1
    assert f"{folder} already exists; choose another folder" in done.error()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("verb", ["merge", "quantize"])
def test_a_wrong_size_of_weight_files(tmp_path, verb):
    done = run(verb, tmp_path / "model", "-o", tmp_path / "out", "--max-shard-size", "big")
    assert done.code == 2
    assert "'--max-shard-size': 'big' should be a size such as 5GB" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["merge", "verify"])
def test_a_folder_that_is_not_a_run(tmp_path, verb):
    arguments = ["-o", tmp_path / "out"] if verb == "merge" else [tmp_path]
    done = run(verb, tmp_path / "no-run", *arguments)
    assert done.code == 1
    assert f"{tmp_path / 'no-run'} is not a run, its adapter/ or one of its checkpoints" in done.error()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_merge_onto_another_base_than_was_trained_on(run_dir, own_base, tmp_path, seed, file):
    path = own_base / file
    whole = path.read_bytes()
    if file == "config.json":
        changed = whole.replace(b"{", b"{ ", 1)
    else:
        place = len(whole) - 1 - seed % 30_000
        changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    path.write_bytes(changed)
    try:
        done = run("merge", run_dir, "-o", tmp_path / "out")
    finally:
        path.write_bytes(whole)
    assert done.code == 1
    assert f"{own_base} is not the base used in training: {file} differ" in done.error()
    assert list(tmp_path.iterdir()) == []


def test_a_merge_whose_base_is_gone(run_dir, own_base, tmp_path):
    moved = own_base.rename(own_base.with_name("moved"))
    try:
        done = run("merge", run_dir, "-o", tmp_path / "out")
    finally:
        moved.rename(own_base)
    assert done.code == 1
    assert str(own_base) in done.error()
    assert list(tmp_path.iterdir()) == []


def test_a_merge_of_a_run_whose_record_says_nothing(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    (copy / "run.json").write_text("{}")
    done = run("merge", copy, "-o", tmp_path / "out")
    assert done.code == 1
    assert f"{copy / 'run.json'} lacks versions, " in done.error()
    assert ", status; it was not written by qlora train" in done.error()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_merge_of_a_run_without_an_adapter(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(copy / "adapter")
    done = run("merge", copy, "-o", tmp_path / "out")
    assert done.code == 1
    assert f"{copy / 'adapter'} has no adapter" in done.error()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_verify_of_a_folder_that_merge_did_not_write(run_dir, own_base):
    before = contents(own_base)
    done = run("verify", run_dir, own_base)
    assert done.code == 1
    assert f"{own_base} has no merge_report.json; give a folder that qlora merge wrote" in done.error()
    assert contents(own_base) == before
    done = run("verify", run_dir, own_base / "none")
    assert f"{own_base / 'none'} does not exist; give a folder that qlora merge wrote" in done.error()


@pytest.mark.parametrize("arguments", [
    ["init", "tiny", "-o", "~nobody-here/x.yaml"],
    ["train", "~nobody-here/x.yaml"],
    ["train", "RUN", "--resume", "~nobody-here/checkpoint"],
    ["train", "--replay", "~nobody-here/step"],
    ["merge", "RUN", "-o", "~nobody-here/out"],
    ["verify", "RUN", "~nobody-here/out"],
])  # fmt: skip
def test_a_home_of_a_user_that_is_not_here(arguments, run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*(run_dir if argument == "RUN" else argument for argument in arguments))
    assert done.code == 2
    assert "is in the home of an unknown user" in " ".join(done.err.replace("│", " ").split())
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_an_own_home_that_the_shell_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("init", "tiny", "--output=~/mine.yaml").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("verb", ["generate", "eval", "verify"])
def test_a_device_that_is_not_there(run_dir, own_base, tmp_path, verb):
    rest = {"generate": ["--prompt", "Hi"], "eval": [], "verify": [tmp_path / "out"]}[verb]
    if verb == "verify":
        assert run("merge", run_dir, "-o", tmp_path / "out").code == 0
    done = run(verb, run_dir, *rest, "--device", "banana")
    assert done.code == 1
    assert "Device 'banana' can't be used here: " in done.error()


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """Return an encoder-decoder base, and an adapter made elsewhere for it."""
    folder = tmp_path_factory.mktemp("t5")
    config = T5Config(vocab_size=259, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    T5ForConditionalGeneration(config).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    layer = "base_model.model.encoder.block.0.layer.0.SelfAttention.q"
    factors = {f"{layer}.lora_A.weight": torch.zeros(2, 16), f"{layer}.lora_B.weight": torch.zeros(16, 2)}
    (folder / "adapter").mkdir()
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    settings["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("verb", ["train", "dry-run", "estimate", "eval", "generate", "quantize", "merge", "verify"])
def test_a_base_that_is_not_decoder_only_gets_the_same_sentence_from_every_verb(t5, alpaca_file, tmp_path, verb):
    base, config = t5 / "base", run_config(t5 / "base", alpaca_file, tmp_path / "run")
    arguments = {
        "train": ["train", config],
        "dry-run": ["train", config, "--dry-run"],
        "estimate": ["estimate", config],
        "eval": ["eval", config],
        "generate": ["generate", base, "--prompt", "Hi"],
        "quantize": ["quantize", base, "-o", tmp_path / "out"],
        "merge": ["merge", t5 / "adapter", "-o", tmp_path / "out"],
        "verify": ["verify", t5 / "adapter"],
    }[verb]
    done = run(*arguments)
    assert done.code == 1
    assert done.error() == (
        f"{base} is an encoder-decoder model (t5), but only decoder-only models are supported; set model.base to one, "
        "such as Llama, Mistral, Qwen or Gemma."
    )
