"""Shards: safetensors and transformers read them back, and their size is limited."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora.config import load_config
from qlora.export import merge
from qlora.files.shards import ShardWriter, TensorLayout
from qlora.training import train
from tests.tiny import run_config


@pytest.fixture
def tensors(generator):
    shapes = {"a": (7, 3), "b": (5,), "c": (), "d": (40, 10), "e": (2, 3, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder, tensors, dtype, max_bytes):
    layout = [TensorLayout(name, tuple(value.shape), dtype) for name, value in tensors.items()]
    writer = ShardWriter(folder, layout, max_bytes)
    for entry in list(writer.remaining):
        writer.write(entry.name, tensors[entry.name].to(dtype))
    writer.close()
    return writer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_safetensors_reads_back_every_bit(dtype, tensors, tmp_path):
    writer = write(tmp_path, tensors, dtype, 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value.to(dtype))
    assert writer.num_bytes == sum(value.nbytes for value in found.values())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("max_bytes", [1, 100, 200, 1700, 1800])
def test_no_file_exceeds_the_limit_except_for_a_single_tensor(max_bytes, tensors, tmp_path):
    writer = write(tmp_path, tensors, torch.float32, max_bytes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        part = load_file(path)
        assert part
        assert len(part) == 1 or sum(value.nbytes for value in part.values()) <= max_bytes
        assert all(index["weight_map"][name] == path.name for name in part)
        found |= part
    assert found.keys() == index["weight_map"].keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    count = len(list(tmp_path.glob("*.safetensors")))
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    }
    assert index["metadata"]["total_size"] == writer.num_bytes


def test_tensors_with_other_strides_are_written_in_order(tmp_path, generator):
    value = torch.randn(6, 4, generator=generator).T
    write(tmp_path, {"transposed": value}, torch.float32, 10**9)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["transposed"], value)


def test_an_order_or_dtype_that_contradicts_the_layout_fails(tmp_path):
    layout = [TensorLayout(name, (2,), torch.float16) for name in "ab"]
    writer = ShardWriter(tmp_path, layout, 100)
    with pytest.raises(AssertionError, match="b instead of .*'a'"):
        writer.write("b", torch.zeros(2, dtype=torch.float16))
    with pytest.raises(AssertionError, match="float32"):
        ShardWriter(tmp_path, layout, 100).write("a", torch.zeros(2))


def layout_of(tensors):
    return [TensorLayout(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_writing_blocks_of_rows_gives_the_same_file(tensors, tmp_path):
    for name in ("whole", "blocks"):
        (tmp_path / name).mkdir()
    write(tmp_path / "whole", tensors, torch.float32, 10**9)
    writer = ShardWriter(tmp_path / "blocks", layout_of(tensors), 10**9)
    for name, value in tensors.items():
        writer.write_blocks(name, value.split(2) if value.dim() else [value])
    writer.close()
    assert contents(tmp_path / "blocks") == contents(tmp_path / "whole")


def test_missing_rows_fail(tmp_path):
    writer = ShardWriter(tmp_path, [TensorLayout("a", (4,), torch.float32)], 100)
    with pytest.raises(AssertionError, match="8 bytes for .*'a'"):
        writer.write_blocks("a", [torch.zeros(2)])


@pytest.mark.parametrize("max_bytes", [100, 1700, 10**9])
def test_files_of_an_interrupted_writer_are_resumed(max_bytes, tensors, tmp_path, seed):
    write(tmp_path, tensors, torch.float32, max_bytes)
    expected = contents(tmp_path)
    weight_files = sorted(path for path in tmp_path.iterdir() if path.suffix == ".safetensors")
    draw = random.Random(seed)
    for _ in range(20):
        for path in tmp_path.iterdir():
            path.unlink()
        num_whole = draw.randrange(len(weight_files))
        for path in weight_files[:num_whole]:
            path.write_bytes(expected[path.name])
        cut = weight_files[num_whole]
        cut.write_bytes(expected[cut.name][: draw.randrange(len(expected[cut.name]))])
        size_left = sum(path.stat().st_size for path in tmp_path.iterdir())
        writer = ShardWriter(tmp_path, layout_of(tensors), max_bytes)
        num_left = sum(tensor.num_bytes for tensor in writer.remaining)
        assert writer.num_bytes - num_left <= size_left
        # Only the truncated tensor is written again.
        assert size_left < writer.num_bytes - num_left + writer.remaining[0].num_bytes + 2000
        assert [entry.name for entry in writer.remaining] == list(tensors)[-len(writer.remaining) :]
        for entry in list(writer.remaining):
            writer.write(entry.name, tensors[entry.name])
        writer.close()
        assert contents(tmp_path) == expected


def test_a_file_of_another_layout_is_rewritten(tensors, tmp_path):
    write(tmp_path, tensors, torch.float32, 10**9)
    expected = contents(tmp_path)
    other = {"z": torch.zeros(7), **tensors}
    write(tmp_path, other, torch.float32, 10**9)
    assert ShardWriter(tmp_path, layout_of(tensors), 10**9).remaining == layout_of(tensors)
    write(tmp_path, tensors, torch.float32, 10**9)
    assert contents(tmp_path) == expected


def test_a_sharded_model_equals_the_unsharded_one(tiny_base, alpaca_file, tmp_path):
    train(load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=2, data__eval=None)))
    merge(tmp_path / "run", tmp_path / "one")
    merge(tmp_path / "run", tmp_path / "several", max_shard_size="60KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "several").glob("*.safetensors"))) >= 4
    models = []
    for name in ("one", "several"):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        models.append(model.state_dict())
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
