"""Stored tensors: rows of every shape and dtype are read as safetensors reads them."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from qlora.errors import ExportError
from qlora.files.headers import read_header
from qlora.files.stored import DTYPES, LazyTensor, StoredTensors, row_blocks


@pytest.fixture
def tensors(generator):
    floats = {
        str(dtype): torch.randn(37, 5, 3, generator=generator).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    }
    whole = {"ints": torch.randint(-(2**40), 2**40, (9,), generator=generator), "bytes": torch.arange(7).byte()}
    return floats | whole | {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "flags": torch.rand(6) < 0.5}


@pytest.fixture
def stored(tensors, tmp_path):
    """The tensors, stored in two files."""
    names = sorted(tensors)
    parts = {tmp_path / "a": names[::2], tmp_path / "b": names[1::2]}
    for path, part in parts.items():
        save_file({name: tensors[name] for name in part}, path)
    return StoredTensors({path: read_header(path) for path in parts})


def test_whole_tensors_are_read_bit_for_bit_in_any_order(stored, tensors, seed):
    names = [*tensors, *tensors]
    random.Random(seed).shuffle(names)
    for name in names:
        found = stored.read(name)
        assert found.dtype == stored.dtype(name) == tensors[name].dtype
        assert found.shape == stored.shape(name)
        assert torch.equal(found, tensors[name]), name


def test_blocks_of_rows_make_up_the_tensor(stored, tensors):
    for name, tensor in tensors.items():
        for block_numel in (1, 16, 47, 10**6):
            blocks = [stored.read(name, rows) for rows in row_blocks(stored.shape(name), block_numel)]
            assert all(block.numel() <= max(block_numel, tensor[:1].numel() if tensor.dim() else 1) for block in blocks)
            found = torch.cat(blocks) if tensor.numel() > 1 else blocks[0] if blocks else torch.zeros(0, 4)
            assert torch.equal(found, tensor), (name, block_numel)


def test_threads_may_read_at_the_same_time(stored, tensors):
    names = [*tensors] * 50
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(stored.read, names))
    assert all(torch.equal(each, tensors[name]) for name, each in zip(names, found, strict=True))


def test_a_lazy_tensor_is_read_when_it_is_indexed(stored, tensors):
    lazy = {name: LazyTensor(stored, name) for name in stored}
    assert lazy.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert lazy[name].get_shape() == list(tensor.shape)
        assert DTYPES[lazy[name].get_dtype()] == tensor.dtype
        assert torch.equal(lazy[name][...], tensor), name


def test_a_file_truncated_meanwhile_is_reported_with_the_tensor(tmp_path, generator):
    path = tmp_path / "file"
    save_file({"a": torch.randn(8, 2, generator=generator), "b": torch.randn(8, 2, generator=generator)}, path)
    stored = StoredTensors({path: read_header(path)})
    path.write_bytes(path.read_bytes()[:-4])
    assert stored.read("b", slice(0, 7)).shape == (7, 2)
    with pytest.raises(ExportError, match=f"{path} ends within b"):
        stored.read("b")


def test_an_unsupported_dtype_is_reported_with_the_tensor(tmp_path):
    path = tmp_path / "file"
    save_file({"small": torch.zeros(4).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ExportError, match="small is in F8_E4M3; supported are F16"):
        StoredTensors({path: read_header(path)}).read("small")
