"""Folders of models and adapters as attacks: no code run, nothing read from elsewhere, no memory taken unchecked."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.checkpoint import read_adapter, read_adapter_config
from qlora.errors import CheckpointError, ModelError
from qlora.files import BaseFiles
from qlora.files.headers import read_header
from qlora.model import build_skeleton, load_base, load_tokenizer
from tests.cli import run

PACKAGE = Path(__file__).parents[1] / "qlora"
OWN_CODE = "import pathlib\npathlib.Path({marker!r}).touch()\n"
# A class of its own, as transformers marks those that it loads for whatever is saved later.
OWN = "from transformers import {parent}\nclass {name}({parent}): pass\n"
FACTORS = [f"base_model.model.model.layers.0.mlp.up_proj.lora_{factor}.weight" for factor in "AB"]


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mknod, (str(self.marker),)


@pytest.fixture
def base(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture
def marker(tmp_path):
    """Return the file that code creates if it is run."""
    return tmp_path / "was-run"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_header(path, header, data=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)
    return path


def entry(shape, first, last, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


# Code.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl"])
def test_pickled_weights_are_named_and_not_read(base, marker, name):
    (base / "model.safetensors").unlink()
    (base / name).write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(ModelError, match=rf"pickled weights are not read.*{name}.*safetensors"):
        load_base(str(base))
    assert not marker.exists()


def test_a_pickled_adapter_is_named_and_not_read(tmp_path, marker):
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing; pickled.*adapter_model\.bin"):
        read_adapter(tmp_path)
    assert not marker.exists()


def test_pickles_next_to_a_model_are_ignored(base, marker):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (base / name).write_bytes(pickle.dumps(Touch(marker)))
    load_base(str(base))
    assert not marker.exists()
    pickle.loads((base / "optimizer.pt").read_bytes())
    assert marker.exists()


@pytest.fixture
def own_code(base, marker):
    """Return a base whose architecture and tokenizer are Python files in its folder."""
    body = OWN_CODE.format(marker=str(marker))
    (base / "own.py").write_text(body + OWN.format(parent="LlamaConfig", name="Own"))
    (base / "own_tokens.py").write_text(body + OWN.format(parent="PreTrainedTokenizerFast", name="OwnTokens"))
    change(
        base / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.Own"},
    )
    change(
        base / "tokenizer_config.json", tokenizer_class="OwnTokens",
        auto_map={"AutoTokenizer": ["own_tokens.OwnTokens", "own_tokens.OwnTokens"]},
    )  # fmt: skip
    return base


@pytest.mark.parametrize("verb", ["quantize", "generate"])
def test_code_of_a_model_is_not_run_even_if_standard_input_says_yes(own_code, marker, tmp_path, verb):
    rest = {"quantize": ["-o", tmp_path / "out"], "generate": ["--prompt", "a"]}[verb]
    done = run(verb, own_code, *rest, stdin="y\ny\ny\n")
    assert done.code == 1
    assert "model.trust_remote_code" in done.error()
    assert not marker.exists()


def test_code_of_a_tokenizer_is_run_only_where_it_is_trusted(own_code, marker):
    with pytest.raises(ModelError, match=r"code of its own.*model\.trust_remote_code: true"):
        load_tokenizer(own_code)
    assert not marker.exists()
    load_tokenizer(own_code, trust_remote_code=True)
    assert marker.exists()


def test_every_loader_of_transformers_is_passed_whether_code_may_be_run():
    """By default it asks on the terminal."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of_auto = isinstance(node.func.value, ast.Name) and node.func.value.id.startswith("Auto")
                if of_auto and node.func.attr in ("from_pretrained", "from_config") and "Hf" not in node.func.value.id:
                    assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, path


def test_nothing_here_unpickles_or_evaluates_text():
    for path in PACKAGE.rglob("*.py"):
        called = {
            ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        }
        assert not called & {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "yaml.load", "os.system"}, (
            path
        )


@pytest.mark.parametrize("section", [{}, {"text_config": {}}])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_that_asks_for_a_kernel_of_the_hub_is_refused(base, key, section):
    asked = {key: "someone/kernel"}
    change(base / "config.json", **({"text_config": asked} if section else asked))
    with pytest.raises(ModelError, match=rf"code from the hub, {key}: 'someone/kernel'"):
        load_base(str(base))


# Places.


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/hostname", "sub/a.safetensors", "pytorch_model.bin", "..", "", 7, None]
)
def test_an_index_names_weight_files_of_its_folder_alone(base, name):
    shutil.copy(base / "model.safetensors", base.parent / "other.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"index\.json names .*not a \*\.safetensors of its folder"):
        BaseFiles.resolve(str(base))


@pytest.mark.parametrize(
    "name", ["LICENSE", "model.safetensors", "tokenizer.json", "additional_chat_templates/x.jinja"]
)
def test_a_link_out_of_a_model_is_refused_as_it_would_be_released(base, tmp_path, name):
    (tmp_path / "secret").write_text("mine")
    path = base / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to("../" * len(Path(name).parts) + "secret")
    with pytest.raises(ModelError, match=r"is a link to .*secret, outside of .*replace it by the file"):
        BaseFiles.resolve(str(base))


def test_links_within_a_model_or_of_the_hubs_cache_are_followed(base, tmp_path):
    (base / "LICENSE").symlink_to("config.json")
    assert BaseFiles.resolve(str(base)).config
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (snapshot.parents[1] / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shared = shutil.copytree(base, tmp_path / "shared")  # one store of blobs for several caches
    for path in base.iterdir():
        (snapshot.parents[1] / "blobs" / path.name).symlink_to(shared / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert BaseFiles.resolve(str(snapshot)).tensors.keys() == BaseFiles.resolve(str(base)).tensors.keys()
    assert BaseFiles.resolve(str(snapshot)).commit == "0123"


# Sizes.


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([1 << 40], 0, 1 << 42)},
        {"a": entry([2], -8, 0)},
        {"a": entry([2], 0, 8), "b": entry([2], 4, 12)},
        {"a": entry([2], 0, 8), "b": entry([2], 12, 20)},
        {"a": entry([2], 0, 16, "F16")},
        {"a": entry([2], 0, 8, "F128")},
        {"a": entry([2.0], 0, 8)},
        {"a": entry([True, 2], 0, 8)},
        {"a": entry([-1, -2], 0, 8)},
        {"a": entry([1 << 62, 0], 0, 0)},
        {"a": entry([1] * 99, 0, 4)},
        {"a": entry("22", 0, 8)},
        {"a": [], "b": 3},
        {"__metadata__": {"a": 1}},
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"a": ' + b"9" * 9000 + b"}",
        b'{"\\ud800": {}}',
        b"\xff\xfe{}",
    ],
    ids=lambda header: str(header)[:40],
)
def test_a_header_that_lies_is_refused_before_any_room_is_made(tmp_path, header):
    path = write_header(tmp_path / "model.safetensors", header, bytes(20))
    with pytest.raises(ModelError, match=r"model\.safetensors has .*download it again"):
        read_header(path)


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate(9 + (1 << 40))  # a sparse file
    with pytest.raises(ModelError, match="damaged header"):
        read_header(path)


def test_what_safetensors_writes_is_read(tmp_path, generator):
    tensors = {"a": torch.rand(3, 5, generator=generator), "b": torch.zeros(0, 7), "c": torch.tensor(3).half()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "model.safetensors")
    assert {name: tuple(value["shape"]) for name, value in header.items()} == {
        name: tuple(value.shape) for name, value in tensors.items()
    }


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"num_local_experts": 10**9},
        {"hidden_size": 10**9},
        {"vocab_size": 10**9},
        {"intermediate_size": 10**18},
        {"num_attention_heads": 0},
        {"head_dim": -1},
        {"num_hidden_layers": "x"},
        {"rope_parameters": []},
    ],
    ids=str,
)
def test_a_config_of_sizes_that_the_files_have_not_is_refused(base, values):
    change(base / "config.json", **values)
    with pytest.raises(ModelError, match=str(base)):
        load_base(str(base))


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"a":' * 9999 + "1" + "}" * 9999, '{"a": ' + "9" * 9999 + "}"])
def test_a_config_that_is_no_object_is_refused_by_its_name(base, text):
    (base / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json is damaged; download it again"):
        BaseFiles.resolve(str(base))


def test_a_config_of_many_layers_takes_no_memory_before_it_is_refused(base):
    """Memory is allocated only for as many layers as the files have weights for."""
    change(base / "config.json", num_hidden_layers=60)
    build_skeleton(BaseFiles.resolve(str(base)))
    with pytest.raises(ModelError, match=r"config\.json describes [\d,]+ parameters, but the files hold [\d,]+"):
        load_base(str(base))


@pytest.mark.parametrize(
    "values",
    [
        {"r": 10**9}, {"r": 0}, {"r": True}, {"r": "4"}, {"r": 10**400}, {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400}, {"lora_alpha": None}, {"rank_pattern": {"(": 3}}, {"rank_pattern": {"a": 0}},
        {"alpha_pattern": 3}, {"target_modules": "("}, {"target_modules": 3},
    ],
    ids=str,
)  # fmt: skip
def test_an_adapters_config_without_a_scale_is_refused(tmp_path, values):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8} | values))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [([(4, 64), (172, 5)], torch.float32), ([(4, 64, 1), (172, 4)], torch.float32), ([(4, 64), (172, 4)], torch.int32)],
    ids=str,
)
def test_factors_that_are_none_are_refused(tmp_path, shapes, dtype):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    tensors = {name: torch.ones(shape, dtype=dtype) for name, shape in zip(FACTORS, shapes, strict=True)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == set(FACTORS)
    with pytest.raises(CheckpointError, match=r"up_proj.* (is not a LoRA factor|has factors)"):
        read_adapter(tmp_path)
