"""A base's files: incomplete ones are refused, and their fingerprint identifies them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.files.headers import read_header

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture
def sharded(base):
    """The base, stored in two files with an index."""
    tensors = load_file(base / WEIGHTS)
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (base / WEIGHTS).unlink()
    (base / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return base


def test_a_header_names_shapes_and_dtypes(base):
    tensors = load_file(base / WEIGHTS)
    header = read_header(base / WEIGHTS)
    assert {name: entry["shape"] for name, entry in header.items()} == {
        name: list(value.shape) for name, value in tensors.items()
    }
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}


@pytest.mark.parametrize("change", [
    lambda content: b"",
    lambda content: content[:7],
    lambda content: content[:200],
    lambda content: content[:-1],
    lambda content: content + b"\0",
    lambda content: content[:8] + b"}" + content[9:],
    lambda content: b"\xff" * 8 + content[8:],
    lambda content: b"PK\x03\x04 this is a pickle in a zip archive",
])  # fmt: skip
def test_a_damaged_file_is_refused_by_its_name(change, base):
    path = base / WEIGHTS
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ModelError, match=r"model\.safetensors.* download it again"):
        read_header(path)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        BaseFiles.resolve(str(base))


def test_all_tensors_are_found_in_one_file_or_several(base, request):
    one = BaseFiles.resolve(str(base)).tensors
    assert set(one) == set(load_file(base / WEIGHTS))
    assert {path.name for path in one.values()} == {WEIGHTS}
    several = BaseFiles.resolve(str(request.getfixturevalue("sharded"))).tensors
    assert several.keys() == one.keys()
    assert all(name in load_file(path) for name, path in several.items())
    assert len(set(several.values())) == 2


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors, which its index names"):
        BaseFiles.resolve(str(sharded))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}'])
def test_a_damaged_index_is_named(text, sharded):
    (sharded / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is damaged; download it again"):
        BaseFiles.resolve(str(sharded))


def test_a_truncated_shard_is_reported(sharded):
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors has \d+ bytes"):
        BaseFiles.resolve(str(sharded))


def test_a_folder_without_config_or_weights_is_refused(base):
    (base / WEIGHTS).rename(base / "elsewhere")
    with pytest.raises(ModelError, match="no \\*\\.safetensors"):
        BaseFiles.resolve(str(base))
    (base / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        BaseFiles.resolve(str(base))


def test_has_weights_requires_all_files(sharded):
    assert BaseFiles.resolve(str(sharded)).has_weights
    (sharded / "model-00002-of-00002.safetensors").unlink()
    files = BaseFiles.resolve(str(sharded), with_weights=False)
    assert not files.has_weights
    assert files.config["model_type"] == "llama"


def test_a_damaged_gguf_file_is_refused_by_its_name(base):
    pytest.importorskip("gguf")
    (base / WEIGHTS).rename(base / "model.gguf")
    for path in (base, base / "model.gguf"):
        with pytest.raises(ModelError, match=rf"^{base}/model\.gguf is truncated or damaged"):
            BaseFiles.resolve(str(path))


def test_one_of_several_gguf_files_has_to_be_named(base):
    (base / WEIGHTS).rename(base / "a.gguf")
    shutil.copy(base / "a.gguf", base / "b.gguf")
    with pytest.raises(ModelError, match=r"2 GGUF files \(a\.gguf, b\.gguf\); name one of them in model\.base"):
        BaseFiles.resolve(str(base))


def fingerprint(base):
    return BaseFiles.resolve(str(base)).fingerprint()


def test_a_copy_has_the_same_fingerprint(base, tmp_path):
    assert fingerprint(base) == fingerprint(shutil.copytree(base, tmp_path / "copy"))
    assert fingerprint(base).keys() == {"config.json", WEIGHTS}


def test_a_changed_config_changes_only_its_hash(base):
    before = fingerprint(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    after = fingerprint(base)
    assert after["config.json"] != before["config.json"]
    assert after[WEIGHTS] == before[WEIGHTS]


def test_a_changed_weight_changes_the_hash_of_its_file(base, seed):
    """The samples cover all of a small file, so any byte counts."""
    before = fingerprint(base)
    content = bytearray((base / WEIGHTS).read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    content[data + seed % (len(content) - data)] ^= 1
    (base / WEIGHTS).write_bytes(content)
    after = fingerprint(base)
    assert after[WEIGHTS] != before[WEIGHTS]
    assert after["config.json"] == before["config.json"]


def test_a_changed_header_changes_the_hash_of_its_file(base):
    before = fingerprint(base)
    content = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(content.replace(b"layers.0.mlp.up_proj", b"layers.9.mlp.up_proj", 1))
    assert fingerprint(base)[WEIGHTS] != before[WEIGHTS]


def test_a_fine_tuned_tensor_changes_the_hash_of_a_large_sampled_file(base, generator):
    """A fine-tune changes whole tensors, and the samples of a large file are close enough to hit each of them."""
    hashes = set()
    tensors = {f"weight{index}": torch.randn(512, 1024, generator=generator) for index in range(8)}
    for changed in (None, *tensors):
        values = {name: value + 1e-3 if name == changed else value for name, value in tensors.items()}
        save_file(values, base / WEIGHTS)
        hashes.add(fingerprint(base)[WEIGHTS])
    assert (base / WEIGHTS).stat().st_size > 64 * 65536
    assert len(hashes) == 9


def test_parts_without_an_index_have_to_be_complete_and_of_one_model(sharded):
    (sharded / f"{WEIGHTS}.index.json").unlink()
    assert len(BaseFiles.resolve(str(sharded)).weight_files) == 2
    first, second = (sharded / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    shutil.copy(second, sharded / "other.safetensors")
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors and other\.safetensors both hold"):
        BaseFiles.resolve(str(sharded))
    (sharded / "other.safetensors").unlink()
    first.unlink()
    assert not BaseFiles.resolve(str(sharded), with_weights=False).has_weights
    with pytest.raises(ModelError, match=rf"lacks {first.name}, a part of the same model; download it again"):
        BaseFiles.resolve(str(sharded))
