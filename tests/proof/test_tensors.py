"""Bounds of the comparison of tensors, and updates that are smaller than the steps of a format."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora.nf4 import dequantize, quantize
from qlora.proof.gguf import GGUFFile
from qlora.proof.tensors import check_tensors, spacing

INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_spacing_is_the_distance_to_the_next_number(dtype, generator):
    """Compare with the number that has the next bits, which is the next one in magnitude."""
    exponents = torch.randint(-20, 15, (2000,), generator=generator)
    values = torch.ldexp(torch.randn(2000, generator=generator), exponents).to(dtype)
    info = torch.finfo(dtype)
    values = torch.cat([values, torch.tensor([0.0, 1.0, -1.0, info.tiny, info.tiny / 2, info.max / 2], dtype=dtype)])
    following = (values.view(INTEGERS[dtype]) + 1).view(dtype)
    expected = following.double().abs() - values.double().abs()
    assert torch.equal(spacing(values.double(), dtype), expected)


class Merge:
    """The expected weights of one layer, an update on a base."""

    names, unplaced = ("model.layers.0.mlp.up_proj.weight",), ()

    def __init__(self, weight: torch.Tensor, update: torch.Tensor) -> None:
        self.weight, self.added = weight, update

    def has_trained_rows(self, _: str) -> bool:
        return False

    def is_adapted(self, _: str) -> bool:
        return True

    def base(self, _: str) -> torch.Tensor:
        return self.weight

    def shape(self, _: str, base: torch.Tensor) -> tuple[int, ...]:
        return tuple(base.shape)

    def rows(self, _: str, rows: slice, base: torch.Tensor) -> torch.Tensor:
        return base[rows].double()

    def update(self, _: str, rows: slice, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        update = self.added[rows].double()
        return update, (update.abs() + base[rows].abs()) * 2.0**-20


def find_problems(merge: Any, values: torch.Tensor, kind: str, path: Path, dtype: str | None = None) -> list[str]:
    """Write values as a GGUF file of one tensor, and compare it with a merge in a dtype, by default that kind."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    stored = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quants.quantize(values.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = SimpleNamespace(model_type="llama", head_dim=16, hidden_size=64, num_attention_heads=4)
    return check_tensors(merge, GGUFFile(path, {merge.names[0]: merge.names[0]}, dtype or kind, config)).problems


@pytest.mark.parametrize("kind", ["q8_0", "q5_0", "q4_0"])
@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_small_updates_are_neither_missed_nor_suspected_in_few_bits(
    onto: str, kind: str, tmp_path: Path, generator: torch.Generator
) -> None:
    """The codes of NF4 lie where Q4_0 rounds up or down, so that small updates onto them are lost or enlarged."""
    base = torch.randn(256, 512, generator=generator) * 0.02
    if onto == "dequantized":
        base = dequantize(*quantize(base), torch.bfloat16).float()
    for size in (1e-8, 1e-6, 1e-5, 1e-4):
        update = torch.randn(256, 4, generator=generator) @ torch.randn(4, 512, generator=generator)
        update *= size / update.std()
        merge = Merge(base, update)
        assert find_problems(merge, base + update, kind, tmp_path / "right") == []
        for factor in (0, -1, 3) if size >= 1e-5 else ():
            wrong = find_problems(merge, base + factor * update, kind, tmp_path / "wrong")
            assert len(wrong) == 1, (size, factor)
    # Of this one, only a few values in a thousand are rounded to other integers.
    assert find_problems(Merge(base, update * 1e-2), base, "q8_0", tmp_path / "wrong")


@pytest.mark.parametrize("kind", ["q8_0", "q5_0"])
def test_blocks_in_a_file_of_k_quants_are_those_of_values_in_fp16(
    kind: str, tmp_path: Path, generator: torch.Generator
) -> None:
    """llama.cpp makes the file from one in fp16, whose rounding adds to that of the blocks."""
    base, update = torch.randn(512, 512, generator=generator) * 0.02, torch.randn(512, 512, generator=generator) * 1e-4
    values = (base + update).half().float()
    assert find_problems(Merge(base, update), values, kind, tmp_path / "right", "q4_k_m") == []
    assert find_problems(Merge(base, update), values - update, kind, tmp_path / "wrong", "q4_k_m")
